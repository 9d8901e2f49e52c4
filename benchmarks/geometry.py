"""Undistortion and triangulation beside OpenCV's.

    python benchmarks/geometry.py [--points 20000] [--rounds 20]

`undistort` answers to 1e-9 focal lengths; OpenCV iterates until it is as near (20 steps and 1e-12; its default, 5 steps,
is off by a tenth of a pixel). `triangulate` takes two views with a pixel of noise; it solves twice and returns errors in
pixels as well. The long lens: four cameras, focal lengths 500 and 3000, 2 pixels of noise; the mean error in metres
beside OpenCV's own rule (linear, not weighted, first two cameras) and scipy's least squares in pixels. One thread, in
turn, the best round of each. Demanded: undistortion at most 1.5 times OpenCV, the long lens within 2 % of least squares.
"""
import os
for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'
import argparse
import time

import cv2
import numpy as np
from scipy.optimize import least_squares

from reidlit.geometry import Camera, triangulate


def best_of(rounds, *functions):
    "Least milliseconds of each, run in turn."
    best = [np.inf]*len(functions)
    for r in range(rounds+1):
        for i, f in enumerate(functions):
            t = time.perf_counter()
            f()
            if r: best[i] = min(best[i], (time.perf_counter()-t)*1e3)
    return best


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--points', type=int, default=20000)
    p.add_argument('--rounds', type=int, default=20)
    a = p.parse_args()
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    print(f'{a.points} points, best of {a.rounds}\n\n| | ours, ms | OpenCV, ms | ratio | ours off by | OpenCV off by |\n'
          '|---|---|---|---|---|---|')
    for dist in ((-.3, .1, 1e-3, -1e-3), (-.2, .05, 1e-3, 1e-3, .01, .1, .02, .001)):
        c = Camera.look_at((8, 0, 3), (0, 0, 1), (1920, 1080), fov=60, dist=dist)
        x = rng.uniform(0, 1, (a.points, 2))*[1920, 1080]
        ours = lambda: c.undistort(x)
        peer = lambda: cv2.undistortPoints(x[:, None], c.K, c.dist, P=c.K, criteria=(3, 20, 1e-12))[:, 0]
        o, q = best_of(a.rounds, ours, peer)
        off = [abs(c.distort(f())-x).max() for f in (ours, peer)]
        print(f'| undistort, {len(dist)} coefficients | {o:.2f} | {q:.2f} | {o/q:.2f} | {off[0]:.0e} px | {off[1]:.0e} px |')
    cams = [Camera.look_at(p, (0, 0, 1), (1920, 1080), fov=60) for p in ((8, 0, 3), (0, 8, 3))]
    X = rng.normal(0, 1.5, (a.points, 3))
    x = np.stack([c.project(X)[0] for c in cams])+rng.normal(0, 1, (2, a.points, 2))
    ours = lambda: triangulate(cams, x)[0]
    peer = lambda: (h := cv2.triangulatePoints(*[c.P for c in cams], x[0].T, x[1].T))[:3].T/h[3:].T
    o, q = best_of(a.rounds, ours, peer)
    off = [np.linalg.norm(f()-X, axis=1).mean() for f in (ours, peer)]
    print(f'| triangulate, two views | {o:.2f} | {q:.2f} | {o/q:.2f} | {off[0]:.4f} m | {off[1]:.4f} m |')

    places = ((6, 0, 3), (0, 6, 3), (-6, 0, 3), (30, 30, 4))
    cams = [Camera.look_at(p, (0, 0, 1), (1920, 1080), focal=f) for p, f in zip(places, (500, 500, 500, 3000))]
    X = rng.normal(0, 1, (300, 3))+[0, 0, 1]
    x = np.stack([c.project(X)[0] for c in cams])+rng.normal(0, 2, (4, 300, 2))
    miss = lambda p, i: np.ravel([c.project(p)[0]-q[i] for c, q in zip(cams, x)])
    least = np.stack([least_squares(miss, X[i], args=(i,)).x for i in range(len(X))])
    h = cv2.triangulatePoints(*[c.P for c in cams[:2]], x[0].T, x[1].T)
    off = [np.linalg.norm(q-X, axis=1).mean() for q in (triangulate(cams, x)[0], least, (h[:3]/h[3]).T)]
    print(f'\nlong lens: ours {off[0]:.4f} m, least squares {off[1]:.4f} m, OpenCV from two {off[2]:.4f} m')


if __name__ == '__main__': main()
