"Detectors: odd frames and boxes, freezing, 16 bits, sizes, files, repeats."
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.optimizer import Adam
from safetensors.torch import load_file, save_file
from torchvision.ops import roi_align

from reidlit.core import DataError, seed_all
from reidlit.data.sets import FrameSet
from reidlit.data.world import World
from reidlit.detection.detectors import (MAKERS,TINY,Detections,Detector,
    corrected_loss,faster_rcnn,load_detector,make_detector,save_detector,
    to_images)
from reidlit.detection.training import (BY_PRESET,FrameDataset,ShuffleSampler,
    base_detector,base_name,detect,detector_learner,detector_scores,frame_batch,
    join_frames,make_base,own_targets,public_frames,world_frames)
from reidlit.runs import WEIGHTS
from reidlit.learner import quiet
from reidlit.runs import fit

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def few():
    return world_frames(World(12, 2, 1, size=(160, 96), crowd=10), range(2), (50, 90))


@pytest.fixture
def small():
    seed_all(0)
    return faster_rcnn('smaller')


def learner(d, items, *args, **kwargs):
    with quiet(): return detector_learner(d, items, *args, device='cpu', **kwargs)


def weights(d): return {k: v.clone() for k, v in d.state_dict().items()}


def changed(d, was):
    "The parts of which any number, statistics left out, is another."
    new = d.state_dict()
    return {p for p in d.parts for k, v in d.part(p).named_parameters()
            if not torch.equal(v, was[next(n for n in was if n.endswith(k) and
                                           new[n].data_ptr() == v.data_ptr())])}


def test_detections():
    d = Detections([[0, 0, 4, 8], [1, 1, 3, 3], [2, 2, 9, 9]], [.9, .5, .1], gold=[1, 0, 1])
    assert d.xyxy.dtype == np.float32 and d.gold.dtype == bool and d.labels.tolist() == [1, 1, 1]
    for i, n in ((0, 1), (-1, 1), ([2, 0], 2), (slice(1, None), 2), (d.scores > .4, 2),
                 ([], 0), (np.zeros(3, bool), 0)):
        assert len(d[i]) == n
    assert d[1].gold.tolist() == [False] and d[[2, 0]].scores.tolist() == d.scores[[2, 0]].tolist()
    empty = Detections(np.zeros((0, 4)))
    assert len(empty) == 0 and empty.scores.shape == empty.gold.shape == (0,)
    for bad in ([[1, 1, 1, 5]], [[1, 5, 4, 5]], [[4, 1, 1, 5]], [[0, 0, np.nan, 1]],
                [[0, 0, np.inf, 1]]):
        with pytest.raises(ValueError, match='is not xyxy'): Detections(bad)
    for k in ('scores', 'labels', 'gold'):
        with pytest.raises(ValueError, match=f'{k} has shape'): Detections(d.xyxy, **{k: [1, 1]})
    with pytest.raises(IndexError): d[3]


def test_degenerate_boxes_of_a_set_are_named():
    flat = FrameSet([np.zeros((96, 160, 3), np.uint8)], None, None, [0], [[3, 3, 3, 9]], None)
    with pytest.raises(ValueError, match=r'box 0 \[3. 3. 3. 9.\] is not xyxy'): own_targets(flat)


def test_frames_without_any_box_train(small):
    items = FrameSet([np.full((96, 160, 3), g, np.uint8) for g in (30, 200)], None, None, [],
                     np.zeros((0, 4)), None)
    learn = learner(small, items, lr=1e-3)
    learn.fit(2)
    last = learn.loss_history.history[-1]
    assert len(last) == 4 and np.isfinite(list(last.values())).all()
    assert last['loss_box_reg'] == last['loss_rpn_box_reg'] == 0
    assert np.isnan(detector_scores(small, items)['AP'])


