"""Time and memory of the retrieval scores, beside torchreid's evaluator.

    python benchmarks/retrieval.py                      market, memory and re-ranking
    python benchmarks/retrieval.py market --torchreid FOLDER

Synthetic features at the sizes of Market-1501 and MSMT17. torchreid is optional:
`pip install --no-deps --target FOLDER torchreid` (0.2.5 was tried), or installed as
usual. Only its evaluator is loaded, so its own requirements are not needed. That
release brings no source of its Cython evaluator; it is run where someone compiled it. Each part
runs in a process of its own, so that peaks of memory do not mix.
"""
import argparse
import importlib
import importlib.util
import resource
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch

from reidlit.metrics.rerank import rerank_chunks
from reidlit.metrics.retrieval import distance_chunks, reid_scores, scores_from_distances

MARKET, MSMT17 = (3368, 15913, 750), (11659, 82161, 3060)  # queries, gallery, people


def people(Q, G, ids, dim, noise=.6, shift=.5):
    "Features, identities and cameras of queries and gallery."
    r = np.random.default_rng(0)
    pids, cams = r.integers(0, ids, Q+G), r.integers(0, 6, Q+G)
    x = r.normal(size=(ids, dim)).astype('f4')[pids]
    x += (shift*r.normal(size=(6, dim))).astype('f4')[cams]
    for part in np.array_split(np.arange(Q+G), 20):
        x[part] += noise*r.normal(size=(len(part), dim)).astype('f4')
    return x[:Q], x[Q:], pids[:Q], pids[Q:], cams[:Q], cams[Q:]


def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024


def best(f, n=5):
    "The shortest wall time and the processor time of `n` runs, and the last result."
    times = []
    for _ in range(n):
        wall, cpu = time.perf_counter(), time.process_time()
        out = f()
        times.append((time.perf_counter()-wall, time.process_time()-cpu))
    return min(t[0] for t in times), min(t[1] for t in times), out


def load_rank(folder):
    "torchreid's module rank.py alone, or None: its package needs much more."
    if folder is None:
        spec = importlib.util.find_spec('torchreid')
        if spec is None: return None
        folder = Path(spec.origin).parent.parent
    for name in ('torchreid.reid.metrics', 'torchreid.metrics'):
        if (Path(folder)/name.replace('.', '/')/'rank.py').exists(): break
    else: return None
    parts = [*name.split('.'), 'rank_cylib']
    for k in range(len(parts)):  # Empty packages in place of the real ones
        package = types.ModuleType('.'.join(parts[:k+1]))
        package.__path__ = [str(Path(folder, *parts[:k+1]))]
        sys.modules[package.__name__] = package
    if not hasattr(np, 'bool'): np.bool = np.bool_  # torchreid predates numpy 1.24
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return importlib.import_module(f'{name}.rank')


def market(folder):
    "Everything after the distance matrix, at Market-1501's size."
    q, g, *labels = people(*MARKET, 32)
    dist = np.concatenate(list(distance_chunks(q, g, device='cpu')))
    start = time.perf_counter()
    scores_from_distances(dist[:2], labels[0][:2], labels[1], labels[2][:2], labels[3])
    print(f'first call, with compiling: {time.perf_counter()-start:.2f} s')
    wall, cpu, ours = best(lambda: scores_from_distances(dist, *labels))
    print(f'reidlit:   best of 5 {wall:.3f} s, processor time {cpu:.3f} s, '
          f'{torch.get_num_threads()} threads; {str(ours).splitlines()[0]}')
    rank = load_rank(folder)
    if rank is None:
        print('torchreid is not installed, comparison skipped; see the top of this file')
        return
    for cython in (False, True):
        if cython and not rank.IS_CYTHON_AVAI:
            print('torchreid: its Cython evaluator is not compiled, skipped')
            continue
        run = lambda: rank.evaluate_rank(dist, *labels, max_rank=50, use_cython=cython)
        theirs_wall, theirs_cpu, (cmc, mAP) = best(run, 1)
        print(f'torchreid: {"Cython" if cython else "Python"}, one run {theirs_wall:.3f} s, '
              f'processor time {theirs_cpu:.3f} s: {theirs_wall/wall:.0f} times as long '
              f'(processor {theirs_cpu/cpu:.0f})')
        print(f'  differences: mAP {abs(mAP-ours.mAP):.1e}, rank-1 {abs(cmc[0]-ours.cmc[0]):.1e}, '
              f'CMC {np.abs(cmc-ours.cmc).max():.1e}')


def memory(dim=512):
    "Peak memory beyond the features, at MSMT17's size."
    data = people(*MSMT17, dim, noise=2.4)
    before = peak_mb()
    wall, cpu, s = best(lambda: reid_scores(*data, device='cpu'), 1)
    print(f'MSMT17 size, {dim} numbers a feature: {wall:.1f} s with compiling and distances '
          f'(processor {cpu:.1f} s), {peak_mb()-before:.0f} MB beyond {before:.0f} MB; '
          f'{str(s).splitlines()[0]}')


def reranking(dim=512):
    "Peak memory and time of re-ranking, at Market-1501's size."
    q, g, *labels = people(*MARKET, dim, noise=1.6)
    plain = reid_scores(q, g, *labels, device='cpu')
    before = peak_mb()
    run = lambda: scores_from_distances(rerank_chunks(q, g, device='cpu'), *labels)
    wall, cpu, s = best(run, 1)
    n = len(q)+len(g)
    print(f'Market size, {dim} numbers a feature: {wall:.1f} s (processor {cpu:.1f} s), '
          f'{peak_mb()-before:.0f} MB more (one full matrix takes {n*n*4/2**20:.0f} MB); '
          f'mAP {plain.mAP:.2%} -> {s.mAP:.2%}')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', nargs='?', choices=['market', 'memory', 'reranking'])
    p.add_argument('--torchreid', help='folder that torchreid was installed into')
    a = p.parse_args()
    if a.part is None:
        for part in ('market', 'memory', 'reranking'):
            print(f'-- {part}', flush=True)
            extra = ['--torchreid', a.torchreid] if a.torchreid else []
            subprocess.run([sys.executable, __file__, part, *extra], check=True)
    elif a.part=='market': market(a.torchreid)
    else: dict(memory=memory, reranking=reranking)[a.part]()


if __name__ == '__main__': main()
