"Pairs, negatives and batches of the cross-dataset method against plain loops."
import itertools
import math

import numpy as np
import pytest
import torch

from reidlit.core import ReidSet, rng_for
from reidlit.crossdataset import (BY_PRESET, Positives, PositivesSampler, batch_sampler,
                                  cooccurring_negatives, embedding_net,
                                  embedding_settings, finetune, flat_then_exp,
                                  presumed_positives, random_negatives)
from reidlit.learner import quiet
from reidlit.tracklets import Tracklets


def features(seed, n=24, cameras=4, whole=False):
    "Random features, cameras of different sizes in any order of rows."
    g = rng_for('test crossdataset', seed)
    cams = g.choice([0, 2, 3, 7][:cameras], n, p=np.array([.4, .3, .2, .1])[:cameras]
                    / sum([.4, .3, .2, .1][:cameras]))
    cams[:cameras] = [0, 2, 3, 7][:cameras]
    x = g.integers(0, 3, (n, 2)) if whole else g.normal(size=(n, 5))
    return g, torch.tensor(x, dtype=torch.float32), g.permutation(cams)


def nearest_by_loop(x, cams, number):
    "Pairs of each two cameras by distance, then by row."
    out = []
    for c, d in itertools.combinations(sorted(set(cams.tolist())), 2):
        a = [i for i in range(len(x)) if cams[i] == c]
        b = [i for i in range(len(x)) if cams[i] == d]
        every = [(float((x[i]-x[j]).norm()), i, j) for i in a for j in b]
        out += [(i, j) for _, i, j in sorted(every)[:number(c, d, a, b)]]
    return out


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('whole', [False, True], ids=['apart', 'ties'])
@pytest.mark.parametrize('alpha', [.1, .5, 1.])
def test_presumed_pairs_against_a_loop(seed, whole, alpha):
    _, x, cams = features(seed, whole=whole)
    p = presumed_positives(x, cams, alpha)
    loop = nearest_by_loop(x, cams, lambda c, d, a, b: round(alpha*min(len(a), len(b))))
    assert [tuple(q) for q in p.pairs.tolist()] == loop
    assert (cams[p.pairs] == p.cameras).all() and (p.cameras[:, 0] < p.cameras[:, 1]).all()
    for (i, j), d in zip(p.pairs, p.distance): assert math.isclose(
        d, float((x[i]-x[j]).norm()), abs_tol=1e-4)


@pytest.mark.parametrize('seed', range(6))
def test_counts_and_precision_against_a_loop(seed):
    g, x, cams = features(seed, cameras=3)
    counts = {(0, 2): 3, (2, 3): 1000}
    p = presumed_positives(x.numpy(), cams, counts=counts)
    assert [tuple(q) for q in p.pairs.tolist()] == nearest_by_loop(
        x, cams, lambda c, d, a, b: counts.get((c, d), 0))
    pids = g.integers(0, 3, len(cams))
    share, each = p.precision(pids)
    right = [pids[i] == pids[j] for i, j in p.pairs]
    assert math.isclose(share, np.mean(right)) and set(each) == set(counts)
    some = [r for r, c in zip(right, p.cameras) if tuple(c) == (0, 2)]
    assert math.isclose(each[0, 2], np.mean(some))


@pytest.mark.parametrize('counts', [{(2, 0): 1}, {(0, 0): 1}, {(0, 9): 1}, {(0, 2): -1}])
def test_counts_that_do_not_fit_are_named(counts):
    _, x, cams = features(0)
    with pytest.raises(ValueError, match=r'counts\['): presumed_positives(x, cams, counts=counts)


def films(seed, n=30):
    "A table of tracklets with random times, and pairs of it."
    g, x, cams = features(seed, n, 3)
    start = g.integers(0, 100, n)
    rows = np.split(np.arange(4*n), np.sort(g.choice(np.arange(1, 4*n), n-1, replace=False)))
    pids = g.integers(0, 8, n)
    table = Tracklets(np.arange(n)*3, cams, pids, start, start+g.integers(0, 30, n), rows)
    return table, presumed_positives(x, cams, .5)


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('disjoint', [False, True])
def test_cooccurring_negatives_against_a_loop(seed, disjoint):
    t, p = films(seed)
    found = cooccurring_negatives(p, t, disjoint, most=1000)
    some = cooccurring_negatives(p, t, disjoint, most=2, seed=1)
    for (a, b), rows, few in zip(p.pairs, found, some):
        loop = set()
        for x, i in itertools.product((a, b), range(len(t))):
            at_once = max(t.start[i], t.start[x]) <= min(t.end[i], t.end[x])
            near = t.camids[i] in ((t.camids[a], t.camids[b]) if disjoint else (t.camids[x],))
            if at_once and near: loop.add(i)
        assert set(rows) == loop-{a, b} and len(rows) == len(loop-{a, b})
        assert set(few) <= set(rows) and len(few) == min(2, len(rows))


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('labels', [False, True])
def test_random_negatives_against_a_loop(seed, labels):
    t, p = films(seed)
    pids = t.pids if labels else None
    found = random_negatives(p, t.camids, 1000, pids)
    for (a, b), rows, few in zip(p.pairs, found, random_negatives(p, t.camids, 3, pids)):
        loop = {i for i in range(len(t)) if i not in (a, b)
                and t.camids[i] in (t.camids[a], t.camids[b])
                and not (labels and t.pids[i] == t.pids[a])}
        assert set(rows) == loop and len(few) == min(3, len(loop)) and set(few) <= loop


