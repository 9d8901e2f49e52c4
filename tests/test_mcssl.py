"MCSSL and its rivals: odd cameras and labels, interruptions, repeats, what is left alone."
import logging
import signal
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import reidlit.mcssl as mcssl
from reidlit.core import DataError, seed_all
from reidlit.data.sets import FrameSet
from reidlit.data.world import World
from reidlit.detection.detectors import Detections,faster_rcnn
from reidlit.detection.training import own_targets,world_frames
from reidlit.learner import quiet
from reidlit.mcssl import (BASELINES, MCSSL, PHASES, PRESETS, baseline, customise,
                           estimate_corruption, exponential_mean, flip_consistency, gather,
                           mcssl_settings)
from reidlit.metrics.detection import box_iou
from reidlit.mcssl.pairs import true_associations
from reidlit.video import VideoReid
from reidlit.detection.yolov3 import yolov3

KEYS = [40, 50]
SHORT = mcssl_settings('ci', epochs=(2, 2), bs=2)
WORLD = World(12, 3, 1, layout='plaza', size=(160, 96), crowd=10)


@pytest.fixture(scope='module')
def items():
    return world_frames(WORLD, range(3), [t+j for t in KEYS for j in range(5)])


@pytest.fixture
def base():
    seed_all(0)
    return faster_rcnn('smaller').eval()


@pytest.fixture(scope='module')
def reid():
    seed_all(0)
    return VideoReid('tiny16', join='mean').eval(), 9., dict(settings=dict(length=2, size=(32, 16)))


@pytest.fixture(autouse=True)
def silent():
    with quiet(): yield


def fake(monkeypatch, scores=(.9, .5), none=False):
    "A base detector that finds true boxes, in turn sure and not."
    def detect(detector, own, size=None, least=.05, bs=8):
        out = []
        for t in own_targets(own):
            t.scores[:] = np.resize(scores, len(t))
            out.append(t[[]] if none else t)
        return out
    monkeypatch.setattr(mcssl, 'detect', detect)


@pytest.fixture
def run(items, base, reid, monkeypatch):
    fake(monkeypatch)
    def f(camera=0, others=(1, 2), detector=base, items=items, times=KEYS, settings=SHORT, **kw):
        return customise(camera, others, detector, items, times, settings,
                         **(dict(reid=reid, device='cpu') | kw))
    return f


def weights(d): return {k: v.clone() for k, v in d.state_dict().items()}
def same(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())


def moved(new, base):
    "Parts of which any number is another."
    return {p for p in base.parts for a, b in zip(new.part(p).state_dict().values(),
                                                  base.part(p).state_dict().values())
            if not torch.equal(a, b)}


def test_names():
    from reidlit.mcssl import (associate_boxes, consistency_loss, epipolar_candidates,
                               split_pseudo_labels)
    for f in (epipolar_candidates, split_pseudo_labels, associate_boxes, consistency_loss,
              customise):
        assert f.__name__ in mcssl.__all__ and f.__module__.startswith('reidlit')


def test_settings():
    may_change = {'epochs', 'opt', 'lr', 'lr_backbone', 'bs'}
    for p in PRESETS:
        s = mcssl_settings(p)
        assert {k for k in s if s[k] != MCSSL[k]} <= may_change and mcssl_settings(**s) == s
    with pytest.raises(ValueError, match="unknown settings ..T_cls"): mcssl_settings(T_cls=.5)
    with pytest.raises(ValueError, match="'tiny'"): mcssl_settings('tiny')


def test_phases_train_their_parts_and_nothing_else(run, base, items):
    was, pictures, seen = weights(base), items.read(3).copy(), []
    c = run(watch=lambda *a: seen.append((*a[:2], moved(a[2], base))))
    assert [o[:2] for o in seen] == [(p, e) for p in PHASES for e in (1, 2)]
    assert [o[2] for o in seen] == [{'backbone'}]*2+[{'backbone', 'rpn', 'roi'}]*2
    assert same(was, weights(base)) and not base.fixed_stats and (pictures == items.read(3)).all()
    assert all(p.requires_grad for p in c.detector.parameters()) and not c.detector.training
    for k, v in was.items():
        if 'running' in k or 'tracked' in k: assert torch.equal(v, c.detector.state_dict()[k])
    assert [a.camera2 for a in c.association] == [1, 2] and len(c.history) == 4
    assert all(np.isfinite(list(h.values())).all() for h in c.history)


