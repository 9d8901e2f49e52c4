"The two stages of intra-camera supervision, on a tiny world: labels, losses, resuming."
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reidlit.ics as ics
from reidlit.ics.association import Association
from reidlit.camera_labels import accumulate_ids
from reidlit.core import DataError, rng_for
from reidlit.data.world import World
from reidlit.ics import (BY_PRESET, PUBLISHED, VARIANTS, CameraMemory, IcsLoss, IcsModel, associate,
                         fit_ics, fit_stage, ics_learner, ics_settings, identity_centroids,
                         join_identities, quintuplet_loss, step_decay)
from reidlit.learner import extract_features, quiet
from reidlit.runs import Checkpoints, check_folder, load_model, read_checkpoint

SHORT = ics_settings('drawn', 'ci', p=6, epochs=(1, 1), milestones=((), ()))
PLAN = SHORT | dict(epochs=(2, 2), milestones=((1,), (1,)))


@pytest.fixture(scope='module')
def train(): return World(people=24, cameras=3, layout='disjoint', style=.5, crowd=12).crops('train')


@pytest.fixture(scope='module', autouse=True)
def silence():
    with quiet(): yield


@pytest.fixture(scope='module')
def m5(train): return fit_ics(train, 'M5', SHORT, device='cpu').learn


def fit(train, variant, settings=SHORT, **kwargs):
    return fit_ics(train, variant, settings, device='cpu', **kwargs)


def weights(fit): return [l.model.state_dict() for l in (fit.first, fit.learn)]


def same(a, b):
    "Are two models' states equal to the bit?"
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def per_camera(train, change):
    "The set with other labels in each camera: `change(camera, old labels)`."
    pids = train.pids.copy()
    for c in np.unique(train.camids):
        m = train.camids == c
        old, at = np.unique(train.pids[m], return_inverse=True)
        pids[m] = np.asarray(change(c, old))[at]
    return replace(train, pids=pids)


# Every variant

@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_trains(train, m5, variant):
    after = VARIANTS[variant]['labels'] != 'camera'
    f = fit(train, variant, first=m5 if after else None)
    history = f.learn.retrieval.history
    assert len(history) == 1 and np.isfinite(history[0]['train_loss'])
    assert all(w.isfinite().all() for w in f.learn.model.state_dict().values())
    assert (f.association is not None) == (VARIANTS[variant]['labels'] == 'joined')
    memory, heads = f.learn.model.memory, f.learn.model.classifier
    assert (memory is None) != (heads is None)
    if memory is None: assert len(heads.weight) == len(f.learn.dls.classes)
    else:
        assert memory.seen.all() and memory.across == VARIANTS[variant]['across']
        assert torch.allclose(memory.centroids.norm(dim=1), torch.ones(()), atol=1e-5)
        assert len(memory.centroids) == len(f.learn.dls.classes)
        assert not memory.centroids.requires_grad


def test_stage_two_begins_with_the_backbone_of_stage_one(train, m5):
    learn = ics_learner(train, 'M8', SHORT, m5.model, device='cpu')
    for part in ('body', 'neck'):
        a, b = (getattr(m, part).state_dict() for m in (learn.model, m5.model))
        assert same(a, b)
        assert all(x.data_ptr() != y.data_ptr() for x, y in zip(a.values(), b.values()))


def test_m7_and_m8_differ_in_labels_only(train, m5, monkeypatch):
    "M7 whose association is the truth ends with M8's weights."
    assert VARIANTS['M7'] | dict(labels='true') == VARIANTS['M8']
    m8 = fit(train, 'M8', first=m5)
    m7 = fit(train, 'M7', first=m5)
    assert not same(m7.learn.model.state_dict(), m8.learn.model.state_dict())
    def truth(centroids, cameras, *_):
        who = np.unique(m5.ids.pids, return_inverse=True)[1]
        return Association(np.zeros((0, 2), int), np.zeros(0), who, np.asarray(cameras), np.inf)
    monkeypatch.setattr(ics, 'associate', truth)
    m7 = fit(train, 'M7', first=m5)
    assert same(m7.learn.model.state_dict(), m8.learn.model.state_dict())


def test_m6_m7_and_m8_leave_stage_one_as_it_was(train, m5):
    before = {k: v.clone() for k, v in m5.model.state_dict().items()}
    for variant in ('M6', 'M7', 'M8'):
        assert fit(train, variant, first=m5).first is m5
    assert same(before, m5.model.state_dict())


# Nothing across cameras is seen

