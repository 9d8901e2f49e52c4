"Readers and writers of PRID 2011 and iLIDS-VID: layouts, trials, and what is broken."
import logging
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image

from reidlit.core import DataError
from reidlit.data.readers.prid import (ILIDS_DIRS, ilids_vid, prid2011,
                                       write_ilids_vid, write_prid2011)
from reidlit.data.sets import (READERS, TRACKLETS, WRITERS, open_data,
                               read_sources)
from reidlit.data.world import World
from reidlit.data.writers import mat_bytes


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def prid_tree(root, a, b):
    "Empty pictures: `{person: frames}` of each camera."
    for k, people in (('cam_a', a), ('cam_b', b)):
        for p, n in people.items():
            folder = root/'multi_shot'/k/f'person_{p:04d}'
            folder.mkdir(parents=True)
            for i in range(n): (folder/f'{i+1:04d}.png').touch()
    return root


def film(root, cam, p, frames=(317, 318)):
    return [touch(root/ILIDS_DIRS[0]/f'cam{cam}'/f'person{p:03d}'
                  / f'cam{cam}_person{p:03d}_{t:05d}.png') for t in frames]


def orders(n, seed=0):
    r = np.random.default_rng(seed)
    return np.stack([r.permutation(n)+1 for _ in range(10)])


def ilids_tree(root, people=(1, 2, 4, 7, 8), rows=None):
    for p in people: film(root, 1, p); film(root, 2, p)
    path = root/ILIDS_DIRS[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mat_bytes('ls_set', orders(len(people)) if rows is None else rows))
    return root


def one_of(s):
    "One person and camera in each tracklet, frames in order."
    for t in set(s.tids):
        part = s[s.tids == t]
        assert len(set(zip(part.pids, part.camids))) == 1
        assert (np.diff(part.frames) > 0).all()
    assert len(set(s.tids)) == len(set(zip(s.pids, s.camids)))


def check_trial(s, people):
    "Query camera 0, gallery camera 1, nobody on both sides, everybody somewhere."
    assert set(s.query.camids) == {0} and set(s.gallery.camids) == {1}
    assert set(s.train.camids) == {0, 1}
    tests, trains = set(s.query.pids), set(s.train.pids)
    assert tests == set(s.gallery.pids) and not tests & trains
    assert tests | trains == set(people)
    for part in s.values(): one_of(part)


# PRID 2011

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "PRID's structure at its full size: 385 and 749 people, 200 shared, 178 long enough."
    r = np.random.default_rng(1)
    long = set((r.permutation(200)[:178]+1).tolist())
    short = sorted(set(range(1, 201)) - long)
    a, b = ({p: 27 if p in long else 1 for p in range(1, n+1)} for n in (385, 749))
    for k, p in enumerate(short):  # Long in one camera, too short in the other
        a[p], b[p] = ((26, 27), (27, 26), (5, 5))[k % 3]
    for p in (201, 300, 385): a[p] = b[p] = 27  # One number, two people
    root = prid_tree(tmp_path_factory.mktemp('prid_2011'), a, b)
    touch(root/'single_shot'/'cam_a'/'person_0001.png')
    return root, long, short


def test_prid_at_its_real_size(whole, caplog):
    root, long, short = whole
    with caplog.at_level(logging.WARNING, 'reidlit'): s = prid2011(root)
    assert [len(set(p.pids)) for p in s.values()] == [89, 89, 89]
    check_trial(s, long)
    assert [len(set(p.tids)) for p in s.values()] == [178, 89, 89]
    assert [len(p) for p in s.values()] == [178*27, 89*27, 89*27]
    assert {k: len(v) for k, v in s.train.dropped.reasons.items()} == {
        'person seen by one camera only': 185+549, 'person with fewer than 27 frames': 22}
    assert sorted(map(int, s.train.dropped.reasons['person with fewer than 27 frames'])) == short
    assert '201, camera 1' in s.train.dropped.reasons['person seen by one camera only']
    assert not s.query.dropped and not s.gallery.dropped
    assert len(caplog.records) == 1


