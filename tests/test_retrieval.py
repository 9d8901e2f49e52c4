"The retrieval scores against plain implementations, and their limits."
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from reidlit.metrics.retrieval import (average_precision, distance_chunks, mars_scores,
    pair_distances, pick_threshold, reid_scores, rerank, rerank_chunks,
    scores_from_distances)


def plain_scores(dist, q_pids, g_pids, q_cams, g_cams, junk, distractor, own, ap, max_rank,
                 skip_empty):
    "Sort every row, walk down it: the rules written as slowly as possible."
    aps, inps, cmc, places = [], [], np.zeros(max_rank), []
    for q in range(len(dist)):
        order = sorted(range(dist.shape[1]), key=lambda j: (dist[q, j], j))
        hits = []
        for j in order:
            match = g_pids[j] == q_pids[q] and not distractor[j]
            if junk[j] or j == own[q]: continue
            if match and q_cams is not None and g_cams[j] == q_cams[q]: continue
            hits.append(match)
        right = [k+1 for k, h in enumerate(hits) if h]
        places.append(right)
        if not right:
            if not skip_empty: aps.append(0.); inps.append(0.)
            continue
        total, found, old_recall, old_precision = 0., 0, 0., 1.
        for k, h in enumerate(hits):
            found += h
            recall, precision = found/len(right), found/(k+1)
            if ap == 'step': total += precision*h/len(right)
            else: total += (recall-old_recall)*(old_precision+precision)/2
            old_recall, old_precision = recall, precision
        aps.append(total)
        inps.append(len(right)/right[-1])
        cmc[right[0]-1:] += 1
    return np.mean(aps), cmc/len(aps), np.mean(inps), places


@pytest.mark.parametrize('seed', range(120))
def test_equals_plain_sort(seed):
    r = np.random.default_rng(seed)
    Q, G = r.integers(1, 12), r.integers(1, 60)
    ids, cams = r.integers(1, 9), r.integers(1, 5)
    ties = r.choice([2, 5, 1000])
    dist = r.integers(0, ties, (Q, G)).astype(r.choice(['f4', 'f8', 'i8', 'f2']))
    q_pids, g_pids = r.integers(-1, ids, Q), r.integers(-1, ids, G)
    with_cams = r.random() < .7
    q_cams, g_cams = (r.integers(-1, cams, Q), r.integers(-1, cams, G)) if with_cams else (None, None)
    junk, distractor = r.random(G) < .15, r.random(G) < .15
    own = np.where(r.random(Q) < .5, r.integers(0, G, Q), -1)
    max_rank = int(r.integers(1, 70))
    for ap in ('step', 'trapezoid'):
        for skip in (True, False):
            score = lambda d: scores_from_distances(d, q_pids, g_pids, q_cams, g_cams, ap=ap,
                max_rank=max_rank, skip_empty=skip, g_junk=junk, g_distractor=distractor,
                exclude_self=own)
            mAP, cmc, inp, places = plain_scores(dist, q_pids, g_pids, q_cams, g_cams, junk,
                distractor, own, ap, max(max_rank, G), skip) if not skip or any_match(
                q_pids, g_pids, q_cams, g_cams, junk, distractor, own) else [None]*4
            if mAP is None:
                with pytest.raises(ValueError, match='no query has a match'): score(dist)
                continue
            whole = score(dist)
            blocks = score(iter(np.array_split(dist, 3)))
            for s in (whole, blocks):
                assert abs(s.mAP-mAP) < 1e-9 and abs(s.mINP-inp) < 1e-9
                assert len(s.cmc) == max_rank
                assert np.abs(s.cmc-cmc[:max_rank]).max() < 1e-6
                assert [list(p) for p in s.ranks] == places
                assert s.skipped == sum(not p for p in places)


def any_match(q_pids, g_pids, q_cams, g_cams, junk, distractor, own):
    "Is there any query with a match?"
    ok = (q_pids[:, None] == g_pids) & ~junk & ~distractor
    ok &= np.arange(len(g_pids)) != own[:, None]
    if q_cams is not None: ok &= q_cams[:, None] != g_cams
    return ok.any()