@pytest.mark.parametrize('variant', ['M1', 'M2', 'M3', 'M5', 'M7'])
def test_numbers_across_cameras_are_not_seen(train, variant):
    "Other numbers in each camera, in the same order: the same weights, to the bit."
    g = rng_for('test ics', 'numbers')
    def apart(c, old): return 1000*c + old
    def anything(c, old): return np.sort(g.choice(10**6, len(old), replace=False))
    want, ids = weights(fit(train, variant)), accumulate_ids(train.pids, train.camids)
    for change in (apart, anything):
        other = per_camera(train, change)
        got = accumulate_ids(other.pids, other.camids)
        assert (got.labels == ids.labels).all() and (got.cameras == ids.cameras).all()
        assert all(same(a, b) for a, b in zip(weights(fit(other, variant)), want))


def test_the_same_test_notices_labels_across_cameras(train, m5):
    "M8, which is given the truth, does change."
    other = per_camera(train, lambda c, old: 1000*c + old)
    a, b = (fit(t, 'M8', first=m5).learn for t in (train, other))
    assert len(a.dls.classes) == len(set(train.pids)) and len(b.dls.classes) == len(m5.ids)
    assert not same(a.model.state_dict(), b.model.state_dict())


def test_any_order_of_numbers_is_the_same_structure(train):
    "People of a camera renamed at random: the same groups of pictures, in another order."
    g = rng_for('test ics', 'order')
    other = per_camera(train, lambda c, old: g.permutation(old))
    a, b = (ics_learner(t, 'M5', SHORT, device='cpu').ids for t in (train, other))
    assert (a.counts == b.counts).all() and (a.labels != b.labels).any()
    pairs = set(zip(a.labels.tolist(), b.labels.tolist()))
    assert len(pairs) == len(a) == len(b) # one to one
    assert all(a.cameras[i] == b.cameras[j] for i, j in pairs)


# Losses

def batch(variant, cams=(0, 0, 1, 1, 2), dtype=None, settings=SHORT):
    "A model in training, a batch of two pictures an identity, and the loss."
    torch.manual_seed(3)
    cams, row = torch.tensor(cams), VARIANTS[variant]
    memory = CameraMemory(cams, 128, across=row['across']) if row['classifier'] == 'memory' else None
    model = IcsModel('tiny16', memory, n_classes=0 if memory else len(cams), dtype=dtype)
    if memory: memory.start(torch.randn(len(cams), 128), torch.arange(len(cams)))
    else: torch.nn.init.normal_(model.classifier.weight, std=.3)
    y = torch.arange(len(cams)).repeat_interleave(2)
    return model, torch.randn(len(y), 3, 64, 32), y, IcsLoss(model, cams, row, settings)


def test_m1_is_one_classifier_a_camera():
    model, x, y, loss = batch('M1')
    pred = model(x)
    got = loss(pred, y)
    f, w, total = F.batch_norm(pred.pooled, None, None, training=True), model.classifier.weight, 0
    for c, first, n in ((0, 0, 2), (1, 2, 2), (2, 4, 1)):
        head = torch.nn.Linear(128, n, bias=False)
        head.weight.data = w[first:first+n].detach()
        m = (y >= first) & (y < first+n)
        total = total + F.cross_entropy(head(f[m]), y[m]-first)
    assert torch.allclose(got, total, atol=1e-5)
    some = y < 2 # camera 0 alone
    loss(ics.IcsOutput(pred.pooled[some], None, pred.logits[some]), y[some]).backward()
    assert w.grad[:2].abs().sum(1).min() > 0 and (w.grad[2:] == 0).all()


def test_parts_of_every_loss():
    s = SHORT | dict(m1=.4, m2=.2, reduction='sum', label_smoothing=.2)
    for variant, row in VARIANTS.items():
        model, x, y, loss = batch(variant, settings=s)
        pred, cams = model(x), loss.cameras
        if row['classifier'] == 'memory':
            logits = 15*pred.unit@model.memory.centroids.T
            if not row['across']: logits[cams[y][:, None] != cams] = -torch.inf
            ce = F.cross_entropy(logits, y, reduction='none')
            want = ce.mean() if row['across'] else sum(ce[cams[y] == c].mean() for c in cams.unique())
        elif row['across']: want = F.cross_entropy(pred.logits, y, label_smoothing=.2)
        else: want = sum(F.cross_entropy(pred.logits[cams[y] == c][:, cams == c],
                                         y[cams[y] == c]-int((cams < c).sum())) for c in cams.unique())
        g, d = pred.pooled, torch.cdist(pred.pooled, pred.pooled)
        hinges = []
        for i in range(len(y)):
            if row['mining'] is None: break
            pos = max(d[i, j] for j in range(len(y)) if j != i and y[j] == y[i])
            neg = [d[i, j] for j in range(len(y)) if y[j] != y[i]
                   and (row['across'] or cams[y[j]] == cams[y[i]])]
            if neg: hinges.append(F.relu(pos-min(neg)+.4))
            if row['mining'] != 'quintuplet': continue
            k = model.memory.centroids
            far = [(pred.unit[i]-k[j]).norm() for j in range(len(k))
                   if cams[j] == cams[y[i]] and j != y[i]]
            if far: hinges.append(F.relu((pred.unit[i]-k[y[i]]).norm()-min(far)+.2))
        if hinges: want = want+(sum(hinges)/len(y) if row['across'] else sum(hinges))
        assert torch.allclose(loss(pred, y), want, atol=1e-4), variant
        assert g.isfinite().all()


