"Readers of VIPeR, WARD, DukeMTMC-reID and CUHK03: layouts, trials, and what is broken."
import json
import logging
import sys

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from reidlit.core import DataError
from reidlit.data.readers import cuhk03 as cuhk03_reader
from reidlit.data.readers.cuhk03 import cuhk03, extract_cuhk03
from reidlit.data.readers.viper import dukemtmc, trial_mask, viper, ward


def picture(path, seed=0, size=(6, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(x).save(path)
    return path


def broken(path):
    picture(path, size=(32, 64))
    path.write_bytes(path.read_bytes()[:200])
    return path


# Trials

@pytest.mark.parametrize('people, n', [(2, 1), (7, 3), (632, 316), (1467, 100)])
def test_trial_mask(people, n):
    r = np.random.default_rng(people)
    pids = r.integers(0, 9999, people).astype(np.int64)
    who = np.unique(pids)
    n = min(n, len(who)-1)
    pids = r.permutation(np.repeat(who, 3))
    m = trial_mask(pids, n, 0, 'x', 4)
    assert len(set(pids[m])) == n and not set(pids[m]) & set(pids[~m])
    order = r.permutation(len(pids))
    assert (trial_mask(pids[order], n, 0, 'x', 4) == m[order]).all()


def test_trial_mask_refuses():
    for n in (0, -1, 2, 3):
        with pytest.raises(ValueError, match=f'n={n}: expected 1 to 1, of 2'):
            trial_mask(np.array([4, 4, 9]), n, 0)


def test_trials_differ_by_each_key():
    "Other trials, seeds and sets draw other people."
    pids = np.arange(632)
    masks = [trial_mask(pids, 316, *k) for k in
             ((0, 'viper', 0), (0, 'viper', 1), (1, 'viper', 0), (0, 'ward', 0))]
    assert all(150 < (a != b).sum() < 480 for i, a in enumerate(masks) for b in masks[:i])


# VIPeR

def viper_tree(root, people=7):
    for p in range(people):
        picture(root/'cam_a'/f'{p:03d}_0.bmp', p)
        picture(root/'cam_b'/f'{p:03d}_{90+p}.bmp', p)
    return root


def test_viper(tmp_path):
    root = viper_tree(tmp_path)
    for trial in range(5):
        s, b = viper(root, trial), viper(root, trial, flip=True)
        assert [len(set(p.pids)) for p in s.values()] == [3, 4, 4]
        assert set(s.train.pids) | set(s.query.pids) == set(range(7))
        assert set(s.train.camids) == {0, 1}
        assert s.query.pids.tolist() == s.gallery.pids.tolist()
        assert [p.parent.name for p in s.query.images] == ['cam_a']*4
        assert b.query.images == s.gallery.images and b.gallery.images == s.query.images
        assert b.train.images == s.train.images
        assert not (s.query.junk.any() or s.gallery.distractor.any())


def test_viper_drops_and_says_so(tmp_path, caplog):
    root = viper_tree(tmp_path)
    picture(root/'cam_a'/'600_0.bmp')
    (root/'cam_a'/'Thumbs.db').touch()
    picture(root/'cam_b'/'front.bmp')
    with caplog.at_level(logging.WARNING, 'reidlit'):
        s = viper(root)
    assert {k: len(v) for k, v in s.train.dropped.reasons.items()} == {
        'not a picture': 1, 'name not understood': 1, 'seen by one camera only': 1}
    assert len(caplog.records) == 1 and not s.query.dropped
    assert 600 not in set(s.train.pids) | set(s.query.pids)


def test_viper_broken(tmp_path):
    with pytest.raises(DataError, match='nowhere: no such folder'):
        viper(tmp_path/'nowhere')
    (tmp_path/'cam_a').mkdir()
    with pytest.raises(DataError, match='has no cam_b'):
        viper(tmp_path)
    (tmp_path/'cam_b').mkdir()
    with pytest.raises(DataError, match='nothing to read'):
        viper(tmp_path)
    picture(tmp_path/'cam_a'/'000_0.bmp')
    picture(tmp_path/'cam_b'/'001_0.bmp')
    with pytest.raises(DataError, match='dropped 2 x seen by one camera only'):
        viper(tmp_path)
    picture(tmp_path/'cam_b'/'000_0.bmp')
    with pytest.raises(ValueError, match='of 1'):
        viper(tmp_path)


def test_verify_leaves_broken_pictures_out(tmp_path):
    root = viper_tree(tmp_path)
    bad = viper(root).gallery.images[0]
    broken(bad)
    assert len(viper(root).gallery) == 4
    s = viper(root, verify=True)
    assert len(s.gallery) == 3 and list(s.gallery.dropped.reasons) == ['unreadable picture']


# WARD

def ward_tree(root, name='{p:04d}{c:04d}{k:05d}.png', people=6, cameras=3):
    for p in range(1, people+1):
        for c in range(1, cameras+1):
            for k in range(2):
                picture(root/name.format(p=p, c=c, k=k), p)
    return root


@pytest.mark.parametrize('name, pattern', [
    ('{p:04d}{c:04d}{k:05d}.png', None), ('deep/{p:04d}{c:04d}{k:04d}.jpg', None),
    ('{c}/{p}_{k}.bmp', r'(?P<cam>\d)/(?P<pid>\d+)_(?P<frame>\d)\.bmp'),
    ('c{c}/{p}/x{k}.png', r'c(?P<cam>\d)/(?P<pid>\d+)/.*')])
def test_ward(tmp_path, name, pattern):
    kw = {} if pattern is None else dict(pattern=pattern)
    s = ward(ward_tree(tmp_path, name), **kw)
    assert [len(p) for p in s.values()] == [18, 18, 18]
    assert set(s.train.pids) | set(s.query.pids) == set(range(1, 7))
    assert s.query.images == s.gallery.images and set(s.query.camids) == {0, 1, 2}
    assert (s.train.frames is None) == ('x' in name)
    two = ward(tmp_path, pair=(2, 1), **kw)
    assert [len(p) for p in two.values()] == [12, 6, 6]
    assert set(two.query.camids) == {2} and set(two.gallery.camids) == {1}
    assert set(two.train.pids) == set(s.train.pids)


def test_ward_refuses(tmp_path):
    ward_tree(tmp_path)
    for pair in ((0,), (0, 5), (0, 1, 2)):
        with pytest.raises(ValueError, match='expected two of'):
            ward(tmp_path, pair=pair)
    with pytest.raises(ValueError, match=r"no group \['cam', 'pid'\]"):
        ward(tmp_path, pattern='.*')
    with pytest.raises(DataError, match='nothing to read'):
        ward(tmp_path, pattern=r'(?P<pid>\d)(?P<cam>\d)')
    with pytest.raises(DataError, match='no such folder'):
        ward(tmp_path/'none')


# DukeMTMC-reID

def test_dukemtmc(tmp_path):
    for k, names in (('bounding_box_train', ['0001_c1_f0000010.jpg', '0001_c8_f0246985.jpg']),
                     ('query', ['0005_c2_f0046985.jpg']),
                     ('bounding_box_test', ['0005_c3_f0000001.jpg', '7139_c4_f0000001.jpg'])):
        for n in names:
            picture(tmp_path/k/n)
    picture(tmp_path/'query'/'0005_c2s1_000451_03.jpg')
    s = dukemtmc(tmp_path, verify=True)
    assert s.train.camids.tolist() == [0, 7] and s.train.frames.tolist() == [10, 246985]
    assert s.gallery.pids.tolist() == [5, 7139]
    assert not s.gallery.junk.any() and not s.gallery.distractor.any()
    assert str(s.query.dropped).startswith('1 x name not understood')
    for f in (tmp_path/'bounding_box_train').iterdir():
        f.unlink()
    with pytest.raises(DataError, match='bounding_box_train: nothing to read'):
        dukemtmc(tmp_path)


# CUHK03

def cell(mat, grid):
    "A MATLAB cell array as version 7.3 stores it."
    refs = mat.require_group('#refs#')

    def put(x):
        if isinstance(x, str):
            d = refs.create_dataset(str(len(refs)), data=np.zeros((0,), 'u1'))
        elif x is None:
            d = refs.create_dataset(str(len(refs)), data=np.zeros(2, 'u8'))
            d.attrs['MATLAB_empty'] = 1
        else:
            d = refs.create_dataset(str(len(refs)), data=np.asarray(x).T)
        return d.ref
    return np.array([[put(x) for x in row] for row in grid], h5py.ref_dtype)


def shot(pair, person, k):
    "A picture of any size that tells who it is."
    r = np.random.default_rng((pair, person, k))
    return r.integers(0, 256, (12+person, 6+k, 3), np.uint8)


def fake_mat(path, people=(3, 2, 2, 1, 1), keep=.7, tests=(((1, 1), (2, 2)), ((5, 1), (1, 3))),
             change=None):
    "A small cuhk-03.mat; returns what is in its cells by name and kind of boxes."
    rng, held = np.random.default_rng(0), {'labeled': {}, 'detected': {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, 'w', userblock_size=512) as mat:
        for boxes, known in held.items():
            pairs = []
            for a, n in enumerate(people, 1):
                rows = []
                for p in range(1, n+1):
                    row = [shot(a, p, k) if rng.random() < keep or k in (1, 6)
                           else (None, '')[k % 2] for k in range(1, 11)]
                    known |= {f'{a}_{p:03d}_{1+(k > 5)}_{k:02d}.png': x
                              for k, x in enumerate(row, 1) if isinstance(x, np.ndarray)}
                    if change:
                        change(boxes, a, p, row)
                    rows.append(row)
                pairs.append([cell(mat, rows)])
            mat[boxes] = cell(mat, pairs).T
        mat['testsets'] = cell(mat, [[np.float64(t)] for t in tests]).T
    return held


def fake_lists(path, names, **changes):
    "The new protocol: pairs 1 and 2 train, the others test."
    person = np.array([int(o[0]+o[2:5]) for o in names])
    first = np.array([i == 0 or names[i-1][:7] != o[:7] for i, o in enumerate(names)])
    test = person >= 3000
    one = lambda m: np.flatnonzero(m)[:, None]+1  # noqa: E731
    mat = dict(filelist=np.array(names, object)[:, None], labels=person[:, None],
               camId=np.array([[int(o[6])] for o in names]), train_idx=one(~test),
               query_idx=one(test & first), gallery_idx=one(test & ~first))
    savemat(path, {k: v for k, v in {**mat, **changes}.items() if v is not None})


LABELED = 'cuhk03_new_protocol_config_labeled.mat'


@pytest.fixture
def tree(tmp_path):
    held = fake_mat(tmp_path/'cuhk-03.mat')
    fake_lists(tmp_path/LABELED, sorted(held['labeled']))
    return tmp_path, held


@pytest.mark.parametrize('where', ['cuhk-03.mat', 'cuhk03_release/cuhk-03.mat'])
@pytest.mark.parametrize('boxes', ['labeled', 'detected'])
def test_extraction(tmp_path, where, boxes):
    "Every cell that is not empty, pixel for pixel, under its own number."
    held = fake_mat(tmp_path/where)[boxes]
    folder = extract_cuhk03(tmp_path, boxes)
    assert folder == tmp_path/f'images_{boxes}'
    found = {p.name: np.asarray(Image.open(p)) for p in folder.glob('*.png')}
    assert found.keys() == held.keys()
    assert all((found[k] == held[k]).all() for k in held)
    note = json.loads((folder/'reidlit.json').read_text())
    assert note['pictures'] == len(held) and note['testsets'][1] == [[5, 1], [1, 3]]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_classic(tree):
    root, held = tree
    s = cuhk03(root, 'classic')
    assert set(s.query.pids) == {1001, 2002} and s.query.images == s.gallery.images
    assert set(s.train.pids) == {1002, 1003, 2001, 3001, 3002, 4001, 5001}
    assert len(s.train)+len(s.query) == len(held['labeled'])
    assert [int(p.name[6])-1 for p in s.query.images] == s.query.camids.tolist()
    ten = cuhk03(root, 'classic', 'detected', 1, cameras=10)
    assert set(ten.query.camids) == {0, 1, 8, 9}
    assert len(ten.train)+len(ten.query) == len(held['detected'])
    for k in (-1, 2):
        with pytest.raises(ValueError, match=f'split={k}: expected 0 to 1'):
            cuhk03(root, 'classic', split=k)


def test_classic_without_the_big_file(tree):
    "The note in the folder is enough; without it, the file is asked for."
    root, _ = tree
    first = cuhk03(root, 'classic')
    (root/'cuhk-03.mat').rename(root/'elsewhere')
    assert str(cuhk03(root, 'classic')) == str(first)
    (root/'images_labeled'/'reidlit.json').unlink()
    with pytest.raises(DataError, match='cuhk-03.mat: no such file'):
        cuhk03(root, 'classic')
    (root/'elsewhere').rename(root/'cuhk-03.mat')
    assert str(cuhk03(root, 'classic')) == str(first)


def test_new(tree):
    root, held = tree
    s = cuhk03(root, verify=True)
    assert sum(map(len, s.values())) == len(held['labeled']) and not s.train.dropped
    assert set(s.train.pids) == {1001, 1002, 1003, 2001, 2002}
    assert sorted(zip(s.query.pids, s.query.camids)) == [
        (p, c) for p in (3001, 3002, 4001, 5001) for c in (0, 1)]
    assert set(cuhk03(root, cameras=10).gallery.camids) <= set(range(4, 10))
    held = cuhk03(root, val=2)
    assert set(held.val.pids) | set(held.train.pids) == set(s.train.pids)
    assert len(set(held.val.pids)) == 2 and not set(held.val.pids) & set(held.train.pids)
    assert held.val.images == cuhk03(root, val=2).val.images
    with pytest.raises(ValueError, match='n=5: expected 1 to 4'):
        cuhk03(root, val=5)


@pytest.mark.parametrize('changes, message', [
    (dict(query_idx=[[0]]), 'query_idx holds 0; expected 1 to'),
    (dict(gallery_idx=[[10_000]]), 'gallery_idx holds 10000; expected 1 to'),
    (dict(camId=None), "KeyError: 'camId'"),
    (dict(camId=[[1], [2]]), 'camId has 2 rows; expected'),
    (dict(labels=[[1]]), 'labels has 1 rows; expected'),
    (dict(train_idx=np.zeros((0, 1))), 'nothing to read')])
def test_new_lists_that_do_not_fit(tree, changes, message):
    root, held = tree
    fake_lists(root/LABELED, sorted(held['labeled']), **changes)
    with pytest.raises(DataError, match=message):
        cuhk03(root)


def test_new_lists_that_disagree(tree):
    root, held = tree
    names = sorted(held['labeled'])
    n = len(names)
    for labels in (np.ones((n, 1)), np.arange(1, n+1)[:, None]):
        fake_lists(root/LABELED, names, labels=labels)
        with pytest.raises(DataError, match='disagree on who is who'):
            cuhk03(root)
    fake_lists(root/LABELED, names, camId=np.full((n, 1), 3))
    with pytest.raises(DataError, match='camId holds 3; expected 1 to 2'):
        cuhk03(root)
    fake_lists(root/LABELED, names[:-1])
    s = cuhk03(root)
    assert s.train.dropped.reasons == {'not in the protocol': [names[-1]]}
    fake_lists(root/LABELED, [*names, '9_001_1_01.png'])
    with pytest.raises(DataError, match=rf'has no 9_001_1_01.png \(1 of {n+1} are missing'):
        cuhk03(root)
    (root/LABELED).write_bytes((root/LABELED).read_bytes()[:300])
    with pytest.raises(DataError, match=f'{LABELED}: not a readable .mat file'):
        cuhk03(root)


@pytest.mark.parametrize('kw, message', [
    (dict(protocol='old'), "protocol='old'"), (dict(boxes='drawn'), "boxes='drawn'"),
    (dict(cameras=6), 'cameras=6'), (dict(split=1), 'split=1: new has one')])
def test_cuhk03_arguments(tmp_path, kw, message):
    with pytest.raises(ValueError, match=message):
        cuhk03(tmp_path, **kw)


def test_test_person_out_of_range(tmp_path):
    fake_mat(tmp_path/'cuhk-03.mat', tests=[[(1, 1), (3, 900)]])
    with pytest.raises(DataError, match='tests person 900 of camera pair 3, who has no picture'):
        cuhk03(tmp_path, 'classic')


def leftovers(root):
    return [p.name for p in root.iterdir() if p.is_dir()]


@pytest.mark.parametrize('share', [.02, .3, .7, .98])
def test_truncated_file(tmp_path, share):
    f = tmp_path/'cuhk-03.mat'
    fake_mat(f)
    f.write_bytes(f.read_bytes()[:int(f.stat().st_size*share)])
    with pytest.raises(DataError, match='cuhk-03.mat: not readable'):
        extract_cuhk03(tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize('write, message', [
    (lambda f: f.write_bytes(b'no file of this kind'*50), 'not readable'),
    (lambda f: savemat(f, dict(labeled=[1])), 'not readable'),
    (lambda f: h5py.File(f, 'w').close(), 'not readable.*MATLAB 7.3'),
    (lambda f: None, 'no such file')])
def test_not_the_right_file(tmp_path, write, message):
    write(tmp_path/'cuhk-03.mat')
    with pytest.raises(DataError, match=f'cuhk-03.mat: {message}'):
        cuhk03(tmp_path, 'classic')
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize('x, message', [
    (np.zeros((5, 4), np.uint8), r'labeled 2_001_1_03.png: uint8 \(4, 5\)'),
    (np.zeros((5, 4, 3)), 'labeled 2_001_1_03.png: float64'),
    (np.zeros((5, 4, 4), np.uint8), r'uint8 \(4, 4, 5\); expected uint8 \(3, W, H\)')])
def test_a_cell_that_is_no_picture(tmp_path, x, message):
    def change(boxes, pair, person, row):
        if (boxes, pair, person) == ('labeled', 2, 1):
            row[2] = x
    fake_mat(tmp_path/'cuhk-03.mat', change=change)
    with pytest.raises(DataError, match=message):
        extract_cuhk03(tmp_path)
    assert leftovers(tmp_path) == []
    assert extract_cuhk03(tmp_path, 'detected').is_dir()


def test_all_cells_empty(tmp_path):
    def change(boxes, pair, person, row):
        row[:] = [None]*10
    fake_mat(tmp_path/'cuhk-03.mat', change=change)
    with pytest.raises(DataError, match='labeled: every cell is empty'):
        extract_cuhk03(tmp_path)
    assert leftovers(tmp_path) == []


def test_a_person_with_one_view(tmp_path):
    def change(boxes, pair, person, row):
        if (pair, person) == (1, 1):
            row[5:] = [None]*5
    fake_mat(tmp_path/'cuhk-03.mat', change=change)
    q = cuhk03(tmp_path, 'classic').query
    assert set(q.camids[q.pids == 1001]) == {0}


def test_stopped_extraction_leaves_nothing(tree, monkeypatch):
    "A stop in the middle is no folder; a later run makes all of it."
    root, held = tree
    save, n = Image.Image.save, 0

    def stop(self, *args, **kw):
        nonlocal n
        n += 1
        if n > 5:
            raise KeyboardInterrupt
        return save(self, *args, **kw)
    monkeypatch.setattr(Image.Image, 'save', stop)
    with pytest.raises(KeyboardInterrupt):
        cuhk03(root)
    assert leftovers(root) == []
    monkeypatch.undo()
    assert sum(map(len, cuhk03(root).values())) == len(held['labeled'])


def test_a_killed_run_is_not_taken_for_complete(tree):
    "What a killed process leaves has another name."
    root, held = tree
    picture(root/'images_labeled.partial-abc'/'1_001_1_01.png')
    assert sum(map(len, cuhk03(root).values())) == len(held['labeled'])


def test_two_runs_at_once(tree, monkeypatch):
    "The slower one takes the folder that the faster one made."
    root, held = tree
    cells = cuhk03_reader._cells

    def slow(path, boxes):
        monkeypatch.setattr(cuhk03_reader, '_cells', cells)
        extract_cuhk03(root, boxes)
        yield from cells(path, boxes)
    monkeypatch.setattr(cuhk03_reader, '_cells', slow)
    folder = extract_cuhk03(root)
    assert len(list(folder.glob('*.png'))) == len(held['labeled'])
    assert leftovers(root) == ['images_labeled']


def test_without_h5py(tree, monkeypatch):
    root, _ = tree
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(ImportError, match='cuhk-03.mat: reading it needs h5py; pip install h5py'):
        cuhk03(root)
    monkeypatch.undo()
    cuhk03(root)
    monkeypatch.setitem(sys.modules, 'h5py', None)
    assert len(cuhk03(root, 'classic').query) and len(cuhk03(root).query)


def test_strange_files_in_the_folder(tree):
    root, held = tree
    folder = extract_cuhk03(root)
    (folder/'Thumbs.db').touch()
    picture(folder/'6_1.png')
    s = cuhk03(root)
    assert sorted(s.train.dropped.reasons) == ['name not understood', 'not a picture']
    for f in folder.glob('*.png'):
        f.unlink()
    with pytest.raises(DataError, match='images_labeled: nothing to read'):
        cuhk03(root)


def test_order_is_that_of_the_lists(tree):
    "Rows of a part come in the order of the protocol's list."
    root, held = tree
    names = sorted(held['labeled'])
    fake_lists(root/LABELED, names, query_idx=[[len(names)], [len(names)-1]])
    assert [p.name for p in cuhk03(root).query.images] == [names[-1], names[-2]]
