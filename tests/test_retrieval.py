"The retrieval scores against plain implementations, and their limits."
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from reidlit.metrics.retrieval import (average_precision, distance_chunks, mars_scores,
    reid_scores, scores_from_distances)
from reidlit.metrics.thresholds import pair_distances, pick_threshold


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
            parts = np.array_split(dist, 3)
            for s in (whole, score(iter(parts)), score(parts), score(torch.as_tensor(dist))):
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
    (dict(q_camids=[0, 1, 2]), 'q_camids has shape'), (dict(q_pids=[.5, 1.5]), 'q_pids: float64'),
    (dict(q_junk=[True, True]), 'no query left'), (dict(g_junk=[True]), 'g_junk has shape'),
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


@pytest.mark.parametrize('cross_camera', [False, True])
def test_sampled_pairs_are_drawn_evenly(cross_camera):
    r = np.random.default_rng(6)
    x, pids, cams = 2.**np.arange(12)[:, None], r.integers(0, 4, 12), r.integers(0, 3, 12)
    kw = dict(cross_camera=cross_camera, device='cpu')
    for every, drawn in zip(pair_distances(x, pids, cams, max_pairs=None, **kw), zip(*(
            pair_distances(x, pids, cams, max_pairs=3, rng=np.random.default_rng(k), **kw)
            for k in range(3000)))):
        values, n = np.unique(np.concatenate(drawn), return_counts=True)
        assert (values == np.sort(every)).all() and len(values) > 3  # Each pair has a distance of its own
        assert np.abs(n*len(n)/n.sum()-1).max() < 6*np.sqrt(len(n)/n.sum())


@pytest.mark.parametrize('cross_camera', [False, True])
def test_rare_pairs_are_found_at_once(cross_camera):
    "One picture in 50,000 is in another camera, or of another person: no drawing until it fits."
    n = 50_000
    x, pids, cams = np.arange(n)[:, None], np.ones(n, int), np.zeros(n, int)
    pids[-1], cams[-2:] = 2, 1
    start = time.process_time()
    pos, neg = pair_distances(x, pids, cams, cross_camera=cross_camera, max_pairs=1000, device='cpu')
    assert time.process_time()-start < 5 and len(pos) == len(neg) == 1000
    assert neg.min() >= 1 and neg.max() <= n-1 and len(np.unique(neg)) > 900
    if cross_camera: assert pos.max() <= n-2 and len(np.unique(pos)) > 900
    pids[:] = np.arange(n)//2  # Two pictures a person: all n/2 are listed, none twice
    pos, _ = pair_distances(x, pids, max_pairs=n, device='cpu')
    assert (pos == 1).all() and len(pos) == n//2


MEASURE = '''
import resource, sys
import numpy as np
from reidlit.metrics.retrieval import reid_scores
r = np.random.default_rng(0)
Q, G = map(int, sys.argv[1:])
pids, cams = r.integers(0, G//20, Q+G), r.integers(0, 6, Q+G)
x = (r.normal(size=(G//20, 16))[pids]+.8*r.normal(size=(Q+G, 16))).astype('f4')
labels = pids[:Q], pids[Q:], cams[:Q], cams[Q:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
reid_scores(x[:9], x[Q:], pids[:9], pids[Q:], device='cpu')
before = peak()
reid_scores(x[:Q], x[Q:], *labels, memory_mb=64, device='cpu')
print(peak()-before)
'''


def test_memory(Q=4000, G=40000, limit=200):
    "Less than a third of what one full matrix takes."
    full = Q*G*4/2**20
    out = subprocess.run([sys.executable, '-c', MEASURE, str(Q), str(G)],
                         capture_output=True, text=True, check=True)
    used = float(out.stdout)
    assert used < limit < full/3, f'{used:.0f} MB more, one full matrix is {full:.0f} MB'
