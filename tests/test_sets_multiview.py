"Sets of cameras that share a view: round trips, clocks, broken files, real PETS."
import json
import logging
import multiprocessing
import pickle
import re
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from real import REAL
from reidlit.core import DataError, Dropped
from reidlit.data.readers import cityflow as road_reader
from reidlit.data.readers import multiviewx as hall_reader
from reidlit.data.readers.cityflow import (RoadSet, apply_homography, camera_from_homography, cityflow,
                                           gps_matrix, moments, plane_homography, read_calibration,
                                           read_clocks, write_cityflow)
from reidlit.data.readers.multiviewx import MULTIVIEWX, move_camera, multiviewx, write_multiviewx
from reidlit.data.readers.pets2009 import pets2009
from reidlit.data.readers.wildtrack import read_xml
from reidlit.data.sets import FrameSet, wildtrack
from reidlit.data.world import World
from reidlit.data.writers import write_wildtrack
from reidlit.geometry import Camera, fundamental_matrix
from reidlit.mcssl.epipolar import epipolar_candidates

TIMES = range(0, 20, 5)


@pytest.fixture(scope='module')
def people():
    return World(people=12, cameras=3, seed=5, crowd=6, size=(96, 64))


@pytest.fixture(scope='module')
def road():
    return World(kind='vehicles', people=12, cameras=3, seed=2, crowd=6, size=(128, 72))


@pytest.fixture(scope='module')
def written(road, tmp_path_factory):
    "The third camera starts two pictures late; pictures are files."
    out = tmp_path_factory.mktemp('cf')/'out'
    return write_cityflow(road, out, TIMES, late=[0, 0, 2], video=False)


def same_f(a, b, cameras=3, atol=1e-9):
    for i in range(cameras):
        for j in range(cameras):
            if i == j: continue
            F, G = (fundamental_matrix(c[i], c[j]) for c in (a, b))
            assert min(abs(F-G).max(), abs(F+G).max()) < atol


# MultiviewX

@pytest.mark.parametrize('digits, convention', [(4, 'cylinder'), (8, 'tight')])
def test_multiviewx_round_trip(tmp_path, people, digits, convention):
    out = write_multiviewx(people, tmp_path/'m', TIMES, convention, digits)
    m = multiviewx(out, clip=False, train_share=1, verify=True)
    s = m.train
    assert not s.dropped and m.name == 'multiviewx'
    assert s.images[0].stem == '0'*digits
    assert (out/'annotations_positions'/'00005.json').exists()
    for t in TIMES:
        for c in range(3):
            a, b = s.boxes(c, t), people.boxes(c, t, convention)
            order = np.argsort(b.pids)
            assert a.pids.tolist() == b.pids[order].tolist()
            np.testing.assert_array_equal(a.xyxy, np.rint(b.xyxy[order]))
            np.testing.assert_array_equal(s.frame(c, t), people.frame(c, t))
    same_f(m.cameras, people.cameras)
    floor = s.ground*[1, -1]  # y is turned round: MultiviewX's world is left-handed
    assert (floor >= 0).all() and (floor <= [25, 16]).all()


def test_multiviewx_feet_are_under_moved_cameras(tmp_path, people):
    "Places and cameras moved together: the cylinder's foot is at the place."
    m = multiviewx(write_multiviewx(people, tmp_path/'m', [5]), clip=False, train_share=1)
    for c, cam in enumerate(m.cameras):
        b = m.train.boxes(c, 5)
        foot = cam.ground_to_image(b.ground) + .5
        assert abs(b.xyxy[:, 3] - foot[:, 1]).max() < 3
        assert abs(b.xyxy[:, [0, 2]].mean(1) - foot[:, 0]).max() < 3


