"Probes, alignment and losses by camera against plain loops, on random labels."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reidlit.camera_bias import _parts, guess_source, standardise_per_camera
from reidlit.camera_labels import (accumulate_ids, camera_cross_entropy, camera_mean,
                                   check_ids)
from reidlit.core import rng_for
from tracks import case


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_cuda():
    _, x, _, which, cams, _ = case(5)
    a, b = standardise_per_camera(x, cams[which]), standardise_per_camera(x.cuda(), cams[which])
    assert b.is_cuda and torch.allclose(a, b.cpu(), atol=1e-4)


def labelled(seed, cameras=4):
    "Labels inside each camera, with holes, and the loop's numbering of them."
    g = rng_for('test ids', seed)
    n = int(g.integers(20, 200))
    camids = np.r_[np.arange(cameras), g.integers(0, cameras, n)]
    pids = g.choice(g.choice(1000, 12, replace=False), len(camids))
    return g, pids, camids


@pytest.mark.parametrize('seed', range(12))
def test_accumulating_against_a_loop(seed):
    _, pids, camids = labelled(seed)
    ids = accumulate_ids(pids, camids)
    number = {}
    for c in range(4):
        for p in sorted(set(pids[camids == c])): number[c, p] = len(number)
    assert ids.labels.tolist() == [number[c, p] for c, p in zip(camids, pids)]
    assert list(zip(ids.cameras, ids.pids)) == list(number) and len(ids) == len(number)
    assert ids.counts.tolist() == [sum(k[0] == c for k in number) for c in range(4)]
    assert ids.labels.dtype == ids.cameras.dtype == ids.pids.dtype == np.int64
    check_ids(torch.tensor(ids.labels), torch.tensor(ids.cameras), torch.tensor(camids))
    assert f'{len(number)} identities in 4 cameras' in str(ids)


def test_accumulating_takes_tensors_lists_and_any_integers():
    _, pids, camids = labelled(1)
    want = accumulate_ids(pids, camids)
    for a, b in ((torch.tensor(pids), torch.tensor(camids)), (pids.tolist(), camids.tolist()),
                 (pids.astype(np.int32), camids.astype(np.uint8)), (pids+10**17, camids)):
        got = accumulate_ids(a, b)
        assert (got.labels == want.labels).all() and (got.cameras == want.cameras).all()


@pytest.mark.parametrize('pids, camids, text', [
    (None, None, 'pids is None'), (None, [0], 'pids is None'), ([0], None, 'camids is None'),
    ([0, 1], [0], r'camids has shape \(1,\); expected \(2\)'),
    ([[0]], [0], r'pids has shape \(1, 1\)'), ([], [], 'empty'),
    ([0, 1, -2], [0]*3, 'pids: -2 in row 2'), ([0, 1], [0, -1], 'camids: -1 in row 1'),
    (['a'], [0], 'pids: <U1'), ([.5], [0], 'pids: float64'),
    ([0, 0], [1, 2], 'camera 0 has no pictures'),
    ([0]*4, [0, 1, 2, 9], r'camera 3 has no pictures.*np\.unique\(camids, return_inverse=True\)\[1\]')])
def test_accumulating_names_what_is_off(pids, camids, text):
    with pytest.raises(ValueError, match=text): accumulate_ids(pids, camids)


@pytest.mark.parametrize('seed', range(12))
def test_camera_mean_against_a_loop(seed):
    g = rng_for('test mean', seed)
    n = int(g.integers(1, 60))
    each = torch.tensor(g.normal(size=n), requires_grad=True)
    cams, valid = torch.tensor(g.integers(0, 5, n)*7-3), torch.tensor(g.random(n) < .6)
    for v in (None, valid):
        ok = torch.ones(n, dtype=torch.bool) if v is None else v
        want = sum(each[(cams == c) & ok].mean() for c in range(-3, 40)
                   if ((cams == c) & ok).any()) + 0*each.sum()
        got = camera_mean(each, cams, v)
        assert got.dtype == torch.float64 and torch.isclose(got, want)
        a, = torch.autograd.grad(got, each)
        assert torch.allclose(a, torch.autograd.grad(want, each)[0])


@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
def test_what_does_not_count_does_not_leak(bad):
    each = torch.tensor([1., bad, 4., bad], requires_grad=True)
    valid, cams = torch.tensor([True, False, True, False]), torch.tensor([0, 0, 0, 1])
    loss = camera_mean(each, cams, valid)
    loss.backward()
    assert loss == 2.5 and each.grad.tolist() == [.5, 0, .5, 0]
    each.grad = None
    loss = camera_mean(each, cams, valid & False)
    loss.backward()
    assert loss == 0 and (each.grad == 0).all()
    none = camera_mean(each[:0], cams[:0])
    assert none == 0 and none.requires_grad


def test_camera_mean_never_reads_a_value():
    "Tensors without data: what would wait for a GPU (`item`, `unique`, `if`) fails."
    each, cams = torch.ones(5, device='meta'), torch.ones(5, device='meta', dtype=torch.int64)
    assert camera_mean(each, cams, cams > 0).shape == camera_mean(each, cams).shape == ()
    with pytest.raises((RuntimeError, NotImplementedError)): cams.unique()


