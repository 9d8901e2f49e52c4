"""The online tracker on crowds, without a network; and the scores of a long film.

    python benchmarks/tracking.py [--people 200] [--frames 150] [--features 128]

People stand and walk on a square, seen from above in 4K; a twentieth of them is missed in each frame. Demanded: 30 frames a
second with 200 people and features, of one thread's processor time.
"""
import argparse
import time

import numpy as np
import torch

from reidlit.data.readers.mot import MotBoxes
from reidlit.detection.detectors import Detections
from reidlit.detection.online_tracker import OnlineTracker
from reidlit.metrics.tracking import tracking_scores


def crowd(people, frames, features, seed=0):
    "For each frame: `Detections`, features, and who they are."
    r = np.random.default_rng(seed)
    xy, v, looks = r.uniform(0, (3840, 2160), (people, 2)), r.normal(0, 3, (people, 2)), r.normal(size=(people, features))
    for _ in range(frames):
        xy = xy+v
        here = np.flatnonzero(r.random(people) > .05)
        box = np.c_[xy, xy+[40, 100]][here]+r.normal(0, 2, (len(here), 4))
        yield (Detections(box, r.uniform(.5, 1, len(here))),
               looks[here]+.3*r.normal(size=(len(here), features)), here)


def run(film, with_looks):
    "Processor seconds of `update`, and the MOT tables of truth and tracks."
    t, seconds, truth, found = OnlineTracker(), 0., [], []
    for k, (d, f, who) in enumerate(film, 1):
        start = time.process_time()
        o = t.update(d, f if with_looks else None)
        seconds += time.process_time()-start
        truth.append((np.full(len(d), k), who+1, d.xyxy))
        found.append((np.full(len(o), k), o.ids, o.xyxy))
    return seconds, *(MotBoxes(*(np.concatenate(c) for c in zip(*rows))) for rows in (truth, found))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--people', type=int, default=200)
    p.add_argument('--frames', type=int, default=150)
    p.add_argument('--features', type=int, default=128)
    a = p.parse_args()
    torch.set_num_threads(1)
    print('| people | names by | frames a second | IDF1 |\n|---|---|---|---|')
    for people in (20, a.people):
        film = list(crowd(people, a.frames, a.features))
        for with_looks in (False, True):
            seconds, truth, found = run(film, with_looks)
            start = time.process_time()
            s = tracking_scores(truth, found)
            scoring = time.process_time()-start
            print(f"| {people} | {'place and looks' if with_looks else 'place'} | {a.frames/seconds:.0f} | {s.idf1:.3f} |")
    print(f'\nscores of {len(truth):,} boxes: {scoring:.1f} s; demanded: 30 frames a second in the last row, '
          f'measured {a.frames/seconds:.0f}')


if __name__ == '__main__': main()
