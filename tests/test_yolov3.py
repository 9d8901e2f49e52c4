"YOLOv3 against loops, the published network's layer list, and bad input."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_iou

from reidlit.core import DataError
from reidlit.detection.detectors import Detections,make_detector
from reidlit.detection.training import detector_learner,world_frames
from reidlit.data.world import World
from reidlit.detection.yolo_grids import shape_iou
from reidlit.detection.darknet import darknet_tensors, load_darknet, save_darknet
from reidlit.detection.yolov3 import (BOX_LOSSES, COCO_ANCHORS, STRIDES, TinyDarknet, YoloHead,
                            YoloV3, decode, encode, frame_losses,
                            pad_frames,
                            tiny_yolov3, upright_anchors, yolov3)

A = torch.tensor(COCO_ANCHORS).float()


def small(seed=0, classes=1, **kwargs):
    "A detector of 9,000 weights."
    torch.manual_seed(seed)
    body = TinyDarknet((8, 8, 16, 16, 16), (0,)*5)
    return YoloV3(body, YoloHead(body.channels, classes, 1), **kwargs)


def boxes(n, w, h, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = torch.rand(n, 2, generator=g)*torch.tensor([w, h])
    s = torch.rand(n, 2, generator=g)*90+4
    return torch.cat([c-s/2, c+s/2], 1)


def targets(n, w, h, seed=0):
    return Detections(boxes(n, w, h, seed).numpy())


@pytest.mark.parametrize('seed', range(3))
def test_decode_against_loops(seed):
    torch.manual_seed(seed)
    raw, anchors, stride = torch.randn(2, 3*7, 2, 3), [(9, 20), (30, 7), (50, 50)], 16
    box, obj, cls = decode(raw, anchors, stride)
    sig = lambda v: 1/(1+math.exp(-v))
    for n in range(2):
        for a, (pw, ph) in enumerate(anchors):
            for y in range(2):
                for x in range(3):
                    t = raw[n, 7*a:7*a+7, y, x].tolist()
                    cx, cy = (sig(t[0])+x)*stride, (sig(t[1])+y)*stride
                    w, h = pw*math.exp(t[2]), ph*math.exp(t[3])
                    np.testing.assert_allclose(
                        box[n, a, y, x], [cx-w/2, cy-h/2, cx+w/2, cy+h/2], atol=1e-3)
                    np.testing.assert_allclose(obj[n, a, y, x], sig(t[4]), atol=1e-6)
                    np.testing.assert_allclose(cls[n, a, y, x], list(map(sig, t[5:])),
                                               atol=1e-6)


@pytest.mark.parametrize('size', [(32, 32), (288, 480), (64, 160)])
@pytest.mark.parametrize('anchors', [A, upright_anchors(2.5), upright_anchors(.6)])
def test_encode_against_loops_and_back(size, anchors):
    b = boxes(60, size[1], size[0])
    rows, code = encode(b, anchors, size)
    names = [(i, a, y, x) for i, s in enumerate(STRIDES) for a in range(3)
             for y in range(size[0]//s) for x in range(size[1]//s)]
    for box, row, c in zip(b.tolist(), rows.tolist(), code.tolist()):
        i, a, y, x = names[row]
        w, h, cx, cy = box[2]-box[0], box[3]-box[1], (box[0]+box[2])/2, (box[1]+box[3])/2
        shared = [min(w, p)*min(h, q) for p, q in anchors.tolist()]
        iou = [s/(w*h+p*q-s) for s, (p, q) in zip(shared, anchors.tolist())]
        assert iou[3*i+a] == pytest.approx(max(iou), abs=1e-6)
        s, (p, q) = STRIDES[i], anchors[3*i+a].tolist()
        assert x*s-1e-3 <= cx <= (x+1)*s+1e-3 and y*s-1e-3 <= cy <= (y+1)*s+1e-3
        back = [(c[0]+x)*s, (c[1]+y)*s, p*math.exp(c[2]), q*math.exp(c[3])]
        np.testing.assert_allclose(back, [cx, cy, w, h], atol=1e-2)


def test_centres_outside_the_frame_take_the_nearest_cell():
    b = torch.tensor([[-90., -90, -50, -40], [900, 900, 950, 999]])
    rows, code = encode(b, A, (64, 64))
    assert ((rows >= 0) & (rows < 252)).all()
    assert ((code[:, :2] >= 0) & (code[:, :2] <= 1)).all() and torch.isfinite(code).all()


def test_shape_iou_is_the_iou_of_boxes_on_one_corner():
    s = torch.rand(20, 2)*50+1
    corner = torch.cat([torch.zeros(20, 2), s], 1)
    torch.testing.assert_close(shape_iou(s, s), box_iou(corner, corner))


def test_paper_gradient_is_prediction_minus_truth():
    raw = torch.randn(5, 6, requires_grad=True)
    code = torch.rand(5, 4)
    BOX_LOSSES['paper'](raw, None, code, None).backward()
    said = torch.cat([raw[:, :2].sigmoid(), raw[:, 2:4]], 1)
    torch.testing.assert_close(raw.grad[:, :4], (said-code).detach())
    assert not raw.grad[:, 4:].any()


@pytest.mark.parametrize('classes', [1, 3])
def test_losses_against_loops(classes):
    size, t = (64, 96), targets(6, 96, 64, 1)
    t.labels[:] = np.arange(6) % classes+1
    torch.manual_seed(2)
    raw, b = torch.randn(378, 5+classes), boxes(378, 96, 64, 3)
    rows, code = encode(torch.tensor(t.xyxy), A, size)
    iou = box_iou(b, torch.tensor(t.xyxy)).amax(1)
    yes = no = kind = 0.
    for i in range(378):
        p = raw[i, 4].sigmoid().item()
        if i not in rows.tolist() and iou[i] <= .5: no -= math.log(1-p)
    for i, k in zip(rows.tolist(), t.labels-1):
        yes -= math.log(raw[i, 4].sigmoid().item())
        for c, p in enumerate(raw[i, 5:].sigmoid().tolist()):
            kind -= math.log(p if c == k else 1-p)
    got = frame_losses(raw, b, t, A, size)
    np.testing.assert_allclose(got[:2], [yes+no, kind], rtol=1e-4)
    assert (iou > .5).any()


def test_correction_of_gold_and_silver():
    t, size = targets(4, 64, 64, 1), (64, 64)
    raw, b = torch.randn(252, 6), torch.zeros(252, 4)
    plain = frame_losses(raw, b, t, A, size)
    C = torch.tensor([[.7, .3], [.2, .8]])
    torch.testing.assert_close(frame_losses(raw, b, t, A, size, correction=C), plain)
    t.gold[1] = False
    row = encode(torch.tensor(t.xyxy), A, size)[0][1]
    p = (raw[row, 4].sigmoid()*raw[row, 5].sigmoid())
    got = frame_losses(raw, b, t, A, size, correction=C)
    change = -torch.log(.3*(1-p)+.8*p)+F.logsigmoid(raw[row, 4])
    torch.testing.assert_close(got[0]-plain[0], change, atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1]-plain[1], F.logsigmoid(raw[row, 5]), atol=1e-4, rtol=0)
    torch.testing.assert_close(got[2], plain[2])
    with pytest.raises(ValueError, match='for 3 classes'):
        frame_losses(torch.randn(252, 8), b, t, A, size, correction=C)


@pytest.mark.parametrize('box', BOX_LOSSES)
def test_a_few_steps_lower_every_loss(box):
    world = World(20, 2, 3, layout='ring', crowd=10, size=(160, 96))
    items = world_frames(world, [0, 1], [10, 60])
    d = small(box=box, anchors=upright_anchors(2.5)/2)
    learn = detector_learner(d, items, bs=4, lr=3e-3, opt_func=None, device='cpu')
    opt = torch.optim.Adam(d.parameters(), 1e-2)
    first = last = None
    for _ in range(12):
        for frames, t, *_ in learn.dls.train:
            x = frames.permute(0, 3, 1, 2).float()/255
            last = d.losses(x, t)
            opt.zero_grad(); sum(last.values()).backward(); opt.step()
            first = first or {k: v.item() for k, v in last.items()}
    assert sum(v.item() for v in last.values()) < .7*sum(first.values())
    assert list(last) == ['loss_objectness', 'loss_class', 'loss_box']


def test_no_boxes_at_all():
    d, x = small(), torch.rand(2, 3, 50, 40)
    losses = d.losses(x, [Detections([]), Detections([])])
    assert losses['loss_box'] == 0 and losses['loss_class'] == 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in d.parameters() if p.grad is not None)
    assert d.class_scores(x, [torch.zeros(0, 4)]*2).shape == (0, 1)
    assert d.eval().class_scores(x, [torch.zeros(0, 4)]*2).shape == (0, 1)
    assert [len(f) for f in d.predict(x, .9)] == [0, 0]


def test_two_people_in_one_cell_are_counted_twice():
    d, x = small(), torch.rand(1, 3, 64, 64)
    t = Detections([[10, 10, 30, 50], [10, 10, 30, 50]])
    once, twice = [d.losses(x, [o])['loss_box'].item() for o in (t[:1], t)]
    assert twice == pytest.approx(once, rel=1e-4)


def test_fixed_statistics_and_frozen_parts():
    d, x, t = small(), torch.rand(2, 3, 64, 64), [targets(3, 64, 64)]*2
    keep = {k: v.clone() for k, v in d.state_dict().items()}
    d.fixed_stats = True
    sum(d.train_only('head').losses(x, t).values()).backward()
    assert all(torch.equal(v, keep[k]) for k, v in d.state_dict().items())
    assert all(p.grad is None for p in d.backbone.parameters())
    d.train_only('backbone').zero_grad()
    d.class_scores(x, [torch.tensor(o.xyxy) for o in t]).log().mean().backward()
    assert all(p.grad is None for p in d.head.parameters())
    assert all(p.grad is not None for p in d.backbone.parameters())
    d.fixed_stats = False
    d.losses(x, t)
    assert not torch.equal(keep['backbone.stages.0.0.1.running_mean'],
                           d.state_dict()['backbone.stages.0.0.1.running_mean'])


@pytest.mark.parametrize('shape', [(7, 10), (33, 65), (64, 64)])
@pytest.mark.parametrize('classes', [1, 4])
def test_prediction_is_inside_the_frame_and_suppressed(shape, classes):
    d, x = small(classes=classes).eval(), torch.rand(2, 3, *shape)
    for f in d.predict(x, 0, most=30):
        assert len(f) <= 30 and (np.diff(f.scores) <= 0).all()
        assert (f.xyxy >= 0).all() and (f.xyxy <= [*shape[::-1]]*2).all()
        assert set(f.labels) <= set(range(1, classes+1))
        for k in set(f.labels):
            b = torch.tensor(f.xyxy[f.labels == k])
            assert (box_iou(b, b).fill_diagonal_(0) <= .45+1e-6).all()
    best = d.predict(x, 0)[0]
    assert len(d.predict(x, float(best.scores[0])+1e-6)[0]) == 0


def test_class_scores_are_the_candidates_own():
    d, x = small(classes=3).eval(), torch.rand(2, 3, 60, 70)
    b = [boxes(5, 70, 60, 1), boxes(2, 70, 60, 2)]
    _, raw, size = d.read(x)
    p = d.class_scores(x, [o.numpy() for o in b])
    want = torch.cat([raw[i, encode(o, d.anchors, size)[0]] for i, o in enumerate(b)])
    torch.testing.assert_close(p, want[:, 4:5].sigmoid()*want[:, 5:].sigmoid())
    assert p.shape == (7, 3)


def test_half_precision():
    d, x, t = small(), torch.rand(2, 3, 64, 64), [targets(3, 64, 64)]*2
    with torch.autocast('cpu', torch.bfloat16): losses = d.losses(x, t)
    assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())


