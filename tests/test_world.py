"The embedded world: the same everywhere, and true about itself."
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from real import REAL
from reidlit.geometry import Camera
from reidlit.data.world import LAYOUTS, World, cylinder_boxes

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(people=14, crowd=8, size=(240, 136))
DIGEST = '''
import cv2,hashlib,sys
from reidlit.data.world import World
cv2.setNumThreads(int(sys.argv[1]))
w = World(people=14, crowd=8, size=(240, 136), kind=sys.argv[2])
jobs = [lambda: w.frame(2, 50).tobytes(), lambda: w.crops('val', 1).images.tobytes(),
        lambda: w.boxes(1, 50).xyxy.tobytes(), lambda: w.frame(0, 7).tobytes()]
order = [3, 1, 0, 2] if sys.argv[3]=='other' else [0, 1, 2, 3]
done = {i: hashlib.sha256(jobs[i]()).hexdigest() for i in order}
print(*(done[i] for i in range(4)))
'''


def digest(*args):
    "What a process of its own computes, as hashes."
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=args[0], OPENBLAS_NUM_THREADS=args[0])
    return subprocess.run([sys.executable, '-c', DIGEST, *args], env=env, check=True,
                          capture_output=True, text=True).stdout


@pytest.fixture(scope='module', params=[('ring', 'people'), ('corridor', 'people'),
                                        ('disjoint', 'people'), ('ring', 'vehicles'), ('plaza', 'people')], ids='-'.join)
def world(request): return World(layout=request.param[0], kind=request.param[1], people=40, crowd=20, style=.5)


@pytest.mark.parametrize('kind', ['people', 'vehicles'])
def test_same_bytes_in_other_processes(kind):
    assert digest('1', kind, 'one') == digest('4', kind, 'other')


def test_seeds_differ():
    a, b = World(**SMALL), World(seed=1, **SMALL)
    assert (a.frame(0, 5) != b.frame(0, 5)).any()
    assert a.split['test'].tolist() != b.split['test'].tolist()


def test_splits_are_disjoint():
    w = World(people=200)
    parts = list(w.split.values())
    assert [len(p) for p in parts] == [100, 30, 70]
    assert sorted(np.concatenate(parts)) == list(range(200))
    assert all(p.dtype == np.int64 for p in parts)


def own_masks(w, c, t):
    "Everybody's pixels as if they were alone, on a canvas with a wide margin, by another filling routine."
    p = w.positions(t)
    p = p[w._near(c, p)[1]]
    _, faces, _ = w._seen(c, p)
    W, H = w.size
    for pid, (points, _) in zip(p.pids, faces):
        mask = np.zeros((3*H*2, 3*W*2), np.uint8)
        for q in points:
            q = ((q+.5)*2 - .5 + [W*2, H*2])*16
            cv2.fillPoly(mask, [q.round().astype(np.int32)], 1, cv2.LINE_8, 4)
        yield int(pid), mask


def test_boxes_are_tight_and_shares_right(world, t=40):
    W, H = world.size
    for c in (0, 3):
        b, masks = world.boxes(c, t, min_visible=0), dict(own_masks(world, c, t))
        p = world.positions(t)
        p = p[world._near(c, p)[1]]
        V, faces, _ = world._seen(c, p)
        labels = world._paint(c, p.xy, V, faces, (0, 0, W, H), (W, H), 2)[..., 3]
        label = {int(k): i+1 for i, k in enumerate(p.pids)}
        for pid, box, share, cut in zip(b.pids, b.xyxy, b.visible, b.truncated):
            m = masks[int(pid)]
            y, x = np.nonzero(m)
            if len(x) == 0 or x.min() == 0 or y.min() == 0 or y.max() == len(m)-1 or x.max() == m.shape[1]-1: continue
            drawn = np.array([x.min()/2 - W, y.min()/2 - H, (x.max()+1)/2 - W, (y.max()+1)/2 - H])
            assert np.abs(drawn-box).max() < 1
            assert abs(share - (labels == label[int(pid)]).sum()/len(x)) < .05
            assert cut == bool((box[:2] < 0).any() or (box[2:] > (W, H)).any())
        assert (b.clipped >= 0).all() and (b.clipped <= np.tile([W, H], 2)).all()


def test_some_are_hidden_and_cut():
    w = World(people=40)
    b = [w.boxes(c, t) for c in range(6) for t in (10, 90)]
    share, cut = np.concatenate([o.visible for o in b]), np.concatenate([o.truncated for o in b])
    assert .1 < (share < .7).mean() < .6 and 0 < cut.mean() < .5


def test_calibration_hits_the_drawn_person(world):
    "Head and feet, projected by K, R, t alone, are inside the box and near its top and bottom."
    for c, cam in enumerate(world.cameras):
        b = world.boxes(c, 120, min_visible=.3)
        tall = world.looks.height[b.pids]
        for z in (.04*tall, .93*tall):
            X = np.c_[b.ground, z] @ cam.R.T + cam.t
            uv = (X @ cam.K.T)[:, :2]/X[:, 2:]
            assert ((uv > b.xyxy[:, :2]-2) & (uv < b.xyxy[:, 2:]+2)).all()
        if world.kind == 'people' and len(b):
            cyl, _ = cylinder_boxes(cam, b.ground, tall)
            h = b.xyxy[:, 3]-b.xyxy[:, 1]
            assert (np.abs(cyl[:, 1]-b.xyxy[:, 1]) < .12*h).all()


