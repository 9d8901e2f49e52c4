"Single-gallery-shot scores against plain loops and enumeration; means over trials."
from itertools import product

import numpy as np
import pytest
import torch

from reidlit.metrics.retrieval import distance_chunks, scores_from_distances
from reidlit.metrics.single_shot import (SingleShotScores, found_by,
                                    mean_over_trials, single_shot_scores)


def task(seed, Q=7, G=14, people=5, cams=3, ties=False, flags=False):
    "A random task; few distances if there shall be ties."
    r = np.random.default_rng(seed)
    dist = r.random((Q, G))
    if ties:
        dist = np.round(3*dist)
    t = dict(dist=dist, q_pids=r.integers(0, people, Q), g_pids=r.integers(0, people, G),
             q_camids=r.integers(0, cams, Q), g_camids=r.integers(0, cams, G))
    if flags:
        t |= dict(q_junk=r.random(Q) < .2, g_junk=r.random(G) < .2,
                  g_distractor=r.random(G) < .2, exclude_self=r.integers(-1, G, Q))
    return t


def allowed(t, q, separate):
    "The rows of the gallery that may be drawn for a query, by person."
    junk, lone = (np.asarray(t.get(k, np.zeros(len(t['g_pids']), bool)))
                  for k in ('g_junk', 'g_distractor'))
    people = {}
    for g, pid in enumerate(t['g_pids']):
        mine = pid == t['q_pids'][q] and not lone[g]
        near = 'g_camids' in t and t['g_camids'][g] == t['q_camids'][q]
        own = 'exclude_self' in t and t['exclude_self'][q] == g
        if not (junk[g] or own or near and (mine or separate)):
            people.setdefault(('lone', g) if lone[g] else int(pid), []).append(g)
    return people


def place(t, q, gallery):
    "The place of the right answer in a gallery of one picture a person."
    order = sorted(gallery.values(), key=lambda g: (t['dist'][q, g], g))
    return 1+order.index(gallery[int(t['q_pids'][q])])


def enumerate_all(t, K, separate=False):
    "The CMC as the mean over every possible gallery, and who was skipped."
    curves, skipped = [], 0
    for q in range(len(t['q_pids'])):
        if t.get('q_junk', np.zeros(99, bool))[q]:
            continue
        people = allowed(t, q, separate)
        if int(t['q_pids'][q]) not in people:
            skipped += 1
            continue
        places = np.array([place(t, q, dict(zip(people, rows)))
                           for rows in product(*people.values())])
        curves.append([(places <= k).mean() for k in range(1, K+1)])
    return np.mean(curves, 0), skipped


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('flags', [False, True])
@pytest.mark.parametrize('separate', [False, True])
def test_exact_is_the_mean_over_all_galleries(seed, ties, flags, separate):
    t = task(seed, ties=ties, flags=flags)
    cmc, skipped = enumerate_all(t, 8, separate)
    s = single_shot_scores(**t, max_rank=8, separate=separate)
    np.testing.assert_allclose(s.cmc, cmc, atol=1e-12)
    assert s.skipped == skipped and s.spread is None


@pytest.mark.parametrize('seed, separate', [(0, False), (1, True)])
def test_a_plain_loop_that_draws(seed, separate):
    "One random picture a person, a thousand times, as other packages do."
    t = task(seed, Q=12, G=40, people=8)
    r, hits, n = np.random.default_rng(5), np.zeros(8), 0
    for q in range(12):
        people = allowed(t, q, separate)
        if int(t['q_pids'][q]) not in people:
            continue
        n += 1
        for _ in range(1000):
            drawn = {p: r.choice(rows) for p, rows in people.items()}
            hits[place(t, q, drawn)-1:] += 1/1000
    s = single_shot_scores(**t, max_rank=8, separate=separate)
    np.testing.assert_allclose(s.cmc, hits/n, atol=.02)
    d = single_shot_scores(**t, max_rank=8, separate=separate, draws=4000)
    np.testing.assert_allclose(d.cmc, s.cmc, atol=.01)
    assert np.nanmax(abs(d.first-s.first)) < .05
    assert (np.isnan(d.first) == np.isnan(s.first)).all()


