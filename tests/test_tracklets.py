"Tracklets against plain loops, on random labels."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reidlit.core import ReidSet
from reidlit.tracklets import pool_tracklets, tracklet_table
from tracks import case


@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('normalise', [None, 'before', 'after'])
def test_pooling_against_a_loop(seed, normalise):
    _, x, ids, which, cams, pids = case(seed)
    mean, t, c, p, none = pool_tracklets(x, ids[which], ids[which], cams[which],
                                         pids[which], None, normalise=normalise)
    loop = []
    for i in range(len(ids)):
        rows = [x[j] for j in range(len(x)) if which[j] == i]
        if normalise == 'before': rows = [r/r.norm() for r in rows]
        m = sum(rows)/len(rows)
        loop.append(m/m.norm() if normalise == 'after' else m)
    assert mean.dtype == torch.float32 and torch.allclose(mean, torch.stack(loop), atol=1e-5)
    assert (t == ids).all() and (c == cams).all() and (p == pids).all() and none is None


def test_pooling_takes_arrays_halves_and_tensors_of_labels():
    _, x, ids, which, cams, _ = case(1)
    mean, c = pool_tracklets(x, torch.tensor(ids[which]), torch.tensor(cams[which]))
    assert (c == cams).all()
    assert torch.equal(pool_tracklets(x.numpy(), ids[which])[0], mean)
    half, = pool_tracklets(x.half(), ids[which])
    assert half.dtype == torch.float32 and torch.allclose(half, mean, atol=1e-2)
    junk = cams[which] == 0
    assert pool_tracklets(x, ids[which], junk)[1].dtype == bool


@pytest.mark.parametrize('seed', range(8))
def test_a_label_that_changes_is_named(seed):
    g, x, ids, which, cams, _ = case(seed)
    counts = np.bincount(which)
    t = g.choice(np.flatnonzero(counts > 1))
    labels = cams[which]
    labels[g.choice(np.flatnonzero(which == t))] += 1
    with pytest.raises(ValueError, match=rf'tracklet {ids[t]}: labels\[1\]'):
        pool_tracklets(x, ids[which], None, labels)
    with pytest.raises(ValueError, match=f'tracklet {ids[t]}: camids'):
        tracklet_table(ReidSet(np.zeros((len(x), 2, 1, 3), np.uint8), None, labels,
                               ids[which]))


def test_table():
    g, _, ids, which, cams, pids = case(4)
    n = len(which)
    s = ReidSet(np.zeros((n, 2, 1, 3), np.uint8), pids[which], cams[which], ids[which],
                g.permutation(n))
    t = tracklet_table(s)
    assert len(t) == 12 and (t.tids == ids).all()
    assert (t.camids == cams).all() and (t.pids == pids).all()
    for i, r in enumerate(t.rows):
        assert set(r) == set(np.flatnonzero(which == i))
        assert (np.diff(s.frames[r]) > 0).all()
        assert (t.start[i], t.end[i]) == (s.frames[r].min(), s.frames[r].max())


def test_normalising_a_zero_row_is_finite():
    mean, = pool_tracklets(torch.zeros(3, 2), [0, 0, 1], normalise='before')
    assert mean.isfinite().all()
    assert F.normalize(mean).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_cuda():
    _, x, ids, which, cams, _ = case(5)
    a, b = pool_tracklets(x, ids[which])[0], pool_tracklets(x.cuda(), ids[which])[0]
    assert b.is_cuda and torch.allclose(a, b.cpu(), atol=1e-5)
