"Trackers on pictures whose motion is known, on the world, and on real video."
import json

import cv2
import numpy as np
import pytest
import torch
from real import REAL

from reidlit.data.world import World
from reidlit.metrics.detection import box_iou
from reidlit.detection.trackers import (TRACKERS, Tracks, box_motion, follow_points,
                              track_boxes, track_quality)


def texture(seed=0, size=(300, 400)):
    r = np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)
    return cv2.normalize(cv2.GaussianBlur(r, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)


def clip(dx, dy, T=5):
    "The picture's content moves by (dx, dy) a frame."
    t = texture()
    return np.stack([t[50-k*dy:200-k*dy, 60-k*dx:260-k*dx] for k in range(T)])


BOXES = np.array([[50, 40, 80, 100], [90, 50, 130, 90], [100, 30, 120, 80.]])


@pytest.mark.parametrize('d', [(0, 0), (2, -1), (-5, 3), (6, 6)])
def test_known_shift(d):
    t = track_boxes(clip(*d), BOXES)
    want = BOXES + np.arange(5)[:, None, None]*np.tile(d, 2)
    assert t.ok.all() and t.xyxy.dtype == np.float32 and t.ok.dtype == bool
    assert np.abs(t.xyxy-want).max() < .1


def test_growth():
    t, frames = texture(), []
    for k in range(4):
        M = cv2.getRotationMatrix2D((100, 75), 0, 1.04**k)
        frames.append(cv2.warpAffine(t[50:200, 60:260], M, (200, 150)))
    box = np.array([[75, 45, 125, 105.]])
    size = track_boxes(frames, box).xyxy[3, 0, 2:]-track_boxes(frames, box).xyxy[3, 0, :2]
    np.testing.assert_allclose(size, np.array([50, 60])*1.04**3, rtol=.02)
    fixed = track_boxes(frames, box, scale=False).xyxy[3, 0]
    np.testing.assert_allclose(fixed[2:]-fixed[:2], [50, 60], atol=1e-3)


def test_boxes_do_not_disturb_each_other():
    frames = clip(2, 1)
    every = track_boxes(frames, BOXES)
    again = track_boxes(list(frames), torch.tensor(BOXES))
    np.testing.assert_array_equal(every.xyxy, again.xyxy)
    alone = track_boxes(frames, BOXES[1:2])
    np.testing.assert_allclose(alone.xyxy[:, 0], every.xyxy[:, 1], atol=1e-3)
    many = track_boxes(frames, np.tile(BOXES, (100, 1)))
    np.testing.assert_allclose(many.xyxy[:, -1], every.xyxy[:, -1], atol=1e-3)


def test_lost():
    flat = np.full((4, 150, 200, 3), 80, np.uint8)
    assert not track_boxes(flat, BOXES).ok[1:].any()
    cut = clip(1, 1, 4)
    cut[2:] = 80
    t = track_boxes(cut, BOXES)
    assert t.ok[:2].all() and not t.ok[2:].any() and np.isnan(t.xyxy[2:]).all()
    out = track_boxes(clip(-20, 0, 3), [[5, 40, 35, 100]])
    assert not out.ok[2].any()


@pytest.mark.parametrize('method', list(TRACKERS))
def test_nothing_and_one_frame(method):
    frames = clip(1, 1, 3)
    for none in ([], np.zeros((0, 4))):
        t = track_boxes(frames, none, method)
        assert t.xyxy.shape == (3, 0, 4) and t.ok.shape == (3, 0) and len(t) == 0
    t = track_boxes(frames[:1], BOXES, method)
    assert t.xyxy.shape == (1, 3, 4) and t.ok.all()
    far = track_boxes(frames, [[500, 500, 520, 540], *BOXES], method)
    assert not far.ok[:, 0].any() and (far.xyxy[0, 0] == [500, 500, 520, 540]).all()


@pytest.mark.parametrize('change, words', [
    (dict(method='kcf'), "method='kcf'"),
    (dict(boxes=[[1, 1, 5, 5], [0, 0, np.nan, 5]]), 'box 1'),
    (dict(boxes=[[5, 5, 5, 9]]), 'box 0'), (dict(boxes=[[9, 5, 5, 9]]), 'box 0'),
    (dict(boxes=[[1, 2, 3]]), 'boxes has shape'),
    (dict(frames=[]), 'expected one shape'),
    (dict(frames=[np.zeros((9, 9, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]), 'expected one shape'),
    (dict(frames=np.zeros((2, 9, 9), np.uint8)), 'expected (T,H,W,3) uint8'),
    (dict(frames=np.zeros((2, 9, 9, 3))), 'expected (T,H,W,3) uint8')])
def test_bad_input(change, words):
    args = dict(frames=clip(0, 0, 2), boxes=BOXES) | change
    with pytest.raises(ValueError) as e:
        track_boxes(**args)
    assert words in str(e.value)


def test_options_reach_the_method():
    with pytest.raises(TypeError, match='grids'):
        track_boxes(clip(0, 0, 2), BOXES, grids=(3, 3))


def test_medians_against_numpy():
    r = np.random.default_rng(0)
    p, q, good = r.normal(size=(6, 9, 2)), r.normal(size=(6, 9, 2)), r.random((6, 9)) < .6
    shift, growth = box_motion(p, q, good)
    for n in range(6):
        g = good[n]
        np.testing.assert_allclose(shift[n], np.median((q-p)[n, g], 0))
        i, j = np.triu_indices(g.sum(), 1)
        far = [np.linalg.norm(o[n, g][i]-o[n, g][j], axis=-1) for o in (p, q)]
        assert growth[n] == pytest.approx(np.median(far[1]/far[0]))


def test_points_are_followed():
    a, b = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in clip(3, -2, 2))
    points = np.random.default_rng(0).uniform((20, 20), (180, 130), (50, 2))
    moved, error = follow_points(a, b, points)
    assert np.abs(moved-points-[3, -2]).max() < .2 and error.max() < .2


def test_quality():
    truth = np.random.default_rng(0).uniform(0, 50, (3, 8, 4))
    truth[..., 2:] += truth[..., :2]+5
    truth[2, 3] = np.nan
    moved = np.nan_to_num(truth)+1.
    ok = np.ones((3, 8), bool)
    ok[1:, 0] = False
    q = track_quality(Tracks(moved.astype(np.float32), ok), truth)
    over = np.array([box_iou(m, np.nan_to_num(t)).diagonal() for m, t in zip(moved, truth)])
    over[1:, 0] = 0
    assert q['iou'][1] == pytest.approx(over[1].mean(), abs=1e-5)
    assert q['iou'][2] == pytest.approx(np.delete(over[2], 3).mean(), abs=1e-5)
    assert q['mean_iou'] == pytest.approx(np.r_[over[1], np.delete(over[2], 3)].mean(), abs=1e-5)
    assert q['ok'].tolist() == [1, 7/8, 6/7]
    nobody = track_quality(Tracks(moved, ok), np.full((3, 8, 4), np.nan))
    assert np.isnan(nobody['mean_iou']) and np.isnan(nobody['iou']).all()


@pytest.mark.parametrize('kind', ['people', 'vehicles'])
def test_beats_standing_still_on_the_world(kind):
    world, tracks, truths = World(people=30, cameras=2, seed=5, kind=kind), {}, []
    for c in range(2):
        pids = world.boxes(c, 200, min_visible=.5).pids
        frames, truth = np.stack([world.frame(c, 200+k) for k in range(5)]), []
        for k in range(5):
            b = world.boxes(c, 200+k, min_visible=0.)
            here = dict(zip(b.pids, b.xyxy))
            truth.append([here.get(p, [np.nan]*4) for p in pids])
        truths.append(np.array(truth, np.float32))
        for m in TRACKERS:
            tracks.setdefault(m, []).append(track_boxes(frames, truths[-1][0], m))
    q = {m: track_quality(Tracks(np.concatenate([o.xyxy for o in t], 1),
                                 np.concatenate([o.ok for o in t], 1)),
                          np.concatenate(truths, 1)) for m, t in tracks.items()}
    assert q['flow']['mean_success'] > q['still']['mean_success']+.1


PETS = REAL/'pets2009_s2l1'


@pytest.mark.skipif(not (PETS/'View_001.avi').exists(), reason='no real video')
def test_real_video():
    "Boxes tracked over four frames lie on that frame's detections better than still ones."
    video, frames = cv2.VideoCapture(str(PETS/'View_001.avi')), []
    while len(frames) < 65:
        frames.append(cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB))
    found = json.loads((PETS/'detections'/'View_001.json').read_text())
    boxes_of = lambda k: np.array(found['bboxes'][k])[np.array(found['scores'][k]) > .9]
    share = {m: [] for m in TRACKERS}
    for t in range(10, 60, 10):
        first, last = (boxes_of(k) for k in (t, t+4))
        for m in share:
            o = track_boxes(frames[t:t+5], first, m)
            over = box_iou(o.xyxy[4, o.ok[4]], last).max(1)
            share[m] += [*over, *np.zeros((~o.ok[4]).sum())]
    assert np.mean(share['flow']) > np.mean(share['still'])+.05
