"Readers of data sets' layouts: counts of real sets, and what is broken."
import csv
import json
import logging
import os
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from real import REAL
from reidlit.core import DataError, Dropped, ReidSet
from reidlit.data.sets import (WILDTRACK, FrameSet, Grid, clip_box, crop_folder,
                               market1501, market_rows, mars, mars_rows,
                               read_json, read_mat, wildtrack,
                               wildtrack_cameras)
from reidlit.data.writers import mat_bytes, camera_xml
from reidlit.geometry import Camera



def real(name):
    "Skips a test whose real data is absent."
    return pytest.mark.skipif(not (REAL/name).exists(), reason=f'{name} is absent')


def picture(path, size=(8, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((8, 16), 60).convert('RGB').resize(size).save(path)
    return path


def broken(path, size=(64, 64)):
    "A picture that ends in the middle."
    Image.effect_noise(size, 60).convert('RGB').save(path)
    data = path.read_bytes()
    path.write_bytes(data[:len(data)//2])
    return path


# Market-1501

@real('market1501_lists')
@pytest.mark.parametrize('part, files, people, junk, distractors', [
    ('train', 12936, 751, 0, 0), ('query', 3368, 750, 0, 0),
    ('test', 19732, 750, 3819, 2798)])
def test_official_lists(part, files, people, junk, distractors):
    rows = list(csv.reader(open(REAL/'market1501_lists'/f'market1501_{part}.csv')))
    s = market_rows([path for _, path in rows])
    assert len(s) == files and not s.dropped
    assert s.junk.sum() == junk and s.distractor.sum() == distractors
    assert len(set(s.pids[~(s.junk | s.distractor)])) == people
    assert set(s.camids) == set(range(6))
    assert s.pids.tolist() == [int(pid) for pid, _ in rows]


@real('market1501_lists')
def test_official_tree(tmp_path):
    "The whole release as a tree of empty files: nothing is opened to read it."
    for part in ('train', 'query', 'test'):
        for _, path in csv.reader(open(REAL/'market1501_lists'/f'market1501_{part}.csv')):
            (tmp_path/path).parent.mkdir(exist_ok=True)
            (tmp_path/path).touch()
    (tmp_path/'query'/'Thumbs.db').touch()
    m = market1501(tmp_path)
    assert [len(s) for s in m.values()] == [12936, 3368, 19732]
    assert (~m.gallery.junk).sum() == 15913
    assert str(m.query.dropped) == '1 x not a picture (first: Thumbs.db)'
    assert set(m.query.pids) <= set(m.gallery.pids)
    assert not set(m.train.pids) & set(m.gallery.pids)


@real('market1501_dev')
def test_real_crops():
    m = market1501(REAL/'market1501_dev', verify=True)
    assert [len(s) for s in m.values()] == [3526, 429, 1324]
    assert [len(set(s.pids)) for s in m.values()] == [200, 100, 100]
    assert not any(s.dropped for s in m.values())
    assert m.train.read(0).shape == (128, 64, 3)
    pairs = Counter(zip(m.query.pids, m.query.camids))
    assert set(pairs.values()) == {1}


def market_tree(root):
    for name in ('bounding_box_train/0002_c1s1_000451_03.jpg',
                 'query/0001_c1s1_000001_00.jpg',
                 'bounding_box_test/0001_c2s1_000001_00.jpg',
                 'bounding_box_test/-1_c2s1_000002_00.jpg'):
        picture(root/name)
    return root


def test_truncated_is_reported_once(tmp_path, caplog):
    bad = broken(market_tree(tmp_path)/'bounding_box_test'/'0003_c2s1_000001_00.jpg')
    with caplog.at_level(logging.WARNING, 'reidlit'):
        m = market1501(tmp_path)
        assert not caplog.records and len(m.gallery) == 3
        m = market1501(tmp_path, verify=True)
    assert len(m.gallery) == 2
    assert m.gallery.dropped.reasons == {'unreadable picture': [str(bad)]}
    assert len(caplog.records) == 1 and str(bad) in caplog.text


def test_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    market_tree(tmp_path)
    (tmp_path/'query'/'b.txt').touch()
    (tmp_path/'query'/'a.txt').touch()
    first = market1501(tmp_path)
    walk = os.walk
    monkeypatch.setattr(os, 'walk', lambda top: ((h, d[::-1], f[::-1]) for h, d, f in walk(top)))
    again = market1501(tmp_path)
    assert str(first) == str(again)
    assert [s.images for s in first.values()] == [s.images for s in again.values()]
    assert str(first.query.dropped) == str(again.query.dropped)


def test_wrong_folders(tmp_path):
    with pytest.raises(DataError, match='nowhere: no such folder; expected folders'):
        market1501(tmp_path/'nowhere')
    with pytest.raises(DataError, match='has no bounding_box_train, query'):
        market1501(tmp_path)
    picture(tmp_path/'file.jpg')
    with pytest.raises(DataError, match='file.jpg: no such folder'):
        market1501(tmp_path/'file.jpg')


def test_splits_behave_like_a_dict(tmp_path):
    m = market1501(market_tree(tmp_path))
    again = pickle.loads(pickle.dumps(m))
    assert list(again) == list(m) and str(again) == str(m) and again.name == 'market1501'
    assert again.train.pids.tolist() == [2]
    assert not hasattr(m, 'val')


# A folder of one's own

def test_crop_folder_forms(tmp_path):
    for name in ('a/x.jpg', 'b/x.jpg', 'loose.jpg'):
        picture(tmp_path/'people'/name)
    s = crop_folder(tmp_path/'people')
    assert s.pids.tolist() == [0, 1] and s.camids is None and s.tids is None
    assert s.dropped.reasons == {"not in a person's folder": ['loose.jpg']}
    s = crop_folder(tmp_path/'people', r'(?P<pid>[ab])/.*')
    assert s.pids.tolist() == [0, 1] and len(s.dropped) == 1
    s = crop_folder(tmp_path/'people'/'a')
    assert s.pids is None and len(s) == 1


def test_nothing_is_skipped_in_silence(tmp_path):
    root = market_tree(tmp_path/'m')
    picture(root/'query'/'more'/'0001_c2s1_000001_00.jpg')
    (root/'query'/'.DS_Store').touch()
    assert sorted(market1501(root).query.dropped.reasons) == ['hidden file', 'subfolder']
    (tmp_path/'own').mkdir()
    picture(tmp_path/'own'/'ann'/'1.jpg')
    (tmp_path/'own'/'bob').symlink_to(root/'query', target_is_directory=True)
    assert crop_folder(tmp_path/'own').dropped.reasons == {'link to a folder': ['bob']}


def test_crop_folder_with_an_optional_group(tmp_path):
    for name in ('1.jpg', '2_c3.jpg'):
        picture(tmp_path/name)
    s = crop_folder(tmp_path, r'(?P<pid>\d)(_c(?P<camid>\d))?\.jpg')
    assert (s.pids.tolist(), s.camids.tolist(), len(s.dropped)) == ([2], [3], 1)


def test_crop_folder_refuses(tmp_path):
    with pytest.raises(DataError, match='nothing to read'):
        crop_folder(tmp_path)
    broken(tmp_path/'a.jpg')
    with pytest.raises(DataError, match=r'dropped 1 x unreadable picture \(first: .*a.jpg'):
        crop_folder(tmp_path, verify=True)
    with pytest.raises(ValueError, match='age'):
        crop_folder(tmp_path, '(?P<age>.*)')


# MARS

NAMES = ['0001C1T0001F001.jpg', '0001C1T0001F002.jpg', '0001C2T0001F001.jpg',
         '0000C2T0001F001.jpg', '00-1C3T0001F001.jpg', '00-1C3T0001F002.jpg']
TRACKS = [[1, 2, 1, 1], [3, 3, 1, 2], [4, 4, 0, 2], [5, 6, -1, 3]]


def mars_tree(root, tracks=TRACKS, query=((2,),)):
    for n in NAMES:
        for k in ('train', 'test'):
            picture(root/f'bbox_{k}'/n[:4]/n)
    info = root/'info'
    info.mkdir()
    for k in ('train', 'test'):
        (info/f'{k}_name.txt').write_text('\n'.join(NAMES)+'\n')
        (info/f'tracks_{k}_info.mat').write_bytes(mat_bytes(f'track_{k}_info', tracks))
    (info/'query_IDX.mat').write_bytes(mat_bytes('query_IDX', query))
    return root


def test_mars(tmp_path):
    m = mars(mars_tree(tmp_path), verify=True)
    assert m.gallery.tids.tolist() == [0, 0, 1, 2, 3, 3]
    assert m.gallery.pids.tolist() == [1, 1, 1, 0, -1, -1]
    assert m.gallery.camids.tolist() == [0, 0, 1, 1, 2, 2]
    assert m.gallery.junk.sum() == 2 and m.gallery.distractor.sum() == 1
    assert m.query.tids.tolist() == [1] and m.query.images == [m.gallery.images[2]]
    without = mars(tmp_path, gallery_includes_query=False)
    assert set(without.gallery.tids) == {0, 2, 3}
    names = mars(tmp_path, info=False)
    assert sorted(names.gallery.images) == sorted(m.gallery.images)
    assert Counter(Counter(names.gallery.tids).values()) == {2: 2, 1: 2}


@pytest.mark.parametrize('tracks, query, message', [
    ([[2, 3, 1, 1]], [[1]], 'is in tracklet 1 of person 1, camera 1'),
    ([[0, 1, 1, 1]], [[1]], 'leaves lines 1 to 6'),
    ([[1, 7, 1, 1]], [[1]], 'leaves lines 1 to 6'),
    ([[2, 1, 1, 1]], [[1]], 'leaves lines 1 to 6'),
    ([[1, 2, 1]], [[1]], r"tracks_train_info.mat: holds .*\(1, 3\)"),
    (TRACKS, [[0]], 'query_IDX.mat: asks for tracklet 0; expected 1 to 4'),
    (TRACKS, [[5]], 'query_IDX.mat: asks for tracklet 5; expected 1 to 4')])
def test_mars_tables_that_do_not_fit(tmp_path, tracks, query, message):
    with pytest.raises(DataError, match=message):
        mars(mars_tree(tmp_path, tracks, query))


def test_mars_missing_and_broken(tmp_path):
    mars_tree(tmp_path)
    mat = tmp_path/'info'/'tracks_test_info.mat'
    mat.write_bytes(mat.read_bytes()[:140])
    with pytest.raises(DataError, match='tracks_test_info.mat: not a readable .mat'):
        mars(tmp_path)
    mat.unlink()
    with pytest.raises(DataError, match='has no tracks_test_info.mat; expected .*info=False'):
        mars(tmp_path)


def test_mars_at_its_real_size():
    "A table of MARS's size (681,089 names, 12,180 tracklets) becomes rows."
    last = np.linspace(0, 681_089, 12_181).astype(int)[1:]
    first = np.r_[0, last[:-1]]+1
    who = np.arange(len(last)) % 637 - 1
    tag = ['00-1' if p < 0 else f'{p:04d}' for p in who]
    names = [f'{tag[i]}C1T{i//637+1:04d}F{k-first[i]+1:03d}.jpg'
             for i in range(len(last)) for k in range(first[i], last[i]+1)]
    s = mars_rows(names, np.stack([first, last, who, np.ones_like(who)], 1))
    assert len(s) == 681_089 and not s.dropped
    assert (np.bincount(s.tids) == last-first+1).all()


# WILDTRACK

def wildtrack_tree(root, cameras=2, times=(0, 5, 10), size=(192, 108)):
    rig = [Camera.look_at((4-3*c, -6, 2.5), (0, 0, 1), size, fov=70)
           for c in range(cameras)]
    names = WILDTRACK if cameras == 7 else [f'C{c+1}' for c in range(cameras)]
    for c, (name, cam) in enumerate(zip(names, rig)):
        for kind, data in zip(('intrinsic_zero/intr', 'extrinsic/extr'), camera_xml(cam)):
            f = root/'calibrations'/f'{kind}_{name}.xml'
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_bytes(data)
        for t in times:
            picture(root/'Image_subsets'/f'C{c+1}'/f'{t:08d}.png', size)
    (root/'annotations_positions').mkdir()
    hidden = dict(xmin=-1, ymin=-1, xmax=-1, ymax=-1)
    box = dict(xmin=10, ymin=20, xmax=30, ymax=80)
    people = [dict(personID=p, positionID=172920+p, views=[
        dict(viewNum=c, **(box if c != p else hidden)) for c in range(cameras)])
        for p in range(cameras)]
    for t in times:
        (root/'annotations_positions'/f'{t:08d}.json').write_text(json.dumps(people))
    return root, rig


def test_wildtrack_reads_cameras_boxes_and_split(tmp_path):
    root, rig = wildtrack_tree(tmp_path, times=range(0, 100, 5))
    w = wildtrack(root, verify=True)
    assert [len(set(s.frames)) for s in w.values()] == [18, 2]
    assert w.train.frames.max() < w.test.frames.min()
    for a, b in zip(w.cameras, rig):
        for k in ('K', 'R', 't'):
            np.testing.assert_allclose(getattr(a, k), getattr(b, k), atol=1e-9)
    boxes = w.train.boxes(0, 0)
    assert boxes.pids.tolist() == [1] and boxes.xyxy.tolist() == [[10, 20, 30, 80]]
    np.testing.assert_allclose(boxes.ground, [[.025, 0]], atol=1e-9)
    assert w.train.frame(1, 5).shape == (108, 192, 3)
    assert not w.train.dropped
    crops = w.test.crops((32, 16))
    assert isinstance(crops, ReidSet) and crops.images.shape == (4, 32, 16, 3)


def test_wildtrack_names_of_seven_cameras(tmp_path):
    root, rig = wildtrack_tree(tmp_path, cameras=7, times=[0, 5])
    assert (root/'calibrations'/'extrinsic'/'extr_IDIAP3.xml').exists()
    w = wildtrack(root)
    np.testing.assert_allclose([c.t for c in w.cameras], [c.t for c in rig], atol=1e-9)


@pytest.mark.parametrize('harm, message', [
    (lambda r: (r/'annotations_positions'/'00000005.json').write_text('[{'),
     '00000005.json: not JSON'),
    (lambda r: (r/'annotations_positions'/'00000005.json').write_text('[{"personID": 1}]'),
     "00000005.json: \[0\].positionID is absent"),
    (lambda r: (r/'annotations_positions'/'00000005.json').write_text(
        '[{"personID": 1, "positionID": 691200, "views": []}]'),
     '00000005.json: person 1, frame 5: position 691200'),
    (lambda r: (r/'calibrations'/'extrinsic'/'extr_C2.xml').write_text('<a><rvec>'),
     'extr_C2.xml: not readable XML'),
    (lambda r: (r/'calibrations'/'extrinsic'/'extr_C2.xml').write_text(
        '<a><rvec>0 0 0</rvec></a>'), 'extr_C2.xml: <tvec> has 0 numbers; expected 3'),
    (lambda r: (r/'calibrations'/'intrinsic_zero'/'intr_C1.xml').unlink(),
     'intr_C1.xml: no such file'),
    (lambda r: (r/'calibrations'/'intrinsic_zero'/'intr_C1.xml').write_text(
        '<a><camera_matrix>1 2 3 4 5 6 7 8 9</camera_matrix></a>'),
     'intr_C1.xml: K must be upper triangular'),
    (lambda r: (r/'Image_subsets'/'C1'/'00000000.png').write_bytes(b'no picture'),
     '00000000.png: not a readable image'),
    (lambda r: (r/'reidlit.json').write_text('{}'), 'reidlit.json: no usable grid'),
    (lambda r: (r/'Image_subsets'/'C2').rename(r/'Image_subsets'/'D'),
     'C2: no such folder')])
def test_wildtrack_broken(tmp_path, harm, message):
    root, _ = wildtrack_tree(tmp_path)
    harm(root)
    with pytest.raises(DataError, match=message):
        wildtrack(root)


def test_wildtrack_tally(tmp_path):
    root, _ = wildtrack_tree(tmp_path)
    note = root/'annotations_positions'/'00000000.json'
    people = json.loads(note.read_text())
    people[0]['views'][1] |= dict(xmin=-20)
    people[1]['views'][0] |= dict(xmin=500, xmax=600)
    people.append(dict(people[0], personID=9, views=[dict(
        viewNum=0, xmin=-1, ymin=-1, xmax=-1, ymax=-1)]))
    note.write_text(json.dumps(people))
    (root/'annotations_positions'/'00000010.json').unlink()
    broken(root/'Image_subsets'/'C1'/'00000005.png', (192, 108))
    w = wildtrack(root, train_share=1, verify=True)
    assert {k: len(v) for k, v in w.train.dropped.reasons.items()} == {
        'picture without annotation': 2, 'box outside the picture': 1,
        'person in no view': 1, 'unreadable picture': 1}
    assert w.train.boxes(1, 0).xyxy.tolist() == [[0, 20, 30, 80]]
    assert w.train.xyxy[w.train.cut].tolist() == [[0, 20, 30, 80]]
    assert '(1 cut at the border)' in str(w.train) and str(w.train).endswith(', 5 dropped')
    kept = wildtrack(root, clip=False, train_share=1)
    assert not kept.train.cut.any() and 'cut' not in str(kept.train)
    assert kept.train.boxes(1, 0).xyxy[0, 0] == -20
    with pytest.raises(DataError, match='C1.00000000.png: box .* is outside'):
        kept.train[kept.train.frames == 0].crops((16, 8))


@real('wildtrack_calibration')
def test_wildtrack_real_calibration(tmp_path):
    "The transcribed real numbers, as files: a real person's foot projects to her box."
    here = REAL/'wildtrack_calibration'
    for name, c in json.loads((here/'wildtrack_calibration.json').read_text()).items():
        K = ' '.join(map(str, np.ravel(c['camera_matrix'])))
        r, t = (' '.join(map(str, c[k])) for k in ('rvec', 'tvec_cm'))
        for kind, body in (('intrinsic_zero/intr', '<camera_matrix type_id="opencv-matrix">'
                            f'<data>{K}</data></camera_matrix>'),
                           ('extrinsic/extr', f'<rvec>{r}</rvec><tvec>{t}</tvec>')):
            f = tmp_path/'calibrations'/f'{kind}_{name}.xml'
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_text(f'<opencv_storage>{body}</opencv_storage>')
    cameras = wildtrack_cameras(tmp_path, [(1920, 1080)]*7)
    assert len(cameras) == 7
    assert all(1.5 < c.center[2] < 10 for c in cameras)
    person, = json.loads((here/'one_annotation_00000000.json').read_text())
    xy = Grid().xy(person['positionID'])
    for v in person['views']:
        camera = cameras[v['viewNum']]
        foot, head = camera.ground_to_image(xy), camera.ground_to_image(xy, 1.8)
        assert abs(foot[0] - (v['xmin']+v['xmax'])/2) < 9
        assert abs(foot[1] - v['ymax']) < 1
        assert abs(head[1] - v['ymin']) < 3
    (tmp_path/'annotations_positions').mkdir()
    (tmp_path/'annotations_positions'/'00000000.json').write_text(json.dumps([person]))
    for c in range(7):
        picture(tmp_path/'Image_subsets'/f'C{c+1}'/'00000000.png', (1920, 1080))
    w = wildtrack(tmp_path, train_share=1)
    assert w.train.boxes(0, 0).xyxy.tolist() == [[1510, 139, 1561, 299]]
    np.testing.assert_allclose(w.train.boxes(1, 0).ground, [[5.65, 14.775]])


def test_a_cut_box_is_not_called_dropped(tmp_path, caplog):
    root, _ = wildtrack_tree(tmp_path, times=[0])
    note = root/'annotations_positions'/'00000000.json'
    note.write_text(note.read_text().replace('"xmin": 10', '"xmin": -20'))
    with caplog.at_level(logging.WARNING, 'reidlit'):
        w = wildtrack(root, train_share=1)
    assert w.train.cut.all() and not w.train.dropped and not caplog.records


def test_frames_without_cameras_or_identities(tmp_path):
    "As in a detection set: what is unknown is None, and stays None."
    paths = [picture(tmp_path/f'{k}.png') for k in 'ab']
    s = FrameSet(paths, None, None, [0, 1, 1], [[0, 0, 4, 8]]*3, None, name='s')
    assert str(s) == 's: 2 pictures, 3 boxes'
    part = s[1]
    assert part.camids is None and part.pids is None and part.row.tolist() == [0, 0]
    crops = s.crops((8, 4))
    assert len(crops) == 3 and crops.pids is None and crops.camids is None
    with pytest.raises(KeyError, match='no frame 0 of camera 0'):
        s.find(0, 0)
    empty = s[[]]
    assert len(empty) == 0 and len(empty.crops((8, 4))) == 0


@pytest.mark.parametrize('box, kept, reason', [
    ([1, 2, 3, 4], [1, 2, 3, 4], None), ([-5, -5, 99, 99], [0, 0, 10, 20], None),
    ([10, 0, 12, 5], None, 'box outside the picture'),
    ([-4, 0, 0, 5], None, 'box outside the picture'),
    ([3, 3, 3, 9], None, 'box without area'),
    ([float('nan'), 0, 5, 5], None, 'box without area')])
def test_clip_box(box, kept, reason):
    d = Dropped()
    assert clip_box(box, (10, 20), d, 'x') == kept
    assert d.reasons == ({reason: ['x']} if reason else {})


def test_files_beside_the_pictures(tmp_path):
    for read in (read_json, read_mat):
        with pytest.raises(DataError, match='none: no such file'):
            read(tmp_path/'none')
    (tmp_path/'a').write_bytes(b'\xff\xfe{')
    with pytest.raises(DataError, match='a: not JSON'):
        read_json(tmp_path/'a')
    with pytest.raises(DataError, match='a: not a readable .mat file'):
        read_mat(tmp_path/'a')