def test_same_seed_same_weights(run):
    a, b = run(), run()
    assert same(weights(a.detector), weights(b.detector)) and a.history == b.history
    assert not same(weights(a.detector), weights(run(settings=SHORT | dict(seed=1)).detector))
    with torch.no_grad(): torch.rand(7)  # chance used elsewhere
    assert same(weights(a.detector), weights(run(others=[0, 1, 2]).detector))


def test_partial_settings_are_completed(run):
    a, b = run(settings=dict(epochs=(0, 1), bs=2)), run(settings=mcssl_settings(epochs=(0, 1), bs=2))
    assert same(weights(a.detector), weights(b.detector)) and len(a.history) == 1


@pytest.mark.parametrize('at', [('backbone', 1), ('backbone', 2), ('detection', 1), ('detection', 2)])
def test_interrupted_runs_end_the_same(run, tmp_path, at):
    whole, done = run(), []
    def cut(phase, epoch, d):
        done.append((phase, epoch))
        if (phase, epoch) == at: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(watch=cut, folder=tmp_path)
    with pytest.raises(DataError, match='resume=True to go on'): run(folder=tmp_path)
    again = run(watch=lambda p, e, d: done.append((p, e)), folder=tmp_path, resume=True)
    assert same(weights(whole.detector), weights(again.detector)) and again.history == whole.history
    assert done == [(p, e) for p in PHASES for e in (1, 2)]  # no epoch twice, none left out


def test_stopped_at_twenty_random_moments_it_ends_the_same(run, tmp_path):
    def stop(*_): raise KeyboardInterrupt
    whole, rng, stopped, start = run(), np.random.default_rng(0), 0, time.perf_counter()
    assert same(weights(whole.detector), weights(run().detector)) # warm by now
    took, was = time.perf_counter()-start, signal.signal(signal.SIGALRM, stop)
    try:
        for k, share in enumerate(rng.uniform(size=20)):
            signal.setitimer(signal.ITIMER_REAL, share*took)
            try: run(folder=tmp_path/str(k))
            except KeyboardInterrupt: stopped += 1
            finally: signal.setitimer(signal.ITIMER_REAL, 0)
            again = run(folder=tmp_path/str(k), resume=True)
            assert same(weights(whole.detector), weights(again.detector)) and again.history == whole.history
    finally: signal.signal(signal.SIGALRM, was)
    assert stopped >= 5


def test_checkpoints_of_another_run_are_refused(run, base, tmp_path):
    fresh = run(folder=tmp_path, resume=True)  # killed before the first checkpoint: begins
    assert same(weights(fresh.detector), weights(run(folder=str(tmp_path), resume=True).detector))
    other = faster_rcnn('smaller').eval()
    for kw, name in ((dict(which='all'), 'which'), (dict(camera=1, others=[0]), 'cameras'),
                     (dict(settings=SHORT | dict(confident=.7)), 'confident'),
                     (dict(times=KEYS[:1]), 'times'), (dict(detector=other), 'base')):
        with pytest.raises(DataError, match=f"other settings.*'{name}'"):
            run(folder=tmp_path, resume=True, **kw)


def test_no_boxes_in_any_frame(run, base, items, reid, monkeypatch, caplog):
    fake(monkeypatch, none=True)
    with caplog.at_level(logging.WARNING, 'reidlit'): c = run()
    assert 'camera 0: no pairs, the backbone stays' in caplog.text
    assert 'camera 0: no box above 0.8, the detection part stays' in caplog.text
    assert not moved(c.detector, base) and c.history == [] and c.detector is not base
    g = gather(base, items, range(2), KEYS, reid)
    assert [len(s) for s in g.seen.values()] == [0, 0]
    for name in BASELINES[:4]:
        with caplog.at_level(logging.WARNING, 'reidlit'):
            b = baseline(name, 0, base, items, g, SHORT, device='cpu')
        assert not moved(b.detector, base) and 'the detector stays' in caplog.text


def test_nothing_found_by_a_real_network(items, base, reid):
    "An untrained network scores .5 at most: nothing to learn from, and no failure."
    c = customise(0, [1], base, items, KEYS, SHORT | dict(least=.7), reid=reid, device='cpu')
    assert c.association[0].possible == 0 and not moved(c.detector, base)


def test_camera_without_overlap(run, base, reid, caplog):
    with caplog.at_level(logging.WARNING, 'reidlit'):
        c = run(reid=(reid[0], 0., reid[2]))  # nobody looks alike
    assert 'no pairs, the backbone stays' in caplog.text
    assert moved(c.detector, base) == {'rpn', 'roi'} and len(c.history) == 2
    assert sum(a.confirmed.sum() for a in c.association) == 0