@pytest.mark.parametrize('variant', ['M1', 'M5', 'M6', 'M7'])
def test_16_bits(variant):
    "A bfloat16 backbone, and autocast around everything: float32 losses close to the plain one."
    model, x, y, loss = batch(variant)
    want = loss(model(x), y)
    low, _, _, low_loss = batch(variant, dtype=torch.bfloat16)
    low.load_state_dict(model.state_dict())
    for amp in (False, True):
        model.zero_grad(); low.zero_grad()
        for net, how in ((model, loss), (low, low_loss)):
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                pred = net(x)
                got = how(pred, y)
            assert got.dtype == torch.float32 and got.isfinite()
            assert abs(got-want) < .1*want+.1
            got.backward()
            assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
            if net.memory is not None:
                with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                    net.memory.update(pred.unit, y)
                assert net.memory.centroids.dtype == torch.float32
                net.memory.load_state_dict(batch(variant)[0].memory.state_dict())


def test_an_epoch_with_16_bits(train):
    learn = ics_learner(train, 'M5', SHORT, device='cpu')
    learn.model.dtype = torch.bfloat16
    fit_stage(learn, SHORT)
    assert np.isfinite(learn.retrieval.history[0]['train_loss'])
    assert learn.model.memory.seen.all() and learn.model.memory.centroids.isfinite().all()


# Labels and settings that are wrong

def test_wrong_labels_are_named(train, m5):
    gap = replace(train, camids=np.where(train.camids == 1, 5, train.camids))
    negative = replace(train, pids=train.pids-100)
    for bad, match in ((gap, 'camera 1 has no pictures'), (negative, 'pids: -'),
                       (replace(train, camids=None), 'camids is None'),
                       (replace(train, pids=None), 'pids is None')):
        with pytest.raises(ValueError, match=match): ics_learner(bad, 'M5', SHORT)
        with pytest.raises(ValueError, match=match): fit_ics(bad, 'M7', SHORT)
    with pytest.raises(ValueError, match="variant 'M9'"): fit_ics(train, 'M9', SHORT)
    with pytest.raises(ValueError, match='12 people, but a step needs 13'):
        fit_ics(train, 'M8', SHORT | dict(p=13), first=m5)


def test_an_identity_in_the_wrong_camera_is_named():
    model, x, y, loss = batch('M5')
    pred, cams = model(x), loss.cameras
    wrong = cams[y].clone()
    wrong[5] = 2
    match = 'row 5: label 2 is of camera 1, its picture of camera 2'
    with pytest.raises(ValueError, match=match): model.memory.loss(pred.unit, y, wrong)
    with pytest.raises(ValueError, match=match):
        quintuplet_loss(pred.pooled, y, wrong, pred.unit, model.memory)
    y[3] = 5
    for act in (lambda: loss(pred, y), lambda: model.memory.update(pred.unit, y)):
        with pytest.raises((ValueError, IndexError)): act()
    with pytest.raises(ValueError, match='row 3: label 5, expected 0 to 4'):
        model.memory.update(pred.unit, y)
    with pytest.raises(ValueError, match='camera 1 has no identity'): CameraMemory([0, 2], 8)


def test_one_camera_cannot_be_joined(train):
    alone = train[train.camids == 0]
    f = fit(alone, 'M5')
    with pytest.raises(ValueError, match=r'cameras: only \[0\], expected 2'):
        associate(identity_centroids(f.learn.model, alone, f.learn.ids, SHORT), f.learn.ids.cameras)
    for variant in ('M6', 'M7'):
        with pytest.raises(ValueError, match=r'cameras: only \[0\], expected 2'):
            fit(alone, variant, first=f.learn)
    assert np.isfinite(fit(alone, 'M8', first=f.learn).learn.retrieval.history[0]['train_loss'])