def published(classes):
    "Input, output and kernel of each convolution, read off the published network."
    out, c = [(3, 32, 3)], 32
    for n in (1, 2, 8, 8, 4):
        out += [(c, 2*c, 3)]+[(2*c, c, 1), (c, 2*c, 3)]*n
        c *= 2
    for width, given in ((512, 1024), (256, 768), (128, 384)):
        if width < 512: out.append((2*width, width, 1))
        out += [(given, width, 1), (width, 2*width, 3)]+[(2*width, width, 1),
                                                         (width, 2*width, 3)]*2
        out.append((2*width, 3*(5+classes), 1))
    return out


@pytest.mark.parametrize('classes', [80, 20])
def test_layers_are_the_published_ones(classes):
    with torch.device('meta'): d = yolov3('darknet53', classes)
    convs = [m for m in d.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convs] \
        == published(classes)
    assert [i for i, m in enumerate(convs) if m.bias is not None] == [58, 66, 74]
    raws = d.head(d.features(torch.empty(1, 3, 416, 416, device='meta')))
    assert [tuple(r.shape[1:]) for r in raws] == [(3*(5+classes), n, n) for n in (52, 26, 13)]


@pytest.mark.parametrize('name,numbers,size', [
    ('yolov3.weights', 62_001_757, 248_007_048),
    ('darknet53.conv.74', 40_620_640, 162_482_580)])
