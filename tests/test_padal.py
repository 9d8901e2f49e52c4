"PADAL: parts against scikit-learn, discriminators against loops, the method on what users may hand it."
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from command import run
from real import REAL
from reidlit.core import ReidSet
from reidlit.data.sampling import CameraSampler
from reidlit.data.world import World
from reidlit.experiments import Run
from reidlit.learner import quiet
from reidlit.padal import (VARIANTS, CameraDiscriminator, GradientReversal, PadalLoss, PadalModel, fit_padal, kmeans,
                           padal_learner, padal_settings, part_features, part_masks)
from reidlit.padal.lab import (ARMS, CLAIMS, GAP, PAPER, REAL_ARMS, STANDARDISED, fragment_identities, lab_scores,
                               real_core, step_cost, train as train_padal)


@pytest.fixture(scope='module')
def clips():
    "Tracklets of three cameras."
    w = World(people=16, cameras=3, seed=1, layout='disjoint', style=0, additive=1, crowd=8)
    return w.tracklets('train', 3, 2, (32, 16), every=3)


@pytest.fixture
def small():
    return padal_settings('drawn', 'ci', size=(32, 16), k=2, steps=2, hidden=(8, 4))


# K-means

@pytest.mark.parametrize('trial', range(40))
def test_kmeans_is_that_of_scikit_learn(trial):
    r = np.random.default_rng(trial)
    places, dim, k = r.integers(8, 60), r.integers(1, 8), r.integers(1, 6)
    x = r.normal(size=(3, places, dim))
    start = np.stack([o[r.permutation(places)[:k]] for o in x])
    if trial % 2: start[:, 0] += 100 # starts empty
    labels, centres = kmeans(torch.tensor(x), torch.tensor(start))
    for a, b, own, c in zip(x, start, labels, centres):
        peer = KMeans(k, init=b, n_init=1, algorithm='lloyd', tol=0).fit(a)
        assert np.array_equal(own, peer.labels_)
        np.testing.assert_allclose(c, peer.cluster_centers_, atol=1e-9)


def test_kmeans_stops_where_it_is_told():
    x = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peer = KMeans(4, init=x[0, :4].numpy(), n_init=1, algorithm='lloyd', tol=0, max_iter=2)
    peer.fit(x[0].numpy())
    assert np.array_equal(kmeans(x, x[:, :4], max_iter=2)[0][0], peer.labels_)


def test_a_batch_is_each_picture_by_itself():
    x = torch.randn(5, 30, 4, generator=torch.Generator().manual_seed(1))
    together, centres = kmeans(x, x[:, :3])
    for i in range(5):
        alone = kmeans(x[i:i+1], x[i:i+1, :3])
        assert torch.equal(alone[0][0], together[i])
        torch.testing.assert_close(alone[1][0], centres[i])


@pytest.mark.parametrize('maps', (torch.zeros(2, 4, 3, 2), torch.ones(2, 4, 3, 2)*1e6, torch.full((1, 1, 6, 1), -3.)))
def test_constant_features_are_one_part(maps):
    masks = part_masks(maps, 3)
    assert masks.sum(1).eq(1).all() and masks[:, 0].all()
    assert part_features(maps, masks).isfinite().all()


def test_a_map_with_two_kinds_of_places_has_an_empty_part():
    maps = torch.zeros(1, 2, 4, 2); maps[:, :, 2:] = 1
    masks = part_masks(maps, 3)
    assert masks.sum((2, 3)).tolist() == [[4, 4, 0]]
    assert masks[0, 0, :2].all() and masks[0, 1, 2:].all()


def test_as_many_parts_as_places():
    maps = torch.arange(8.).reshape(1, 1, 4, 2)
    assert part_masks(maps, 8).sum((2, 3)).eq(1).all()
    with pytest.raises(ValueError, match='parts=9: a map of 4 x 2 has 1 to 8'): part_masks(maps, 9)
    with pytest.raises(ValueError, match='parts=0'): part_masks(maps, 0)