def test_prid_trials(whole):
    root, long, _ = whole
    tests = [set(prid2011(root/'multi_shot', t).query.pids) for t in (0, 10)]
    tests.append(set(prid2011(str(root), 0, seed=1).query.pids))
    shared = [len(a & b) for i, a in enumerate(tests) for b in tests[:i]]
    assert all(25 < n < 65 for n in shared)
    assert all(len(t) == 89 and t < long for t in tests)


def test_prid_least_frames(tmp_path):
    root = prid_tree(tmp_path, {1: 3, 2: 4, 3: 5, 4: 2}, {1: 3, 2: 3, 3: 4, 4: 9})
    check_trial(prid2011(root, min_frames=3), [1, 2, 3])
    assert len(set(prid2011(root, min_frames=3).query.pids)) == 2  # The larger half tests
    check_trial(prid2011(root, min_frames=0), [1, 2, 3, 4])
    with pytest.raises(DataError, match='1 people have 4 frames or more in each camera'
                       r'.*3 x person with fewer than 4.*expected 2 or more, for halves'):
        prid2011(root, min_frames=4)


def test_prid_tally(tmp_path):
    root = prid_tree(tmp_path, {1: 2, 2: 2, 5: 0}, {1: 2, 2: 2, 3: 2})
    cam = root/'multi_shot'/'cam_a'
    for name in ('person_1/0001.png', 'Person_0002/0001.png', 'person_0001/a003.png',
                 'person_0001/3.png', 'person_0001/more/0001.png', '0001.png',
                 'person_0002/Thumbs.db', '.cache/0001.png'): touch(cam/name)
    (cam/'person_0007').symlink_to(cam/'person_0001', target_is_directory=True)
    (cam/'bob').mkdir()
    s = prid2011(root, min_frames=2)
    check_trial(s, [1, 2])
    assert len(s.query) == 2 and len(s.train) == 4
    assert {k: sorted(v) for k, v in s.train.dropped.reasons.items()} == {
        'not a picture': ['Thumbs.db'], 'hidden folder': ['.cache'],
        'link to a folder': ['person_0007'],
        'folder without pictures': ['cam_a/bob', 'cam_a/person_0005'],
        'name not understood': sorted(f'cam_a/{n}' for n in (
            'person_1/0001.png', 'Person_0002/0001.png', 'person_0001/a003.png',
            'person_0001/3.png', 'person_0001/more/0001.png', '0001.png')),
        'person seen by one camera only': ['3, camera 1']}


def test_prid_broken(tmp_path):
    with pytest.raises(DataError, match='nowhere: no such folder; expected multi_shot'):
        prid2011(tmp_path/'nowhere')
    (tmp_path/'multi_shot'/'cam_a').mkdir(parents=True)
    with pytest.raises(DataError, match='multi_shot: has no cam_b; expected .*cam_a and cam_b'):
        prid2011(tmp_path)
    (tmp_path/'multi_shot'/'cam_b'/'person_0001').mkdir(parents=True)
    touch(tmp_path/'multi_shot'/'cam_a'/'person_0001'/'0001.png')
    with pytest.raises(DataError, match=r'cam_b: shows nobody \(dropped 1 x folder without '
                       r'pictures \(first: cam_b/person_0001\)\); expected names like '
                       r'cam_a/person_0001/0001.png'):
        prid2011(tmp_path)
    touch(tmp_path/'multi_shot'/'cam_b'/'person_0001'/'a001.png')
    with pytest.raises(DataError, match='cam_b: shows nobody .*a001.png'):
        prid2011(tmp_path)
    touch(tmp_path/'multi_shot'/'cam_b'/'person_0002'/'0001.png')
    with pytest.raises(DataError, match='multi_shot: 0 people have 1 frames'):
        prid2011(tmp_path, min_frames=1)


def test_prid_single_shot_is_not_read(tmp_path):
    for k in 'ab': touch(tmp_path/'single_shot'/f'cam_{k}'/'person_0001.png')
    with pytest.raises(DataError, match='has no cam_a, cam_b; expected multi_shot'):
        prid2011(tmp_path)
    with pytest.raises(DataError, match='cam_a: shows nobody .*cam_a/person_0001.png'):
        prid2011(tmp_path/'single_shot')


