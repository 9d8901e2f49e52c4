"COCO's form: what is read, what is dropped, and COCO's own code on what was written."
import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from reidlit.core import DataError
from reidlit.data.sets import FrameSet
from reidlit.data.readers.coco import coco, write_coco
from reidlit.data.world import World

SETS = dict(person=1, dog=18)


def made(root, boxes, size=(100, 80), ids=(42, 7, 9)):
    "A folder with pictures, and boxes as `(image, category, bbox, iscrowd)`."
    for i in ids: Image.new('RGB', size, (i, 0, 0)).save(root/f'{i}.png')
    about = dict(
        images=[dict(id=i, file_name=f'{i}.png', width=size[0], height=size[1]) for i in ids],
        annotations=[dict(id=k, image_id=i, category_id=SETS[c], bbox=b, iscrowd=w)
                     for k, (i, c, b, w) in enumerate(boxes, 1)],
        categories=[dict(id=i, name=n) for n, i in SETS.items()])
    (root/'a.json').write_text(json.dumps(about))
    return root/'a.json', about


BOXES = [(42, 'person', [10, 20, 30.5, 40], 0), (42, 'dog', [1, 2, 3, 4], 0),
         (42, 'person', [0, 0, 50, 50], 1), (9, 'person', [5, 5, 10, 10], 0),
         (42, 'person', [90, 70, 20, 20], 0)]


def test_reads_people_in_order_of_images(tmp_path):
    f, _ = made(tmp_path, BOXES)
    s = coco(tmp_path, f, verify=True)
    assert s.frames.tolist() == [7, 9, 42] and s.row.tolist() == [1, 2, 2]
    assert s.xyxy.tolist() == [[5, 5, 15, 15], [10, 20, 40.5, 60], [90, 70, 100, 80]]
    assert s.cut.tolist() == [False, False, True] and s.xyxy.dtype == np.float32
    assert s.pids is None and s.camids is None and s.cameras is None
    assert [s.read(i)[0, 0, 0] for i in range(3)] == [7, 9, 42]
    assert {k: len(v) for k, v in s.dropped.reasons.items()} == {'crowd': 1}
    assert coco(tmp_path, f, clip=False).xyxy[2].tolist() == [90, 70, 110, 90]


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    f, _ = made(tmp_path, BOXES)
    s = coco(tmp_path, f)
    f.write_text(f.read_text().replace('"id": 42', '"id": 42.0').replace('"image_id": 9,', '"image_id": 9.0,'))
    same = coco(tmp_path, f)
    assert same.frames.tolist() == [7, 9, 42] and same.row.tolist() == s.row.tolist() and (same.xyxy == s.xyxy).all()


def test_crowds_and_other_categories(tmp_path):
    f, _ = made(tmp_path, BOXES)
    crowd = coco(tmp_path, f, crowd=True)
    assert (crowd.row.tolist(), crowd.xyxy.tolist()) == ([2], [[0, 0, 50, 50]])
    assert crowd.dropped.reasons.keys() == {'single one'}
    assert coco(tmp_path, f).frames.tolist() == crowd.frames.tolist()
    both = coco(tmp_path, f, ('dog', 'person'), empty=False)
    assert both.frames.tolist() == [9, 42] and len(both.row) == 4
    dogs = coco(tmp_path, f, 'dog')
    assert len(dogs) == 3 and dogs.row.tolist() == [2]


def test_no_boxes_at_all(tmp_path):
    f, _ = made(tmp_path, [])
    s = coco(tmp_path, f)
    assert len(s) == 3 and s.xyxy.shape == (0, 4)
    with pytest.raises(DataError, match='nothing to read'): coco(tmp_path, f, empty=False)


