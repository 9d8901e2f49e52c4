"Writers of data sets' layouts: round trips, the same bytes, nothing half written."
import json
import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from reidlit.core import DataError, ReidSet
from reidlit.data.sets import (WILDTRACK, Grid, market1501, market_rows, mars,
                               wildtrack)
from reidlit.data.world import World
from reidlit.data.writers import (camera_xml, save_market, write_mars,
                                  write_market1501, write_wildtrack, writing)
from reidlit.geometry import Camera


@pytest.fixture(scope='module')
def world():
    return World(people=20, cameras=7, seed=5, crowd=10, size=(160, 90))


def content(root):
    return {f.relative_to(root).as_posix(): f.read_bytes()
            for f in sorted(root.rglob('*')) if f.is_file()}


def test_market_round_trip(tmp_path, world):
    "The same people, cameras and frames; the same bytes when written again."
    out = write_market1501(world, tmp_path/'m', per_camera=2, size=(32, 16))
    m = market1501(out, verify=True)
    parts = [world.crops('train', 2, (32, 16)), *world.query_gallery('test', 2, (32, 16))]
    for s, w in zip(m.values(), parts):
        assert Counter(zip(s.pids-1, s.camids, s.frames)) == \
            Counter(zip(w.pids, w.camids, w.frames))
        assert not s.junk.any() and not s.distractor.any() and not s.dropped
    again = write_market1501(world, tmp_path/'again', per_camera=2, size=(32, 16))
    assert content(out) == content(again)


def test_mars_round_trip(tmp_path, world):
    out = write_mars(world, tmp_path/'m', length=3, per_camera=1, size=(32, 16))
    m = mars(out, verify=True)
    w = world.tracklets('test', 3, 1, (32, 16))
    assert len(set(m.gallery.tids)) == len(set(w.tids))
    for t in set(m.gallery.tids):
        one = m.gallery[m.gallery.tids == t]
        assert one.frames.tolist() == [1, 2, 3]
        assert len(set(zip(one.pids, one.camids))) == 1
    assert Counter(zip(m.gallery.pids-1, m.gallery.camids)) == Counter(zip(w.pids, w.camids))
    assert content(out) == content(write_mars(world, tmp_path/'n', 3, 1, (32, 16)))


@pytest.mark.parametrize('layout', ['ring', 'corridor', 'disjoint'])
def test_wildtrack_round_trip(tmp_path, layout):
    world = World(people=20, cameras=3, seed=5, crowd=10, size=(160, 90), layout=layout)
    out = write_wildtrack(world, tmp_path/'w', times=[0, 5])
    w = wildtrack(out, clip=False, train_share=1, verify=True)
    for a, b in zip(w.cameras, world.cameras):
        for k in ('K', 'R', 't'):
            np.testing.assert_allclose(getattr(a, k), getattr(b, k), atol=1e-9)
        assert a.size == b.size
    assert len(w.train) == 6
    for t in (0, 5):
        for c in range(3):
            a, b = w.train.boxes(c, t), world.boxes(c, t, 'cylinder')
            order = np.argsort(b.pids)
            assert a.pids.tolist() == b.pids[order].tolist()
            np.testing.assert_array_equal(a.xyxy, np.rint(b.xyxy[order]))
            np.testing.assert_allclose(a.ground, b.ground[order], atol=.0126)
            np.testing.assert_array_equal(w.train.frame(c, t), world.frame(c, t))


def test_seven_cameras_get_their_names_and_rectangles(tmp_path, world):
    "What others' readers expect: names, view order, and lines of rectangles.pom."
    out = write_wildtrack(world, tmp_path/'w', times=[0, 5], convention='tight')
    assert {f.stem for f in (out/'calibrations'/'extrinsic').iterdir()} == {
        f'extr_{n}' for n in WILDTRACK}
    rects = {}
    for line in (out/'rectangles.pom').read_text().splitlines():
        word, c, cell, *box = line.split()
        assert word == 'RECTANGLE' and (box == ['notvisible'] or len(box) == 4)
        rects[int(c), int(cell)] = None if len(box) == 1 else list(map(int, box))
    for t in (0, 5):
        for p in json.loads((out/'annotations_positions'/f'{t:08d}.json').read_text()):
            assert [v['viewNum'] for v in p['views']] == list(range(7))
            for c, v in enumerate(p['views']):
                box = [v[k] for k in ('xmin', 'ymin', 'xmax', 'ymax')]
                assert rects[c, p['positionID']] == (None if box == [-1]*4 else box)
    assert content(out) == content(write_wildtrack(world, tmp_path/'v', [0, 5], 'tight'))


