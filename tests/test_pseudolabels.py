"Pairs of boxes across cameras: empty frames, short clips, late clocks, lenses."
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from reidlit.data.sets import FrameSet
from reidlit.data.world import World
from reidlit.detection.detectors import Detections
from reidlit.detection.training import own_targets,world_frames
from reidlit.geometry import Camera
from reidlit.mcssl.pairs import (WHICH, BoxAssociation, associate_boxes, candidate_pairs, confirm_pairs, funnel,
                                 tracked_pairs, true_associations)
from reidlit.mcssl.pseudolabels import Sightings, clips_of, follow, pids_of, split_pseudo_labels

K = [[100, 0, 100], [0, 100, 60], [0, 0, 1]]
ONE, TWO = (Camera(K, np.eye(3), [x, 0, 0], (200, 120)) for x in (0, -1))
NOBODY = Detections(np.zeros((0, 4)))
BOX = [60, 30, 84, 78]


def sight(moment, boxes, scores, rows=None):
    n = len(boxes)
    rows = np.zeros((n, 1), int) if rows is None else np.asarray(rows)
    xyxy = np.float32(boxes).reshape(n, 1, 4).repeat(rows.shape[1], 1)
    return Sightings(np.array(moment, int), np.arange(n), np.array(scores, np.float32), rows, xyxy)


def clip(n=5, step=3, camera=0, first=0):
    "Frames with a pattern that walks from `BOX`."
    patch = np.random.default_rng(0).integers(0, 255, (12, 6, 3)).repeat(4, 0).repeat(4, 1)
    images = []
    for t in range(n):
        im = np.full((96, 160, 3), 128, np.uint8)
        im[30:78, 60+step*t:84+step*t] = patch
        images.append(im)
    return FrameSet(images, [camera]*n, np.arange(n)+first, [], [], [], name='clip')


@pytest.fixture(scope='module')
def square():
    "A world's frames in two cameras; true boxes are the detections."
    world = World(30, cameras=4, seed=5, layout='plaza', crowd=14)
    return world_frames(world, [0, 1], range(7))


def seen_at(items, times, delay=(0, 0), score=.5, steps=0):
    "Sightings of both cameras; camera c's own clock shows `delay[c]` more."
    out, targets = {}, own_targets(items)
    for c in (0, 1):
        own = [t+delay[c] for t in times]
        found = [replace(d, scores=np.full(len(d), score)) for d in (targets[items.find(c, t)] for t in own)]
        out[c] = follow(items, found, c, own, steps)
    return out


@pytest.mark.parametrize('score, sizes', [(.99, (3, 0)), (.3, (0, 3)), (.8, (0, 3)), (.05, (0, 3)), (.01, (0, 0))])
def test_all_scores_on_one_side(score, sizes):
    d = Detections([BOX]*3, [score]*3)
    sure, rest = split_pseudo_labels([d, NOBODY])
    assert (len(sure[0]), len(rest[0])) == sizes and len(sure[1]) == len(rest[1]) == 0


@pytest.mark.parametrize('score, which', [(.9, 'uncertain'), (.3, 'confident')])
def test_nothing_to_pair_when_all_are_on_one_side(score, which):
    seen = {0: sight([0], [BOX], [score]), 1: sight([0], [BOX], [score])}
    f = {c: np.ones((1, 2)) for c in (0, 1)}
    a = associate_boxes(seen, f, 0, [1], [ONE, TWO], 9, which=which)
    assert a[0].possible == 0 and len(tracked_pairs(a, seen, 0)) == 0
    other = WHICH[which == 'uncertain']
    assert len(tracked_pairs(associate_boxes(seen, f, 0, [1], [ONE, TWO], 9, which=other), seen, 0)) == 1


def test_frames_without_boxes():
    items = clip()
    s = follow(items, [NOBODY, Detections([BOX], [.5]), NOBODY], 0, [0, 1, 2], 2)
    assert s.moment.tolist() == [1] and s.rows.tolist() == [[1, 2, 3]]
    none = follow(items, [NOBODY]*2, 0, [0, 1])
    assert len(none) == 0 and none.xyxy.shape == (0, 5, 4)
    assert clips_of(items, none).shape == (0, 4, 64, 32, 3)
    for a, b in ((s, none), (none, s), (none, none)):
        pairs, n = candidate_pairs(a, b, ONE, TWO)
        assert pairs.shape == (2, 0) and n == 0


