"""How fast the embedded world is drawn, on one core: `OMP_NUM_THREADS=1 python benchmarks/world.py`.

Process time, best of three, so that other processes disturb little.
"""
import time

import cv2

from reidlit.data.world import World


def best(f, n=3):
    "Least process time in seconds of `n` calls, and what the last one returned."
    least = float('inf')
    for _ in range(n):
        start = time.process_time()
        out = f()
        least = min(least, time.process_time() - start)
    return least, out


if __name__ == '__main__':
    cv2.setNumThreads(1)
    seconds, world = best(World)
    print(f'build, 200 people and 6 cameras: {seconds:.2f} s')
    for camera in range(6): world.frame(camera, 0)
    seconds, frames = best(lambda: [world.frame(c, t) for c in range(6) for t in (100, 200)])
    print(f'frames of 480x270, 20 people: {len(frames)/seconds:.0f} a second')
    seconds, boxes = best(lambda: [world.boxes(c, 100) for c in range(6)])
    print(f'frames with boxes: {len(boxes)/seconds:.0f} a second')
    seconds, crops = best(lambda: world.crops('val'))
    print(f'crops of 64x32: {len(crops)/seconds:.0f} a second')