def test_off_the_grid_is_logged(tmp_path, world, caplog):
    with caplog.at_level(logging.WARNING, 'reidlit'):
        write_wildtrack(world, tmp_path/'w', times=[0], grid=Grid((40., 40.)))
    assert 'person off the grid' in caplog.text


def test_interrupted_write_is_noticed(tmp_path, world, monkeypatch):
    out = tmp_path/'m'
    real_save, calls = Image.Image.save, []

    def full_disk(self, *args, **kw):
        calls.append(1)
        if len(calls) > 20: raise OSError(28, 'No space left on device')
        return real_save(self, *args, **kw)

    monkeypatch.setattr(Image.Image, 'save', full_disk)
    with pytest.raises(OSError, match='No space'):
        write_market1501(world, out, per_camera=2, size=(32, 16))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path/'m.partial'/'query').mkdir(parents=True)  # a killed process leaves this
    with pytest.raises(DataError, match='m: no such folder, but an unfinished write m.partial'):
        market1501(out)
    with pytest.raises(DataError, match='m.partial: an unfinished write'):
        write_market1501(world, out, per_camera=1, size=(32, 16))
    write_market1501(world, out, per_camera=1, size=(32, 16), overwrite=True)
    assert [f.name for f in tmp_path.iterdir()] == ['m']


def test_overwriting_needs_a_word_and_our_mark(tmp_path):
    out = tmp_path/'o'
    with writing(out, 'any') as half: (half/'a').touch()
    with pytest.raises(DataError, match='not empty'):
        with writing(out, 'any'): pass
    with pytest.raises(ZeroDivisionError):
        with writing(out, 'any', overwrite=True): 1/0
    assert (out/'a').exists() and len(list(tmp_path.iterdir())) == 1
    with writing(out, 'any', overwrite=True) as half: (half/'b').touch()
    assert (out/'b').exists() and not (out/'a').exists()
    (out/'reidlit.json').unlink()
    with pytest.raises(DataError, match='holds other data'):
        with writing(out, 'any', overwrite=True): pass
    assert (out/'b').exists()


def test_flags_are_written_and_read(tmp_path):
    s = ReidSet(np.zeros((3, 8, 4, 3), np.uint8), [4, 4, 4], [0, 1, 7],
                junk=[True, False, False], distractor=[False, True, False])
    save_market(s, tmp_path)
    again = market_rows(sorted(tmp_path.iterdir()))
    assert sorted(zip(again.pids, again.camids, again.junk, again.distractor)) == [
        (-1, 0, True, False), (0, 1, False, True), (4, 7, False, False)]
    with pytest.raises(ValueError, match='pids 0..4'):
        save_market(ReidSet(s.images, [4, 4, 0], [0, 1, 2], name='s'), tmp_path)
    with pytest.raises(ValueError, match='no camera ids'):
        save_market(ReidSet(s.images, [4, 4, 1], name='s'), tmp_path)


def test_xml_is_what_opencv_reads(tmp_path):
    cv2 = pytest.importorskip('cv2')
    cam = Camera.look_at((3, 2, 5), (0, 0, 1), (192, 108), fov=60, dist=[.1, .01, 0, 0])
    inside, outside = camera_xml(cam)
    (tmp_path/'intr.xml').write_bytes(inside)
    store = cv2.FileStorage(str(tmp_path/'intr.xml'), cv2.FILE_STORAGE_READ)
    np.testing.assert_array_equal(store.getNode('camera_matrix').mat(), cam.K)
    np.testing.assert_array_equal(
        store.getNode('distortion_coefficients').mat().ravel(), cam.dist)
    (tmp_path/'extr.xml').write_bytes(outside)
    store = cv2.FileStorage(str(tmp_path/'extr.xml'), cv2.FILE_STORAGE_READ)
    node = store.getNode('rvec')
    rvec = np.array([node.at(i).real() for i in range(node.size())])
    np.testing.assert_allclose(cv2.Rodrigues(rvec)[0], cam.R, atol=1e-9)
