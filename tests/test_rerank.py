"Re-ranking against a plain implementation, and its memory."
import subprocess
import sys

import numpy as np
import pytest

from reidlit.metrics.rerank import rerank, rerank_chunks
from reidlit.metrics.retrieval import scores_from_distances


def plain_rerank(x, Q, k1, k2, lam):
    "k-reciprocal re-ranking with N x N matrices and loops over sets."
    d2 = ((x[:, None]-x)**2).sum(2)
    d = d2/d2.max(1, keepdims=True)
    order = d.copy()
    np.fill_diagonal(order, -1)
    rank, N = np.argsort(order, axis=1, kind='stable'), len(x)
    mutual = lambda i, k: {j for j in rank[i, :k+1] if i in rank[j, :k+1]}
    V, half = np.zeros((N, N)), int(np.around(k1/2))
    for i in range(N):
        first = mutual(i, k1)
        members = set(first)
        for j in first:
            other = mutual(j, half)
            if len(other & first) > 2/3*len(other): members |= other
        members = sorted(members)
        V[i, members] = np.exp(-d[i, members])
        V[i] /= V[i].sum()
    V = np.stack([V[rank[i, :k2]].mean(0) for i in range(N)])
    low = np.minimum(V[:Q, None], V[None, Q:]).sum(2)
    return (1-lam)*(1-low/(2-low)) + lam*d[:Q, Q:]


@pytest.mark.parametrize('seed', range(12))
def test_rerank_equals_plain(seed):
    r = np.random.default_rng(seed)
    N, k1, k2 = int(r.integers(3, 160)), int(r.choice([1, 2, 5, 20])), int(r.choice([1, 2, 6]))
    x = r.normal(size=(N, 6)) + 2*r.normal(size=(8, 6))[r.integers(0, 8, N)]
    Q = int(r.integers(1, N-1))
    want = plain_rerank(x, Q, k1, k2, .3)
    got = rerank(x[:Q], x[Q:], k1=k1, k2=k2, memory_mb=.005, device='cpu')
    assert got.shape == want.shape and np.abs(got-want).max() < 1e-6
    single = rerank(x[:Q].astype('f4'), x[Q:].astype('f4'), k1=k1, k2=k2, device='cpu')
    assert np.abs(single-want).max() < 1e-5
    assert np.abs(rerank(x[:Q], x[Q:], k1=k1, k2=k2, lam=1, device='cpu')
                  - plain_rerank(x, Q, k1, k2, 1)).max() < 1e-6


def test_rerank_with_ties_and_cosine():
    r = np.random.default_rng(5)
    x = r.integers(0, 3, (70, 3)).astype(float)
    assert np.abs(rerank(x[:20], x[20:], k1=6, k2=3, device='cpu')
                  - plain_rerank(x, 20, 6, 3, .3)).max() < 1e-6
    y = r.normal(size=(70, 5))
    unit = y/np.linalg.norm(y, axis=1, keepdims=True)
    assert np.abs(rerank(y[:20], y[20:], metric='cosine', device='cpu')
                  - plain_rerank(unit, 20, 20, 6, .3)).max() < 1e-6
    same = np.ones((9, 4))
    assert np.isfinite(rerank(same[:3], same[3:], device='cpu')).all()


def test_blocks_are_the_matrix():
    r = np.random.default_rng(7)
    x = r.normal(size=(90, 4))
    blocks = list(rerank_chunks(x[:30], x[30:], memory_mb=.005, device='cpu'))
    assert len(blocks) > 3 and np.allclose(np.concatenate(blocks), rerank(x[:30], x[30:], device='cpu'))
    pids = r.integers(0, 5, 90)
    a, b = (scores_from_distances(d, pids[:30], pids[30:]) for d in (blocks, np.concatenate(blocks)))
    assert a.mAP == b.mAP


@pytest.mark.parametrize('change, message', [
    (dict(k1=0), 'k1=0'), (dict(k2=0), 'k2=0'), (dict(lam=1.5), 'lam=1.5'), (dict(metric='l1'), "metric='l1'"),
    (dict(query=np.zeros((2, 4))), 'gallery has shape'), (dict(gallery=np.full((3, 3), np.nan)), 'gallery: NaN')])
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message): rerank(**{**dict(query=np.eye(2, 3), gallery=np.eye(3)), **change})


MEASURE = '''
import resource, sys
import numpy as np
from reidlit.metrics.rerank import rerank_chunks
from reidlit.metrics.retrieval import scores_from_distances
r = np.random.default_rng(0)
Q, G = map(int, sys.argv[1:])
pids = r.integers(0, G//20, Q+G)
x = (r.normal(size=(G//20, 16))[pids]+.8*r.normal(size=(Q+G, 16))).astype('f4')
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
score = lambda q, g: scores_from_distances(rerank_chunks(x[:q], x[Q:Q+g], memory_mb=64, device='cpu'), pids[:q], pids[Q:Q+g])
score(60, 200)
before = peak()
score(Q, G)
print(peak()-before)
'''


def test_memory(Q=1000, G=11000, limit=300):
    "About half of what one full matrix takes; plain implementations hold several."
    full = (Q+G)**2*4/2**20
    out = subprocess.run([sys.executable, '-c', MEASURE, str(Q), str(G)],
                         capture_output=True, text=True, check=True)
    used = float(out.stdout)
    assert used < limit < full*.6, f'{used:.0f} MB more, one full matrix is {full:.0f} MB'