def test_all_above_or_below(run, base, monkeypatch, caplog):
    fake(monkeypatch, [.95])
    with caplog.at_level(logging.WARNING, 'reidlit'): c = run()
    assert moved(c.detector, base) == {'rpn', 'roi'} and 'no pairs' in caplog.text
    assert moved(run(which='confident').detector, base) == {'backbone', 'rpn', 'roi'}
    caplog.clear(); fake(monkeypatch, [.3])
    with caplog.at_level(logging.WARNING, 'reidlit'): c = run()
    assert moved(c.detector, base) == {'backbone'} and 'the detection part stays' in caplog.text
    assert all('consistency' in h for h in c.history)


def test_sure_boxes_in_phase_one(run, base, monkeypatch):
    c = run(settings=SHORT | dict(beta=1., epochs=(1, 0)))
    assert {'consistency', 'loss_classifier'} <= set(c.history[0])
    assert moved(c.detector, base) == {'backbone'}
    fake(monkeypatch, [.3])  # none is sure: agreement alone, as with beta 0
    a, b = (run(settings=SHORT | dict(beta=v)) for v in (1., 0.))
    assert a.history == b.history and set(a.history[0]) == {'consistency'}


def test_late_clock(run, items, base, reid, monkeypatch):
    "A camera that shows at t what happened at t+2: pairs are lost, fudge brings some back."
    fake(monkeypatch)
    late = world_frames(WORLD, [1], [t+j+2 for t in KEYS for j in range(5)])
    mine = items[items.camids != 1]
    both = FrameSet(mine.images+late.images, np.r_[mine.camids, late.camids],
                    np.r_[mine.frames, late.frames-2], np.r_[mine.row, late.row+len(mine)],
                    np.r_[mine.xyxy, late.xyxy], np.r_[mine.pids, late.pids], cameras=items.cameras)
    def true(own, fudge):
        g = gather(base, own, [0, 1], KEYS, reid)
        return true_associations(g.seen, own, 0, [1], fudge, 'all')[0].confirmed.sum()
    assert true(items, 2) >= true(both, 2) and true(both, 40) >= true(both, 0)
    assert true(both, 40) > 0
    c = run(items=both, which='all', settings=SHORT | dict(fudge=10.))
    assert moved(c.detector, base) == {'backbone', 'rpn', 'roi'}


def test_calibration_is_needed(run, items):
    for cams, missing in ((None, '0, 1, 2'), (items.cameras[:2], '2'),
                          ([items.cameras[0], None, items.cameras[2]], '1')):
        with pytest.raises(ValueError, match=rf'yard: no calibration of cameras \[{missing}\]'):
            run(items=replace(items, cameras=cams, name='yard'))
    found = run().association  # known pairs need no cameras
    assert len(run(items=replace(items, cameras=None), found=found).history) == 4


def test_misuse(run, items, base, reid):
    with pytest.raises(KeyError, match='no frame 999 of camera 0'): run(times=[40, 999])
    with pytest.raises(ValueError, match='no key moment'): run(times=[])
    with pytest.raises(ValueError, match='no other camera'): run(others=[0])
    with pytest.raises(ValueError, match="which='sure': expected"): run(which='sure')
    with pytest.raises(ValueError, match='unknown settings'): run(settings=dict(T_cls=.8))
    g = gather(base, items, [0], KEYS, reid)
    with pytest.raises(ValueError, match="'Self-training': expected one of"):
        baseline('Self-training', 0, base, items, g)
    blank = FrameSet(items.images, items.camids, items.frames, [], [], None, name='yard')
    with pytest.raises(ValueError, match='yard: no true boxes for the supervised'):
        baseline('supervised', 0, base, blank, g)