def test_features_equal_plain_sort():
    r = np.random.default_rng(0)
    q, g = r.normal(size=(30, 5)), r.normal(size=(200, 5))
    labels = r.integers(0, 9, 30), r.integers(0, 9, 200), r.integers(0, 3, 30), r.integers(0, 3, 200)
    none = np.zeros(200, bool)
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    for metric, dist in (('euclidean', np.linalg.norm(q[:, None]-g, axis=2)),
                         ('cosine', 1-unit(q)@unit(g).T)):
        mAP, cmc, *_ = plain_scores(dist, *labels, none, none, np.full(30, -1), 'step', 200, True)
        for a, b in ((q, g), (torch.tensor(q), torch.tensor(g))):
            s = reid_scores(a, b, *labels, metric=metric, memory_mb=.01, device='cpu')
            assert abs(s.mAP-mAP) < 1e-9 and np.abs(s.cmc-cmc[:50]).max() < 1e-6
        with torch.autocast('cpu', torch.bfloat16):
            assert abs(reid_scores(q, g, *labels, metric=metric, device='cpu').mAP-mAP) < 1e-9


def test_sklearn_agrees():
    r = np.random.default_rng(1)
    for _ in range(20):
        hits = r.random(50) < .2
        if hits.any():
            assert np.isclose(average_precision(np.flatnonzero(hits)+1),
                              average_precision_score(hits, -np.arange(50)))


@pytest.mark.parametrize('change, message', [
    (dict(q_camids=None), 'give both'), (dict(g_pids=[1, 2]), 'g_pids has 2'),
    (dict(query=np.zeros((2, 4))), 'gallery has shape'), (dict(ap='area'), "ap='area'"),
    (dict(query=np.full((2, 3), np.nan)), 'query: NaN'), (dict(metric='l1'), "metric='l1'"),
    (dict(gallery=np.full((3, 3), np.inf)), 'gallery: NaN or infinity'),
    (dict(q_camids=[0, 1, 2]), 'q_camids: shape'), (dict(q_pids=[.5, 1.5]), 'q_pids: float64'),
    (dict(q_junk=[True, True]), 'no query left'), (dict(g_junk=[True]), 'g_junk: shape'),
    (dict(exclude_self=[0, 3]), 'exclude_self: 0 to 3'), (dict(max_rank=0), 'max_rank=0'),
    (dict(g_camids=[0, 0, 0], q_camids=[0, 0]), 'leave q_camids and g_camids out'),
    (dict(g_junk=[True]*3), 'no usable identity')])
def test_errors_name_the_argument(change, message):
    good = dict(query=np.eye(2, 3), gallery=np.eye(3), q_pids=[1, 2], g_pids=[1, 2, 1],
                q_camids=[0, 1], g_camids=[1, 0, 1])
    assert reid_scores(**good).skipped == 0
    with pytest.raises(ValueError, match=message): reid_scores(**{**good, **change})


def test_junk_queries_and_pids_that_look_special():
    dist = np.array([[.1, .2], [.1, .2], [.2, .1]])
    s = scores_from_distances(dist, [0, -1, -1], [0, -1], q_junk=[False, True, False])
    assert s.mAP == 1 and np.isnan(s.aps[1]) and s.skipped == 0
    assert '1 junk queries not asked' in str(s)
    kept = scores_from_distances(dist[:1], [0], [0, 0], [0], [0, 1], g_distractor=[True, False])
    assert kept.ranks[0].tolist() == [2]


def test_text_states_the_conventions():
    dist = np.zeros((1, 2))
    text = str(scores_from_distances(dist, [1], [1, 1]))
    assert 'NOT removed' in text and 'the query itself NOT removed' in text and 'step' in text
    text = str(scores_from_distances(dist, [1], [1, 1], [0], [0, 1], skip_empty=False, ap='trapezoid'))
    assert 'same person in the same camera' in text and 'counted as 0' in text and 'trapezoid' in text


def test_mars_gallery():
    r = np.random.default_rng(2)
    x, pids, cams = r.normal(size=(80, 4)), r.integers(-1, 9, 80), r.integers(0, 3, 80)
    query = np.flatnonzero(pids > 0)[::4]
    flags = dict(junk=pids == -1, distractor=pids == 0)
    same = lambda keep: reid_scores(x[query], x[keep], pids[query], pids[keep], cams[query],
        cams[keep], g_junk=pids[keep] == -1, g_distractor=pids[keep] == 0, skip_empty=False)
    s = mars_scores(x, pids, cams, query, **flags)
    assert s.mAP == same(np.arange(80)).mAP and 'queries in the gallery' in str(s)
    s = mars_scores(x, pids, cams, query, **flags, gallery_includes_query=False)
    assert s.mAP == same(np.setdiff1d(np.arange(80), query)).mAP


