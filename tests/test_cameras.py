"Probes, alignment and tracklets against plain loops, on random labels."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reidlit.cameras import (_parts, guess_source, pool_tracklets,
                             standardise_per_camera, tracklet_table)
from reidlit.core import ReidSet, rng_for


def case(seed, tracks=12):
    "Features, tracklets in any order of rows, and the tracklets' labels."
    g = rng_for('test cameras', seed)
    ids = np.sort(g.choice(1000, tracks, replace=False))
    which = g.permutation(np.repeat(np.arange(tracks), g.integers(1, 9, tracks)))
    cams, pids = g.integers(0, 3, tracks), g.integers(0, 5, tracks)
    x = torch.tensor(g.normal(2, 3, (len(which), 7)), dtype=torch.float32)
    return g, x, ids, which, cams, pids


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


@pytest.mark.parametrize('seed', range(12))
def test_standardising_against_a_loop(seed):
    _, x, _, which, _, _ = case(seed, tracks=4)
    x[:, 2] = torch.tensor(which)*.1  # varies between cameras only
    out = standardise_per_camera(x, which)
    for i in range(4):
        m = x[which == i].double()
        want = (m-m.mean(0))/m.std(0, correction=0)
        want[:, 2] = 0
        if len(m) == 1: want[:] = 0
        assert torch.allclose(out[which == i].double(), want, atol=1e-4)
    assert out.dtype == torch.float32 and (out[:, 2] == 0).all()


def test_standardising_is_blind_to_gain_and_offset_of_a_camera():
    g, x, _, which, _, _ = case(3, tracks=4)
    gain, offset = g.uniform(.5, 3, (4, 7)), g.normal(size=(4, 7))
    seen = x*torch.tensor(gain[which]).float()+torch.tensor(offset[which]).float()
    a, b = standardise_per_camera(x, which), standardise_per_camera(seen, which)
    assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('align', [False, True])
def test_probe_against_scikit_learn(seed, align):
    g = rng_for('test probe', seed)
    who, y = g.integers(0, 30, 240), g.integers(0, 3, 240)
    x = g.normal(size=(240, 6))+y[:, None]*g.uniform(0, .6, 6)
    # aligned, a linear probe is blind and decides by rounding: take neighbours
    model = KNeighborsClassifier(5) if align else LogisticRegression(max_iter=1000)
    probe = guess_source(x, y+7, who, seed=seed, align=align,
                         classifier=model if align else None)
    part = _parts(y, np.unique(who, return_inverse=True)[1], 5, seed)
    for p in range(30): assert len(set(part[who == p])) <= 1
    clf = make_pipeline(StandardScaler(), model)
    if not align: guess = cross_val_predict(clf, x, y, cv=PredefinedSplit(part))
    else:
        guess, z = np.empty_like(y), np.empty_like(x)
        for k in range(5):
            for side in (part == k, part != k):
                for c in range(3):
                    m = side & (y == c)
                    z[m] = (x[m]-x[m].mean(0))/x[m].std(0)
            clf.fit(z[part != k], y[part != k])
            guess[part == k] = clf.predict(z[part == k])
    want = [[((y == a) & (guess == b)).sum() for b in range(3)] for a in range(3)]
    assert (probe.confusion == want).all()
    assert (probe.sources == [7, 8, 9]).all() and probe.people == len(set(who))
    assert probe.accuracy == (guess == y).mean()
    recall = [(guess[y == c] == c).mean() for c in range(3)]
    assert np.allclose(probe.recall, recall) and np.isclose(probe.balanced, np.mean(recall))
    assert probe.chance == np.bincount(y).max()/240


@pytest.mark.parametrize('seed', range(20))
def test_parts(seed):
    "Equal numbers of people; people of one data set only are spread evenly."
    g = rng_for('test parts', seed)
    home = np.sort(g.integers(0, 3, 40))
    who = np.r_[np.arange(40), g.integers(0, 40, 100)]
    folds = int(g.integers(2, 7))
    part = _parts(home[who], who, folds, seed)
    of = part[:40]
    assert (part == of[who]).all()
    assert np.ptp(np.bincount(of, minlength=folds)) <= 1
    for s in range(3):
        assert np.ptp(np.bincount(of[home == s], minlength=folds)) <= 1


def test_the_probe_is_the_same_again_and_takes_tensors():
    g = rng_for('again')
    x, y, who = g.normal(size=(60, 4)), g.integers(0, 2, 60), np.arange(60)//3
    a, b = guess_source(x, y, who), guess_source(torch.tensor(x), torch.tensor(y), torch.tensor(who))
    assert (a.confusion == b.confusion).all()


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
    a, b = standardise_per_camera(x, cams[which]), standardise_per_camera(x.cuda(), cams[which])
    assert b.is_cuda and torch.allclose(a, b.cpu(), atol=1e-4)