def test_camera_without_shared_view():
    "Whoever is seen is somebody else: no pairs, and no error anywhere."
    items = replace(clip(2), camids=np.array([0, 1]), frames=np.zeros(2, int), row=np.array([0, 1]),
                    xyxy=np.float32([BOX, BOX]), pids=np.array([3, 4]), cut=None, unnamed=None,
                    cameras=[ONE, TWO])
    seen = {c: sight([0], [BOX], [.5], [[c]]) for c in (0, 1)}
    a = associate_boxes(seen, {0: np.array([[0., 1]]), 1: np.array([[1., 0]])}, 0, [1], [ONE, TWO], .5)
    p = tracked_pairs(a, seen, 0)
    assert len(p) == 0 and p.box1.shape == (0, 4)
    steps = funnel(a, seen, items, 0)
    assert [s['pairs'] for s in steps] == [1, 1, 0, 0] and steps[0]['true'] == 0
    assert np.isnan(steps[2]['precision']) and np.isnan(steps[0]['recall'])
    assert not true_associations(seen, items, 0, [1])[0].confirmed.any()
    seen[1] = sight([], np.zeros((0, 4)), [])
    a = associate_boxes(seen, {0: np.ones((1, 2)), 1: np.ones((0, 2))}, 0, [1], [ONE, TWO], .5)
    assert a[0].possible == 0 and a[0].candidates.shape == (2, 0)


def test_film_that_ends():
    items, d = clip(5), Detections([BOX], [.5])
    s = follow(items, [d], 0, [3], 4)
    assert s.rows.tolist() == [[3, 4, -1, -1, -1]]
    x = clips_of(items, s, 4, (48, 24))
    assert (x[0, 2] == x[0, 1]).all() and (x[0, 3] == x[0, 1]).all() and (x[0, 0] != x[0, 1]).any()
    whole = follow(items, [d], 0, [0], 4)
    a = BoxAssociation(1, 1, np.array([[0], [0]]), np.array([.1]), np.array([True]))
    assert len(tracked_pairs([a], {0: s, 1: whole}, 0)) == 2*5


def test_missing_moment_is_named():
    d = Detections([BOX])
    with pytest.raises(ValueError, match='camera 0 has no frame 7'): follow(clip(), [d], 0, [7])
    with pytest.raises(ValueError, match='camera 2 has no frame 0'): follow(clip(), [d], 2, [0])


def test_boxes_partly_outside():
    items = clip(3, 0)
    boxes = [[-10, 30, 14, 78], [150, 60, 168, 110], [60, -20, 84, 30]]
    s = follow(items, [Detections(boxes, [.5]*3)], 0, [0], 2)
    np.testing.assert_allclose(s.xyxy[:, 0], boxes)
    assert (s.rows[:, 0] == 0).all() and clips_of(items, s, 3).shape == (3, 3, 64, 32, 3)
    ok = s.rows >= 0
    assert np.isfinite(s.xyxy[ok]).all()
    assert candidate_pairs(s, s, ONE, TWO)[1] == 9


def test_degenerate_cameras_and_bad_choice():
    s = sight([0], [BOX], [.5])
    with pytest.raises(ValueError, match='cameras 0 and 1'): candidate_pairs(s, s, ONE, ONE)
    with pytest.raises(ValueError, match='which='): candidate_pairs(s, s, ONE, TWO, which='sure')
    with pytest.raises(ValueError, match='no other camera'): tracked_pairs([], {0: s}, 0)


def test_truth_passes_the_epipolar_step(square):
    seen = seen_at(square, [0, 3])
    a = true_associations(seen, square, 0, [1], fudge=4)
    steps = funnel(a, seen, square, 0)
    assert steps[0]['true'] > 5 and steps[1]['recall'] > .95 and steps[1]['pairs'] < steps[0]['pairs']
    assert steps[2]['precision'] == 1 and steps[2]['recall'] == steps[1]['recall']
    assert funnel(true_associations(seen, square, 0, [1], which='confident'), seen, square, 0, 'confident')[0]['pairs'] == 0