def test_camera_mean_refuses():
    each, cams = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    for a in ((each, cams[:2]), (each[None], cams), (each, cams, torch.ones(2) > 0)):
        with pytest.raises(ValueError, match='has shape'): camera_mean(*a)
    with pytest.raises(ValueError, match='valid: torch.int64'): camera_mean(each, cams, cams)


@pytest.mark.parametrize('seed', range(12))
def test_cross_entropy_against_separate_heads(seed):
    g, pids, camids = labelled(seed)
    ids = accumulate_ids(pids, camids)
    some = g.choice(len(pids), 16)  # a batch, in which a camera may be missing
    y, cam, of = (torch.tensor(v) for v in (ids.labels[some], camids[some], ids.cameras))
    x = torch.tensor(g.normal(size=(16, 6)))
    w = torch.tensor(g.normal(size=(len(ids), 6)), requires_grad=True)
    loss = camera_cross_entropy(x@w.T, y, of, cam)
    heads = 0
    for c in range(4):
        first = int((of < c).sum())
        head = w[first:first+int((of == c).sum())]
        if (cam == c).any(): heads = heads + F.cross_entropy(x[cam == c]@head.T, y[cam == c]-first)
    assert torch.isclose(loss, heads, atol=1e-6)
    a, = torch.autograd.grad(loss, w)
    assert torch.allclose(a, torch.autograd.grad(heads, w)[0], atol=1e-6)
    p = torch.tensor(g.permutation(len(ids)))  # identities in any order
    inverse = p.argsort()
    assert torch.isclose(camera_cross_entropy((x@w.T)[:, p], inverse[y], of[p], cam), loss)


def test_cross_entropy_sees_nothing_of_other_cameras():
    of, y = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 3])
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    other = of[y][:, None] != of
    want = camera_cross_entropy(z, y, of)
    for v in (1e30, torch.inf, torch.nan):
        z2 = z.masked_fill(other, v).requires_grad_()
        loss = camera_cross_entropy(z2, y, of)
        loss.backward()
        assert loss == want and (z2.grad[other] == 0).all() and z2.grad.isfinite().all()


def test_one_identity_alone_costs_nothing():
    of, y = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0])
    z = torch.tensor([[9., 1, 0], [-9, 0, 1], [0, 0, 0]], requires_grad=True)
    loss = camera_cross_entropy(z, y, of)
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


def test_cross_entropy_under_autocast():
    of, y = torch.tensor([0]*300+[1]*300), torch.arange(0, 600, 40)
    layer = torch.nn.Linear(32, 600, bias=False)
    x = torch.randn(15, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast('cpu', torch.bfloat16):
        z = layer(x)
        loss = camera_cross_entropy(z, y, of)
        assert z.dtype == torch.bfloat16 and loss.dtype == torch.float32
        assert camera_cross_entropy(z.double(), y, of).dtype == torch.float64
    assert torch.isclose(loss, camera_cross_entropy(z.float(), y, of), atol=1e-6)
    assert camera_mean(z[:, 0], of[y]).dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all()


def test_wrong_ids_are_named():
    of, y = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 4, 2])
    z = torch.zeros(3, 5)
    check_ids(y, of), check_ids(y, of, torch.tensor([0, 1, 1])), check_ids(y[:0], of[:0], y[:0])
    for fails, text in (((y+1, of), 'row 1: label 5, expected 0 to 4'),
                        ((y-1, of), 'row 0: label -1'),
                        ((y, of[:0]), 'row 0: label 0, expected 0 to -1'),
                        ((y, of, torch.tensor([0, 1, 0])),
                         'row 2: label 2 is of camera 1, its picture of camera 0'),
                        ((y, of, y[:2]), 'camids has shape'), ((y[None], of), 'labels has shape'),
                        ((y.float(), of), 'labels: torch.float32'),
                        ((y > 0, of), 'labels: torch.bool'),
                        ((y, of.numpy()), 'cameras: int64, expected a tensor')):
        with pytest.raises(ValueError, match=text): check_ids(*fails)
        if 'camids has' not in text:
            with pytest.raises(ValueError, match=text): camera_cross_entropy(z, *fails)
    with pytest.raises(ValueError, match='cameras has shape'): camera_cross_entropy(z[:, :4], y*0, of)
    with pytest.raises(ValueError, match='labels has shape'): camera_cross_entropy(z[:2], y, of)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_cross_entropy_on_cuda():
    of, y = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 4, 2, 1])
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    a, b = camera_cross_entropy(z, y, of), camera_cross_entropy(z.cuda(), y.cuda(), of.cuda())
    assert b.is_cuda and torch.isclose(a, b.cpu(), atol=1e-6)
    each, cams, ok = b.repeat(4), y.cuda(), z[:, 0].cuda() > 0
    camera_mean(each, cams, ok)  # kernels are loaded now
    torch.cuda.set_sync_debug_mode('error')  # waiting for the device is an error
    try: camera_mean(each, cams, ok)
    finally: torch.cuda.set_sync_debug_mode('default')