def test_empty_and_full_targets_in_one_batch(small, few):
    x = to_images([few.images[0]]*2)
    t = own_targets(few)[0]
    for correction in (None, torch.eye(2)):
        for targets in ([t, Detections([])], [Detections([])]*2):
            out = small.losses(x, targets, correction)
            assert all(torch.isfinite(v) for v in out.values())
            sum(out.values()).backward()


def test_gold_all_false(small, few):
    x, t = to_images(few.images[:1]), own_targets(few)[0]
    doubtful = Detections(t.xyxy, gold=np.zeros(len(t), bool))

    def loss(target, correction):
        seed_all(3)
        return small.losses(x, [target], correction)['loss_classifier'].item()
    plain = loss(t, None)
    habits = torch.tensor([[1., 0], [.4, .6]])
    assert np.isclose(loss(doubtful, torch.eye(2)), plain, rtol=1e-5)
    assert np.isclose(loss(t, habits), plain, rtol=1e-5)
    assert loss(doubtful, habits) > plain
    assert loss(doubtful, None) == plain # `correction=None` forgets the last one


def test_corrected_loss_against_a_loop():
    seed_all(0)
    z, y, gold = torch.randn(20, 3), torch.randint(0, 3, (20,)), torch.rand(20) < .5
    C = torch.rand(3, 3)
    C = C/C.sum(1, keepdim=True)
    p = z.softmax(1)
    each = [-(p[i, y[i]] if gold[i] else sum(p[i, k]*C[k, y[i]] for k in range(3))).log()
            for i in range(20)]
    assert torch.isclose(corrected_loss(z, y, gold, C), torch.stack(each).mean(), atol=1e-6)
    assert torch.isclose(corrected_loss(z, y, gold | True, C), F.cross_entropy(z, y))
    for bad in (C[:2], C[:, :2]):
        with pytest.raises(ValueError, match='correction has shape'): corrected_loss(z, y, gold, bad)


@pytest.mark.parametrize('names', [('backbone',), ('rpn', 'roi'), ()])
def test_freezing(small, few, names):
    was = weights(small)
    small.train_only(*names)
    learner(small, few[:2], lr=1e-3, opt_func=Adam).fit(1)
    assert changed(small, was) == set(names or small.parts)
    small.train_only()
    assert all(p.requires_grad for p in small.parameters())
    with pytest.raises(ValueError, match="part 'neck'"): small.train_only('backbone', 'neck')
    assert all(p.requires_grad for p in small.parameters())


def test_statistics_stay_when_fixed(small, few):
    stats = lambda: [v.clone() for k, v in small.state_dict().items() if 'running' in k]
    a = stats()
    small.fixed_stats = True
    learner(small, few[:2], lr=1e-3).fit(1)
    assert a and all(torch.equal(p, q) for p, q in zip(a, stats()))
    small.fixed_stats = False
    learner(small, few[:2], lr=1e-3).fit(1)
    assert not any(torch.equal(p, q) for p, q in zip(a, stats()))


def test_modes_are_kept(small, few):
    x, t = to_images(few.images[:1]), own_targets(few)[:1]
    for mode in (True, False):
        small.train(mode)
        small.predict(x), small.losses(x, t)
        assert small.training == small.net.training == mode


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='no GPU'))])
def test_16_bits(few, device):
    seed_all(0)
    d = faster_rcnn('smaller').to(device)
    d.fixed_stats = True
    x, t = to_images(few.images[:2], device), own_targets(few)[:2]
    boxes = [torch.tensor(o.xyxy, device=device) for o in t]
    full = d.eval().class_scores(x, boxes)
    for C in (None, torch.tensor([[1., 0], [.3, .7]], device=device)):
        with torch.autocast(device, torch.bfloat16):
            out = d.losses(x, t, C)
            half = d.class_scores(x, boxes)
        sum(out.values()).backward()
        assert all(torch.isfinite(v) for v in out.values())
        assert torch.allclose(half.float(), full, atol=.03)
    assert all(torch.isfinite(p.grad).all() for p in d.parameters() if p.grad is not None)
    assert isinstance(d.predict(x)[0].xyxy, np.ndarray)