def test_prid_unreadable_pictures_do_not_count(tmp_path):
    root = prid_tree(tmp_path, {1: 2, 2: 2, 3: 2}, {1: 2, 2: 2, 3: 2})
    bad = root/'multi_shot'/'cam_b'/'person_0003'/'0002.png'
    for f in root.rglob('*.png'): Image.new('RGB', (4, 8)).save(f)
    data = bad.read_bytes()
    bad.write_bytes(data[:len(data)//2])
    check_trial(prid2011(root, min_frames=2), [1, 2, 3])
    s = prid2011(root, min_frames=2, verify=True)
    check_trial(s, [1, 2])
    assert s.train.dropped.reasons == {'unreadable picture': [str(bad)],
                                       'person with fewer than 2 frames': ['3']}


@pytest.mark.parametrize('note', ['{', '{}', '[]', '{"shared": "all"}', '{"shared": null}'])
def test_prid_note_that_cannot_be_used(tmp_path, note):
    root = prid_tree(tmp_path, {1: 1, 2: 1}, {1: 1, 2: 1})
    (root/'reidlit.json').write_text(note)
    with pytest.raises(DataError, match='reidlit.json: (no usable number|not JSON)'):
        prid2011(root, min_frames=1)


# iLIDS-VID

@pytest.mark.parametrize('inside', ['', 'i-LIDS-VID'])
def test_ilids(tmp_path, inside):
    people, rows = np.array([1, 2, 4, 7, 8, 11]), orders(6)
    root = ilids_tree(tmp_path, people.tolist(), rows)/inside
    for t in range(10):
        s = ilids_vid(root, t)
        check_trial(s, people.tolist())
        assert set(s.query.pids) == set(people[rows[t, :3]-1])
    assert not s.train.dropped and set(s.query.frames) == {317, 318}
    for t in (-1, 10, None):
        with pytest.raises(ValueError, match=f'trial={t}: expected 0 to 9'): ilids_vid(root, t)


def test_ilids_at_its_real_size(tmp_path):
    rows = orders(300, 3)
    folders = np.sort(np.random.default_rng(0).permutation(319)[:300]+1)
    for p in folders.tolist():
        for cam in (1, 2): film(tmp_path, cam, p, (317,))
    path = tmp_path/ILIDS_DIRS[1]
    path.parent.mkdir()
    path.write_bytes(mat_bytes('ls_set', rows))
    s = ilids_vid(tmp_path, 7)
    check_trial(s, folders.tolist())
    assert set(s.query.pids) == set(folders[rows[7, :150]-1])
    assert [len(set(p.pids)) for p in s.values()] == [150, 150, 150]


def ten(*row): return [[1, 2, 3, 4, 5]]*4+[row]+[[1, 2, 3, 4, 5]]*5


@pytest.mark.parametrize('rows, message', [
    (ten(1, 2, 3, 4, 4), r'row 5 holds 4 \(2 x\); expected each of 1 to 5 once'),
    (ten(1, 2, 3, 4, 6), r'row 5 holds 6 \(1 x\); expected each of 1 to 5 once'),
    (ten(0, 2, 3, 4, 5), r'row 5 holds 0 \(1 x\)'),
    (orders(6), r"holds \{'ls_set': \(10, 6\)\}; expected one array \(N,5\)"),
    (orders(5)[:9], 'holds 9 rows; expected 10'),
    (orders(5).T, r'\(5, 10\)\}; expected one array \(N,5\)'),
    (orders(5).ravel()[None], 'expected one array')])
def test_ilids_list_that_does_not_fit(tmp_path, rows, message):
    with pytest.raises(DataError, match='train_test_splits_ilidsvid.mat: .*'+message):
        ilids_vid(ilids_tree(tmp_path, rows=rows))


def test_ilids_broken(tmp_path):
    with pytest.raises(DataError, match='nowhere: no such folder'): ilids_vid(tmp_path/'nowhere')
    root = ilids_tree(tmp_path)
    mat = root/ILIDS_DIRS[1]
    data = mat.read_bytes()
    mat.write_bytes(data[:150])
    with pytest.raises(DataError, match='ilidsvid.mat: not a readable .mat file'): ilids_vid(root)
    mat.unlink()
    with pytest.raises(DataError, match='has no train-test people splits/.*ilidsvid.mat'):
        ilids_vid(root)
    mat.write_bytes(data)
    films = root/ILIDS_DIRS[0]
    (films/'cam2').rename(films/'cam3')
    with pytest.raises(DataError, match='sequences: has no cam2; expected folders cam1 and cam2'):
        ilids_vid(root)
    (films/'cam2').mkdir()
    with pytest.raises(DataError, match='cam2: shows nobody .*expected names like cam1/person001'):
        ilids_vid(root)


def test_ilids_tally(tmp_path):
    "A person who is not in both is left out, and nobody behind moves in the list."
    people, rows = np.array([1, 2, 4, 7, 8]), orders(5, 2)
    root = ilids_tree(tmp_path, people.tolist(), rows)
    films = root/ILIDS_DIRS[0]
    for f in (films/'cam2'/'person002').iterdir(): f.unlink()
    touch(films/'cam1'/'person001'/'cam2_person001_00319.png')
    touch(films/'cam1'/'person001'/'cam1_person004_00319.png')
    touch(films/'cam1'/'person001'/'cam1_person001_a319.png')
    touch(films/'cam1'/'bob'/'cam1_person009_00319.png')
    s = ilids_vid(root, 4)
    check_trial(s, [1, 4, 7, 8])
    assert set(s.query.pids) == set(people[rows[4, :2]-1]) - {2}
    assert {k: len(v) for k, v in s.train.dropped.reasons.items()} == {
        'folder without pictures': 1, 'name not understood': 4,
        'person seen by one camera only': 1}


def test_ilids_unreadable_picture(tmp_path):
    root = ilids_tree(tmp_path, [1, 2, 3, 4])
    for f in root.rglob('*.png'): Image.new('RGB', (4, 8)).save(f)
    bad = film(root, 2, 3)[0]
    bad.write_bytes(b'no picture')
    s = ilids_vid(root, verify=True)
    check_trial(s, [1, 2, 3, 4])
    assert s.train.dropped.reasons == {'unreadable picture': [str(bad)]}


def test_ilids_too_few(tmp_path):
    root = ilids_tree(tmp_path, [5])
    with pytest.raises(DataError, match='1 people have 1 frames .*expected 2 or more'):
        ilids_vid(root)


# Written

@pytest.fixture(scope='module')
def world():
    "Drawn once: films are asked for many times."
    w = World(people=12, cameras=2, seed=5, layout='disjoint')
    w.tracklets = cache(w.tracklets)
    return w


def content(root):
    return {f.relative_to(root).as_posix(): f.read_bytes()
            for f in sorted(root.rglob('*')) if f.is_file()}


def drawn(world, length=3, size=(32, 16)):
    "`{(person, camera): (pictures, frames)}` of all splits."
    out = {}
    for k in world.split:
        try: s = world.tracklets(k, length, 1, size)
        except ValueError: continue
        for t in set(s.tids):
            part = s[s.tids == t]
            out[part.pids[0], part.camids[0]] = part.images, part.frames
    return out


def same_films(s, films):
    for key in set(zip(s.pids, s.camids)):
        part = s[(s.pids == key[0]) & (s.camids == key[1])]
        images, _ = films[key[0]-1, key[1]]
        assert (part.load((32, 16)).images == images).all()


def test_prid_round_trip(tmp_path, world):
    films = drawn(world)
    count = Counter(p for p, _ in films)
    both = [p+1 for p, n in count.items() if n == 2]
    assert 1 < len(both) < len(count)
    out = write_prid2011(world, tmp_path/'p', 3, (32, 16))
    s = prid2011(out, min_frames=3, verify=True)
    check_trial(s, both)
    assert len(s.train.dropped) == len(count)-len(both)
    for part in s.values():
        same_films(part, films)
        assert set(part.frames) == {1, 2, 3}
    assert len(list(out.rglob('*.png'))) == 3*len(films)
    assert content(out) == content(write_prid2011(world, tmp_path/'q', 3, (32, 16)))


def test_prid_of_many_people_shares_all_numbers(tmp_path, world, monkeypatch):
    tracklets = world.tracklets
    def far(*args):
        s = tracklets(*args)
        return replace(s, pids=s.pids+400)
    monkeypatch.setattr(world, 'tracklets', far)
    s = prid2011(write_prid2011(world, tmp_path/'p', 3, (32, 16)), min_frames=3)
    assert min(s.train.pids) > 400 and len(s.query)
    (tmp_path/'p'/'reidlit.json').unlink()  # Now it reads like the real set
    with pytest.raises(DataError, match='0 people have 3 frames'):
        prid2011(tmp_path/'p', min_frames=3)


def test_ilids_round_trip(tmp_path, world, caplog):
    films = drawn(world)
    count = Counter(p for p, _ in films)
    both = [p+1 for p, n in count.items() if n == 2]
    with caplog.at_level(logging.WARNING, 'reidlit'):
        out = write_ilids_vid(world, tmp_path/'i', 3, (32, 16))
    assert f'write_ilids_vid: dropped {len(count)-len(both)} x person seen' in caplog.text
    halves = set()
    for t in range(10):
        s = ilids_vid(out, t, verify=True)
        check_trial(s, both)
        halves.add(tuple(sorted(set(s.query.pids))))
    assert len(halves) > 3 and not s.train.dropped
    for part in s.values():
        same_films(part, films)
        for p, c, f in zip(part.pids, part.camids, part.frames):
            assert f in films[p-1, c][1]
    assert content(out) == content(write_ilids_vid(world, tmp_path/'j', 3, (32, 16)))


@pytest.mark.parametrize('write', [write_prid2011, write_ilids_vid])
def test_writers_refuse(tmp_path, world, write, monkeypatch):
    for n in (1, 3):
        with pytest.raises(ValueError, match=f'a world with {n} cameras: expected 2'):
            write(World(people=10, cameras=n), tmp_path/'o')
    with pytest.raises(ValueError, match='nobody is well in view'):
        write(world, tmp_path/'o', length=5000)
    assert not list(tmp_path.iterdir())
    write(world, tmp_path/'o', 3, (32, 16))
    with pytest.raises(DataError, match='not empty; expected overwrite=True'):
        write(world, tmp_path/'o', 3, (32, 16))
    write(world, tmp_path/'o', 3, (32, 16), overwrite=True)
    assert [f.name for f in tmp_path.iterdir()] == ['o']
    tracklets = world.tracklets
    def far(*args):
        s = tracklets(*args)
        return replace(s, pids=s.pids+9999)
    monkeypatch.setattr(world, 'tracklets', far)
    with pytest.raises(ValueError, match=r'person 1\d{4}: the layout has 999\d? at most'):
        write(world, tmp_path/'far', 3, (32, 16))


def test_ilids_names_have_five_digits(tmp_path, world, monkeypatch):
    tracklets = world.tracklets
    def late(*args):
        s = tracklets(*args)
        return replace(s, frames=s.frames+100_000)
    monkeypatch.setattr(world, 'tracklets', late)
    with pytest.raises(ValueError, match=r'frame 100\d{3}: the layout has 99999 at most'):
        write_ilids_vid(world, tmp_path/'o', 3, (32, 16))


def test_by_name(tmp_path):
    two = {1: 27, 2: 27}
    trees = dict(prid2011=prid_tree(tmp_path/'p', two, two), ilids_vid=ilids_tree(tmp_path/'i'))
    for name, root in trees.items():
        assert name in READERS and name in WRITERS and name in TRACKLETS
        d = open_data(name, root)
        assert d.tracklets and d.kind == 'real' and set(d.query.camids) == {0}
        assert len(read_sources([f'{name}={root}'])[name]) == len(d.train)
