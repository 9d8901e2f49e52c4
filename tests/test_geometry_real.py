"Geometry on real cameras and pictures; skipped where the data is absent."
import json

import cv2
import numpy as np
import pytest

from real import REAL
from reidlit.geometry import Camera, epipolar_distance, fundamental_matrix, triangulate
from reidlit.mcssl.epipolar import epipolar_candidates



def folder(name):
    path = REAL/name
    if not path.is_dir(): pytest.skip(f'{path} is not there')
    return path


# Chessboards seen by two cameras, OpenCV's sample pictures

BOARD, SIZE = (9, 6), (640, 480)
SQUARES = np.c_[np.mgrid[:9, :6].T.reshape(-1, 2), np.zeros(54)].astype(np.float32)


@pytest.fixture(scope='module')
def corners():
    "Corners `(2,13,54,2)` of the 13 boards in both cameras."
    d, found = folder('opencv_stereo'), []
    names = sorted(f.name[4:] for f in d.glob('left??.jpg'))
    for side in ('left', 'right'):
        for name in names:
            im = cv2.imread(str(d/(side+name)), cv2.IMREAD_GRAYSCALE)
            ok, c = cv2.findChessboardCorners(im, BOARD)
            assert ok, side+name
            found.append(cv2.cornerSubPix(im, c, (5, 5), (-1, -1), (3, 50, 1e-4)))
    return np.array(found, float).reshape(2, len(names), 54, 2)


@pytest.fixture(scope='module')
def stereo(corners):
    "Both cameras, calibrated by OpenCV on every other board, unit one square."
    seen = [list(c[::2].astype(np.float32)) for c in corners]
    board = [SQUARES]*len(seen[0])
    lenses = [cv2.calibrateCamera(board, s, SIZE, None, None)[1:3] for s in seen]
    K1, d1, K2, d2, R, t = cv2.stereoCalibrate(
        board, *seen, *lenses[0], *lenses[1], SIZE, flags=cv2.CALIB_FIX_INTRINSIC)[1:7]
    return (Camera(K1, np.eye(3), np.zeros(3), SIZE, d1),
            Camera(K2, R, t[:, 0], SIZE, d2))


def test_corners_lie_on_their_epipolar_lines(corners, stereo):
    "On boards that the calibration has not seen; without undistortion it fails."
    x = corners[:, 1::2]
    F = fundamental_matrix(*stereo)
    good = epipolar_distance(*(c.undistort(p) for c, p in zip(stereo, x)), F)
    raw = epipolar_distance(*x, F)
    assert np.median(good) < .3 and np.percentile(good, 95) < 1
    assert raw.mean() > 2*good.mean()


def test_triangulated_squares_are_square(corners, stereo):
    X, miss = triangulate(stereo, corners[:, 1::2])
    X = X.reshape(-1, 6, 9, 3)
    for axis in (1, 2):
        side = np.linalg.norm(np.diff(X, axis=axis), axis=-1)
        assert abs(side.mean() - 1) < .01 and side.std() < .03
    diagonal = np.linalg.norm(X[:, 0, 0] - X[:, -1, -1], axis=-1)
    assert abs(diagonal/np.hypot(5, 8) - 1).max() < .02
    assert np.median(miss) < .3


def test_agrees_with_opencv_on_the_real_lens(corners, stereo):
    for cam, x in zip(stereo, corners):
        x = x.reshape(-1, 1, 2)
        opencv = getattr(cv2, 'undistortPointsIter', cv2.undistortPoints)
        theirs = opencv(x, cam.K, cam.dist, R=None, P=cam.K, criteria=(3, 500, 1e-13))
        assert abs(cam.undistort(x) - theirs).max() < 1e-6


# WILDTRACK, lengths in centimetres