def test_clock_two_frames_late(square):
    "Unknown: fudge keeps nearly all. Known: the camera's own key moments make it exact."
    true = funnel(true_associations(seen_at(square, [3]), square, 0, [1], 0), seen_at(square, [3]), square, 0)[1]
    late = replace(square, frames=np.where(square.camids == 1, square.frames+2, square.frames))
    recall = {}
    for name, delay, fudge in (('unknown', (0, 0), 0), ('fudge', (0, 0), 16), ('known', (0, 2), 0)):
        seen = seen_at(late, [3], delay)
        recall[name] = funnel(true_associations(seen, late, 0, [1], fudge), seen, late, 0)[1]['recall']
    assert .6 < recall['unknown'] <= recall['fudge'] and recall['fudge'] > .9
    assert recall['known'] == true['recall']


def test_lens(square):
    "Boxes as a lens shows them are candidates as without it."
    bent = Camera(K, np.eye(3), [-1, 0, 0], (200, 120), [-.2, 0, 0, 0])
    r = np.random.default_rng(1)
    X = r.uniform((-1, -.8, 3), (2, .8, 6), (40, 3))
    box = lambda cam: np.concatenate([(p := cam.project(X)[0]+.5)-6, p+6], 1)
    a = sight([0]*40, box(ONE), [.5]*40)
    for cam in (TWO, bent):
        got = set(zip(*candidate_pairs(a, sight([0]*40, box(cam), [.5]*40), ONE, cam, 2)[0].tolist()))
        assert {(i, i) for i in range(40)} <= got


@pytest.mark.parametrize('seed', range(4))
def test_confirm_like_a_loop(seed):
    r = np.random.default_rng(seed)
    f, g = r.normal(size=(9, 3)).astype(np.float32), r.normal(size=(7, 3)).astype(np.float32)
    pairs = np.array([p for p in product(range(9), range(7)) if r.random() < .4]).T
    d, ok = confirm_pairs(pairs, f, g, 1.6)
    every = {(i, j): np.sqrt(((f[i]-g[j])**2).sum()) for i, j in pairs.T}
    for (i, j), x, yes in zip(pairs.T, d, ok):
        np.testing.assert_allclose(x, every[i, j], rtol=1e-6)
        best = all(every[i, j] <= v for (a, b), v in every.items() if a == i or b == j)
        assert yes == (best and every[i, j] <= 1.6)
    loose = confirm_pairs(pairs, f, g, 1.6, mutual=False)[1]
    assert (loose == (d <= 1.6)).all() and (ok <= loose).all()
    i, j = pairs[:, ok]
    assert len(set(i)) == len(i) and len(set(j)) == len(j)


def test_confident_boxes_compete():
    "An uncertain box does not get the partner of a nearer, confident one."
    seen = {0: sight([0, 0], [BOX, [20, 31, 44, 79]], [.5, .9]), 1: sight([0], [BOX], [.5])}
    f = {0: np.array([[1.], [.1]]), 1: np.array([[0.]])}
    run = lambda **k: associate_boxes(seen, f, 0, [1], [ONE, TWO], 2, **k)[0].confirmed.tolist()
    assert run() == [False] and run(which='confident') == [True]
    assert run(which='all') == [False, True] and run(mutual=False) == [True]


def test_tracked_like_a_loop():
    r = np.random.default_rng(3)
    rows = [np.where(r.random((4, 3)) < .3, -1, r.integers(0, 50, (4, 3))) for _ in range(2)]
    seen = {c: sight([0]*4, [BOX]*4, [.5]*4, rows[c]) for c in (0, 1)}
    a = BoxAssociation(1, 16, np.array([[0, 1, 2, 3], [2, 1, 0, 3]]), np.zeros(4), np.array([1, 0, 1, 1], bool))
    p = tracked_pairs([a], seen, 0)
    want = [(x, y, i, j) for i, j in ((0, 2), (2, 0), (3, 3)) for x in rows[0][i] for y in rows[1][j] if x >= 0 and y >= 0]
    assert list(zip(*(v.tolist() for v in (p.row1, p.row2, p.id1, p.id2)))) == [tuple(map(int, w)) for w in want]
    assert len(p[p.id1 == 3]) == sum(w[2] == 3 for w in want)


def test_who_is_it(square):
    assert (pids_of(square, square.row, square.xyxy) == square.pids).mean() > .99
    assert (pids_of(square, np.full(len(square.row), -1), square.xyxy) == -1).all()
    assert pids_of(square, [], []).shape == (0,)
