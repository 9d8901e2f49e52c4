"""Batch-hard triplet loss beside pytorch-metric-learning's, forward and backward.

    python benchmarks/losses.py [--threads 1] [--rounds 40]

Four pictures of each person, features of 64 x 2048 and 256 x 512. Both run in turn, the best round of each counts; loss
and gradient are compared with float64. Demanded: ours / peer at most 1.
"""
import argparse
import time
import warnings

warnings.filterwarnings('ignore')

import torch
from pytorch_metric_learning import distances, losses, miners

from reidlit.losses import batch_hard_triplet


def peer(margin=.3):
    "The same loss, by a miner and a loss over the triplets it finds."
    distance = distances.LpDistance(normalize_embeddings=False)
    mine, loss = miners.BatchHardMiner(distance=distance), losses.TripletMarginLoss(
        margin=margin, distance=distance, reducer=None)
    return lambda x, y: loss(x, y, mine(x, y))


def exact(x, y, margin=.3):
    "Loss and gradient in float64, by all differences."
    x = x.detach().double().requires_grad_()
    d = (x[:, None]-x).square().sum(2).add(1e-12).sqrt()
    same = y[:, None] == y
    far = d.masked_fill(~same, -torch.inf).max(1).values
    loss = (far-d.masked_fill(same, torch.inf).min(1).values+margin).relu().mean()
    loss.backward()
    return loss.item(), x.grad


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--rounds', type=int, default=40)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    print(f'{a.threads} threads, best of {a.rounds}\n\n| features | ours, ms | peer, ms | ratio | loss off by | '
          'gradient off by |\n|---|---|---|---|---|---|')
    for n, d in ((64, 2048), (256, 512)):
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = torch.arange(n//4).repeat_interleave(4)
        functions, best = (batch_hard_triplet, peer()), [torch.inf]*2
        for r in range(a.rounds+2):
            for i, f in enumerate(functions):
                x.grad = None
                t = time.perf_counter()
                f(x, y).backward()
                if r > 1: best[i] = min(best[i], (time.perf_counter()-t)*1e3)
        x.grad = None
        loss = batch_hard_triplet(x, y)
        loss.backward()
        true, grad = exact(x, y)
        print(f'| {n} x {d} | {best[0]:.2f} | {best[1]:.2f} | {best[0]/best[1]:.2f} | {abs(loss.item()-true):.0e} | '
              f'{(x.grad-grad).abs().max():.0e} |')


if __name__ == '__main__': main()