def test_tally(tmp_path):
    f, about = made(tmp_path, [*BOXES, (42, 'person', [9, 9, 0, 9], 0),
                               (42, 'person', [200, 9, 5, 9], 0)])
    (tmp_path/'9.png').unlink()
    about['annotations'].append(dict(id=99, image_id=1234, category_id=1, bbox=[1, 1, 2, 2]))
    f.write_text(json.dumps(about))
    s = coco(tmp_path, f)
    assert {k: len(v) for k, v in s.dropped.reasons.items()} == {
        'picture without a file': 1, 'crowd': 1, 'box without a picture': 2,
        'box without area': 1, 'box outside the picture': 1}
    data = (tmp_path/'42.png').read_bytes()
    (tmp_path/'42.png').write_bytes(data[:len(data)//2])
    s = coco(tmp_path, f, verify=True)
    assert s.frames.tolist() == [7] and 'unreadable picture' in s.dropped.reasons


def harm(about, where, **changes):
    about[where][0].update(changes)
    return about


@pytest.mark.parametrize('change, message', [
    (lambda a: [], 'it is .*; expected entries'), (lambda a: dict(images=[]), 'annotations is absent'),
    (lambda a: harm(a, 'images', id=7), 'images: id 7 comes twice'),
    (lambda a: harm(a, 'images', id=None), r'images\[0\].id is None; expected a whole number'),
    (lambda a: harm(a, 'images', width='x'), r"images\[0\].width is 'x'"),
    (lambda a: harm(a, 'annotations', bbox=[1, 2]), r'annotations\[0\].bbox is \[1, 2\]; expected 4'),
    (lambda a: harm(a, 'annotations', bbox=None), r'annotations\[0\].bbox is None'),
    (lambda a: harm(a, 'annotations', bbox=[1, 2, float('nan'), 3]), r'annotations\[0\].bbox\[2\] is nan.*finite'),
    (lambda a: harm(a, 'categories', name='human'), "no category 'person'; expected one of"),
    (lambda a: dict(a, annotations=['x']), r'annotations\[0\] is .x.; expected entries')])
def test_broken(tmp_path, change, message):
    f, about = made(tmp_path, BOXES)
    f.write_text(json.dumps(change(about)))
    with pytest.raises(DataError, match=f'a.json: {message}'): coco(tmp_path, f)


def test_missing(tmp_path):
    with pytest.raises(DataError, match='a.json: no such file'): coco(tmp_path, tmp_path/'a.json')
    f, _ = made(tmp_path, BOXES)
    with pytest.raises(DataError, match='none: no such folder'): coco(tmp_path/'none', f)
    f.write_text('{')
    with pytest.raises(DataError, match='a.json: not JSON'): coco(tmp_path, f)


@pytest.fixture(scope='module')
def frames():
    world = World(people=10, cameras=2, seed=3, crowd=6, size=(96, 64))
    keys = [(c, t) for t in (0, 10) for c in (0, 1)]
    boxes = [world.boxes(c, t) for c, t in keys]
    return FrameSet([world.frame(c, t) for c, t in keys], *np.transpose(keys),
                    np.repeat(range(4), [len(b) for b in boxes]),
                    np.concatenate([b.clipped for b in boxes]),
                    np.concatenate([b.pids for b in boxes]), name='frames')


def test_round_trip(tmp_path, frames):
    out = write_coco(frames, tmp_path/'o', 'walker')
    s = coco(out/'images', out/'annotations.json', 'walker', verify=True)
    assert s.frames.tolist() == [1, 2, 3, 4]  # each moment is there twice
    assert s.row.tolist() == frames.row.tolist() and not s.dropped
    np.testing.assert_allclose(s.xyxy, frames.xyxy, atol=1e-4)
    for i in range(4): np.testing.assert_array_equal(s.read(i), frames.read(i))
    p = write_coco(s[[3, 1]], tmp_path/'p')
    part = coco(p/'images', p/'annotations.json')
    assert part.frames.tolist() == [2, 4]  # a set's own numbers are kept
    with pytest.raises(DataError, match="no category 'person'"):
        coco(out/'images', out/'annotations.json')
    with pytest.raises(DataError, match='not empty'): write_coco(frames, out)
    write_coco(frames[0], out, overwrite=True)
    assert len(coco(out/'images', out/'annotations.json')) == 1


def test_a_missing_picture_stops_the_writer(tmp_path, frames):
    s = FrameSet([tmp_path/'gone.png'], None, None, [], [], None)
    with pytest.raises(DataError, match='gone.png: cannot be copied'):
        write_coco(s, tmp_path/'o')
    assert not list(tmp_path.iterdir())


def test_cocos_own_code(tmp_path, frames):
    "The true boxes as a detector's score 1; half of them recall half."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    out = write_coco(frames, tmp_path/'o')
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(out/'annotations.json')
        assert truth.getCatIds(catNms=['person']) == [1] and len(truth.getImgIds()) == 4
        for i, k in enumerate(truth.getImgIds()):
            notes = truth.loadAnns(truth.getAnnIds(imgIds=[k]))
            x, y, w, h = np.transpose([o['bbox'] for o in notes])
            mine = frames.xyxy[frames.row == i]
            np.testing.assert_allclose(np.stack([x, y, x+w, y+h], 1), mine, atol=1e-4)
        found = [dict(image_id=o['image_id'], category_id=1, bbox=o['bbox'], score=.5)
                 for o in truth.dataset['annotations']]
        stats = []
        for keep in (1, 2):
            e = COCOeval(truth, truth.loadRes(found[::keep]), 'bbox')
            e.evaluate(); e.accumulate(); e.summarize()
            stats.append((e.stats[0], e.stats[8]))
    assert stats[0] == pytest.approx((1, 1))
    assert stats[1][1] == pytest.approx(len(found[::2])/len(found))


def test_crowds_are_ignored_by_cocos_own_code(tmp_path):
    "A detection inside a crowd costs nothing, one elsewhere does."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    f, about = made(tmp_path, [(42, 'person', [60, 60, 20, 20], 0),
                               (42, 'person', [0, 0, 40, 40], 1)])
    for o in about['annotations']: o['area'] = o['bbox'][2]*o['bbox'][3]
    f.write_text(json.dumps(dict(about, info={})))
    s, crowd = coco(tmp_path, f), coco(tmp_path, f, crowd=True)
    one = lambda b, score: dict(image_id=42, category_id=1, score=score,
                                bbox=[b[0], b[1], b[2]-b[0], b[3]-b[1]])
    person, inside = s.xyxy[0].tolist(), (crowd.xyxy[0]/2).tolist()
    ap = []
    for extra in (inside, [80, 0, 99, 20]):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(f)
            e = COCOeval(truth, truth.loadRes([one(extra, .9), one(person, .8)]), 'bbox')
            e.params.catIds = [1]
            e.evaluate(); e.accumulate(); e.summarize()
        ap.append(e.stats[0])
    assert ap == pytest.approx([1, .5], abs=.01)
