"""PointID's dense contrastive loss beside its floor, four lines of autograd, the queue, and the making of views.

    python benchmarks/contrastive.py [--threads 1] [--rounds 5] [--points 2000] [--queue 32768] [--dim 256] [--device cpu]

A step is the loss and its gradient. Its floor are two products, points @ queue.T and weights @ queue. All run in one
process in turn; the best round of each counts, so that other work on the machine disturbs all alike. Demanded: step /
floor at most 1.6. Views: frames of 480 x 270 with ten people, one after another, on one thread (CPU only).
"""
import argparse
import math
import time

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from reidlit.idfree.contrastive import EmbeddingQueue, dense_contrastive_loss
from reidlit.idfree.views import TRANSFORMS, two_views


def plain(x, ids, queue, queue_ids, tau=.07):
    "The same loss by autograd, the whole table of similarities kept."
    rivals = (x@queue.T/tau).masked_fill(ids[:, None] == queue_ids, -math.inf).logsumexp(1)
    pair = (ids[:, None] == ids).fill_diagonal_(False)
    each = torch.where(pair, F.softplus(rivals[:, None]-x@x.T/tau), 0).sum(1)/pair.sum(1).clamp(min=1)
    return each.sum()/pair.any(1).sum()


def best_of(functions, rounds, cuda):
    "Least milliseconds of each, run in turn."
    least, clock = dict.fromkeys(functions, math.inf), time.perf_counter if cuda else time.process_time
    for i in range(rounds+1):
        for name, f in functions.items():
            if cuda: torch.cuda.synchronize()
            start = clock()
            f()
            if cuda: torch.cuda.synchronize()
            if i: least[name] = min(least[name], (clock()-start)*1e3)
    return least


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--points', type=int, default=2000)
    p.add_argument('--queue', type=int, default=32768)
    p.add_argument('--dim', type=int, default=256)
    p.add_argument('--device', default='cpu')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    cv2.setNumThreads(1)
    g = torch.Generator().manual_seed(0)
    unit = lambda n: F.normalize(torch.randn(n, a.dim, generator=g)).to(a.device)
    x, ids = unit(a.points).requires_grad_(), torch.arange(a.points, device=a.device)//18
    views, queue = torch.arange(a.points, device=a.device) % 18//9, EmbeddingQueue(a.dim, a.queue).to(a.device)
    queue.enqueue(unit(a.queue), torch.arange(10**6, 10**6+a.queue, device=a.device))
    queue.enqueue(x, ids, views)
    rows = queue.latest()
    weights = torch.rand(a.points, a.queue, generator=g).to(a.device)

    def floor():
        with torch.no_grad(): return x@rows[0].T, weights@rows[0]

    def step(f):
        x.grad = None
        f(x, ids, *rows).backward()
    ms = best_of(dict(floor=floor, step=lambda: step(dense_contrastive_loss), plain=lambda: step(plain),
                      enqueue=lambda: queue.enqueue(x, ids, views)), a.rounds, a.device.startswith('cuda'))
    print(f'{a.points} points, queue {a.queue}, dim {a.dim}, {a.device}, {a.threads} threads, best of {a.rounds}\n')
    print('| floor, ms | step | ratio | by autograd | ratio | enqueue |\n|'+'---|'*6)
    print(f"| {ms['floor']:.0f} | {ms['step']:.0f} | {ms['step']/ms['floor']:.2f} | {ms['plain']:.0f} | "
          f"{ms['plain']/ms['floor']:.2f} | {ms['enqueue']:.1f} |")
    if a.device != 'cpu': return
    r = np.random.default_rng(0)
    frame = np.kron(r.integers(0, 256, (27, 48, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    lo = r.uniform([0, 0], [440, 190], (10, 2))
    boxes, names = np.concatenate([lo, lo+[40, 80]], 1), [(n,) for n in TRANSFORMS]+[TRANSFORMS]

    def pairs(which): # a chance of a half is met as often as missed in ten
        for k in range(10): two_views(frame, boxes, np.random.default_rng(k), which)
    ms = best_of({n: lambda n=n: pairs(n) for n in names}, a.rounds, False)
    print('\n| two_views, changes | ms a pair | pairs a second |\n|---|---|---|')
    for n in names: print(f"| {' '.join(n) if len(n) == 1 else 'all'} | {ms[n]/10:.1f} | {1e4/ms[n]:.0f} |")


if __name__ == '__main__': main()