def test_thresholds():
    r = np.random.default_rng(3)
    for _ in range(50):
        digits = r.choice([0, 1, 6])
        pos, neg = r.normal(1, 1, r.integers(1, 99)).round(digits), r.normal(3, 1, r.integers(1, 99)).round(digits)
        fmr = r.choice([0, .01, .1, .3, 1, r.random()])
        t = pick_threshold(pos, neg, fmr)
        assert t.fmr == (neg < t.threshold).mean() <= fmr
        assert np.isclose(t.fnmr, (pos >= t.threshold).mean())
        wider = np.unique(np.r_[pos, neg, np.inf])
        wider = wider[wider > t.threshold]
        if fmr < 1: assert (neg < wider[0]).mean() > fmr
        every = np.r_[-9, np.unique(np.r_[pos, neg])+1e-9]
        rates = [((neg < e).mean(), (pos >= e).mean()) for e in every]
        for method, cost in (('eer', lambda a, b: abs(a-b)), ('crossing', lambda a, b: a+b)):
            t = pick_threshold(pos, neg, method=method)
            assert np.isclose(cost(t.fmr, t.fnmr), min(cost(*k) for k in rates))
    assert '3.00%' in str(pick_threshold([1.], np.arange(2, 102.)))
    for bad in (dict(pos=[np.nan]), dict(neg=[]), dict(fmr=2), dict(method='best')):
        with pytest.raises(ValueError): pick_threshold(**{**dict(pos=[1.], neg=[2.]), **bad})


@pytest.mark.parametrize('cross_camera', [False, True])
@pytest.mark.parametrize('metric', ['euclidean', 'cosine'])
def test_pairs_are_all_pairs(cross_camera, metric):
    r = np.random.default_rng(4)
    x, pids, cams, ignore = r.normal(size=(60, 4)), r.integers(0, 5, 60), r.integers(0, 3, 60), r.random(60) < .1
    dist = np.concatenate(list(distance_chunks(x, x, metric, device='cpu')))
    i, j = np.triu_indices(60, 1)
    ok = ~ignore[i] & ~ignore[j] & ((not cross_camera) | (cams[i] != cams[j]))
    kw = dict(cross_camera=cross_camera, metric=metric, ignore=ignore, device='cpu')
    want = [np.sort(dist[i, j][ok & ((pids[i] == pids[j]) == same)]) for same in (True, False)]
    for got, w in zip(pair_distances(x, pids, cams, max_pairs=None, **kw), want):
        assert np.allclose(np.sort(got), w)
    for got, w in zip(pair_distances(x, pids, cams, max_pairs=40, **kw), want):
        assert len(got) == 40 and np.abs(got[:, None]-w).min(1).max() < 1e-9
    with pytest.raises(ValueError, match='camids'): pair_distances(x, pids, cross_camera=True)


def test_sampled_pairs_are_drawn_evenly():
    x, pids = np.array([[0.], [1], [3], [7], [20], [31]]), np.array([1, 1, 1, 2, 2, 3])
    pos, neg = pair_distances(x, pids, max_pairs=3)
    assert len(pos) == 3
    values, n = np.unique(np.concatenate([pair_distances(x, pids, max_pairs=3,
        rng=np.random.default_rng(k))[0] for k in range(4000)]), return_counts=True)
    assert len(values) == 4 and np.abs(n/n.sum()-.25).max() < .03


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


MEASURE = '''
import resource, sys
import numpy as np
from reidlit.metrics.retrieval import reid_scores, rerank_chunks, scores_from_distances
r = np.random.default_rng(0)
Q, G, rerank = map(int, sys.argv[1:])
pids, cams = r.integers(0, G//20, Q+G), r.integers(0, 6, Q+G)
x = (r.normal(size=(G//20, 16))[pids]+.8*r.normal(size=(Q+G, 16))).astype('f4')
labels = pids[:Q], pids[Q:], cams[:Q], cams[Q:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
reid_scores(x[:9], x[Q:], pids[:9], pids[Q:], device='cpu')
list(rerank_chunks(x[:9], x[9:99], device='cpu'))
before = peak()
if rerank: scores_from_distances(rerank_chunks(x[:Q], x[Q:], memory_mb=64, device='cpu'), *labels)
else: reid_scores(x[:Q], x[Q:], *labels, memory_mb=64, device='cpu')
print(peak()-before)
'''


@pytest.mark.parametrize('Q, G, rerank, limit', [(4000, 40000, 0, 200), (1000, 11000, 1, 300)])
def test_memory(Q, G, rerank, limit):
    "Less than a third (features), or half (re-ranking), of what one full matrix takes."
    full = Q*G*4/2**20 if not rerank else (Q+G)**2*4/2**20
    out = subprocess.run([sys.executable, '-c', MEASURE, str(Q), str(G), str(rerank)],
                         capture_output=True, text=True, check=True)
    used = float(out.stdout)
    assert used < limit < full*.6, f'{used:.0f} MB more, one full matrix is {full:.0f} MB'