def published(root):
    "`K[R|t]` of each camera's files, by OpenCV, and its boxes of the first moment by person."
    notes = json.loads(min((root/'annotations_positions').iterdir()).read_text())
    keys = 'xmin', 'ymin', 'xmax', 'ymax'
    for c in range(len(list((root/'calibrations'/'extrinsic').iterdir()))):
        K, = read_xml(root/'calibrations'/'intrinsic'/f'intr_Camera{c+1}.xml', camera_matrix=9)
        r, t = read_xml(root/'calibrations'/'extrinsic'/f'extr_Camera{c+1}.xml', rvec=3, tvec=3)
        boxes = {p['personID']: [v[k] for k in keys] for p in notes
                 for v in p['views'] if v['viewNum'] == c and v['xmax'] > 0}
        yield K.reshape(3, 3)@np.c_[cv2.Rodrigues(r)[0], t], boxes


def test_multiviewx_is_what_published_readers_expect(tmp_path, people):
    "Names, metres, x + 1000 y, and the same boxes in rectangles.pom."
    out = write_multiviewx(people, tmp_path/'m', [0])
    names = sorted(f.relative_to(out).as_posix() for f in out.rglob('*.xml'))
    assert names == [f'calibrations/{k}_Camera{i}.xml' for k in
                     ('extrinsic/extr', 'intrinsic/intr') for i in (1, 2, 3)]
    file = cv2.FileStorage(str(out/names[3]), cv2.FILE_STORAGE_READ)
    np.testing.assert_allclose(file.getNode('camera_matrix').mat(), people.cameras[0].K)
    m = multiviewx(out, train_share=1)
    assert all(abs(np.linalg.norm(c.center - [12.5, -8, 0]))<20 for c in m.cameras)
    notes = json.loads((out/'annotations_positions'/'00000.json').read_text())
    for p in notes:
        x, y = (.025*v for v in (p['positionID'] % 1000, p['positionID']//1000))
        at = m.train.ground[m.train.pids == p['personID']]
        np.testing.assert_allclose(at, np.tile([x, -y], (len(at), 1)), atol=1e-6)
        for P, b in published(out):  # as OpenCV takes the files: in place, behind the camera
            if p['personID'] not in b: continue
            u, _, depth = P@[x, y, 0, 1]
            assert depth < 0 and abs(u/depth + .5 - sum(b[p['personID']][::2])/2) < 3
    assert not (out/'old').exists() and (out/'rectangles.pom').stat().st_size
    with pytest.raises(DataError, match='has no extr_.*expected extr_CVLab1'):
        wildtrack(out)


@pytest.fixture(scope='module')
def hall(tmp_path_factory):
    "MultiviewX's published calibration and one annotation, with empty pictures."
    if not (REAL/'multiviewx_calibration').is_dir(): pytest.skip('multiviewx_calibration is absent')
    root = tmp_path_factory.mktemp('hall')/'m'
    shutil.copytree(REAL/'multiviewx_calibration', root)
    for c in range(6):
        (f := root/'Image_subsets'/f'C{c+1}').mkdir(parents=True)
        Image.new('L', (1920, 1080)).save(f/'0001.png')
    return root


def test_multiviewx_as_published(hall):
    "Everybody stands in front of the cameras that show them, feet within 10 pixels."
    m = multiviewx(hall, clip=False, train_share=1)
    s, seen = m.train, []
    assert len(s.row) == 217 and all(1 < c.center[2] < 4 for c in m.cameras)
    for c, cam in enumerate(m.cameras):
        b = s.boxes(c, 1)
        foot, head = (cam.ground_to_image(b.ground, z) + .5 for z in (0, 1.8))
        off = abs(foot - np.c_[b.xyxy[:, [0, 2]].mean(1), b.xyxy[:, 3]])
        assert (np.median(off, 0) < [10, 2]).all()
        assert np.median(abs(head[:, 1] - b.xyxy[:, 1])) < 3
        seen += cam.visible(np.c_[b.ground, 0*b.ground[:, 0]]).tolist()
        there = cam.image_to_ground(np.c_[b.xyxy[:, [0, 2]].mean(1), b.xyxy[:, 3]] - .5)
        assert np.nanmedian(np.linalg.norm(there - b.ground, axis=1)) < .25
    assert np.mean(seen) > .95  # none of them, before the world was mirrored


def test_multiviewx_read_as_right_handed_is_an_error(hall, caplog):
    with pytest.raises(DataError, match='extr_Camera1.xml: its camera sees none of the 27 people .*, '
                                        'and 27 if the world is mirrored'):
        wildtrack(hall, rig=replace(MULTIVIEWX, left_handed=False))
    with caplog.at_level(logging.WARNING, 'reidlit'): wildtrack(hall, rig=replace(MULTIVIEWX, unit=3.))
    assert 'extr_Camera2.xml: puts only' in caplog.text


def test_shifted_snapshots(hall, tmp_path, caplog):
    "Picture k with annotation k or k + 1, as the release has it; said where names show it."
    root = shutil.copytree(hall, tmp_path/'m')
    for f in (root/'Image_subsets').rglob('0001.png'): f.rename(f.with_stem('0000'))
    with caplog.at_level(logging.WARNING, 'reidlit'), pytest.raises(DataError, match='nothing to read'):
        multiviewx(root)
    assert 'pictures start at 0, annotations at 1; shift=1 would pair' in caplog.text
    caplog.clear()
    s = multiviewx(root, shift=1, train_share=1).train
    assert s.frames.tolist() == [0]*6 and len(s.row) == 217 and not caplog.records


def test_both_widths_in_one_folder(tmp_path, people):
    out = write_multiviewx(people, tmp_path/'m', [0, 5])
    folder = out/'Image_subsets'/'C1'
    (folder/'00000005.png').write_bytes((folder/'0005.png').read_bytes())
    (out/'annotations_positions'/'5.json').write_text('[]')
    s = multiviewx(out, train_share=1).train
    assert len(s) == 6
    assert {k: len(v) for k, v in s.dropped.reasons.items()} == {'second file': 2}


@pytest.mark.parametrize('harm, message', [
    (lambda r: (r/'calibrations'/'intrinsic'/'intr_Camera2.xml').unlink(),
     'intr_Camera2.xml: no such file'),
    (lambda r: (r/'calibrations'/'extrinsic'/'extr_Camera1.xml').write_text('<a>'),
     'extr_Camera1.xml: not readable XML'),
    (lambda r: (r/'annotations_positions'/'00000.json').write_text(
        '[{"personID": 1, "positionID": 640000, "views": []}]'), 'position 640000'),
    (lambda r: (r/'Image_subsets'/'C3').rename(r/'x'), 'C3: no such folder')])
def test_multiviewx_broken(tmp_path, people, harm, message):
    out = write_multiviewx(people, tmp_path/'m', [0])
    harm(out)
    with pytest.raises(DataError, match=message): multiviewx(out)


def test_a_hall_too_long_is_cut_and_logged(tmp_path, caplog):
    world = World(people=10, cameras=8, seed=1, layout='corridor', crowd=10, size=(96, 64))
    with caplog.at_level(logging.WARNING, 'reidlit'):
        out = write_multiviewx(world, tmp_path/'m', [0])
    left = re.search(r'dropped (\d+) x person off the grid', caplog.text)
    seen = {p for c in range(8) for p in world.boxes(c, 0, 'cylinder').pids}
    read = set(multiviewx(out, train_share=1).train.pids)
    assert len(seen) == len(read) + int(left[1])


def test_moved_world():
    Q, s = hall_reader._fit(MULTIVIEWX.grid, np.array([[0., 0], [4, 20]]))
    assert Q[0].tolist() == [0, -1, 0]
    np.testing.assert_allclose(np.array([[0., 0], [4, 20]])@Q[:2, :2].T + s[:2],
                               [[22.5, -10], [2.5, -6]])
    X = np.random.default_rng(0).normal(size=(5, 3))
    cam = Camera.look_at((4, -6, 2.5), (0, 0, 1), (96, 64), fov=70, dist=[.1, 0, 0, 0])
    there = move_camera(cam, Q, s)
    np.testing.assert_allclose(there.project(X@Q.T + s)[0], cam.project(X)[0], atol=1e-9)
    assert there.dist.tolist() == cam.dist.tolist()


def test_wildtrack_is_as_before(tmp_path, people):
    w = wildtrack(write_wildtrack(people, tmp_path/'w', [0, 5]), train_share=1)
    assert w.name == 'wildtrack' and w.train.name == 'wildtrack train'
    same_f(w.cameras, people.cameras)
    assert len(w.train) == 6 and not w.train.dropped


# Calibration of roads

def test_calibration_forms(tmp_path):
    f = tmp_path/'calibration.txt'
    H = np.array([[2, 0, 1e-3], [0, -2, 50], [0, .01, 1]])
    text = ';'.join(' '.join(map(repr, row)) for row in H.tolist())
    lens = 'Intrinsic parameter matrix: 9 0 4;0 9 3;0 0 1\nDistortion coefficients: .1 0 0 0\n'
    for head in ('Homography matrix: ', '', 'homography matrix:'):
        f.write_text(f'{head}{text}\n{lens}Reprojection error: 5.5\nDistance error: x\n')
        c = read_calibration(f)
        np.testing.assert_array_equal(c.H, H)
        assert c.K[0].tolist() == [9, 0, 4] and c.dist.tolist() == [.1, 0, 0, 0]
    f.write_text(f'Homography matrix: {text}')
    assert read_calibration(f).K is None


@pytest.mark.parametrize('text, message', [
    ('', 'no usable homography'), ('Reprojection error: 1', 'no usable homography'),
    ('Homography matrix: 1 2 3;4 5 6', 'line 1 is .*6 numbers, expected 9'),
    ('Homography matrix: 1 0 0;0 1 0;0 0 nan', "line 1 is .*'nan' is not a number"),
    ('Homography matrix: 1 0 0;0 1 0;0 0 z', "line 1 is .*'z' is not a number"),
    ('Homography matrix: 1 0 0;0 1 0;0 0 0', 'no usable homography'),
    ('1 0 0;0 1 0;0 0 1\nDistortion coefficients: 1 2', 'line 2 is .*2 numbers, expected 4')])
def test_calibration_broken(tmp_path, text, message):
    (tmp_path/'calibration.txt').write_text(text)
    with pytest.raises(DataError, match=f'calibration.txt: {message}'):
        read_calibration(tmp_path/'calibration.txt')


@pytest.mark.parametrize('origin', [(0., 0.), (42.5, -90.7), (-33., 151.)])
def test_gps_and_metres(origin):
    "Against distances on a sphere; and a homography survives the way there and back."
    A = gps_matrix(origin)
    for xy in ([100., 0], [0, 100.], [-70, 40]):
        lat, lon, one = A@[*xy, 1]
        p, q = np.radians([origin, (lat, lon)])
        a = np.sin((q-p)[0]/2)**2 + np.cos(p[0])*np.cos(q[0])*np.sin((q-p)[1]/2)**2
        assert one == 1
        assert abs(2*6378137*np.arcsin(a**.5) - np.hypot(*xy)) < .05
    cam = Camera.look_at((3, -9, 5), (0, 0, 0), (640, 360), fov=60)
    H = cam.ground_homography()@np.linalg.inv(A)
    back = camera_from_homography(H@A, cam.size, cam.K)
    np.testing.assert_allclose(back.center, cam.center, atol=1e-4)


@pytest.mark.parametrize('seed', range(5))
def test_camera_from_homography(seed):
    "Any scale and sign; without K exact if the lens is as assumed."
    r = np.random.default_rng(seed)
    cam = Camera.look_at((*r.uniform(-9, 9, 2), r.uniform(3, 9)), (*r.uniform(-1, 1, 2), 0),
                         (640, 360), fov=r.uniform(40, 80))
    H = cam.ground_homography()*r.choice([-1, 1])*r.uniform(.1, 1e4)
    for K in (cam.K, None):
        back = camera_from_homography(H, cam.size, K)
        np.testing.assert_allclose(back.R, cam.R, atol=1e-6)
        np.testing.assert_allclose(back.t, cam.t, atol=1e-5)
        np.testing.assert_allclose(back.K, cam.K, rtol=1e-6)
    other = Camera.look_at((8, 8, 4), (0, 0, 0), (320, 240), fov=70)
    H12 = plane_homography(H, other.ground_homography())
    XY = r.uniform(-2, 2, (5, 2))
    x = cam.ground_to_image(XY)
    theirs = cv2.perspectiveTransform(x[None], H12)[0]
    np.testing.assert_allclose(theirs, other.ground_to_image(XY), atol=1e-6)


def test_points_behind_are_nan():
    H = Camera.look_at((0, -5, 3), (0, 0, 0), (100, 80), fov=60).ground_homography()
    out = apply_homography(H, [[0, 0], [0, -50]])
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


# Small files

def test_clocks(tmp_path):
    f = tmp_path/'S03.txt'
    f.write_text('c010 8.715\nc013 0\n\n')
    assert read_clocks(f) == dict(c010=8.715, c013=0)
    assert moments([1, 2, 11], 8.715).tolist() == [87, 88, 97]
    assert moments(range(1, 10), rate=8).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    f.write_text('c010 x')
    with pytest.raises(DataError, match="S03.txt: line 1 is 'c010 x'"): read_clocks(f)


# CityFlow

def test_cityflow_round_trip(written, road):
    s = cityflow(written, train_share=1, verify=True).train
    assert isinstance(s, RoadSet) and not s.dropped
    assert s.names == ('c001', 'c002', 'c003') and s.clocks == (0, 0, 1)
    assert sorted(zip(s.camids.tolist(), s.frames.tolist())) == [
        (c, t) for c in range(3) for t in TIMES if not (c == 2 and t < 10)]
    for c, t in zip(s.camids.tolist(), s.frames.tolist()):
        a, b = s.boxes(c, t), road.boxes(c, t)
        order = np.argsort(b.pids)
        assert (a.pids-1).tolist() == b.pids[order].tolist()
        np.testing.assert_array_equal(a.xyxy, np.rint(b.clipped[order]))
        np.testing.assert_array_equal(s.frame(c, t), road.frame(c, t))
    for a, b, H in zip(s.cameras, road.cameras, s.homographies):
        np.testing.assert_allclose(a.P, b.P, atol=1e-6)
        G = b.ground_homography()
        np.testing.assert_allclose(H, G/np.linalg.norm(G), atol=1e-9)
    same_f(s.cameras, road.cameras)


def test_cityflow_film(tmp_path, road):
    "Lossy, but the right picture at the right moment; the same bytes again."
    out = write_cityflow(road, tmp_path/'a', range(10, 30, 5))
    s = cityflow(out, train_share=1, verify=True).train
    assert s.frames.tolist() == np.repeat([10, 15, 20, 25], 3).tolist()
    error = [[abs(s.frame(c, t) - np.float32(road.frame(c, u))).mean()
              for u in (10, 15, 20, 25)] for c in (0, 2) for t in (10, 15, 20, 25)]
    assert np.argmin(error, 1).tolist() == [0, 1, 2, 3]*2
    again = write_cityflow(road, tmp_path/'b', range(10, 30, 5))
    for f in sorted(p for p in out.rglob('*') if p.is_file()):
        assert f.read_bytes() == (again/f.relative_to(out)).read_bytes(), f
    back = pickle.loads(pickle.dumps(s))
    np.testing.assert_array_equal(back.frame(1, 20), s.frame(1, 20))


def test_late_clock(written):
    "Without the clocks, the late camera shows two pictures too early."
    right = cityflow(written, train_share=1).train
    wrong = cityflow(written, sync=False, train_share=1).train
    np.testing.assert_array_equal(wrong.frame(2, 0), right.frame(2, 10))
    assert wrong.boxes(2, 0).xyxy.tolist() == right.boxes(2, 10).xyxy.tolist()
    assert wrong.clocks == (0, 0, 0)


def test_every_and_split(written):
    s = cityflow(written, every=10, train_share=.5)
    assert set(s.train.frames) == {0} and set(s.test.frames) == {10}
    assert s.cameras is s.train.cameras and s.name == 'cityflow S01'
    part = s.train[s.train.camids == 1]
    assert isinstance(part, RoadSet) and len(part.homographies) == 3


def test_feet_are_on_the_road(written, road):
    "The middle of the lower edge lies within half a vehicle of its place."
    s = cityflow(written, train_share=1).train
    for c, t in ((0, 0), (1, 15), (2, 10)):
        b = road.boxes(c, t)
        b = b.ground[~b.truncated], b.pids[~b.truncated]+1
        k = s.row == s.find(c, t)
        feet = dict(zip(s.pids[k], s.feet()[k]))
        gaps = [np.hypot(*(feet[p]-x)) for x, p in zip(*b)]
        assert len(gaps) and np.median(gaps) < 3


def test_homographies_alone(tmp_path, road):
    "As most cameras of CityFlow: no K, so no camera, or a guessed one."
    out = write_cityflow(road, tmp_path/'c', [0, 5], video=False)
    for f in out.rglob('calibration.txt'):
        f.write_text(f.read_text().splitlines()[0])
    s = cityflow(out, train_share=1)
    assert s.cameras is None and s.train.cameras is None
    G = road.cameras[0].ground_homography()
    np.testing.assert_allclose(s.train.homographies[0], G/np.linalg.norm(G), atol=1e-9)
    assert np.isfinite(s.train.feet()).any()
    guessed = cityflow(out, guess=True, train_share=1)
    same_f(guessed.cameras, road.cameras, atol=1e-6)
    (out/'reidlit.json').unlink()  # then the rate is 10, and the origin a mean of places
    s = cityflow(out, guess=True, train_share=1)
    assert set(s.train.frames) == {0, 1}
    same_f(s.cameras, road.cameras, atol=1e-5)
    np.testing.assert_allclose(np.mean([c.image_to_ground([c.size[0]/2, c.size[1]-1])
                                        for c in s.cameras], 0), [0, 0], atol=1e-3)


def test_only_some_lenses_known(tmp_path, road):
    out = write_cityflow(road, tmp_path/'c', [0], video=False)
    f = out/'train'/'S01'/'c002'/'calibration.txt'
    f.write_text(f.read_text().splitlines()[0])
    s = cityflow(out, train_share=1).train
    assert [c is None for c in s.cameras] == [False, True, False]
    assert np.isfinite(s.feet()[s.camids[s.row] == 1]).any()


def test_least(tmp_path, road):
    "Vehicles that one camera alone sees are not labelled, as in CityFlow itself."
    out = write_cityflow(road, tmp_path/'c', [0], video=False, least=2)
    s = cityflow(out, train_share=1).train
    seen = [set(road.boxes(c, 0).pids+1) for c in range(3)]
    assert set(s.pids) == {p for p in set.union(*seen) if sum(p in o for o in seen) >= 2}
    assert set(s.pids) < set.union(*seen)


def test_tally(written, tmp_path):
    out = shutil.copytree(written, tmp_path/'c')
    c1 = out/'train'/'S01'/'c001'
    (c1/'gt'/'gt.txt').write_text('1,5,1,1,9,9,0,-1,-1,-1\n99,5,1,1,9,9,1\n'
                                  '1,6,500,1,9,9,1\n1,7,-4,1,9,9,1\n')
    (c1/'img1'/'notes.txt').touch()
    (c1/'img1'/'cover.png').write_bytes((c1/'img1'/'000001.png').read_bytes())
    s = cityflow(out, train_share=1).train
    assert {k: len(v) for k, v in s.dropped.reasons.items()} == {
        'not a picture': 1, 'name not understood': 1, 'box not to be counted': 1,
        'box without a picture': 1, 'box outside the picture': 1}
    assert s.boxes(0, 0).xyxy.tolist() == [[0, 1, 5, 10]] and s.cut.sum() == 1
    (out/'reidlit.json').write_text('{"rate": 40}')
    s = cityflow(out, train_share=1).train
    assert 'second picture of a moment' in s.dropped.reasons


@pytest.mark.parametrize('harm, message', [
    (lambda r, c: (c/'calibration.txt').unlink(), 'c002.calibration.txt: no such file'),
    (lambda r, c: (c/'calibration.txt').write_bytes(b'\xff\xfe\x00'),
     'c002.calibration.txt: not readable'),
    (lambda r, c: (c/'gt'/'gt.txt').unlink(), 'c002.gt.gt.txt: no such file'),
    (lambda r, c: (c/'img1').rename(c/'x'), 'c002: has no vdo.avi'),
    (lambda r, c: (c/'img1'/'000001.png').write_bytes(b'x'), '000001.png: not a readable'),
    (lambda r, c: (c/'img1'/'000001.png').rename(c/'img1'/'0.png'), 'img1: counts from 0'),
    (lambda r, c: (r/'cam_timestamp'/'S01.txt').unlink(), 'S01.txt: no such file'),
    (lambda r, c: (r/'cam_timestamp'/'S01.txt').write_text('c001 0\nc003 0'),
     'S01.txt: no clock of c002'),
    (lambda r, c: (c.parent).rename(r/'train'/'S02'), 'has no S01 with cameras')])
def test_cityflow_broken(written, tmp_path, harm, message):
    out = shutil.copytree(written, tmp_path/'c')
    harm(out, out/'train'/'S01'/'c002')
    with pytest.raises(DataError, match=message): cityflow(out)


def test_a_film_that_is_none(written, tmp_path):
    out = shutil.copytree(written, tmp_path/'c')
    shutil.rmtree(out/'train'/'S01'/'c001'/'img1')
    (out/'train'/'S01'/'c001'/'vdo.avi').write_bytes(b'RIFF')
    with pytest.raises(DataError, match='vdo.avi: not a video'): cityflow(out)


@pytest.mark.parametrize('kw, message', [
    (dict(times=[0, 5, 11]), 'not evenly'), (dict(times=[]), 'not evenly'),
    (dict(times=[5, 0]), 'not evenly'), (dict(late=[0]), r'late=\[0\]: expected 3'),
    (dict(times=[0, 5], late=[0, 0, 2]), 'of 0..1')])
def test_cityflow_writer_refuses(tmp_path, road, kw, message):
    with pytest.raises(ValueError, match=message): write_cityflow(road, tmp_path/'c', **kw)
    assert not list(tmp_path.iterdir())


def test_folder_names(tmp_path):
    for part in ('validation', 'test', ''):
        (tmp_path/part/f'S0{len(part)}'/'c006').mkdir(parents=True)
        here, cams = road_reader._scenario(tmp_path, f'S0{len(part)}')
        assert here == tmp_path/part/f'S0{len(part)}' and [c.name for c in cams] == ['c006']
    d = Dropped()
    folder = tmp_path/'S00'/'c006'
    (folder/'frames').mkdir()
    Image.new('RGB', (8, 6)).save(folder/'frames'/'00002.jpg')
    assert list(road_reader._shots(folder, False, d)[0]) == [2] and not d


# PETS 2009

def made_up(root, world, n=2, scale=1000):
    (root/'detections').mkdir(parents=True)
    rig = {}
    for c, cam in enumerate(world.cameras):
        found = [world.boxes(c, t) for t in range(n)]
        rig[name := f'View_00{c+1}'] = dict(K=cam.K.tolist(), R=cam.R.tolist(),
                                            t=(scale*cam.t).tolist(), size=cam.size)
        (root/'detections'/f'{name}.json').write_text(json.dumps(dict(
            bboxes=[b.xyxy.tolist() for b in found], scores=[b.visible.tolist() for b in found])))
    (root/'calibration.json').write_text(json.dumps(rig))
    return root


def test_pets_made_up(tmp_path, people):
    p = pets2009(made_up(tmp_path, people))
    assert len(p) == 2 and p.names == ('View_001', 'View_002', 'View_003')
    same_f(p.cameras, people.cameras)
    b = people.boxes(1, 1)
    np.testing.assert_allclose(p.at(1, 1)[0], b.xyxy, rtol=1e-6)
    assert len(p.at(1, 1, .9)[0]) == (b.visible >= .9).sum()
    straight = p.undistorted()
    np.testing.assert_allclose(straight.at(1, 1)[0], b.xyxy, atol=1e-4)


@pytest.mark.parametrize('harm, message', [
    (lambda r: (r/'detections'/'View_002.json').unlink(), 'View_002.json: no such file'),
    (lambda r: (r/'detections'/'View_002.json').write_text('{'), 'View_002.json: not JSON'),
    (lambda r: (r/'detections'/'View_002.json').write_text('{"bboxes": [[]]}'),
     'View_002.json: scores is absent'),
    (lambda r: (r/'detections'/'View_002.json').write_text(
        '{"bboxes": [[[1, 2, 3, 4]], []], "scores": [[], []]}'), 'View_002.json: moment 1: scores has shape'),
    (lambda r: (r/'detections'/'View_002.json').write_text(
        '{"bboxes": [[]], "scores": [[]]}'), r'detections: moments differ: \[2, 1, 2\]'),
    (lambda r: (r/'calibration.json').write_text('{}'), 'calibration.json: no views'),
    (lambda r: (r/'calibration.json').write_text('{"View_001": {"K": 1}}'),
     "calibration.json: View_001.R is absent"),
    (lambda r: (r/'calibration.json').unlink(), 'has no calibration.json')])
def test_pets_broken(tmp_path, people, harm, message):
    root = made_up(tmp_path, people)
    harm(root)
    with pytest.raises(DataError, match=message): pets2009(root)


@pytest.fixture(scope='module')
def pets():
    if not (REAL/'pets2009_s2l1').is_dir(): pytest.skip('pets2009_s2l1 is absent')
    return pets2009(REAL/'pets2009_s2l1')


def test_pets_real(pets):
    assert (len(pets), len(pets.names)) == (795, 7)
    assert sum(len(s) for view in pets.boxes for _, s in view) == 65947
    assert pets.frame(0, 794).shape == (576, 768, 3)
    assert [c.size for c in pets.cameras] == [(768, 576)]*3 + [(720, 576)]*4
    assert all(1.5 < c.center[2] < 20 for c in pets.cameras)
    with pytest.raises(KeyError, match='View_003 has no film'): pets.frame(1, 0)


@pytest.mark.parametrize('view', [1, 3, 4, 5, 6])  # View_004 is less well calibrated
def test_pets_feet_meet(pets, view):
    "SOURCE.txt: .24 to .71 m in step, 2.9 to 5.7 m when shifted by 200 moments."
    def gap(shift):
        out = []
        for t in range(0, 590, 10):
            a, b = pets.feet(0, t, .9), pets.feet(view, t+shift, .9)
            a = a[pets.cameras[view].visible(np.c_[a, 0*a[:, 0]])]
            b = b[np.isfinite(b).all(1)]
            if len(a) and len(b):
                out += [*np.linalg.norm(a[:, None]-b, axis=-1).min(1)]
        return np.median(out)
    assert gap(0) < .8 and gap(200) > 2


def test_pets_straightened(pets):
    "Boxes of one person lie in each other's regions, and few boxes are lost."
    p = pets.undistorted()
    assert isinstance(p.boxes[0][0][0], np.ndarray) and not p.cameras[0].dist.any()
    lost = len(p.dropped)
    assert lost < .01*sum(len(s) for view in pets.boxes for _, s in view)
    F, hits = fundamental_matrix(p.cameras[0], p.cameras[3]), []
    for t in range(0, 790, 20):
        a, b = p.at(0, t, .9)[0], p.at(3, t, .9)[0]
        near = np.linalg.norm(p.feet(0, t, .9)[:, None] - p.feet(3, t, .9), axis=-1) < .7
        hits += [*epipolar_candidates(a, b, F, 10)[near]]
    assert len(hits) > 20 and np.mean(hits) > .95


def test_frame_sets_still_read_arrays():
    s = RoadSet([np.zeros((4, 4, 3), np.uint8)], [0], [0], [], [], [])
    assert s.read(0).shape == (4, 4, 3) and isinstance(s, FrameSet)