@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
def test_masks_of_16_bit_maps(dtype):
    maps = torch.randn(4, 16, 8, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(part_masks(maps, 3), part_masks(maps.float(), 3))


def test_masks_carry_no_gradient():
    maps = torch.randn(2, 4, 6, 2, requires_grad=True)
    assert not part_masks(maps, 2).requires_grad


# Discriminators

@pytest.mark.parametrize('aligned', ('all', 'pairs', ((0, 1), (2, 3, 4))))
@pytest.mark.parametrize('parts', (1, 3))
def test_grouped_convolutions_are_separate_networks(aligned, parts):
    torch.manual_seed(0)
    d = CameraDiscriminator(6, 5, aligned, parts, hidden=(7, 4)).eval()
    x, cams = torch.randn(8, 6, 5, 3), torch.arange(8) % 5
    masks = part_masks(x, parts)
    seats, total = max(map(len, d.sets)), 0.
    sizes = 7, 4, seats
    for part in range(parts):
        for i, s in enumerate(d.sets):
            y, h = x*masks[:, part:part+1], part*len(d.sets)+i
            for j, layer in enumerate((d.layers[0], d.layers[2], d.layers[4])):
                rows = slice(h*sizes[j], (h+1)*sizes[j])
                y = F.conv2d(y, layer.weight[rows], layer.bias[rows], padding=1)
                if j < 2: y = F.leaky_relu(y, .2)
            logp = y[:, :len(s)].log_softmax(1)
            for row, c in enumerate(cams.tolist()):
                if c in s: total = total-(logp[row, s.index(c)]*masks[row, part]).sum()/15
    torch.testing.assert_close(d.loss(d(x, masks), cams, masks), total/8, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", (.1, 10., 1e3))
def test_shrinking_features_fool_nobody(scale):
    torch.manual_seed(0)
    d = CameraDiscriminator(6, 3, hidden=(7, 4), kernel=1)
    x = torch.randn(40, 6)
    torch.testing.assert_close(d(x*scale), d(x), atol=2e-2, rtol=1e-2)


def test_a_camera_absent_from_the_batch():
    d = CameraDiscriminator(6, 5, 'pairs', hidden=(7, 4), kernel=1)
    x = torch.randn(6, 6, requires_grad=True)
    d.loss(d(x), torch.zeros(6, dtype=torch.int64)).backward()
    assert x.grad.isfinite().all()


# The method

@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_trains(variant, clips, small):
    with quiet(): learn = fit_padal(clips, variant, small, device='cpu')
    assert np.isfinite(learn.retrieval.history[-1]['train_loss'])
    assert ('camera' in learn.loss_func.parts) == (variant != 'id')


@pytest.mark.parametrize('change', (dict(over='time'), dict(division='strict'), dict(shuffle=True), dict(parts=1),
    dict(sets=((0, 1), (1, 2))), dict(sharpness=None), dict(decay=2, steps=5), dict(epochs=1), dict(n=7)))
def test_choices(change, clips, small):
    with quiet(): learn = fit_padal(clips, 'mp', small | change, device='cpu')
    assert np.isfinite(learn.retrieval.history[-1]['train_loss'])


def test_steps_and_epochs(clips, small):
    n = len(CameraSampler(clips.camids, clips.tids, small['k']))
    for change, steps in ((dict(steps=n), n), (dict(steps=n+1), 2*n), (dict(epochs=3), 3*n)):
        with quiet(): learn = fit_padal(clips, 'id', small | change, device='cpu')
        assert len(learn.recorder.losses) == steps


def test_the_rate_falls_by_steps(clips, small):
    with quiet(): learn = fit_padal(clips, 'id', small | dict(steps=6, decay=2, epochs=None, lr=1e-2), device='cpu')
    n = len(learn.recorder.losses)
    assert learn.opt.hypers[0]['lr'] == pytest.approx(1e-2*.1**((n-1)//2))


def test_tracklets_of_one_frame_and_of_none(clips, small):
    one = clips[np.unique(clips.tids, return_index=True)[1]] # a frame each
    with quiet():
        fit_padal(one, 'mp', small, device='cpu')
        fit_padal(replace(clips, tids=None, frames=None), 'mp', small | dict(n=1), device='cpu')


def test_who_is_in_another_camera_does_not_matter(clips, small):
    "The order of labels in a camera is arbitrary, and no label joins two cameras."
    other = replace(clips, pids=clips.pids+1000*clips.camids)
    got = []
    for s in (clips, other):
        with quiet(): got.append(fit_padal(s, 'mp', small, device='cpu').model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(g.values() for g in got)))


def test_the_gradient_is_that_of_equation_5(clips):
    torch.manual_seed(0)
    cams = torch.tensor([0, 0, 1, 1])
    d = CameraDiscriminator(128, 2, parts=2, hidden=(6, 5)); model = PadalModel('tiny16', 4, d).train()
    loss, x, y = PadalLoss(model, cams), torch.randn(6, 3, 32, 16), torch.tensor([0, 1, 2, 3, 0, 3])
    weight = model.body[0][0][0].weight

    def grads(strength, sign):
        model.reversal = GradientReversal(strength) if sign > 0 else torch.nn.Identity()
        loss(model(x), y)
        out = model(x)
        camera = d.loss(out.guesses, cams[y], out.masks)
        people = loss(out, y)-camera
        return torch.autograd.grad(people+(1. if sign > 0 else -strength)*camera, weight)[0]

    torch.testing.assert_close(grads(.5, 1), grads(.5, -1), atol=1e-5, rtol=1e-4)
    assert (grads(0., 1)-grads(.5, 1)).abs().max() > 1e-5


@pytest.mark.parametrize('broken, message', (
    (lambda s: replace(s, camids=None), 'camids is None'),
    (lambda s: replace(s, pids=None), 'pids is None'),
    (lambda s: s[s.camids == 0], '1 camera'),
    (lambda s: s[s.camids != 1], 'camera 1 has no pictures'),
    (lambda s: replace(s, pids=s.pids-5), 'expected 0 or more'),
    (lambda s: replace(s, tids=s.tids*0), 'tracklet 0: camids')))
def test_labels_that_cannot_be(broken, message, clips, small):
    with pytest.raises(ValueError, match=message): fit_padal(broken(clips), 'mp', small, device='cpu')


@pytest.mark.parametrize('settings, message', ((dict(parts=99), 'parts=99: a map of 4 x 2'),
    (dict(sets=((0, 5),)), 'set'), (dict(k=0), 'k=0'), (dict(strength=-1.), 'strength=-'),
    (dict(parts=5, division='strict'), '1 to 4')))
def test_settings_that_cannot_be(settings, message, clips, small):
    with pytest.raises(ValueError, match=message), quiet():
        fit_padal(clips, 'mp', small | settings, device='cpu')


def test_without_cameras_the_method_says_how_they_are_found():
    d = SimpleNamespace(train=ReidSet(np.zeros((4, 8, 8, 3), np.uint8), [0, 0, 1, 1], name='mine'))
    with pytest.raises(ValueError, match='mine: no cameras are known'): train_padal(Run(settings={}), d)


# The lab

def test_fragments():
    s = ReidSet(np.zeros((24, 2, 2, 3), np.uint8), np.repeat([0, 1, 2], 8), np.tile([0, 1], 12),
                tids=np.arange(24)//2*0+np.arange(24))
    cut = fragment_identities(s, .5, 3)
    assert len(np.unique(np.stack([cut.pids, cut.camids]), axis=1).T) == 6+4 # two of each camera's three
    assert np.array_equal(fragment_identities(s, 0).pids, s.pids)
    new = cut.pids != s.pids
    for p, c in {(p, c) for p, c in zip(s.pids[new], s.camids[new])}:
        assert new[(s.pids == p) & (s.camids == c)].mean() == .5
    with pytest.raises(ValueError, match='share=2'): fragment_identities(s, 2)


def test_cost_counts_parameters():
    found = {k: step_cost(3, k, channels=16, places=(4, 2)) for k in ('a', 'm', 'mp')}
    for k, d in (('a', CameraDiscriminator(16, 3, 'pairs', kernel=1)), ('m', CameraDiscriminator(16, 3, kernel=1)),
                 ('mp', CameraDiscriminator(16, 3, parts=3))):
        assert found[k]['millions'] == sum(p.numel() for p in d.parameters())/1e6
        assert found[k]['megabytes'] > 16*found[k]['millions'] and found[k]['seconds'] > 0


def test_core_from_command_to_page(tmp_path, monkeypatch):
    monkeypatch.setenv('REIDLIT_PRESET', 'ci')
    done = run('reproduce', 'padal', '--preset', 'ci', '--seeds', '5', '--results', tmp_path)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path/'padal-world-ci.json').read_text())
    assert set(stored['variants']) == {*ARMS, STANDARDISED, GAP}
    assert [c['claim'] for c in stored['claims']] == [str(c) for c in CLAIMS]
    for name, values in stored['variants'].items():
        assert all(0 <= v[0] <= 1 for v in values.values()), name
    again = run('reproduce', 'padal', '--preset', 'ci', '--seeds', '5', '--results', tmp_path)
    assert again.returncode == 0 and json.loads((tmp_path/'padal-world-ci.json').read_text())['variants'] == \
        stored['variants']


def test_real_core_on_any_set(clips):
    test = clips[clips.pids > np.median(clips.pids)]
    one = replace(test, tids=None)
    first = np.unique(np.stack([test.pids, test.camids]), axis=1, return_index=True)[1]
    mask = np.isin(np.arange(len(one)), first)
    d = SimpleNamespace(train=clips, query=one[mask], gallery=one[~mask])
    r = Run(0, 'ci', 'cpu', kind='real', data=lambda: d)
    real_core(r)
    assert set(r.values) == {*REAL_ARMS, STANDARDISED, GAP}


def test_the_probe_of_noise_is_chance(clips):
    class Noise(torch.nn.Module):
        def __init__(self): super().__init__(); self.p = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x): return torch.randn(len(x), 8)
    torch.manual_seed(0)
    target = SimpleNamespace(query=clips[clips.tids % 2 == 0], gallery=clips)
    assert lab_scores(Noise(), target, (32, 16))['probe'] < .55 # chance is a third


def test_train_and_resume_by_command(tmp_path):
    words = ['train', 'padal', '--preset', 'ci', '--people', '12', '--cameras', '3', '--set', 'k=2',
             '--set', 'size=[32, 16]', '--out', tmp_path/'run', '--device', 'cpu']
    done = run(*words)
    assert done.returncode == 0 and 'mAP' in done.stdout, done.stderr
    assert run(*words).returncode == 2 # holds a run
    assert run('eval', tmp_path/'run').returncode == 0
    for variant in ('m', 'x'):
        done = run(*words[:-4], '--out', tmp_path/variant, '--variant', variant, '--epochs', '1')
        assert (done.returncode == 0) == (variant == 'm'), done.stderr


@pytest.mark.skipif(not (REAL/'market1501_dev').is_dir(), reason='no Market-1501 crops')
def test_on_real_crops(tmp_path):
    done = run('train', 'padal', '--preset', 'ci', '--data', 'market1501', '--root', REAL/'market1501_dev',
               '--out', tmp_path/'run', '--set', 'steps=2', '--device', 'cpu')
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_parts_and_reversal_on_a_gpu_agree_with_the_cpu():
    maps = torch.randn(8, 32, 8, 4, generator=torch.Generator().manual_seed(3))
    assert (part_masks(maps.cuda(), 3).cpu() == part_masks(maps, 3)).float().mean() > .99
    empty = torch.ones(2, 4, 3, 2)
    assert torch.equal(part_masks(empty.cuda(), 3).cpu(), part_masks(empty, 3))