@pytest.mark.parametrize('make', [lambda: faster_rcnn('smaller'), lambda: yolov3('tiny')])
def test_baselines(items, reid, monkeypatch, make):
    fake(monkeypatch)
    seed_all(0)
    base = make().eval()
    g, was = gather(base, items, range(2), KEYS, reid), weights(base)
    run = partial(baseline, camera=0, detector=base, items=items, gathered=g,
                          settings=SHORT | dict(epochs=(1, 1)), device='cpu')
    every = {n: run(n) for n in BASELINES}
    for n, r in every.items():
        assert moved(r.detector, base) == set(base.parts), n
        assert len(r.history) == 2 and r.association == []
        assert ('flip' in r.history[0]) == (n == 'ST-CL')
        assert all(np.isfinite(list(h.values())).all() for h in r.history)
    assert same(was, weights(base))
    assert same(weights(every['ST'].detector), weights(run('ST').detector))
    alone = run('ST', parts=((), ()))
    assert moved(alone.detector, base) == set(base.parts[1:])
    c = customise(0, [1], base, items, KEYS, SHORT | dict(epochs=(1, 1)), gathered=g, reid=reid,
                  device='cpu')
    assert moved(c.detector, base) == set(base.parts) and same(was, weights(base))


def test_corruption(items, base, reid, monkeypatch):
    fake(monkeypatch)
    g = gather(base, items, [0], KEYS, reid)
    own = items[[items.find(0, t) for t in KEYS]]
    base.train()
    was = weights(base)
    C = estimate_corruption(base, own, g.found[0], g.found[0])
    assert C.shape == (2, 2) and torch.allclose(C.sum(1), torch.ones(2)) and base.training
    assert same(was, weights(base))  # no batch statistics were touched
    base.eval()
    assert torch.equal(C, estimate_corruption(base, own, g.found[0], g.found[0]))
    full = [Detections([[0, 0, 160, 96]])]*2  # nowhere is background
    with pytest.raises(ValueError, match='no background box'):
        estimate_corruption(base, own, full, full)
    rng = np.random.default_rng(0)
    box = own.xyxy[own.row == 0]
    empty = mcssl._background(box, box, (160, 96), rng)
    assert box_iou(empty.numpy(), box).max() < .1 and (empty >= 0).all()
    assert (empty[:, 2] <= 160).all() and (empty[:, 3] <= 96).all()


def test_flip(base):
    seed_all(1)
    half = torch.rand(1, 3, 96, 80)
    x = torch.cat([half, half.flip(-1)], -1)  # its own mirror image
    mid, left = torch.tensor([[60., 20, 100, 80]]), torch.tensor([[10., 20, 50, 80]])
    assert flip_consistency(base, x, [mid]) == 0
    off = torch.rand(1, 3, 96, 160)
    loss = flip_consistency(base, off, [torch.cat([mid, left])])
    assert loss > 0
    loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in base.backbone.parameters())
    there, boxes = mcssl._mirror(*mcssl._mirror(off, [left]))
    assert torch.equal(there, off) and torch.equal(boxes[0], left)


def test_teacher(base):
    seed_all(2)
    student = faster_rcnn('smaller')
    a, b = weights(base), weights(student)
    exponential_mean(base, student, .75)
    for k, v in base.state_dict().items():
        want = .75*a[k]+.25*b[k] if v.is_floating_point() else b[k]
        assert torch.allclose(v, want, atol=1e-6)
    assert same(b, weights(student))


def test_gather_once_serves_every_camera(items, base, reid, run, monkeypatch):
    g = gather(base, items, range(3), KEYS, reid)
    assert same(weights(run(camera=1, others=[0, 2], gathered=g).detector),
                weights(run(camera=1, others=[0, 2]).detector))


def test_cameras_at_one_place_are_named(run, items):
    same = replace(items, cameras=[items.cameras[0], items.cameras[1], items.cameras[0]])
    with pytest.raises(ValueError, match='cameras 0 and 2'): run(items=same)


def test_unknown_optimiser(run):
    with pytest.raises(ValueError, match="opt='Adam'"): run(settings=SHORT | dict(opt='Adam'))


def test_corruption_at_the_size_of_the_network(items, base):
    "Frames twice as large with `size=` give what the small ones give."
    own = items[[items.find(0, t) for t in KEYS]]
    large = FrameSet([f.repeat(2, 0).repeat(2, 1) for f in own.images], own.camids, own.frames,
                     own.row, own.xyxy*2, own.pids)
    small, big = (estimate_corruption(base, s, own_targets(s), own_targets(s), 0, size)
                  for s, size in ((own, None), (large, (96, 160))))
    plain = estimate_corruption(base, large, own_targets(large), own_targets(large), 0)
    assert abs(small - big).max() < .02 and abs(small - big).max() < abs(small - plain).max()


def test_resuming_on_other_frames_is_refused(run, items, tmp_path):
    run(folder=tmp_path)
    dark = replace(items, images=[f//2 for f in items.images])
    with pytest.raises(DataError, match='data'): run(items=dark, folder=tmp_path, resume=True)
