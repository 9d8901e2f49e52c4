"FCOS on one map against loops, PointID at odd sizes, in 16 bits, frozen, kept, and bad input."
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, deform_conv2d

from reidlit.core import DataError, seed_all
from reidlit.detection.detectors import Detections, load_detector, make_detector, save_detector
from reidlit.detection.fcos import (FcosHead, HeadOutput, centreness, fcos_detections, fcos_losses, map_points,
                                    middle_points, point_targets)
from reidlit.detection.training import detect, detector_learner, world_frames
from reidlit.data.world import World
from reidlit.idfree.pointid import DeformConv, PointEncoder, PointID, Stages
from reidlit.learner import quiet
from reidlit.runs import build_model


def some_boxes(n, w, h, seed=0):
    r = np.random.default_rng(seed)
    c, wh = r.uniform(0, [w, h], (n, 2)), r.uniform(2, [w/3, h/2], (n, 2))
    return np.concatenate([c-wh/2, c+wh/2], 1)


def small(**kwargs):
    seed_all(0)
    return PointID(**dict(backbone='smaller', width=32, dim=24) | kwargs)


# FCOS

@pytest.mark.parametrize('stride,radius', [(4, 1.5), (8, .5), (8, 1.5), (16, 1.5), (8, 100.)])
def test_point_targets_against_a_loop(stride, radius):
    b, (h, w) = some_boxes(12, 200, 120, stride), (-(-120//stride), -(-200//stride))
    got = point_targets(b, (h, w), stride, radius)
    for p, (person, ltrb, centre) in enumerate(zip(*got)):
        x, y = (p % w+.5)*stride, (p//w+.5)*stride
        mine = [i for i, (x1, y1, x2, y2) in enumerate(b) if x1 < x < x2 and y1 < y < y2
                and max(abs(x-(x1+x2)/2), abs(y-(y1+y2)/2)) < radius*stride]
        best = min(mine, key=lambda i: (b[i, 2]-b[i, 0])*(b[i, 3]-b[i, 1]), default=-1)
        assert person == best
        want = [x-b[best, 0], y-b[best, 1], b[best, 2]-x, b[best, 3]-y] if mine else [0]*4
        np.testing.assert_allclose(ltrb, want, atol=1e-4)
        l, t, r, d = want
        of = math.sqrt(min(l, r)/max(l, r)*min(t, d)/max(t, d)) if mine else 0
        assert float(centre) == pytest.approx(of, abs=1e-4)


def test_equal_boxes_and_many():
    b = [[2, 2, 22, 30]]*3
    assert set(point_targets(b, (4, 4), 8).person.tolist()) == {-1, 0}
    many = some_boxes(400, 2000, 1200)
    t = point_targets(many, (150, 250), 8)
    assert len(t.person.unique()) > 300 and t.person.shape == (150*250,)


def test_middle_points_are_nearest():
    b = some_boxes(50, 130, 90)
    xy, got = map_points((12, 17), 8), middle_points(b, (12, 17), 8)
    middle = torch.tensor((b[:, :2]+b[:, 2:])/2).float()
    distance = torch.cdist(middle, xy)
    torch.testing.assert_close(distance.gather(1, got[:, None])[:, 0], distance.amin(1))


def test_points_find_their_own_box_again():
    b = some_boxes(6, 200, 120, 3)
    t = point_targets(b, (15, 25), 8)
    mine = t.person >= 0
    out = HeadOutput(torch.where(mine, 5., -9.).view(1, 1, 15, 25), t.ltrb.T.reshape(1, 4, 15, 25).clamp(min=.1),
                     t.centre.clamp(.01, .99).logit().view(1, 1, 15, 25))
    found, at = fcos_detections(out, 8, (400, 400), .1, overlap=.99)[0]
    clipped = torch.tensor(b).clamp(min=0).float()
    own = box_iou(torch.tensor(found.xyxy), clipped)
    assert (own[range(len(found)), t.person[at]] > .999).all()
    assert set(t.person[at].tolist()) == set(t.person[mine].tolist())


def test_losses_are_means_over_peoples_points():
    seed_all(1)
    out = HeadOutput(torch.randn(2, 1, 6, 8), 20*torch.rand(2, 4, 6, 8)+1, torch.randn(2, 1, 6, 8))
    t = [point_targets(some_boxes(3, 64, 48, i), (6, 8), 8) for i in (0, 1)]
    both, n = fcos_losses(out, t), [int((a.person >= 0).sum()) for a in t]
    one = [fcos_losses(HeadOutput(*(o[i:i+1] for o in out)), t[i:i+1]) for i in (0, 1)]
    for k, v in both.items():
        torch.testing.assert_close(v, (n[0]*one[0][k]+n[1]*one[1][k])/sum(n))
    again = fcos_losses(HeadOutput(*(o.flip(0) for o in out)), t[::-1])
    for k, v in both.items(): torch.testing.assert_close(v, again[k])


def test_loss_gradients_by_differences():
    seed_all(2)
    t = [point_targets([[6, 6, 30, 28]], (4, 5), 8)]
    maps = [torch.randn(1, c, 4, 5, dtype=torch.float64, requires_grad=True) for c in (1, 4, 1)]
    f = lambda a, b, c: sum(fcos_losses(HeadOutput(a, 12*b.exp(), c), t).values())
    assert torch.autograd.gradcheck(f, maps)


def test_centreness_is_between_0_and_1():
    c = centreness(torch.randn(1000, 4)*10)
    assert c.min() == 0 and c.max() <= 1 and torch.isfinite(c).all()


@pytest.mark.parametrize('call,message', [
    (lambda: point_targets([[5, 5, 2, 9]], (4, 4), 8), 'it ends before it starts'),
    (lambda: point_targets([[5, 5, np.inf, 9]], (4, 4), 8), 'not finite'),
    (lambda: point_targets([[5, 5, 9]], (4, 4), 8), 'boxes has shape'),
    (lambda: point_targets([], (4, 4), 8, -1), 'radius -1'),
    (lambda: point_targets([], (0, 4), 8), r'size \(0, 4\)'),
    (lambda: FcosHead(8, 8, 40), 'divisible by'),
    (lambda: Stages('resnet18'), "backbone 'resnet18'"),
    (lambda: PointID('tiny', stride=2), 'stride 2: expected 4 or 8'),
    (lambda: PointID('tiny', weights='hub'), 'there are none for tiny'),
    (lambda: PointID('dla34', weights='pip'), 'there are none for dla34'),
    (lambda: small()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), 'expected floats'),
    (lambda: small()(torch.zeros(3, 8, 8)), 'images has shape'),
    (lambda: small().losses(torch.zeros(2, 3, 32, 32), [Detections([])]), '2 frames, 1 targets'),
    (lambda: small().embed_boxes(torch.zeros(1, 3, 32, 32), []), '1 frames, boxes for 0'),
    (lambda: small().embed_boxes(torch.zeros(1, 3, 32, 32), [[[np.nan, 0, 1, 1]]]), 'not finite'),
    (lambda: small().train_only('neck'), "part 'neck'"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


# The network

def deform_loop(x, move, count, weight):
    "By the definition, one place after another."
    n, c, h, w = x.shape
    out = torch.zeros(n, len(weight), h, w, dtype=x.dtype)
    at = lambda i, y, z: x[i, :, y, z] if 0 <= y < h and 0 <= z < w else torch.zeros(c, dtype=x.dtype)
    for i in range(n):
        for y in range(h):
            for z in range(w):
                for k in range(9):
                    py, px = y+k//3-1+move[i, 2*k, y, z].item(), z+k % 3-1+move[i, 2*k+1, y, z].item()
                    y0, x0 = math.floor(py), math.floor(px)
                    v = sum((1-abs(py-a))*(1-abs(px-b))*at(i, a, b) for a in (y0, y0+1) for b in (x0, x0+1))
                    out[i, :, y, z] += count[i, k, y, z]*weight[:, :, k//3, k % 3] @ v
    return out


def test_deformable_convolution_against_loops_and_the_operator():
    seed_all(0)
    conv = DeformConv(3, 2).double()
    torch.nn.init.normal_(conv.where.weight, std=.5)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    got, (move, count) = conv(x), conv.places(x)
    assert move.abs().max() > 1.5 # also far beyond the border
    torch.testing.assert_close(got, deform_loop(x, move, count, conv.conv.weight))
    torch.testing.assert_close(got, deform_conv2d(x, move, conv.conv.weight, padding=1, mask=count))


def test_deformable_convolution_begins_as_a_plain_one():
    conv, x = DeformConv(6, 4), torch.randn(2, 6, 9, 7)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.conv.weight, padding=1), atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_gives_the_cpus_values():
    model, x = small(stride=4).eval(), torch.rand(2, 3, 50, 75)
    torch.nn.init.normal_(model.encoder.skips[0][0].where.weight, std=.05)
    with torch.no_grad(): a, b = model(x), model.cuda()(x.cuda())
    for p, q in zip((a.embedding, *a.head), (b.embedding, *b.head)):
        torch.testing.assert_close(p, q.cpu(), atol=2e-3, rtol=2e-3)
    t = [Detections([[5, 5, 40, 45]]), Detections([])]
    with torch.autocast('cuda', torch.float16): losses = model.losses(x.cuda(), t)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize('size', [(32, 32), (33, 31), (50, 75), (7, 200)])
@pytest.mark.parametrize('stride', [4, 8])
def test_any_frame_size(size, stride):
    model, x = small(stride=stride).eval(), torch.rand(2, 3, *size)
    with torch.no_grad(): out = model(x)
    h, w = (-(-n//stride) for n in size)
    assert out.embedding.shape == (2, 24, h, w) and out.head.ltrb.shape == (2, 4, h, w)
    torch.testing.assert_close(out.embedding.norm(dim=1), torch.ones(2, h, w))
    for d, f in model.find(x, 0., most=5):
        assert len(d) == len(f) and (d.xyxy >= 0).all() and (d.xyxy <= [*size[::-1]]*2).all()
    f = model.embed_boxes(x, [[[0, 0, size[1], size[0]]], []])
    assert [len(a) for a in f] == [1, 0]
    losses = model.losses(x, [Detections([[1, 1, 6, 6]]), Detections([])])
    assert all(torch.isfinite(v) for v in losses.values())


def test_features_are_those_of_the_point_that_found():
    model, x = small().eval(), torch.rand(2, 3, 48, 64)
    with torch.no_grad(): out = model(x)
    for i, (d, f) in enumerate(model.find(x, 0., most=4)):
        rows = fcos_detections(out.head, 8, (48, 64), 0., 4)[i][1]
        np.testing.assert_allclose(f, out.embedding[i].flatten(1)[:, rows].T, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(f, axis=1), 1, atol=1e-5)


def test_one_pass_is_the_same_as_apart():
    model, x = small().eval(), torch.rand(1, 3, 40, 60)
    with torch.no_grad(): out, e, p = model(x), model.embeddings(x), model.class_scores(x, [[[0, 0, 16, 16]]])
    torch.testing.assert_close(out.embedding, e)
    torch.testing.assert_close(p[0, 0], out.head.classes[0, 0, 1, 1].sigmoid())


def test_sixteen_bits():
    model, x = small().eval(), torch.rand(2, 3, 50, 75)
    with torch.no_grad():
        a = model(x)
        with torch.autocast('cpu', torch.bfloat16): b = model(x)
    assert all(o.dtype == torch.float32 for o in (b.embedding, *b.head))
    assert F.cosine_similarity(a.embedding, b.embedding).min() > .99
    torch.testing.assert_close(a.head.classes, b.head.classes, atol=.05, rtol=.02)
    with torch.autocast('cpu', torch.bfloat16): losses = model.losses(x, [Detections([[9, 9, 40, 45]])]*2)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_double():
    model, x = small().double().eval(), torch.rand(1, 3, 40, 60, dtype=torch.float64)
    with torch.no_grad(): assert torch.isfinite(model(x).embedding).all()


def test_every_part_learns_from_both_losses():
    model, x = small().train(), torch.rand(2, 3, 48, 64)
    out = model(x)
    det = sum(fcos_losses(out.head, model.assign(out, [Detections([[9, 4, 30, 40]])]*2)).values())
    for loss, parts in ((det, ('backbone', 'encoder', 'head')), (out.embedding[:, :3].sum(), ('backbone', 'encoder'))):
        model.zero_grad()
        loss.backward(retain_graph=True)
        for n in model.parts:
            moved = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.part(n).parameters())
            assert moved == (n in parts)


def test_frozen_parts_keep_weights_and_statistics():
    model, x, t = small(), torch.rand(2, 3, 48, 64), [Detections([[9, 4, 30, 40]])]*2
    for names in (('backbone', 'encoder'), ('head',), ('encoder',)):
        model.train_only(*names)
        was = {k: v.clone() for k, v in model.state_dict().items()}
        opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .1)
        out = model.train()(x)
        loss = sum(fcos_losses(out.head, model.assign(out, t)).values())+out.embedding[:, :3].sum()
        loss.backward()
        opt.step()
        changed = {k.split('.')[0] for k, v in model.state_dict().items() if not torch.equal(v, was[k])}
        assert changed == set(names)
    assert all(p.requires_grad for p in model.train_only().parameters())
    assert model.train().encoder.norm.training and model.backbone.training
    model.fixed_stats = True
    assert not model.train().encoder.norm.training


def test_without_norm_nothing_is_centred():
    maps = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)]
    assert PointEncoder((8, 16), 4, 6, norm=False)(maps).mean((0, 2, 3)).abs().max() > .01
    assert PointEncoder((8, 16), 4, 6)(maps).mean((0, 2, 3)).abs().max() < 1e-5
    assert not any('norm' in k for k in small(norm=False).encoder.state_dict() if k.startswith('norm'))


def test_backbones_from_files(tmp_path):
    net, file = timm.create_model('dla34'), tmp_path/'d.pth'
    torch.save(net.state_dict(), file)
    mine = Stages('dla34', 4, file).state_dict()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in mine.items()) and len(mine) > 100
    for name in ('resnet50', 'dla34'):
        with pytest.raises(DataError, match='no such file'): Stages(name, weights=tmp_path/'none.pth')
    with pytest.raises(ValueError, match='does not fit'): Stages('tiny', weights=file)


def test_unreachable_weights(monkeypatch):
    def fail(*_, **__): raise OSError('no network')
    monkeypatch.setattr(timm, 'create_model', fail)
    with pytest.raises(ConnectionError, match='dla34 could not be downloaded'): PointID('dla34', weights='hub')


def test_kept_in_a_file(tmp_path):
    seed_all(3)
    model = make_detector('pointid', backbone='smaller', width=32, dim=16, stride=4, norm=False, radius=2.).eval()
    path, x = save_detector(model, tmp_path/'p.safetensors', half=False), torch.rand(1, 3, 40, 60)
    again = load_detector(path, 'cpu')
    torch.testing.assert_close(again(x).embedding, model(x).embedding)
    assert again.recipe == model.recipe and again.radius == 2. and again.fixed_stats
    assert 'weights' not in again.recipe and isinstance(build_model(again.recipe), PointID)
    with pytest.raises(ValueError, match="network 'pointID'"): make_detector('pointID')


def test_trained_as_any_detector():
    world = World(20, 2, 3, layout='ring', crowd=8, size=(160, 96))
    items, model = world_frames(world, [0, 1], [10, 60]), small()
    learn = detector_learner(model, items, bs=2, lr=.01, device='cpu')
    with quiet(): learn.fit(3)
    first, last = (h['loss_class'] for h in (learn.loss_history.history[0], learn.loss_history.history[-1]))
    assert last < first
    found = detect(model, items, least=0.)
    assert len(found) == 4 and all(len(d) for d in found)