class Middle(Detector):
    "Finds the brightest pixels' extent, whatever the size."
    parts = ('backbone',)

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(1, 1)

    def predict(self, images, least=.05):
        out = []
        for im in images:
            y, x = torch.where(im[0] > .5)
            out.append(Detections([[x.min(), y.min(), x.max()+1, y.max()+1]], [.9]))
        return out


@pytest.mark.parametrize('size', [None, (48, 80), (192, 320), (96, 320)])
def test_sizes_scale_boxes_back(size):
    im = np.zeros((96, 160, 3), np.uint8)
    im[16:80, 40:64] = 255
    items = FrameSet([im]*3, None, None, [0, 1, 2], [[40, 16, 64, 80]]*3, None)
    found = detect(Middle(), items, size, bs=2)
    assert len(found) == 3
    for d in found: assert np.allclose(d.xyxy, [[40, 16, 64, 80]], atol=.01)
    frame, t = FrameDataset(items, size=size, flip=False)[1]
    h, w = size or (96, 160)
    assert frame.shape == (h, w, 3)
    assert np.allclose(t.xyxy/[w, h, w, h], [[.25, 1/6, .4, 5/6]], atol=1e-6)
    assert detector_scores(Middle(), items, size)['AP'] > .99


def test_frames_of_two_sizes(few):
    items = join_frames([few, FrameSet([np.zeros((64, 64, 3), np.uint8)], None, None, [],
                                       np.zeros((0, 4)), None)])
    with pytest.raises(ValueError, match=r'sizes \[\(64, 64\), \(96, 160\)\]'):
        detect(Middle(), items)
    with pytest.raises(ValueError, match='give size='):
        frame_batch([FrameDataset(items)[i] for i in (0, 4)])
    frames, _ = frame_batch([FrameDataset(items, size=(32, 32))[i] for i in (0, 4)])
    assert frames.shape == (2, 32, 32, 3)


def test_mirrored_frames(few):
    ds, plain = FrameDataset(few), FrameDataset(few, flip=False)
    (im, t), mirrored = plain[0], 0
    for seed in range(12):
        seed_all(seed)
        flipped, o = ds[0]
        if np.array_equal(flipped, im): assert np.array_equal(o.xyxy, t.xyxy); continue
        mirrored += 1
        assert np.array_equal(flipped, im[:, ::-1])
        assert np.allclose(o.xyxy[:, [2, 0]], 160-t.xyxy[:, [0, 2]])
        assert np.array_equal(o.xyxy[:, [1, 3]], t.xyxy[:, [1, 3]])
    assert 2 <= mirrored <= 10
    assert np.array_equal(few.xyxy[few.row == 0], t.xyxy) # the set itself is as it was


def test_sampler():
    for n, size, rows in ((10, 4, None), (10, 4, 6), (3, 8, None), (9, 3, 1), (5, 5, 99)):
        s = ShuffleSampler(n, size, 2, rows)
        p = s.plan(0)
        assert p.shape[1] == min(size, n) and len(set(p.ravel())) == p.size <= n
        assert p.size <= max(min(size, n), rows or n) and len(s) == len(p)
        assert np.array_equal(p, ShuffleSampler(n, size, 2, rows).plan(0))
    seen = np.concatenate([ShuffleSampler(10, 4).plan(e).ravel() for e in range(5)])
    assert set(seen) == set(range(10))
    with pytest.raises(ValueError, match='no rows'): ShuffleSampler(0)


def test_a_seed_repeats_a_training(few):
    def run(seed):
        seed_all(seed)
        d = faster_rcnn('smaller')
        learner(d, few, bs=2, lr=1e-3, rows=2, seed=seed).fit(2)
        return weights(d)
    a, b, c = run(1), run(1), run(2)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a['net.backbone.fpn.inner_blocks.0.0.weight'],
                           c['net.backbone.fpn.inner_blocks.0.0.weight'])