def test_settings_are_complete():
    names = set(ics_settings('real', 'paper'))
    for kind, preset in BY_PRESET:
        s = ics_settings(kind, preset)
        assert set(s) == names
        assert {k: s[k] for k in PUBLISHED} == PUBLISHED # never a matter of the preset
        assert all(m < e for e, ms in zip(s['epochs'], s['milestones']) for m in ms) \
            or preset == 'paper'
    with pytest.raises(ValueError, match="centroids='mean'"): ics_settings('real', centroids='mean')
    with pytest.raises(ValueError, match=r"\['momentun'\]"): ics_settings('real', momentun=.2)


# Between the stages

def test_centroids_against_a_loop(train, m5):
    f = extract_features(m5.model, train, (64, 32))
    loop = []
    for c, p in zip(m5.ids.cameras, m5.ids.pids):
        rows = [f[i] for i in range(len(train)) if train.camids[i] == c and train.pids[i] == p]
        mean = sum(rows)/len(rows)
        loop.append(mean/mean.norm())
    got = identity_centroids(m5.model, train, m5.ids, SHORT | dict(centroids='features'))
    assert torch.allclose(got, torch.stack(loop), atol=1e-6)
    bank = identity_centroids(m5.model, train, m5.ids, SHORT)
    assert torch.equal(bank, m5.model.memory.centroids)
    m1 = ics_learner(train, 'M1', SHORT, device='cpu')
    with pytest.raises(ValueError, match="no memory; use centroids='features'"):
        identity_centroids(m1.model, train, m1.ids, SHORT)


@pytest.mark.parametrize('rule', ['reciprocal', 'greedy'])
def test_singletons_dropped(train, m5, caplog, rule):
    few = SHORT | dict(S=9, rule=rule, p=2)
    all_in = fit(train, 'M7', few, first=m5)
    assert not caplog.records and len(all_in.learn.dls.train.dataset) == len(train)
    left = fit(train, 'M7', few | dict(keep_singletons=False), first=m5)
    alone = left.association.labels < 0
    lost = int(alone[m5.ids.labels].sum())
    assert 0 < alone.sum() < len(m5.ids) and lost > 0
    assert f'{lost} of {len(train)} pictures belong to identities' in caplog.text
    assert len(left.learn.dls.train.dataset) == len(train)-lost
    assert len(left.learn.dls.classes) == left.association.labels.max()+1
    linked = set(all_in.association.edges.ravel().tolist())
    assert set(np.flatnonzero(~alone).tolist()) == linked


def test_joined_labels_against_a_loop(train, m5):
    a = associate(m5.model.memory.centroids, m5.ids.cameras, keep_singletons=False)
    got = join_identities(train, m5.ids, a)
    kept = [i for i in range(len(train)) if a.labels[m5.ids.labels[i]] >= 0]
    assert got.pids.tolist() == [a.labels[m5.ids.labels[i]] for i in kept]
    assert (got.frames == train.frames[kept]).all() and (got.images == train.images[kept]).all()


# The schedule

@pytest.mark.parametrize('epochs, milestones, warmup, table', [
    (5, (2, 4), 0, [1, 1, .1, .1, .01]), (4, (), 0, [1]*4), (3, (5,), 0, [1]*3),
    (6, (3,), 2, [.01, .505, 1, .1, .1, .1]), (50, (40, 70), 0, [1]*40+[.1]*10),
    (120, (40, 70), 0, [1]*40+[.1]*30+[.01]*50)])
def test_step_decay(epochs, milestones, warmup, table):
    rate = step_decay(2e-3, epochs, milestones, warmup=warmup)['lr']
    assert [rate(e/epochs) for e in range(epochs)] == pytest.approx([2e-3*t for t in table])
    for batches in (3, 7): # fastai adds up the done part step by step
        for e in range(epochs):
            done, seen = e/epochs, []
            for _ in range(batches):
                seen.append(rate(done))
                done += 1/(batches*epochs)
            if e >= warmup: assert seen == pytest.approx([2e-3*table[e]]*batches)
    assert step_decay(1., 4, (1,), gamma=.5)['lr'](.25) == .5


def test_rates_of_a_training(train):
    s = SHORT | dict(epochs=(4, 1), milestones=((1, 3), ()))
    learn = ics_learner(train, 'M1', s, device='cpu')
    fit_stage(learn, s)
    n = len(learn.dls.train)
    assert learn.recorder.lrs == pytest.approx(np.repeat([1e-3, 1e-4, 1e-4, 1e-5], n))


# Checkpoints

