"Clips: attention against loops, masks, odd boxes, files."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reidlit.core import DataError, ReidSet, seed_all
from reidlit.data.world import World
from reidlit.video import (WEIGHTS, ClipLoaders, TemporalAttention, VideoReid, choose_threshold,
                           cut_crops, cut_clips, features_of, clip_distance, clip_features,
                           frame_weights, load_reid, loose_clips, loosen, reid_for, save_reid,
                           video_settings)


@pytest.mark.parametrize('seed', range(5))
def test_attention_against_a_loop(seed):
    seed_all(seed)
    n, t, d = 3, 2+seed, 7
    att, x = TemporalAttention(d, 5), torch.randn(n, t, d)
    att.score.weight.data.normal_()
    w, pooled = att(x)
    for i in range(n):
        h = [F.relu(att.squeeze.weight @ x[i, k] + att.squeeze.bias) for k in range(t)]
        z = [torch.zeros(5), *h, torch.zeros(5)]
        s = [sum(att.score.weight[0, :, j] @ z[k+j] for j in range(3)) + att.score.bias[0]
             for k in range(t)]
        e = torch.stack(s).exp()
        a = e/e.sum()
        assert torch.allclose(w[i], a, atol=1e-5)
        assert torch.allclose(pooled[i], sum(a[k]*x[i, k] for k in range(t)), atol=1e-5)


def test_masked_frames_say_nothing():
    seed_all(0)
    net = VideoReid().eval()
    net.attention.score.weight.data.normal_()
    x = torch.randn(3, 5, 3, 64, 32)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3], [1]])
    out = net(x, mask)
    for i, n in enumerate((5, 3, 1)):
        assert torch.allclose(out[i], net(x[i:i+1, :n])[0], atol=1e-5)
    y = x.clone()
    y[1, 3:] = 9
    assert torch.equal(net(y, mask)[1], out[1])
    w = net.look(x, mask)[0]
    assert (w[~mask] == 0).all() and torch.allclose(w.sum(1), torch.ones(3))
    with pytest.raises(ValueError, match='clip 2 has no frame'):
        frame_weights(torch.zeros(3, 4), torch.tensor([True, True, False])[:, None].expand(3, 4))


def test_gradient_reaches_the_scores():
    seed_all(0)
    net = VideoReid(n_classes=4)
    out = net(torch.randn(4, 3, 3, 32, 16))
    (F.cross_entropy(out.logits, torch.arange(4))+out.pooled.square().sum()).backward()
    assert net.attention.score.weight.grad.abs().sum() > 0
    assert net.attention.squeeze.weight.grad.abs().sum() > 0


def test_the_mean_is_the_mean():
    seed_all(0)
    net = VideoReid(join='mean', pool='gem').eval()
    x = torch.randn(2, 4, 3, 64, 32)
    each = torch.stack([net.look(x[:, i])[1] for i in range(4)])
    assert torch.allclose(net.look(x)[1], each.mean(0), atol=1e-5)
    assert torch.allclose(net(x), net(x[:, [3, 0, 2, 1]]), atol=1e-5)


def test_features_batches_images_modes():
    seed_all(0)
    net = VideoReid()
    net.train()
    g = np.random.default_rng(0)
    clips = g.integers(0, 256, (7, 4, 48, 64, 3), dtype=np.uint8)
    f = clip_features(net, clips, batch=3)
    assert net.training and f.shape == (7, 128) and f.dtype == torch.float32
    assert torch.allclose(f, clip_features(net, clips), atol=1e-5)
    one = clip_features(net, clips[:, 0])
    assert torch.allclose(one, clip_features(net, clips[:, :1]), atol=1e-6)
    d = clip_distance(f, one)
    assert d.shape == (7, 7) and torch.allclose(d[2, 5], (f[2]-one[5]).norm(), atol=1e-5)
    assert clip_distance(f, f).diag().max() < 1e-3
    assert clip_distance(f[:0], f).shape == (0, 7)
    with pytest.raises(ValueError, match='uint8'): clip_features(net, clips.astype(np.float32))


def test_loosen_stays_within_its_bounds():
    ramp = torch.linspace(0, 1, 65)[:-1]+1/128
    x = ramp.expand(1, 2, 3, 64, 64).repeat(50, 1, 1, 1, 1)
    box = 1/1.3
    y = loosen(x, (32, 32), .15, .1, .1, .03, torch.Generator().manual_seed(0))
    middle, span = y.mean((2, 3, 4)), (y[..., -1]-y[..., 0]).mean((2, 3))*32/31
    assert (middle-.5).abs().max() <= .13*box+.01
    assert (span/box-1).abs().max() <= .14 and span.std() > .02
    assert (middle[:, 0]-middle[:, 1]).abs().max() <= .06*box+.01
    assert (middle[:, 0]-middle[:, 1]).abs().max() > .005
    same = loosen(x, (32, 32), .15, .1, .1, .03, torch.Generator().manual_seed(0))
    assert torch.equal(y, same)


def test_crops_of_odd_boxes():
    g = np.random.default_rng(0)
    frame = g.integers(0, 256, (27, 48, 3), dtype=np.uint8)
    out = cut_crops(frame, [[-5, -5, 60, 40], [40, 20, 48.4, 27.3], [0, 0, .2, .2]], (8, 4))
    assert out.shape == (3, 8, 4, 3)
    assert np.array_equal(cut_crops(frame, [[3, 4, 7, 12]], (8, 4))[0], frame[4:12, 3:7])
    with pytest.raises(ValueError, match='frame'): cut_crops(frame[0], [[0, 0, 2, 2]])