@pytest.mark.parametrize('opt', [None, Adam])
def test_resumed_training_is_the_same(few, tmp_path, opt):
    def run(folder, **kwargs):
        seed_all(1)
        d = faster_rcnn('smaller').train_only('backbone')
        learn = learner(d, few[:2], lr=1e-3, opt_func=opt)
        try: fit(learn, 3, folder, dict(run=1), **kwargs)
        except KeyboardInterrupt: pass
        return d.state_dict(), learn.loss_history.history
    whole, history = run(tmp_path/'a')
    part, _ = run(tmp_path/'b', stop_after=2)
    again, other = run(tmp_path/'b', resume=True)
    assert any(not torch.equal(whole[k], part[k]) for k in whole)
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert history == other and len(history) == 3


def test_class_scores(small, few):
    x = to_images(few.images[:2])
    boxes = [torch.tensor(t.xyxy) for t in own_targets(few)[:2]]
    small.eval()
    s = small.class_scores(x, boxes)
    assert torch.allclose(s.sum(1), torch.ones(len(s)))
    assert torch.allclose(s[len(boxes[0]):], small.class_scores(x[1:], boxes[1:]), atol=1e-5)
    empty = small.class_scores(x, [boxes[0], torch.zeros(0, 4)])
    assert torch.allclose(empty, s[:len(boxes[0])], atol=1e-5)
    assert small.class_scores(x, [torch.zeros(0, 4)]*2).shape == (0, 2)
    for n in (1, 3):
        with pytest.raises(ValueError, match=f'2 frames, boxes for {n}'):
            small.class_scores(x, boxes[:1]*n)
    # both cameras' opinions of one box, its features by roi_align alone
    pyramid = small.features(x[:1])
    one = torch.tensor([[60., 20, 76, 50]]) # area 480, so the finest map
    pooled = roi_align(pyramid[0], [one], 7, 1/8, 2)
    z = small.roi.box_predictor(small.roi.box_head(pooled))[0]
    assert torch.allclose(small.class_scores(x[:1], [one]), z.softmax(1), atol=1e-5)


@pytest.mark.parametrize('train,gets', [(('backbone',), {'backbone'}), (('roi',), {'roi'}),
                                        ((), {'backbone', 'roi'})])
def test_where_the_gradient_of_class_scores_goes(small, few, train, gets):
    small.train_only(*train).eval()
    s = small.class_scores(to_images(few.images[:1]), [torch.tensor(own_targets(few)[0].xyxy)])
    s[:, 1].sum().backward()
    got = {p for p in small.parts for q in small.part(p).parameters()
           if q.grad is not None and q.grad.abs().sum() > 0}
    assert got == gets


def test_predict_is_sorted_and_cut(few):
    d = base_detector(device='cpu')
    x = to_images([World(60, 3, 100, layout='plaza').frame(0, 0)])
    low, high = d.predict(x, .05)[0], d.predict(x, .7)[0]
    assert (np.diff(low.scores) <= 0).all() and len(high) < len(low)
    assert np.array_equal(high.xyxy, low[low.scores > .7].xyxy)
    assert low.xyxy.min() >= 0 and low.xyxy[:, 2].max() <= 480 and low.xyxy[:, 3].max() <= 270


def test_published_backbones():
    for name, n in (('resnet50', 41e6), ('resnet101', 60e6)):
        d = faster_rcnn(name, classes=2)
        assert abs(sum(p.numel() for p in d.parameters())/n-1) < .02
        assert d.roi.box_predictor.cls_score.out_features == 3
        assert d.train_only('rpn').part('rpn') is d.net.rpn
    big = [sum(p.numel() for p in faster_rcnn(n).backbone.parameters())
           for n in ('smaller', 'tiny', 'larger')]
    assert big == sorted(big) and set(TINY) == {'smaller', 'tiny', 'larger'}


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def no(*_, **__): raise OSError('no route to host')
    monkeypatch.setattr('reidlit.detection.detectors.fasterrcnn_resnet50_fpn', no)
    with pytest.raises(ConnectionError, match=r'could not be downloaded \(OSError\).*weights=None'):
        faster_rcnn('resnet50', weights='hub')
    for backbone, weights in (('tiny', 'hub'), ('resnet50', 'there'), ('tiny', 'there')):
        with pytest.raises(ValueError, match='weights='): faster_rcnn(backbone, weights=weights)
    with pytest.raises(ValueError, match="backbone 'alexnet'"): faster_rcnn('alexnet')