@pytest.fixture(scope='module')
def whole(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    return folder, fit(train, 'M7', PLAN, folder=folder)


def stop(monkeypatch, owner, name, count):
    "Ctrl-C after (or in) the `count`th call of a callback's method."
    was, calls = getattr(owner, name), []
    def call(self):
        was(self)
        calls.append(0)
        if len(calls) == count: raise KeyboardInterrupt
    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize('owner, name, count', [
    (Checkpoints, 'after_validate', 1), (Checkpoints, 'after_validate', 2),
    (Checkpoints, 'after_validate', 3), (ics.UpdateMemory, 'before_step', 8)],
    ids=['stage one', 'between', 'stage two', 'inside an epoch'])
def test_interrupted_and_resumed(train, whole, tmp_path, monkeypatch, owner, name, count):
    with monkeypatch.context() as m:
        stop(m, owner, name, count)
        with pytest.raises(KeyboardInterrupt): fit(train, 'M7', PLAN, folder=tmp_path)
    begun = [(tmp_path/f'stage{n}'/'checkpoint.json').exists() for n in (1, 2)]
    assert begun == [True, count == 3]
    again = fit(train, 'M7', PLAN, folder=tmp_path, resume=True)
    for a, b in zip(weights(again), weights(whole[1])): assert same(a, b)
    memory, other = again.first.model.memory, whole[1].first.model.memory
    assert memory.seen.all() and torch.equal(memory.centroids, other.centroids)
    assert (again.association.labels == whole[1].association.labels).all()
    for a, b in ((again.first, whole[1].first), (again.learn, whole[1].learn)):
        assert a.retrieval.history == b.retrieval.history


def test_m6_resumes_its_memory(train, m5, tmp_path):
    "A memory across cameras, in stage two."
    want = fit(train, 'M6', PLAN, first=m5)
    folder, joined = tmp_path/'stage2', join_identities(train, m5.ids, want.association)
    begun = ics_learner(joined, 'M6', PLAN, m5.model, device='cpu')
    with pytest.raises(KeyboardInterrupt): fit_stage(begun, PLAN, folder, stop_after=1)
    again = fit(train, 'M6', PLAN, first=m5, folder=tmp_path, resume=True)
    assert same(again.learn.model.state_dict(), want.learn.model.state_dict())


def test_folder_changes_nothing_and_holds_the_bank(train, whole):
    folder, made = whole
    for a, b in zip(weights(fit(train, 'M7', PLAN)), weights(made)): assert same(a, b)
    state, tensors = read_checkpoint(folder/'stage1')
    assert state['epoch'] == 2 and state['settings']['variant'] == 'M5'
    for k in ('cameras', 'centroids', 'seen'):
        assert torch.equal(tensors[f'model.memory.{k}'], getattr(made.first.model.memory, k))
    state, tensors = read_checkpoint(folder/'stage2')
    assert state['settings']['variant'] == 'M7' and not any('memory' in k for k in tensors)


def test_finished_is_not_trained_again(train, whole, monkeypatch):
    monkeypatch.setattr(Checkpoints, 'after_validate', lambda self: pytest.fail('trained'))
    again = fit(train, 'M7', PLAN, folder=whole[0], resume=True)
    for a, b in zip(weights(again), weights(whole[1])): assert same(a, b)


def test_misused_folders_are_refused(train, whole, tmp_path):
    folder, _ = whole
    with pytest.raises(DataError, match='holds a checkpoint; expected resume=True'):
        fit(train, 'M7', PLAN, folder=folder)
    with pytest.raises(DataError, match=r"other settings: \['lr'\]"):
        fit(train, 'M7', PLAN | dict(lr=1e-2), folder=folder, resume=True)
    with pytest.raises(DataError, match=r"other settings: \['variant'\]"):
        fit(train, 'M4', PLAN, folder=folder, resume=True)
    with pytest.raises(DataError, match=r"other settings: \['variant'\]"):
        fit(train, 'M6', PLAN, folder=folder, resume=True)
    assert not check_folder(tmp_path, resume=True) # nothing to go on from: a run begins
    (tmp_path/'stage1').mkdir()
    (tmp_path/'stage1'/'checkpoint.json').write_text('{')
    with pytest.raises(DataError, match='not JSON'): fit(train, 'M5', PLAN, folder=tmp_path, resume=True)


def test_a_trained_run_is_loaded_for_searching(train, tmp_path):
    f = fit(train, 'M7', folder=tmp_path)
    for folder, learn in (('stage1', f.first), ('stage2', f.learn)):
        model, settings = load_model(tmp_path / folder)
        assert settings['variant'] == learn.variant
        a, b = extract_features(model, train[:9], SHORT['size']), learn.features(train[:9])
        assert torch.allclose(a, b, atol=1e-5) if torch.cuda.is_available() else torch.equal(a, b)