def test_published_files_have_our_length(tmp_path, name, numbers, size):
    "A file of that length, all holes, is taken in whole, and no other length is."
    with torch.device('meta'): d = yolov3('darknet53', 80)
    d = d if name == 'yolov3.weights' else d.backbone
    assert sum(t.numel() for t in darknet_tensors(d)) == numbers
    path = tmp_path/name
    with open(path, 'wb') as f:
        f.write(np.array([0, 2, 0], '<i4').tobytes()); f.truncate(size)
    assert load_darknet(d, path) is d
    for wrong in (-4, -1, 3, 400):
        with open(path, 'r+b') as f: f.truncate(size+wrong)
        with pytest.raises(DataError, match=f'{name}: .*numbers; expected {numbers:,}'):
            load_darknet(d, path)


@pytest.mark.parametrize('version', [(0, 1, 0), (0, 2, 0), (0, 2, 5), (1, 0, 0)])
def test_weights_round_trip(tmp_path, version):
    a, b = small(1, 2), small(2, 2)
    for m in a.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean); nn.init.uniform_(m.running_var, .5, 2)
    path = save_darknet(a, tmp_path/'a.weights', 12, version)
    load_darknet(b, path)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(a.eval().read(x)[1], b.eval().read(x)[1])
    values = np.fromfile(path, '<f4', offset=16 if version == (0, 1, 0) else 20)
    first, norm = a.backbone.stages[0][0][:2]
    for want, start in ((norm.bias, 0), (norm.weight, 8), (norm.running_mean, 16),
                        (norm.running_var, 24), (first.weight, 32)):
        want = want.detach().numpy().ravel()
        np.testing.assert_array_equal(values[start:start+len(want)], want)
    last = a.head.scales[-1].out[1]
    np.testing.assert_array_equal(values[-last.weight.numel():],
                                  last.weight.detach().numpy().ravel())