@pytest.fixture(scope='module')
def wildtrack():
    d = folder('wildtrack_calibration')
    calibration = json.loads((d/'wildtrack_calibration.json').read_text())
    names = ('CVLab1', 'CVLab2', 'CVLab3', 'CVLab4', 'IDIAP1', 'IDIAP2', 'IDIAP3')
    cams = [Camera(c['camera_matrix'], cv2.Rodrigues(np.array(c['rvec']))[0],
                   c['tvec_cm'], (1920, 1080)) for c in map(calibration.get, names)]
    person, = json.loads((d/'one_annotation_00000000.json').read_text())
    i = person['positionID']
    XY = np.array([-300 + 2.5*(i % 480), -900 + 2.5*(i//480)])
    boxes = {v['viewNum']: [v[k] for k in ('xmin', 'ymin', 'xmax', 'ymax')]
             for v in person['views'] if v['xmin'] >= 0}
    return cams, XY, boxes


def test_wildtrack_position_meets_its_boxes(wildtrack):
    cams, XY, boxes = wildtrack
    assert set(boxes) == {0, 1}
    for i, (x1, y1, x2, y2) in boxes.items():
        u, v = cams[i].ground_to_image(XY)
        assert abs(u - (x1+x2)/2) < 9 and abs(v - y2) < 1
        head = cams[i].project([*XY, 180])[0]
        assert abs(head[1] - y1) < 2
        back = cams[i].image_to_ground([(x1+x2)/2, y2])
        assert np.linalg.norm(back - XY) < 50  # cm


def test_wildtrack_boxes_match_across_views(wildtrack):
    cams, XY, boxes = wildtrack
    F = fundamental_matrix(cams[0], cams[1])
    assert epipolar_candidates([boxes[0]], [boxes[1]], F).all()
    foot = [[(b[0]+b[2])/2, b[3]] for b in boxes.values()]
    assert epipolar_distance(*foot, F) < 10
    X, miss = triangulate(cams[:2], foot)
    assert np.linalg.norm(X - [*XY, 0]) < 60 and miss.max() < 10


def test_wildtrack_cameras_hang_above_the_ground(wildtrack):
    heights = [c.center[2] for c in wildtrack[0]]
    assert min(heights) > 150 and max(heights) < 500  # cm


# PETS2009, lengths in millimetres, distorted lenses

VIEWS = ('View_003', 'View_005', 'View_006', 'View_007', 'View_008')


@pytest.fixture(scope='module')
def pets():
    "Cameras, and per view one `(n,4)` array of sure boxes for every 5th frame."
    d = folder('pets2009_s2l1')
    calibration = json.loads((d/'calibration.json').read_text())
    cams, boxes = {}, {}
    for name in ('View_001', 'View_004', *VIEWS):
        size = (768, 576) if name < 'View_005' else (720, 576)
        c = calibration[name]
        cams[name] = Camera(c['K'], c['R'], c['t'], size, c['dist'])
        found = json.loads((d/'detections'/f'{name}.json').read_text())
        boxes[name] = [np.array(b, float).reshape(-1, 4)[np.array(s) > .9]
                       for b, s in zip(found['bboxes'], found['scores'])]
    return cams, boxes


def feet(cam, boxes):
    return cam.image_to_ground(np.c_[boxes[:, [0, 2]].mean(1), boxes[:, 3]])


def nearest(pets, view, shift=0, frames=range(0, 590, 5)):
    "Metres from feet of View_001, seen by `view` too, to its nearest foot there."
    cams, boxes = pets
    out = []
    for k in frames:
        a = feet(cams['View_001'], boxes['View_001'][k])
        b = feet(cams[view], boxes[view][k+shift])
        a = a[cams[view].visible(np.c_[a, 0*a[:, 0]])]
        b = b[np.isfinite(b).all(1)]
        if len(a) and len(b):
            out += [*np.linalg.norm(a[:, None] - b, axis=-1).min(1)/1000]
    return np.array(out)


@pytest.mark.parametrize('view', VIEWS)
def test_pets_feet_meet_on_the_ground(pets, view):
    "In step less than a metre apart (SOURCE.txt: .24 to .71), out of step far."
    together, apart = nearest(pets, view), nearest(pets, view, shift=200)
    assert len(together) > 50
    assert np.median(together) < 1
    assert np.median(apart) > 2*np.median(together)


@pytest.mark.parametrize('view', VIEWS)
def test_pets_true_pairs_stay_compatible(pets, view):
    "Boxes whose feet meet lie in each other's regions."
    cams, boxes = pets
    one, two = cams['View_001'], cams[view]
    F = fundamental_matrix(one, two)
    straight = lambda cam, b: cam.undistort(b.reshape(-1, 2, 2)).reshape(-1, 4)
    hits = []
    for k in range(0, 790, 5):
        a, b = boxes['View_001'][k], boxes[view][k]
        if not len(a) or not len(b): continue
        near = np.linalg.norm(feet(one, a)[:, None] - feet(two, b), axis=-1) < 700
        hits += [*epipolar_candidates(straight(one, a), straight(two, b), F, 10)[near]]
    assert len(hits) > 50 and np.mean(hits) > .95