def test_files(tmp_path):
    d = make_detector(backbone='smaller', aspect=1.5)
    f = save_detector(d, tmp_path/'a.safetensors', note='x')
    back = load_detector(f, 'cpu')
    assert back.made == d.made and back.info == dict(note='x') and not back.training
    for k, v in d.state_dict().items(): assert torch.allclose(back.state_dict()[k], v, atol=1e-3)
    whole = save_detector(d, tmp_path/'b.safetensors', half=False)
    assert whole.stat().st_size > 1.9*f.stat().st_size
    again = load_detector(whole, 'cpu').state_dict()
    assert all(torch.equal(again[k], v) for k, v in d.state_dict().items())
    with pytest.raises(ValueError, match='no .made'): save_detector(faster_rcnn(), f)


def test_broken_and_other_files(tmp_path):
    state = {k: v for k, v in faster_rcnn('smaller').state_dict().items()}
    good = save_detector(make_detector(backbone='smaller'), tmp_path/'good.safetensors')
    files = {n: tmp_path/f'{n}.safetensors' for n in
             ('cut', 'text', 'bare', 'wrong', 'unknown', 'lacking', 'odd')}
    files['cut'].write_bytes(good.read_bytes()[:-100])
    files['text'].write_text('hello')
    save_file(state, files['bare'])
    note = lambda made: dict(detector=json.dumps(dict(made=made, info={})))
    save_file(state, files['wrong'], note(dict(network='faster_rcnn', backbone='larger')))
    save_file(state, files['unknown'], note(dict(network='detr')))
    half = dict(list(load_file(good).items())[:5])
    save_file(half, files['lacking'], note(dict(network='faster_rcnn', backbone='smaller')))
    save_file(state, files['odd'], note(dict(network='faster_rcnn', colour='red')))
    for f in files.values():
        with pytest.raises(DataError, match=f'{f.name}: not a model'): load_detector(f, 'cpu')
    with pytest.raises(DataError, match='no such file'): load_detector(tmp_path/'none', 'cpu')
    pickled = tmp_path/'p.safetensors'
    torch.save(state, pickled)
    with pytest.raises(DataError, match='p.safetensors'): load_detector(pickled, 'cpu')


def test_base_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv('REIDLIT_DATA', str(tmp_path))
    monkeypatch.setenv('REIDLIT_PRESET', 'ci')
    monkeypatch.setattr('reidlit.runs.WEIGHTS', tmp_path/'none')
    monkeypatch.setitem(BY_PRESET, 'ci', dict(worlds=1, times=1, epochs=1))
    d = base_detector('vehicles', device='cpu', backbone='smaller')
    path = tmp_path/'models'/'ci'/base_name('vehicles', backbone='smaller')
    assert path.exists() and d.made['aspect'] == .6 and d.fixed_stats
    monkeypatch.setattr('reidlit.detection.training.make_base', partial(pytest.fail, 'made twice'))
    again = base_detector('vehicles', device='cpu', backbone='smaller')
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in d.state_dict().items())
    for f in (base_detector, make_base, public_frames):
        with pytest.raises((ValueError, KeyError), match='boats'): f('boats')


def test_the_shipped_base():
    f = WEIGHTS/base_name('people')
    assert f.stat().st_size < 5e6 and 'faster_rcnn' in MAKERS
    world = World(60, 3, 101, layout='plaza', crowd=12)
    items = world_frames(world, [0], (0, 60))
    s = detector_scores(load_detector(f, CPU), items)
    assert s['AP50'] > .3 and s['AP'] > s['AP80']
