"""Time and memory of joining identities across cameras, beside the bare products.

    python benchmarks/association.py                    5,000 and 20,000 centroids
    python benchmarks/association.py 100000             the goal's size: minutes
    python benchmarks/association.py 5000 --rule greedy --threads 1

Synthetic unit centroids of 15 cameras: a person is seen by 5 of them on average, each time
with noise and that camera's shift. Each size runs in a process of its own, so that peaks of
memory do not mix. `ratio` divides by the products of the same blocks and nothing else, in
processor time; up to 20,000 centroids they are run, above that computed from the speed of
some blocks. Processor time counts all threads.
"""
import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from reidlit.ics.association import associate, camera_blocks

CAMERAS, SEEN_BY = 15, 5


def centroids(n, dim, noise=3.2, shift=.3):
    "Unit rows `(n,dim)` float32, their cameras and people, in the order of cameras."
    r = np.random.default_rng(0)
    keys = r.permutation(CAMERAS*(n//SEEN_BY))[:n]  # each (person, camera) at most once
    cams, pids = np.divmod(np.sort(keys), n//SEEN_BY)
    g = torch.Generator().manual_seed(0)
    people = torch.randn(n//SEEN_BY, dim, generator=g)
    bias = shift*torch.randn(CAMERAS, dim, generator=g)
    x = torch.empty(n, dim)
    for at in torch.arange(n).split(1000):
        x[at] = people[pids[at]]+bias[cams[at]]+noise*torch.randn(len(at), dim, generator=g)
        x[at] /= x[at].norm(dim=1, keepdim=True)
    return x, cams, pids


def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024


def bare(x, cams, most=75, chunk=2048):
    "Processor time of the products alone; of `most` blocks and scaled, if there are more."
    start = [*np.unique(cams, return_index=True)[1].tolist(), len(x)]
    blocks = list(camera_blocks(start, chunk))
    part = blocks[::-(-len(blocks)//most)]
    size = lambda bs: sum((a.stop-a.start)*(b.stop-b.start) for a, b in bs)
    t = time.process_time()
    for a, b in part: torch.mm(x[a], x[b].T)
    return (time.process_time()-t)*size(blocks)/size(part), size(blocks)


def one(n, dim, rule, threads):
    torch.set_num_threads(threads)
    x, cams, pids = centroids(n, dim)
    base = peak_mb()
    associate(x[::max(1, n//500)], cams[::max(1, n//500)])  # loads what is loaded once
    wall, cpu = time.perf_counter(), time.process_time()
    a = associate(x, cams, rule=rule)
    wall, cpu, peak = time.perf_counter()-wall, time.process_time()-cpu, peak_mb()
    s = a.scores(pids)
    floor, pairs = bare(x, cams)
    print(f'| {n:,} | {wall:.1f} | {cpu:.1f} | {floor:.1f} | {cpu/floor:.2f} | {base:.0f} | {peak:.0f} '
          f'| {n*n*4/2**20:,.0f} | {len(a.edges):,} | {s["precision"]:.3f} | {s["recall"]:.3f} '
          f'| {2*pairs*dim/cpu/1e9:.0f} |', flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('n', nargs='*', type=int, default=[5000, 20000], help='how many centroids')
    p.add_argument('--dim', type=int, default=2048)
    p.add_argument('--rule', choices=['reciprocal', 'greedy'], default='reciprocal')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.inside: return one(a.n[0], a.dim, a.rule, a.threads)
    print(f'{CAMERAS} cameras, d={a.dim}, S = n, {a.rule}, {a.threads} threads\n\n'
          '| n | seconds | processor | products | ratio | MB before | peak MB | n x n, MB '
          '| edges | precision | recall | GFLOP/s |\n|'+'---|'*12, flush=True)
    extra = ['--dim', str(a.dim), '--rule', a.rule, '--threads', str(a.threads), '--inside']
    for n in a.n: subprocess.run([sys.executable, __file__, str(n), *extra], check=True)


if __name__ == '__main__': main()