def test_spread_is_that_of_single_draws():
    "Queries are drawn independently, so variances of their hits add up."
    t = task(3, Q=30, G=60, people=10)
    s = single_shot_scores(**t)
    p = s.first[~np.isnan(s.first)]
    expected = np.sqrt((p*(1-p)).sum())/len(p)
    d = single_shot_scores(**t, draws=3000)
    assert abs(d.spread[0]/expected-1) < .1
    means = [single_shot_scores(**t, draws=10, rng=np.random.default_rng(k)).cmc[0]
             for k in range(200)]
    assert abs(np.std(means)/(expected/10**.5)-1) < .2


def test_draws_repeat_with_the_generator():
    t = task(4)
    a, b = (single_shot_scores(**t, draws=7) for _ in 'ab')
    c = single_shot_scores(**t, draws=7, rng=np.random.default_rng(0))
    d = single_shot_scores(**t, draws=7, rng=np.random.default_rng(1))
    assert (a.cmc == b.cmc).all() and (a.cmc == c.cmc).all() and (a.cmc != d.cmc).any()


def test_one_picture_a_person_is_the_usual_cmc():
    r = np.random.default_rng(0)
    dist = r.random((40, 40)).round(1)
    who = r.permutation(40)
    for kw in ({}, dict(q_camids=np.zeros(40, int), g_camids=np.ones(40, int))):
        s = single_shot_scores(dist, np.arange(40), who, **kw)
        np.testing.assert_allclose(
            s.cmc, scores_from_distances(dist, np.arange(40), who, **kw).cmc, atol=1e-12)


def test_blocks_tensors_and_types():
    r = np.random.default_rng(0)
    q, g = r.normal(size=(9, 4)), r.normal(size=(25, 4))
    qp, gp = r.integers(0, 4, 9), r.integers(0, 4, 25)
    whole = single_shot_scores(np.concatenate(list(distance_chunks(q, g))), qp, gp)
    blocks = single_shot_scores(distance_chunks(q, g, memory_mb=0), qp, gp)
    tensor = single_shot_scores(torch.cdist(torch.tensor(q), torch.tensor(g)),
                                torch.tensor(qp), torch.tensor(gp))
    assert (whole.cmc == blocks.cmc).all()
    np.testing.assert_allclose(whole.cmc, tensor.cmc)
    order = r.permutation(25)
    moved = single_shot_scores(np.concatenate(list(distance_chunks(q, g[order]))),
                               qp, gp[order])
    np.testing.assert_allclose(whole.cmc, moved.cmc)


def test_curve_rises_to_one():
    t = task(6, Q=20, G=50, people=6)
    s = single_shot_scores(**t, max_rank=6)
    assert (np.diff(s.cmc) >= -1e-12).all() and abs(s.cmc[-1]-1) < 1e-12
    np.testing.assert_allclose(np.nanmean(s.first), s.cmc[0])
    short = single_shot_scores(**t, max_rank=2)
    np.testing.assert_allclose(short.cmc, s.cmc[:2])


@pytest.mark.parametrize('draws', [None, 5])
def test_queries_without_a_match(draws):
    dist = np.array([[.1, .2], [.1, .2]])
    s = single_shot_scores(dist, [1, 8], [1, 2], draws=draws)
    assert s.skipped == 1 and s.cmc[0] == 1 and np.isnan(s.first[1])
    s = single_shot_scores(dist, [1, 1], [1, 2], q_junk=[False, True], draws=draws)
    assert s.skipped == 0 and np.isnan(s.first[1])
    for kw in (dict(q_pids=[8, 9]), dict(g_junk=[True, False], q_pids=[1, 1]),
               dict(q_pids=[1, 1], q_camids=[0, 0], g_camids=[0, 0])):
        with pytest.raises(ValueError, match='no query has a match'):
            single_shot_scores(dist, g_pids=[1, 2], draws=draws, **kw)