def test_films_of_vehicles_and_of_the_same_people():
    w = World(people=10, cameras=2, seed=5, kind='vehicles')
    f = cut_clips(w, length=2, per_camera=1, every=2, step=1000)
    assert f.images.shape[1:] == (48, 64, 3)
    assert (np.diff(f.frames.reshape(-1, 2)) == 2).all()
    assert set(np.bincount(np.unique(f.tids, return_inverse=True)[1])) == {2}
    again = cut_clips(w, length=2, per_camera=1, every=2, step=1000)
    assert np.array_equal(f.images, again.images) and np.array_equal(f.tids, again.tids)
    b = w.boxes(int(f.camids[0]), int(f.frames[0]), min_visible=.4)
    box = b.clipped[b.pids == f.pids[0]]
    frame = w.frame(int(f.camids[0]), int(f.frames[0]))
    assert np.array_equal(cut_crops(frame, box, (48, 64))[0], f.images[0])


def stripes(people=6, clips=3, length=4, size=(83, 42)):
    "Clips of people told apart by the direction of their stripes."
    n = people*clips*length
    pids = np.repeat(np.arange(people), clips*length)
    g, x = np.random.default_rng(0), np.arange(size[1])
    images = g.integers(0, 60, (n, *size, 3), dtype=np.uint8)
    for i, p in enumerate(pids):
        images[i, ..., p % 3] += (90*(1+np.sin(x*(.2+.25*p))))[None].astype(np.uint8)
    return ReidSet(images, pids, np.tile(np.repeat(np.arange(clips), length), people),
                   np.arange(n)//length, np.arange(n))


def test_loaders_give_whole_films():
    s = video_settings('ci', p=3, k=2, place=0., scale=0.)
    dls = ClipLoaders(stripes(), s, 'cpu')
    for x, y, c, row in dls.train:
        assert x.shape == (6, 4, 3, 64, 32) and (row % 4 == 0).all()
        assert (y == row//12).all() and (c == row//4 % 3).all()
    assert not torch.equal(x[0, 0], x[0, 1])


def test_loose_films_are_repeatable_and_labelled():
    clips = stripes()
    s = video_settings('ci')
    a, b, c = (loose_clips(clips, s, seed) for seed in (1, 1, 2))
    assert np.array_equal(a.images, b.images) and not np.array_equal(a.images, c.images)
    assert np.array_equal(a.tids, clips.tids) and a.images.shape[1:] == (64, 32, 3)


def test_threshold_needs_both_kinds_of_pairs():
    f = torch.eye(4)
    with pytest.raises(ValueError, match='one person'): choose_threshold(f, [0, 1, 2, 3])
    with pytest.raises(ValueError, match='two people'): choose_threshold(f, [0]*4)


def test_file_is_small_and_holds_no_code(tmp_path):
    seed_all(0)
    net = VideoReid(n_classes=1000, hidden=8, pool='gem')
    a = save_reid(net, tmp_path/'a.safetensors', .5, dict(x=[1, 2]))
    b = save_reid(net, tmp_path/'b.safetensors', .5, dict(x=[1, 2]))
    assert a.read_bytes() == b.read_bytes()
    assert not any('classifier' in k for k in load_file(a))
    with safe_open(a, 'pt') as f: json.loads(f.metadata()['reidlit'])
    back, t, info = load_reid(a, 'cpu')
    x = torch.randn(2, 4, 3, 64, 32)
    assert t == .5 and info == dict(x=[1, 2], threshold=dict(threshold=.5)) and not back.training
    assert torch.equal(back(x), net.eval()(x))
    save_file({'x': torch.zeros(2)}, tmp_path/'c.safetensors')
    with pytest.raises(DataError, match='not a model'):
        load_reid(tmp_path/'c.safetensors')


@pytest.mark.parametrize('kind', ['people', 'vehicles'])
def test_shipped(kind):
    path = WEIGHTS/f'reid-{kind}.safetensors'
    assert path.stat().st_size < 5e6
    model, threshold, info = reid_for(kind, 'cpu')
    assert info['made_by'].startswith(f"make_reid('{kind}', 9")
    assert 0 < threshold < 2 and info['threshold']['fmr'] <= .0101
    w = World(people=16, cameras=2, seed=77, kind=kind)
    s = info['settings']
    clips = loose_clips(cut_clips(w, s['length'], 1, step=1000, margin=.15,
                                  size=tuple(round(1.3*n) for n in s['size'])), s)
    f, t = features_of(model, clips)
    d, same = clip_distance(f, f), t.pids[:, None] == t.pids
    cross = t.camids[:, None] != t.camids
    near = (d < threshold).numpy()
    assert near[~same].mean() < .1
    assert near[same & cross].mean() > (.4 if kind == 'people' else .2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_cuda():
    seed_all(0)
    net = VideoReid().eval()
    clips = np.random.default_rng(0).integers(0, 256, (3, 4, 64, 32, 3), dtype=np.uint8)
    a = clip_features(net, clips)
    b = clip_features(net, clips, device='cuda')
    assert torch.allclose(a, b, atol=1e-3)
    x = torch.rand(2, 4, 3, 83, 42)
    g = [loosen(x.to(d), (64, 32), generator=torch.Generator().manual_seed(0)).cpu()
         for d in ('cpu', 'cuda')]
    assert torch.allclose(*g, atol=1e-4)