def test_weights_of_another_network(tmp_path):
    path = save_darknet(small(), tmp_path/'one.weights')
    d = small(classes=2)
    keep = d.head.scales[0].out[1].bias.clone()
    with pytest.raises(DataError, match='one.weights'): load_darknet(d, path)
    assert torch.equal(keep, d.head.scales[0].out[1].bias)
    path.write_bytes(b'')
    with pytest.raises(DataError, match='too short'): load_darknet(d, path)
    with pytest.raises(DataError, match='no such file'): load_darknet(d, tmp_path/'none')


def test_bad_arguments():
    with pytest.raises(ValueError, match="backbone 'resnet'"): yolov3('resnet')
    with pytest.raises(ValueError, match='aspect -1'): upright_anchors(-1)
    with pytest.raises(ValueError, match='images has shape'): pad_frames(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match='1 to 1'):
        small().losses(torch.rand(2, 3, 64, 64),
                       [Detections([[1, 1, 9, 9]], labels=[2])]*2)


def test_the_tiny_one_is_small_and_is_listed():
    d = tiny_yolov3()
    assert 3e5 < sum(p.numel() for p in d.parameters()) < 8e5
    assert d.parts == ('backbone', 'head') and d.binary
    assert make_detector('yolov3').made == dict(network='yolov3')