def test_each_pair_draws_from_a_stream_of_its_own():
    t, p = films(3)
    fewer = Positives(p.pairs[:5], p.distance[:5], p.cameras[:5])
    for a, b in zip(random_negatives(p, t.camids, 4), random_negatives(fewer, t.camids, 4)):
        assert (a == b).all()


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('p, k', [(18, 4), (5, 3), (2, 2)])
def test_batches_hold_a_pair_and_its_negatives(seed, p, k):
    t, pairs = films(seed)
    negatives = cooccurring_negatives(pairs, t, True)
    s = PositivesSampler(pairs, negatives, t.rows, p, k, seed)
    owner = np.empty(sum(map(len, t.rows)), int)
    for i, r in enumerate(t.rows): owner[r] = i
    kept = [m for m in range(len(pairs)) if len(negatives[m])]
    pictures = sum(len(t.rows[i]) for m in kept for i in pairs.pairs[m])
    plan = s.plan(2)
    assert len(s) == math.ceil(pictures/k) and plan.shape == (len(s), p, k)
    which = {tuple(pairs.pairs[m]): m for m in kept}
    used = []
    for row in plan.reshape(len(s), -1):
        a, b = owner[row[0]], owner[row[k-1]]
        m = which[a, b]
        used.append(m)
        assert (owner[row[:k//2]] == a).all() and (owner[row[k//2:k]] == b).all()
        assert set(owner[row[k:]]) <= set(negatives[m])
        for part, have in ((row[:k//2], t.rows[a]), (row[k//2:k], t.rows[b])):
            assert len(set(part)) == min(len(part), len(have)) # repeated only if short
    turns = np.bincount(used, minlength=len(pairs))[kept]
    assert turns.max()-turns.min() <= 1
    assert (plan == s.plan(2)).all() and (plan != s.plan(3)).any()


def test_schedule_is_continuous_and_falls():
    rate = flat_then_exp(1e-3, 1e-6, .3)['lr']
    v = [rate(x) for x in np.linspace(0, 1, 201)]
    assert all(a >= b-1e-12 for a, b in zip(v, v[1:])) and max(v) == v[0] == 1e-3
    assert max(a/b for a, b in zip(v, v[1:])) < 1.06 and math.isclose(v[-1], 1e-6, rel_tol=1e-4)
    with pytest.raises(ValueError, match='flat=1'): flat_then_exp(1e-3, 1e-6, 1)


@pytest.mark.parametrize('key', list(BY_PRESET))
def test_settings_are_complete(key):
    s = embedding_settings(*key)
    assert set(s) == set(embedding_settings('real', 'paper')) and s['lr'] > s['lr_end'] > 0
    assert (s['p'], s['k'], s['margin']) == (18, 4, 'soft') # never a matter of the preset


def test_a_batch_of_merge_is_mixed_and_one_of_switch_is_not():
    pids, sources = np.arange(400)//4, np.repeat([0, 1], [240, 160])
    s = embedding_settings('drawn', 'ci', batches=6)
    seen = {how: [len(set(sources[b.ravel()])) for b in batch_sampler(how, pids, sources, s)]
            for how in ('merge', 'switch', 'uniform', 'equal')}
    assert seen == dict(merge=[2]*6, switch=[1]*6, uniform=[1]*6, equal=[2]*6)


def test_pictures_without_tracklets_are_tuned_with_random_negatives():
    "As on Market-1501: every picture is a tracklet of its own; labels are not asked for."
    g = rng_for('test crossdataset', 'pictures')
    images = g.integers(0, 255, (20, 64, 32, 3)).astype(np.uint8)
    s = embedding_settings('drawn', 'ci', p=3, ft_epochs=1, hidden=32, out=8)
    net = embedding_net(s, 'cpu')
    target = ReidSet(images, None, np.arange(20) % 2, name='shop')
    with quiet(): t = finetune(net, target, s, negatives='random', alpha=.3, most=5)
    assert len(t.positives) == 3 and len(t.table) == 20 and t.table.pids is None
    assert len(t.learn.retrieval.history) == 1 and t.learn.model is not net
    with pytest.raises(ValueError, match='shop: no tracklets'): finetune(net, target, s)