def test_crops_are_seen_and_labelled(world):
    s = world.crops('val', per_camera=2)
    assert set(s.pids) <= set(world.split['val']) and len(s) > 20
    for i in range(0, len(s), 7):
        b = world.boxes(s.camids[i], s.frames[i], min_visible=0)
        assert b.visible[b.pids == s.pids[i]][0] > .5
    same = world.crops('val', per_camera=2)
    assert (same.images == s.images).all() and (same.tids == s.tids).all()


def test_tracklets_follow_one_person(world):
    s = world.tracklets('val', length=5)
    for tid in np.unique(s.tids):
        k = s.tids == tid
        assert k.sum() == 5 and (np.diff(s.frames[k]) == 1).all()
        assert len(set(s.pids[k])) == 1 == len(set(s.camids[k]))


def test_query_and_gallery_share_no_picture():
    q, g = World(**SMALL).query_gallery('test', 2)
    key = lambda s: set(zip(s.pids, s.camids, s.frames))
    assert not key(q) & key(g) and len(q) == len({(p, c) for p, c, _ in key(q)})


def test_crowd_and_walls(world):
    for t in (0, 5, 999, 12345):
        p = world.positions(t)
        assert len(p) == 20 == len(set(p.pids)) and np.isfinite(p.xy).all()
    if world.layout == 'disjoint':
        seen = [set(world.boxes(c, 300).pids) for c in range(6)]
        assert sum(map(len, seen)) == len(set().union(*seen))


def test_first_appearance(world):
    for pid in (0, 11):
        t = int(world.first[pid]) + 3
        assert pid in world.positions(t).pids


@pytest.mark.parametrize('bad', [dict(layout='maze'), dict(kind='cats'), dict(people=5), dict(cameras=0), dict(style=-1),
                                 dict(similarity=2), dict(crowd=500), dict(size=(10, 10))])
def test_bad_knobs_are_named(bad):
    (k, v), = bad.items()
    with pytest.raises(ValueError, match=f"{k}={min(v) if k == 'size' else repr(v)}"): World(**bad)


def test_bad_requests_are_named():
    w = World(**SMALL)
    with pytest.raises(ValueError, match='camera=9'): w.frame(9, 0)
    with pytest.raises(ValueError, match='camera=-1'): w.boxes(-1, 0)
    with pytest.raises(ValueError, match="split='dev'"): w.query_gallery('dev')
    with pytest.raises(ValueError, match='t=-3'): w.frame(0, -3)


def test_layout_names(): assert list(LAYOUTS) == ['ring', 'corridor', 'disjoint', 'plaza']


@pytest.mark.skipif(not (REAL/'wildtrack_calibration').exists(), reason='no WILDTRACK calibration')
def test_cylinders_fit_a_real_annotation():
    "The default radius and height give WILDTRACK's own boxes to a few pixels."
    person = json.loads((REAL/'wildtrack_calibration'/'one_annotation_00000000.json').read_text())[0]
    calibration = list(json.loads((REAL/'wildtrack_calibration'/'wildtrack_calibration.json').read_text()).values())
    at = person['positionID']
    xy = [[(-300 + 2.5*(at % 480))/100, (-900 + 2.5*(at//480))/100]]
    for view in person['views']:
        c = calibration[view['viewNum']]
        u, _, v = np.linalg.svd(cv2.Rodrigues(np.array(c['rvec']))[0])
        cam = Camera(np.array(c['camera_matrix']), u@v, np.ravel(c['tvec_cm'])/100, (1920, 1080))
        box = [view[k] for k in ('xmin', 'ymin', 'xmax', 'ymax')]
        assert np.abs(cylinder_boxes(cam, xy)[0][0] - box).max() < 6


def test_a_loose_box_shows_everybody_who_stands_in_it(monkeypatch):
    w,drawn,paint = World(60, 3, 1, 'disjoint', crowd=50, additive=2),[],World._paint
    def keep(self, c, xy, V, faces, box, *rest):
        drawn.append((c, xy, box))
        return paint(self, c, xy, V, faces, box, *rest)
    monkeypatch.setattr(World, '_paint', keep)
    beside = 0
    for pid in w.split['test'][:8]:
        for c in range(3):
            for t in w._sightings(pid, c)[:60:12]:
                drawn.clear()
                if w._crop(pid, c, t, (64, 32), .5) is None or not drawn: continue
                (_, xy, box),p = drawn[0],w.positions(t)
                p = p[w._near(c, p)[1]]
                tight = w._seen(c, p)[2]
                there = (tight[:, :2]<box[2:]).all(1) & (tight[:, 2:]>box[:2]).all(1)
                assert {*map(tuple, p.xy[there])} <= {*map(tuple, xy)}
                beside += there.sum()-1
    assert beside>20
