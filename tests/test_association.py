"Association against distance matrices and plain loops, with ties and odd numbers."
import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from reidlit.ics.association import (Association, _agree, camera_blocks, _Nearest, associate,
                                 nearest_pairs, plot_association)
from reidlit.core import rng_for

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get('REIDLIT_REAL', ROOT.parent/'shared'/'data'))


def case(seed, whole):
    "Centroids, cameras with odd numbers, S; whole coordinates give many equal distances."
    g = rng_for('test association', seed)
    n = int(g.integers(4, 45))
    cams = g.permutation(np.array([7, 2, 2, 30])[np.arange(n) % 4])
    x = g.integers(1, 6, (n, 2)).astype(float) if whole else g.normal(size=(n, 5))
    return x, cams, int(g.integers(1, n*n//2+2))


def table(x, cams, most=None):
    "The nearest pairs from all distances, and these."
    x = np.asarray(x, float)
    d = np.sqrt(((x[:, None]-x[None])**2).sum(-1))
    i, j = np.triu_indices(len(x), 1)
    k = cams[i] != cams[j]
    i, j = i[k], j[k]
    k = np.lexsort((j, i, d[i, j]))[:most]
    return np.stack([i[k], j[k]], 1), d[i, j][k], d


def eq6(x, cams, S):
    pairs, dist, d = table(x, cams)
    T = dist[S-1] if S <= len(dist) else np.inf

    def nearest(i, camera):
        mates = np.flatnonzero(cams == camera)
        return mates[d[i, mates].argmin()]
    return [[i, j] for i, j in pairs.tolist() if d[i, j] < T
            and nearest(i, cams[j]) == j and nearest(j, cams[i]) == i]


def greedy(x, cams, S):
    out = []
    for i, j in table(x, cams, S)[0].tolist():
        met = any((i in e and cams[e[0]+e[1]-i] == cams[j]) or
                  (j in e and cams[e[0]+e[1]-j] == cams[i]) for e in out)
        if not met: out.append([i, j])
    return out


def components(edges, n):
    "Labels by repeated merging, numbered by first row."
    label = list(range(n))
    for i, j in edges:
        a, b = label[i], label[j]
        label = [a if v == b else v for v in label]
    return np.unique([label.index(v) for v in label], return_inverse=True)[1]


@pytest.mark.parametrize('whole', [False, True])
def test_against_the_matrix(whole):
    for seed in range(30):
        x, cams, S = case(seed, whole)
        rows, dist, _ = table(x, cams, S)
        for chunk in (2048, 5):
            got, d = nearest_pairs(x, cams, S, chunk)
            assert got.dtype == np.int64 and d.dtype == np.float64
            np.testing.assert_array_equal(got, rows)
            np.testing.assert_allclose(d, dist, rtol=1e-12)
        a, b = associate(x, cams, S), associate(x, cams, S, 'greedy')
        assert a.edges.tolist() == eq6(x, cams, S)
        assert b.edges.tolist() == greedy(x, cams, S)
        assert set(map(tuple, a.edges.tolist())) <= set(map(tuple, b.edges.tolist()))
        every = table(x, cams)[1]
        assert a.threshold == b.threshold
        assert np.isclose(a.threshold, every[S-1]) if S <= len(every) else np.isinf(a.threshold)
        for v in (a, b):
            np.testing.assert_array_equal(v.labels, components(v.edges, len(x)))
            assert (np.diff(v.distance) >= 0).all()


def test_default_S_and_left_out():
    x, cams, _ = case(3, False)
    a, b = associate(x, cams), associate(x, cams, len(x))
    np.testing.assert_array_equal(a.edges, b.edges)
    c = associate(x, cams, keep_singletons=False)
    alone = np.bincount(a.labels)[a.labels] == 1
    assert alone.any() and (~alone).any()
    np.testing.assert_array_equal(c.labels == -1, alone)
    kept = np.unique(a.labels[~alone], return_inverse=True)[1]
    np.testing.assert_array_equal(c.labels[~alone], kept)
    assert 'left out' in str(c) and 'left out' not in str(a)
    none = associate(x, cams, 1, keep_singletons=False)
    assert (none.labels == -1).all() and '0 pairs' in str(none)
    s = none.scores(np.arange(len(x)) % 3)
    assert np.isnan(s['precision']) and s['recall'] == 0 and s['groups'] == 0


def test_order_of_rows_does_not_matter():
    x, cams, _ = case(11, False)
    turn = rng_for('turn').permutation(len(x))
    a, b = associate(x, cams), associate(x[turn], cams[turn])
    key = lambda e: set(map(tuple, np.sort(e, 1).tolist()))
    assert key(a.edges) == key(turn[b.edges])


@pytest.mark.parametrize('kind', ['float32', 'float16', 'float64', 'list', 'grad'])
def test_kinds_of_input(kind):
    x, cams, _ = case(5, True)
    want = associate(x, cams)
    given = dict(float32=torch.tensor(x).float(), float16=torch.tensor(x).half(),
                 float64=x, list=x.tolist(), grad=torch.tensor(x, requires_grad=True))
    got = associate(given[kind], torch.tensor(cams))
    np.testing.assert_array_equal(got.edges, want.edges)
    np.testing.assert_array_equal(got.labels, want.labels)


@pytest.mark.parametrize('how', ['far', 'cameras', 'tiny', 'huge', 'lengths', 'equal', 'same'])
def test_hard_numbers(how):
    "Sums in float32 are off here; what is returned must not be."
    g = rng_for('hard', how)
    x, cams = g.normal(size=(300, 8)), np.arange(300) % 3
    if how == 'far': x += 1e4
    if how == 'cameras': x += 3e3*np.eye(8)[cams]
    if how == 'tiny': x *= 1e-25
    if how == 'huge': x *= 1e25
    if how == 'lengths': x *= 10.**g.integers(-6, 6, (300, 1))
    if how == 'equal': x[:] = 1
    if how == 'same': x = np.repeat(x[:60], 5, 0)
    x = x.astype(np.float32)
    for S in (7, 300, 2500):
        rows, d, _ = table(x, cams, S)
        got, near = nearest_pairs(x, cams, S, 64)
        np.testing.assert_allclose(near, d, rtol=1e-9)
        np.testing.assert_array_equal(got, rows)


@pytest.mark.parametrize('precision', ['high', 'medium'])
def test_coarse_products_give_the_same(precision):
    g = rng_for('coarse')
    x, cams = torch.from_numpy(g.normal(size=(400, 64))).float(), np.arange(400) % 4
    want = nearest_pairs(x, cams, 400)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        got = nearest_pairs(x, cams, 400)
    finally: torch.set_float32_matmul_precision(before)
    with torch.autocast('cpu', torch.bfloat16): half = nearest_pairs(x, cams, 400)
    for v in (got, half):
        np.testing.assert_array_equal(v[0], want[0])
        np.testing.assert_array_equal(v[1], want[1])


def test_no_large_block(monkeypatch):
    "Each pair of cameras is multiplied once, in blocks of at most chunk x chunk."
    sizes, plain = [], torch.addmm
    def spy(*a, **k):
        out = plain(*a, **k)
        sizes.append(tuple(out.shape))
        return out
    monkeypatch.setattr(torch, 'addmm', spy)
    cams = np.repeat([0, 1, 2], [500, 30, 270])
    nearest_pairs(rng_for('blocks').normal(size=(800, 4)), cams, 800, 100)
    assert max(map(max, sizes)) == 100
    assert sum(a*b for a, b in sizes) == 500*30+500*270+30*270


def testcamera_blocks_hold_every_pair_of_two_cameras_once():
    assert [(a.start, a.stop, b.start, b.stop) for a, b in camera_blocks([0, 3, 6, 9], 6)] == \
        [(0, 3, 3, 9), (3, 6, 6, 9)]
    start = [0, 4, 5, 12]
    which = np.repeat(range(3), np.diff(start))
    met = [(i, j) for a, b in camera_blocks(start, 3) for i in range(12)[a] for j in range(12)[b]]
    assert sorted(met) == [(i, j) for i in range(12) for j in range(i+1, 12) if which[i] != which[j]]


def test_what_is_forgotten_is_farther():
    "Loose bounds keep more pairs than S, never fewer of the nearest."
    x, cams, _ = case(4, False)
    rows, dist, _ = table(x, cams)
    for loose in (1e-6, .3):
        near = _Nearest(torch.from_numpy(x), size=8, most=9)
        bound = torch.from_numpy(dist/8).square()
        near.add(torch.from_numpy(rows.T[::-1].copy()), bound*(1-loose), bound*(1+loose))
        near.prune()
        assert 9 <= near.held < len(dist) and (near.held == 9) == (loose < .1)
        got, d = near.measured(near.parts[0][0])
        np.testing.assert_array_equal(got.T, rows[:9])
        np.testing.assert_allclose(d, dist[:9], rtol=1e-12)


def test_scores_against_loops():
    for seed in range(20):
        x, cams, S = case(seed, seed % 2)
        pids = rng_for('people', seed).integers(0, 6, len(x))
        a = associate(x, cams, min(S, 2*len(x)), ['reciprocal', 'greedy'][seed % 2],
                      keep_singletons=seed % 3 > 0)
        n = len(x)
        pairs = [(i, j) for i in range(n) for j in range(i+1, n)]
        same = lambda i, j: pids[i] == pids[j]
        other = lambda i, j: cams[i] != cams[j]
        true = sum(same(*p) and other(*p) for p in pairs)
        joined = [p for p in pairs if a.labels[p[0]] == a.labels[p[1]] >= 0
                  and (other(*p) or not same(*p))]
        right, found = sum(same(*e) for e in a.edges), sum(same(*p) for p in joined)
        wrong = sum(not other(*p) for p in joined)
        share = lambda a, b: a/b if b else np.nan
        want = dict(precision=share(right, len(a.edges)), recall=share(right, true),
                    joined_precision=share(found, len(joined)),
                    joined_recall=share(found, true), same_camera=wrong,
                    people=len(set(pids)), groups=len(set(a.labels[a.labels >= 0])))
        got = a.scores(pids)
        assert got.keys() == want.keys()
        np.testing.assert_allclose(list(got.values()), list(want.values()))


def test_errors_name_the_value():
    x, cams, _ = case(1, False)
    n = len(x)
    hole, unseen = x.copy(), x.copy()
    hole[2, 1], unseen[3] = np.inf, 0
    for args, text in [((hole, cams), 'first in row 2'),
                       ((unseen, cams), 'row 3 is zero'),
                       ((x, cams[1:]), f'cameras has shape \\({n-1},\\); expected \\({n}\\)'),
                       ((x, cams*0+5), 'cameras: only \\[5\\], expected 2 or more'),
                       ((x, cams+.5), 'expected whole numbers'),
                       ((x[0], cams), 'expected \\(N D\\)'),
                       ((x[:0], cams[:0]), 'cameras: only'),
                       ((x, cams, 0), 'S=0: expected a whole number from 1'),
                       ((x, cams, 1.5), 'S=1.5'), ((x, cams, -3), 'S=-3'),
                       ((x, cams, 5, 'best'), "rule='best': expected 'reciprocal' or 'greedy'")]:
        with pytest.raises(ValueError, match=text): associate(*args)
    with pytest.raises(ValueError, match='chunk=0'): nearest_pairs(x, cams, 5, 0)
    with pytest.raises(ValueError, match='pids has shape'): associate(x, cams).scores(cams[1:])


def test_a_picture_draws_every_edge():
    x, cams, _ = case(8, False)
    pids = np.arange(len(x))//3
    a = associate(x, cams)
    for p in (None, pids):
        ax = plot_association(x, a, p, method='pca')
        assert len(ax.collections[0].get_segments()) == len(a.edges)
    plt.close('all')


def test_market_cannot_have_that_recall():
    "The notebook's 3,262 identities and 5,874 true pairs, from the official list."
    lists = REAL/'market1501_lists'/'market1501_train.csv'
    if not lists.exists(): pytest.skip(f'{lists} is absent')
    names = [l.split('/')[-1] for l in lists.read_text().split() if l.endswith('.jpg')]
    seen = np.array(sorted({(int(n[:4]), int(n[6])) for n in names}))
    assert len(seen) == 3262 and len(np.unique(seen[:, 0])) == 751
    assert _agree(seen[:, 0]) == 5874


def test_line():
    a = Association(np.array([[0, 1]]), np.ones(1), np.array([0, 0, 1]), np.array([0, 1, 1]), 2.)
    assert str(a) == '3 identities of 2 cameras: 1 pair within 2, 2 joined into 1 group, 1 alone'