@pytest.mark.parametrize('kw, message', [
    (dict(max_rank=0), 'max_rank=0: expected 1 or more'),
    (dict(draws=0), 'draws=0'), (dict(draws=-3), 'draws=-3'),
    (dict(separate=True), 'needs camera ids'), (dict(q_camids=[0]), 'give both'),
    (dict(g_junk=[True]), 'g_junk'), (dict(dist=np.full((1, 2), np.nan)), 'dist has NaN'),
    (dict(dist=np.zeros((1, 3))), r'expected \(1, 2\)'),
    (dict(dist=np.zeros((2, 2))), r'expected \(1, 2\)'),
    (dict(dist=[]), 'dist has 0 rows; expected 1')])
def test_misuse(kw, message):
    with pytest.raises(ValueError, match=message):
        single_shot_scores(**{**dict(dist=np.zeros((1, 2)), q_pids=[1], g_pids=[1, 2]), **kw})


def test_rules():
    t = task(2, flags=True)
    s = str(single_shot_scores(**t))
    assert 'distractors kept, each as a person' in s and 'exact mean over all draws' in s
    assert 'same person in the same camera' in s
    s = str(single_shot_scores(**task(2), separate=True, draws=10))
    assert "all of the query's own camera" in s and 'of 10 draws' in s and '±' in s
    assert 'no camera ids' in str(single_shot_scores(np.zeros((1, 2)), [1], [1, 2]))


# The Poisson binomial

@pytest.mark.parametrize('n', [0, 1, 2, 6])
def test_found_by_enumerated(n):
    p = np.random.default_rng(n).random((3, n))
    ahead = np.array(list(product((0, 1), repeat=n))).reshape(2**n, n)
    for row, f in zip(p, found_by(p, n+1)):
        chance = np.where(ahead, row, 1-row).prod(1)
        want = [chance[ahead.sum(1) <= k].sum() for k in range(n+1)]
        np.testing.assert_allclose(f, want, atol=1e-12)


def test_found_by_limits():
    f = found_by(np.random.default_rng(0).random((4, 300)), 50)
    assert f.shape == (4, 50) and (np.diff(f) >= 0).all() and f.max() <= 1
    np.testing.assert_allclose(found_by(np.ones((1, 3)), 5), [[0, 0, 0, 1, 1]])
    np.testing.assert_allclose(found_by(np.full((1, 9), .5), 1), .5**9)


# Means over trials

def test_mean_over_trials_of_each_kind():
    t = [task(k, Q=20, G=40) for k in range(4)]
    many = [scores_from_distances(**x, max_rank=5) for x in t]
    one = [single_shot_scores(**x, max_rank=5) for x in t]
    for scores in (many, one, [s.cmc for s in many]):
        m = mean_over_trials(scores)
        c = np.array([getattr(s, 'cmc', s) for s in scores])
        np.testing.assert_allclose(m.cmc, c.mean(0))
        np.testing.assert_allclose(m.spread, c.std(0, ddof=1))
        assert m.n == 4 and '4 trials' in str(m)
    m = mean_over_trials(many)
    aps = [s.mAP for s in many]
    np.testing.assert_allclose((m.mAP, m.mAP_spread), (np.mean(aps), np.std(aps, ddof=1)))
    assert 'mAP' in str(m) and mean_over_trials(one).mAP is None
    assert 'removed per query: same person in the same camera' in m.rules
    assert not any('junk removed' in r for r in mean_over_trials(
        [many[0], scores_from_distances(**task(0, flags=True), max_rank=5)]).rules)


def test_mean_over_trials_small_and_wrong():
    one = mean_over_trials(iter([scores_from_distances(**task(0))]))
    assert one.n == 1 and np.isnan(one.spread).all()
    assert '±' not in str(one).splitlines()[0]
    for bad in ([], [[.1], [.1, .2]], [[.1], single_shot_scores(**task(0), max_rank=1)], [.5],
                [scores_from_distances(**task(0)), single_shot_scores(**task(0))]):
        with pytest.raises(ValueError, match='expected one kind of score'):
            mean_over_trials(bad)
    assert isinstance(single_shot_scores(**task(0)), SingleShotScores)
