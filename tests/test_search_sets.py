"Person search: PRW, CUHK-SYSU and CrowdHuman as they are on disk, what is broken, and the scores."
import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat
from sklearn.metrics import average_precision_score

from reidlit.core import DataError
from reidlit.data.readers.crowdhuman import crowdhuman, write_crowdhuman
from reidlit.data.readers.search import (SearchSet, as_search, cuhk_sysu, one_each, prw, write_cuhk_sysu,
                                         write_prw)
from reidlit.data.readers.wildtrack import FrameSet
from reidlit.data.sets import FRAME_READERS, WRITERS
from reidlit.data.world import World
from reidlit.data.writers import mat_cells, mat_struct
from reidlit.metrics.search import iou_needed, search_scores, top_boxes

TIMES = range(0, 240, 40)


@pytest.fixture(scope='module')
def world():
    return World(people=20, cameras=3, seed=6, crowd=10, size=(160, 90))


@pytest.fixture(scope='module')
def prw_root(world, tmp_path_factory):
    return write_prw(world, tmp_path_factory.mktemp('prw')/'p', TIMES)


@pytest.fixture(scope='module')
def cuhk_root(world, tmp_path_factory):
    return write_cuhk_sysu(world, tmp_path_factory.mktemp('cuhk')/'c', TIMES, (4, 100))


@pytest.fixture
def tree(prw_root, tmp_path):
    return Path(shutil.copytree(prw_root, tmp_path/'tree'))


@pytest.fixture
def cuhk_tree(cuhk_root, tmp_path):
    return Path(shutil.copytree(cuhk_root, tmp_path/'tree'))


# The written files, opened in the way of the people who published them

def test_prw_files_are_as_published(world, prw_root):
    names = loadmat(prw_root/'frame_test.mat')['img_index_test']
    assert names.shape[1] == 1 and names[0][0][0].startswith('c1s1_')
    seen = 0
    for name, in names:
        rows = loadmat(prw_root/'annotations'/f'{name[0]}.jpg.mat')['box_new']
        c, t = int(name[0][1])-1, int(name[0][5:])
        b = world.boxes(c, t, min_visible=.3)
        known = np.isin(b.pids, world.split['test'])
        assert rows[:, 0].tolist() == np.where(known, b.pids+1, -2).tolist()
        np.testing.assert_allclose(rows[:, 1:3]+rows[:, 3:], b.clipped[:, 2:], atol=1e-3)
        assert Image.open(prw_root/'frames'/f'{name[0]}.jpg').size == world.size
        seen += len(rows)
    assert seen == len(prw(prw_root).test.row)
    ids = [loadmat(prw_root/f'ID_{k}.mat')[v].ravel() for k, v in (('train', 'ID_train'), ('test', 'ID_test2'))]
    assert not set(ids[0]) & set(ids[1])


def test_prw_queries_are_as_published(prw_root):
    raw = (prw_root/'query_info.txt').read_bytes()
    lines = raw.splitlines(keepends=True)
    assert all(line.endswith(b'\r\n') for line in lines)
    q = prw(prw_root).queries
    for line, i, box, pid in zip(lines, q.row, q.xyxy, q.pids):
        words = str(line, 'utf-8').split(' ')
        x, y, w, h = map(float, words[1:5])
        assert int(words[0]) == pid and words[5][:-2]+'.jpg' == Path(q.images[i]).name
        np.testing.assert_allclose([x, y, x+w, y+h], box, atol=1e-3)
        crop = Image.open(prw_root/'query_box'/f'{pid:03d}_{Path(q.images[i]).stem}.jpg')
        assert abs(crop.size[0]-w) <= 1.01 and abs(crop.size[1]-h) <= 1.01
    assert len(list((prw_root/'query_box').iterdir())) == len(lines)


def test_cuhk_files_are_as_published(cuhk_root):
    note = cuhk_root/'annotation'
    boxes = {}
    for name, n, b in loadmat(note/'Images.mat')['Img'].squeeze():
        x = np.asarray([o[0] for o in b[0]]).reshape(-1, 4)
        assert len(x) == n[0, 0] > 0 and (x[:, 2:] > 0).all()
        boxes[str(name[0])] = x.astype(np.int32)
    pool = [str(a[0]) for a in loadmat(note/'pool.mat')['pool'].squeeze()]
    assert set(pool) < set(boxes)

    def there(name, box): return (boxes[name] == box.squeeze().astype(np.int32)).all(1).any()
    train = loadmat(note/'test/train_test/Train.mat')['Train'].squeeze()
    for item in train:
        for name, box, _ in item[0, 0][2].squeeze():
            assert str(name[0]) not in pool and there(str(name[0]), box)
    for size in (4, 100):
        tests = loadmat(note/f'test/train_test/TestG{size}.mat')[f'TestG{size}'].squeeze()
        for item in tests:
            own, box = str(item['Query'][0, 0][0][0]), item['Query'][0, 0][1]
            assert there(own, box) and str(item['Query'][0, 0][3][0]).startswith('p')
            ended, names = False, []
            for name, box, _ in item['Gallery'].squeeze():
                gt = box[0].astype(np.int32)
                assert not (ended and gt.size)
                ended = ended or not gt.size
                assert not gt.size or there(str(name[0]), box)
                names.append(str(name[0]))
            assert own not in names and len(set(names)) == len(names) and set(names) <= set(pool)
            assert len(names) >= min(size, len(pool)-1)
    persons = loadmat(note/'Person.mat')['Person']
    assert persons.shape == (1, len(train)+len(tests))
    assert all(p[2].size == p[1][0, 0] > 1 for p in persons[0])


def test_round_trips_agree(prw_root, cuhk_root, world):
    p, c = prw(prw_root, verify=True), cuhk_sysu(cuhk_root, verify=True)
    for a, b in ((p.train, c.train), (p.test, c.test)):
        assert a.row.tolist() == b.row.tolist()
        np.testing.assert_allclose(a.xyxy, b.xyxy, atol=.51)
        for i in range(len(a)): assert (a.read(i) == b.read(i)).all()
        assert (b.pids[b.unnamed] == -2).all() and not a.dropped and not b.dropped
    assert p.test.pids.tolist() == c.test.pids.tolist()
    assert c.test.camids is None and c.test.frames is None
    assert set(p.train.frames) | set(p.test.frames) == set(TIMES)
    named = set(p.test.pids[~p.test.unnamed]-1)
    assert named <= set(world.split['test']) and not named & set(world.split['train'])
    assert set(c.queries.pids) == set(p.queries.pids) and len(c.queries.pids) == len(set(c.queries.pids))
    assert p.answers().any(1).all() and c.answers().any(1).all()


def test_galleries(prw_root, cuhk_root):
    p, c = prw(prw_root), cuhk_sysu(cuhk_root)
    assert (p.gallery.sum(1) == len(p.test)-1).all()
    apart = prw(prw_root, same_camera=False)
    cams = apart.test.camids
    for g, i in zip(apart.gallery, apart.queries.row):
        assert g.tolist() == (cams != cams[i]).tolist()
    few = cuhk_sysu(cuhk_root, 4)
    assert (few.answers() == c.answers()).all() and (few.gallery <= c.gallery).all()
    assert (few.gallery.sum(1) == np.maximum(4, few.answers().sum(1))).all()


def test_same_bytes_and_overwrite(world, tmp_path):
    for write in (write_prw, write_cuhk_sysu, write_crowdhuman):
        a, b = (write(world, tmp_path/f'{write.__name__}{k}', (0, 60)) for k in 'ab')
        files = sorted(p.relative_to(a) for p in a.rglob('*') if p.is_file())
        assert files and files == sorted(p.relative_to(b) for p in b.rglob('*') if p.is_file())
        for f in files: assert (a/f).read_bytes() == (b/f).read_bytes(), f
        with pytest.raises(DataError, match='not empty'): write(world, a, (0, 60))
        write(world, a, (0, 60), overwrite=True)


def test_writers_refuse(world, tmp_path):
    for write in (write_prw, write_cuhk_sysu, write_crowdhuman):
        with pytest.raises(ValueError, match=r'times=\[3\]'): write(world, tmp_path/'o', [3])
        assert not (tmp_path/'o').exists() and not (tmp_path/'o.partial').exists()
    with pytest.raises(ValueError, match="test='exam'"): write_prw(world, tmp_path/'o', (0, 5), test='exam')
    lonely = World(people=10, cameras=1, seed=0, crowd=1, size=(96, 64))
    with pytest.raises(ValueError, match='nobody is'): write_prw(lonely, tmp_path/'o', (0, 900))
    assert not (tmp_path/'o').exists()


def test_by_name(tmp_path):
    from command import run
    for name in ('prw', 'cuhk_sysu'):
        assert name in FRAME_READERS and name in WRITERS
        r = run('world', tmp_path/name, '--layout', name, '--people', 20, '--cameras', 2, '--moments', 4)
        assert r.returncode == 0, r.stderr
        assert f'{name} train: 4 pictures' in r.stdout and 'queries, each in 3 pictures' in r.stdout


# PRW: what is missing, broken or odd

def note_of(root, part, k=0):
    "The frame and the annotation of picture `k`."
    s = getattr(prw(root), part)
    f = Path(s.images[k])
    return f, root/'annotations'/f'{f.name}.mat'


def reasons(s): return {k: len(v) for k, v in s.dropped.reasons.items()}


@pytest.mark.parametrize('gone', ['frames', 'annotations', 'frame_train.mat', 'frame_test.mat', 'query_info.txt'])
def test_prw_parts(tree, gone):
    shutil.rmtree(tree/gone) if (tree/gone).is_dir() else (tree/gone).unlink()
    with pytest.raises(DataError, match=f'has no {gone}'): prw(tree)


def test_prw_missing_files(tree, caplog):
    whole = prw(tree)
    frame, _ = note_of(tree, 'test', 0)
    frame.unlink()
    note_of(tree, 'test', 0)[1].unlink()
    Image.new('RGB', (8, 8)).save(tree/'frames'/'c1s1_999999.jpg')
    with caplog.at_level(logging.WARNING, 'reidlit'): s = prw(tree)
    assert len(s.test) == len(whole.test)-2 and 'c1s1_999999' not in str(s.test.images)
    assert reasons(s.test) == {'picture without annotation': 1, 'picture without a file': 1}
    gone = np.isin(whole.queries.row, [0, 1]).sum()
    assert gone and reasons(s.queries) == {'query without a picture': gone}
    assert s.gallery.shape == (len(whole.gallery)-gone, len(whole.test)-2)
    assert 'prw test: dropped' in caplog.text and 'prw queries: dropped' in caplog.text


def test_prw_broken_pictures(tree):
    whole = prw(tree)
    f = Path(whole.test.images[1])
    data = f.read_bytes()
    f.write_bytes(b'')
    assert reasons(prw(tree).test) == {'unreadable picture': 1}
    f.write_bytes(data[:len(data)//2])
    assert not prw(tree).test.dropped
    s = prw(tree, verify=True)
    assert reasons(s.test) == {'unreadable picture': 1} and len(s.test) == len(whole.test)-1
    assert set(s.queries.row) <= set(range(len(s.test))) and s.gallery.shape[1] == len(s.test)


@pytest.mark.parametrize('rows, message', [
    ([[1, 2, 3, 4]], r'holds .*\(1, 4\).*expected box_new'), ([['a']], 'holds .*expected box_new'),
    ([[0, 1, 1, 5, 5]], 'row 1 is'), ([[-1, 1, 1, 5, 5]], 'row 1 is'), ([[1.5, 1, 1, 5, 5]], 'row 1 is'),
    ([[1, 1, 1, 5, 5], [2, 1, np.nan, 5, 5]], 'row 2 is'), ([[-2, 1, 1, np.inf, 5]], 'row 1 is'),
    ([[np.nan]*5], 'row 1 is')])
def test_prw_broken_annotation(tree, rows, message):
    _, note = note_of(tree, 'train')
    savemat(note, dict(box_new=rows))
    with pytest.raises(DataError, match=f'{note.name}: {message}'): prw(tree)


def test_prw_annotation_of_another_name(tree):
    _, note = note_of(tree, 'train')
    rows = loadmat(note)['box_new']
    for key in ('anno_file', 'anno_previous'):
        savemat(note, {key: rows[:2]})
        assert (prw(tree).train.row == 0).sum() == 2
    savemat(note, dict(box_new=rows, anno_previous=np.zeros((0, 5))))
    s = prw(tree)
    assert (s.train.row == 0).sum() == len(rows)
    savemat(note, dict(anything=rows))
    with pytest.raises(DataError, match='anything'): prw(tree)
    note.write_bytes(note.read_bytes()[:140])
    with pytest.raises(DataError, match='not a readable .mat file'): prw(tree)


def test_prw_boxes_at_the_border(tree):
    f, note = note_of(tree, 'train')
    w, h = Image.open(f).size
    savemat(note, dict(box_new=[[1, -5, -5, 20, 30], [2, w-4, h-6, 20, 30], [3, w, 1, 5, 5], [-2, -9, 1, 9, 5],
                                [4, 3, 3, 0, 9], [5, 3, 3, 9, -9], [6, 1, 1, 5, 5]]))
    s = prw(tree).train
    b = s.row == 0
    assert s.xyxy[b].tolist() == [[0, 0, 15, 25], [w-4, h-6, w, h], [1, 1, 6, 6]]
    assert s.cut[b].tolist() == [True, True, False] and s.pids[b].tolist() == [1, 2, 6]
    assert reasons(s) == {'box outside the picture': 2, 'box without area': 2}


def test_prw_frame_of_nobody(tree):
    _, note = note_of(tree, 'test')
    for empty in (np.zeros((0, 5)), np.zeros((0, 0))):
        savemat(note, dict(box_new=empty))
        s = prw(tree)
        assert 0 not in s.test.row and s.gallery[:, 0].any()


@pytest.mark.parametrize('names, message', [
    (mat_cells(['frame7']), 'nothing to read.*name not understood'), (mat_cells(['']), 'nothing to read'),
    (np.zeros((3, 1)), 'expected cells'), (mat_cells([1, 2]), 'nothing to read'), ('c1s1_000000', 'expected cells')])
def test_prw_broken_lists(tree, names, message):
    savemat(tree/'frame_train.mat', dict(img_index_train=names))
    with pytest.raises(DataError, match=f'frame_train.mat: .*{message}'): prw(tree)


def test_prw_lists_that_overlap(tree):
    names = loadmat(tree/'frame_test.mat')['img_index_test']
    old = loadmat(tree/'frame_train.mat')['img_index_train']
    both = mat_cells([str(n[0]) for n in [*old[:, 0], names[2, 0]]])
    savemat(tree/'frame_train.mat', dict(img_index_train=both))
    with pytest.raises(DataError, match=f'{names[2, 0][0]}.jpg is to train and to test'): prw(tree)


@pytest.mark.parametrize('line', ['7 1 2 3 c1s1_000120', '7 1 2 3 4 5 c1s1_000120', 'ann 1 2 3 4 c1s1_000120',
                                  '-2 1 2 3 4 c1s1_000120', '7 1 2 inf 4 c1s1_000120', '7.5 1 2 3 4 c1s1_000120'])
def test_prw_broken_queries(tree, line):
    f = tree/'query_info.txt'
    f.write_text(f.read_text()+'\n'+line+'\n')
    with pytest.raises(DataError, match=r'query_info.txt: line \d+ is'): prw(tree)


def test_prw_queries_left_out(tree):
    f, n = tree/'query_info.txt', len(prw(tree).queries.row)
    f.write_text(f.read_text()+'7 1 2 3 4 c9s1_000120\n7 900 2 3 4 c1s1_000120\n\n'
                 '999 1 2 30 40 c1s1_000120\n')
    s = prw(tree)
    assert reasons(s.queries) == {'query without a picture': 1, 'box outside the picture': 1}
    assert len(s.queries.row) == n+1 and not s.answers()[-1].any()
    f.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(DataError, match='query_info.txt: not readable'): prw(tree)
    f.write_text('')
    with pytest.raises(DataError, match='asks for nobody'): prw(tree)


def test_unfinished_write(tmp_path):
    (tmp_path/'p.partial').mkdir()
    for read in (prw, cuhk_sysu, crowdhuman):
        with pytest.raises(DataError, match='unfinished write p.partial'): read(tmp_path/'p')


# CUHK-SYSU

@pytest.mark.parametrize('gone', ['Image/SSM', 'annotation/Images.mat', 'annotation/pool.mat',
                                  'annotation/test/train_test/Train.mat'])
def test_cuhk_parts(cuhk_tree, gone):
    shutil.rmtree(cuhk_tree/gone) if (cuhk_tree/gone).is_dir() else (cuhk_tree/gone).unlink()
    with pytest.raises(DataError, match=f'has no {gone}'): cuhk_sysu(cuhk_tree)


def test_cuhk_sizes(cuhk_tree):
    with pytest.raises(DataError, match=r'TestG50.mat: no such file; expected a gallery of \[4, 100\]'):
        cuhk_sysu(cuhk_tree, 50)
    (cuhk_tree/'annotation'/'Person.mat').unlink() # no reader needs it
    assert cuhk_sysu(cuhk_tree, gallery=4)


def test_cuhk_missing_pictures(cuhk_tree):
    whole = cuhk_sysu(cuhk_tree)
    gone = [whole.queries.row[0], np.setdiff1d(range(len(whole.test)), whole.queries.row)[0]]
    for k in gone: Path(whole.test.images[k]).unlink()
    Path(whole.train.images[0]).write_bytes(b'no picture')
    s = cuhk_sysu(cuhk_tree)
    assert len(s.test) == len(whole.test)-2 and reasons(s.test) == {'picture without a file': 2}
    assert len(s.train) == len(whole.train)-1 and reasons(s.train) == {'unreadable picture': 1}
    left, there = ~np.isin(whole.queries.row, gone), np.setdiff1d(range(len(whole.test)), gone)
    assert left.sum() == len(s.queries.row) < len(left)
    assert (s.gallery == whole.gallery[left][:, there]).all()
    assert (s.answers() == whole.answers()[left][:, there]).all()


def edit(root, name, change):
    "A variable of a file, changed and written again."
    f = root/'annotation'/f'{name}.mat'
    key = {'Images': 'Img'}.get(f.stem, f.stem)
    savemat(f, {key: change(loadmat(f)[key])})


def test_cuhk_unknown_pictures(cuhk_tree):
    n = len(cuhk_sysu(cuhk_tree).test)
    edit(cuhk_tree, 'pool', lambda x: np.concatenate([x, mat_cells(['s999.jpg'])]))
    s = cuhk_sysu(cuhk_tree)
    assert reasons(s.test) == {'picture without annotation': 1} and len(s.test) == n
    edit(cuhk_tree, 'pool', lambda x: x[1:])
    with pytest.raises(DataError, match=r'TestG100.mat: query \d+ searches s\d+.jpg; expected pictures of pool.mat'):
        cuhk_sysu(cuhk_tree)


def moved(person):
    "The person with the first box at another place."
    scene = person['scene'][0, 0]
    scene['idlocate'][0, 0] = np.array([[1, 1, 77, 88]])
    return person


def test_cuhk_named_box_that_is_not_there(cuhk_tree):
    whole = cuhk_sysu(cuhk_tree)
    edit(cuhk_tree, 'test/train_test/Train', lambda x: mat_cells([moved(x[0, 0]), *x[1:, 0]]))
    s = cuhk_sysu(cuhk_tree)
    assert reasons(s.train) == {'named box not in Images.mat': 1}
    assert s.train.unnamed.sum() == whole.train.unnamed.sum()+1


@pytest.mark.parametrize('name, value, message', [
    ('Images', np.zeros(3), 'a struct has None'), ('pool', np.zeros(3), 'holds .*expected cells pool'),
    ('Images', mat_struct([('s1.jpg', 1)], 'imname', 'n'), r"a struct has \('imname', 'n'\); expected box"),
    ('Images', mat_struct([('s1.jpg', mat_struct([([1, 2, 3],)], 'idlocate'))], 'imname', 'box'),
     r's1.jpg: \[1, 2, 3\]; expected x, y'),
    ('Images', mat_struct([('s1.jpg', mat_struct([('abcd',)], 'idlocate'))], 'imname', 'box'), 's1.jpg: '),
    ('test/train_test/Train', mat_cells([mat_struct([('bob', 1, 2)], 'idname', 'nAppear', 'scene')]),
     "a person is 'bob'"),
    ('test/train_test/Train', mat_cells([mat_struct([('p1', 1, 2)], 'idname', 'nAppear', 'scene')]), 'a struct has'),
    ('test/train_test/TestG100', np.zeros(3), 'a struct has None'),
    ('test/train_test/TestG100', mat_struct([(mat_struct([('s1.jpg', np.zeros((1, 0)), 0, 'p1')], 'imname',
     'idlocate', 'ishard', 'idname'), 0)], 'Query', 'Gallery'), 'query 1 has no box')])
def test_cuhk_broken(cuhk_tree, name, value, message):
    edit(cuhk_tree, name, lambda x: value)
    with pytest.raises(DataError, match=f'{Path(name).name}.mat: {message}'): cuhk_sysu(cuhk_tree)


@pytest.mark.parametrize('name', ['Images', 'pool', 'test/train_test/Train', 'test/train_test/TestG100'])
def test_cuhk_half_a_file(cuhk_tree, name):
    f = cuhk_tree/'annotation'/f'{name}.mat'
    f.write_bytes(f.read_bytes()[:200])
    with pytest.raises(DataError, match=f'{f.name}: not a readable'): cuhk_sysu(cuhk_tree)
    savemat(f, dict(other=[1]))
    with pytest.raises(DataError, match=f"{f.name}: holds .'other'"): cuhk_sysu(cuhk_tree)


def test_cuhk_boxes_without_area(cuhk_tree):
    "The real set has some; they are dropped and counted, and so is a query that has none."
    whole = cuhk_sysu(cuhk_tree)

    def flatten(x):
        x[0, 0]['Query'][0, 0]['idlocate'][0, 2] = 0
        return x
    edit(cuhk_tree, 'test/train_test/TestG100', flatten)
    s = cuhk_sysu(cuhk_tree)
    assert len(s.queries.row) == len(whole.queries.row)-1
    assert reasons(s.queries) == {'box without area': 1} and (s.queries.pids == whole.queries.pids[1:]).all()
    assert (s.gallery == whole.gallery[1:]).all()
    assert reasons(s.test) == {'named box not in Images.mat': 1}


# CrowdHuman

def odgt(root, *entries, part='train'):
    (root/'Images').mkdir(exist_ok=True)
    for e in entries: Image.new('RGB', (100, 80)).save(root/'Images'/f"{e['ID']}.jpg")
    (root/f'annotation_{part}.odgt').write_text('\n'.join(map(json.dumps, entries)))
    return root


def gtbox(x, y, w, h, tag='person', **extra):
    out = dict(tag=tag, fbox=[x, y, w, h], vbox=[x, y, w, h//2], hbox=[x, y, 5, 5], head_attr={})
    return out | (dict(extra=extra) if extra else {})


def test_crowdhuman_flags(tmp_path):
    odgt(tmp_path, dict(ID='a,1', gtboxes=[gtbox(1, 2, 10, 40), gtbox(5, 5, 9, 9, 'mask', ignore=1),
                                           gtbox(9, 9, 9, 9, ignore=1), gtbox(9, 9, 9, 8, ignore=0, occ=1),
                                           gtbox(3, 3, 9, 9, 'mask')]), dict(ID='b', gtboxes=[]))
    s, off = crowdhuman(tmp_path), crowdhuman(tmp_path, ignored=True)
    assert s.xyxy.tolist() == [[1, 2, 11, 42], [9, 9, 18, 17]] and reasons(s) == {'ignored box': 3}
    assert off.xyxy[:, 0].tolist() == [5, 9, 3] and len(off) == len(s) == 2
    assert crowdhuman(tmp_path, box='vbox').xyxy[0].tolist() == [1, 2, 11, 22]
    assert s.pids is None and s.camids is None and s.frames is None


def test_crowdhuman_border(tmp_path):
    odgt(tmp_path, dict(ID='a', gtboxes=[gtbox(-5, 60, 20, 60), gtbox(200, 1, 9, 9), gtbox(1, 1, 0, 9)]))
    s = crowdhuman(tmp_path)
    assert s.xyxy.tolist() == [[0, 60, 15, 80]] and s.cut.tolist() == [True]
    assert reasons(s) == {'box outside the picture': 1, 'box without area': 1}
    assert crowdhuman(tmp_path, clip=False).xyxy[0].tolist() == [-5, 60, 15, 120]


@pytest.mark.parametrize('text, message', [
    ('{', 'line 1 is .*not JSON'), ('[]', 'line 1 is .*expected entries'), ('{"ID": "a"}', 'line 1 is .*gtboxes is absent'),
    ('{"ID": "a", "gtboxes": [{}]}', 'line 1 is .*tag is absent'), ('{"ID": "a", "gtboxes": [3]}', 'line 1 is .*gtboxes.0. is 3'),
    ('{"ID": "a", "gtboxes": [{"tag": "person", "fbox": [1, 2]}]}', 'line 1 is .*fbox is .1, 2.; expected 4'),
    ('{"ID": "a", "gtboxes": [{"tag": "cat", "fbox": [1, 2, 3, 4]}]}', 'line 1 is .*tag is .cat.'),
    ('{"ID": "a", "gtboxes": [{"tag": "person", "fbox": [1, 2, 3, NaN]}]}', 'line 1 is .*nan; expected a finite'),
    ('{"ID": "a", "gtboxes": [{"tag": "person", "fbox": [1, 2, 3, 4], "extra": 3}]}', 'line 1 is .*extra is 3'),
    ('{"ID": "a", "gtboxes": 3}', 'line 1 is .*gtboxes is 3; expected a list')])
def test_crowdhuman_broken(tmp_path, text, message):
    odgt(tmp_path, dict(ID='a', gtboxes=[]))
    (tmp_path/'annotation_train.odgt').write_text(text)
    with pytest.raises(DataError, match=f'annotation_train.odgt: {message}'): crowdhuman(tmp_path)


def test_crowdhuman_files(tmp_path):
    odgt(tmp_path, *[dict(ID=k, gtboxes=[gtbox(1, 1, 9, 9)]) for k in 'abcd'])
    (tmp_path/'Images'/'b.jpg').unlink()
    (tmp_path/'Images'/'c.jpg').write_bytes(b'x')
    data = (tmp_path/'Images'/'d.jpg').read_bytes()
    (tmp_path/'Images'/'d.jpg').write_bytes(data[:len(data)-20])
    assert reasons(crowdhuman(tmp_path)) == {'picture without a file': 1, 'unreadable picture': 1}
    s = crowdhuman(tmp_path, verify=True)
    assert len(s) == 1 and len(s.row) == 1 and reasons(s)['unreadable picture'] == 2
    with pytest.raises(DataError, match='has no annotation_val.odgt'): crowdhuman(tmp_path, 'val')


def test_crowdhuman_of_a_world(world, tmp_path):
    out = write_crowdhuman(world, tmp_path/'o', (0, 40, 80, 120))
    lines = [json.loads(t) for t in (out/'annotation_val.odgt').read_text().splitlines()]
    assert [o['ID'] for o in lines] == [f'6,c{c}_{t:06d}' for t in (80, 120) for c in (1, 2, 3)]
    b = world.boxes(1, 80)
    x = np.array([o['fbox'] for o in lines[1]['gtboxes']])
    np.testing.assert_allclose(x[:, :2]+x[:, 2:], b.xyxy[:, 2:], atol=1e-3)
    assert [o['extra']['ignore'] for o in lines[1]['gtboxes']] == (b.visible < .3).astype(int).tolist()


# A search of any frames

def blank(n): return [np.zeros((2, 2, 3), np.uint8)]*n


def test_one_each_is_the_largest_of_those_seen_twice():
    r = np.random.default_rng(0)
    for _ in range(20):
        n, b = 8, 30
        xy, wh = r.uniform(0, 9, (b, 2)), r.integers(1, 4, (b, 2))
        s = FrameSet(blank(n), r.integers(0, 3, n), np.arange(n), r.integers(0, n, b), np.c_[xy, xy+wh],
                     r.integers(0, 6, b), unnamed=r.random(b) < .3)
        area, cam = (s.xyxy[:, 2:]-s.xyxy[:, :2]).prod(1), s.camids[s.row]
        for per_camera in (True, False):
            found = one_each(s, per_camera)
            keys = {(s.pids[k], cam[k] if per_camera else 0) for k in range(b) if not s.unnamed[k]
                    and len(set(s.row[(s.pids == s.pids[k]) & ~s.unnamed])) > 1}
            assert {(s.pids[k], cam[k] if per_camera else 0) for k in found} == keys and len(found) == len(keys)
            for k in found:
                same = (s.pids == s.pids[k]) & ~s.unnamed & ((cam == cam[k]) | (not per_camera))
                assert not s.unnamed[k] and area[k] == area[same].max()


def test_search_set_refuses():
    s = FrameSet(blank(3), [0, 0, 1], [1, 2, 3], [0, 1, 2], np.tile([0, 0, 1, 1], (3, 1)), [5, 5, 6])
    whole = as_search(s[[]], s)
    assert whole.queries.pids.tolist() == [5] and whole.queries.row.tolist() == [0]
    with pytest.raises(ValueError, match='query 0 searches its own picture'):
        SearchSet(s[[]], s, s.only([0]), np.ones((1, 3)))
    with pytest.raises(ValueError, match=r'gallery has shape \(2, 3\)'):
        SearchSet(s[[]], s, s.only([0]), np.zeros((2, 3)))
    with pytest.raises(ValueError, match='nobody is in two pictures'): as_search(s[[]], s[[1, 2]])
    assert s.only([2]).crops((4, 2)).pids.tolist() == [6]


# Scores

def random_case(seed, n=10, people=5, kinds=None):
    "A search with people twice in a picture, unnamed ones, doubled and missing detections."
    r = np.random.default_rng(seed)
    b = 4*n
    xy, wh = r.uniform(0, 80, (b, 2)), r.uniform(4, 60, (b, 2))
    test = FrameSet(blank(n), None, None, r.integers(0, n, b), np.c_[xy, xy+wh], r.integers(1, people+1, b),
                    unnamed=r.random(b) < .3)
    s = as_search(test[[]], test, per_camera=False)
    s.gallery &= r.random(s.gallery.shape) < .8
    of = r.integers(0, b, 6*n)
    boxes = test.xyxy[of]+r.normal(0, 5, (6*n, 4))*(r.random((6*n, 1)) < .8)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2]+.5)
    part = [np.flatnonzero(test.row[of] == i) for i in range(n)]
    part[r.integers(n)] = np.zeros(0, int)
    x = r.normal(size=(6*n, 3)) if kinds is None else np.eye(kinds)[r.integers(0, kinds, 6*n)]
    q = r.normal(size=(len(s.gallery), 3)) if kinds is None else np.eye(kinds)[r.integers(0, kinds, len(s.gallery))]
    return s, [(boxes[k], r.random(len(k))) for k in part], [x[k] for k in part], q


def unit(x): return x/np.linalg.norm(x, axis=-1, keepdims=True)


def iou(a, b):
    w, h = min(a[2], b[2])-max(a[0], b[0]), min(a[3], b[3])-max(a[1], b[1])
    both = max(0, w)*max(0, h)
    return both/((a[2]-a[0])*(a[3]-a[1])+(b[2]-b[0])*(b[3]-b[1])-both)


def one_by_one(s, found, features, query, least):
    "AP and place of the first right box of each query, from the definition alone."
    out = []
    for q in range(len(query)):
        pid, y, sims, truths, hits = s.queries.pids[q], [], [], 0, 0
        for i in range(len(s.test)):
            if not s.gallery[q, i]: continue
            mine = s.test.xyxy[(s.test.row == i) & (s.test.pids == pid) & ~s.test.unnamed].astype(float)
            truths += len(mine) > 0
            boxes, scores = found[i]
            k = [j for j in range(len(boxes)) if scores[j] >= least]
            sim = np.float32([unit(features[i][j])@unit(query[q]) for j in k])
            label = np.zeros(len(k), int)
            for j in np.argsort(-sim, kind='stable'):
                need = [min(.5, (w := t[2]-t[0])*(h := t[3]-t[1])/((w+10)*(h+10))) for t in mine]
                if any(iou(boxes[k[j]], t) >= v for t, v in zip(mine, need)):
                    label[j], hits = 1, hits+1
                    break
            y += label.tolist()
            sims += sim.tolist()
        y, sims = np.array(y, int), np.array(sims)
        if not truths: out.append((np.nan, np.nan))
        elif not hits: out.append((0, np.inf))
        else:
            best = sims[y == 1].max()
            place = 1+(sims > best).sum()+((sims == best) & (y == 0)).sum()
            out.append((average_precision_score(y, sims)*hits/truths, place))
    return np.array(out, float).T


@pytest.mark.parametrize('kinds', [None, 2, 1])
def test_scores_equal_the_definition(kinds):
    "Also where many or all features are the same: a tie is a wrong answer."
    ranks = 0
    for seed in range(40):
        case = random_case(seed, kinds=kinds)
        s = search_scores(*case, least=.25, max_rank=3)
        ap, place = one_by_one(*case, .25)
        np.testing.assert_allclose(s.aps, ap, atol=1e-6)
        np.testing.assert_array_equal(s.places, place)
        counts = ~np.isnan(ap)
        assert s.skipped == (~counts).sum() and s.mAP == pytest.approx(ap[counts].mean())
        assert s.cmc.tolist() == [(place[counts] <= k).mean() for k in (1, 2, 3)]
        ranks += np.isfinite(s.places).sum()
    assert ranks > 20


def test_order_does_not_matter():
    s, found, features, q = random_case(7)
    r, back = np.random.default_rng(0), search_scores(s, found, features, q, least=.2)
    order = [r.permutation(len(b)) for b, _ in found]
    mixed = search_scores(s, [(b[k], c[k]) for (b, c), k in zip(found, order)],
                          [f[k] for f, k in zip(features, order)], 3*q, least=.2)
    np.testing.assert_allclose(mixed.aps, back.aps, atol=1e-6)
    np.testing.assert_array_equal(mixed.places, back.places)


def test_perfect_and_hopeless():
    s, *_ = random_case(3)
    s = as_search(s.test[[]], s.test.only(~s.test.unnamed), per_camera=False)
    own = [s.test.row == i for i in range(len(s.test))]
    found = [(s.test.xyxy[b], np.ones(b.sum())) for b in own]
    one_hot = np.eye(9)
    # Somebody twice in a picture leaves a false alarm: take each person once a picture
    _, first = np.unique(np.c_[s.test.row, s.test.pids], axis=0, return_index=True)
    s = as_search(s.train, s.test.only(first), per_camera=False)
    own = [s.test.row == i for i in range(len(s.test))]
    found = [(s.test.xyxy[b], np.ones(b.sum())) for b in own]
    best = search_scores(s, found, [one_hot[s.test.pids[b]] for b in own], one_hot[s.queries.pids])
    assert best.mAP == best.recall == best.cmc[0] == 1
    away = [(b+1000, c) for b, c in found]
    none = search_scores(s, away, [one_hot[s.test.pids[b]] for b in own], one_hot[s.queries.pids])
    assert none.mAP == none.recall == none.cmc[-1] == 0 and np.isinf(none.places).all()
    nothing = [(np.zeros((0, 4)), np.zeros(0))]*len(s.test)
    assert search_scores(s, nothing, [np.zeros((0, 9))]*len(s.test), one_hot[s.queries.pids]).mAP == 0


def test_lists_of_single_queries():
    case = random_case(11)
    s, found = case[:2]
    scores = search_scores(*case, least=.2)
    for q in range(len(s.gallery)):
        t = top_boxes(*case, q, n=1000, least=.2)
        assert (np.diff(t.similarity) <= 0).all() and s.gallery[q, t.row].all()
        assert len(t.row) == sum((found[i][1] >= .2).sum() for i in np.flatnonzero(s.gallery[q]))
        assert len(set(t.row[t.right])) == t.right.sum()
        if t.right.any(): assert np.flatnonzero(t.right)[0]+1 == scores.places[q]
        assert len(top_boxes(*case, q, n=3, least=.2).row) <= 3


def test_iou_needed_is_what_five_pixels_cost():
    r = np.random.default_rng(0)
    for w, h in r.uniform(1, 100, (50, 2)):
        grown = iou([0, 0, w, h], [-5, -5, w+5, h+5])
        assert iou_needed([[3, 4, 3+w, 4+h]])[0] == pytest.approx(min(.5, grown))


@pytest.mark.parametrize('change, message', [
    (lambda s, f, x, q: (s, f[1:], x, q), '9 pictures with boxes, 10 with features; the test has 10'),
    (lambda s, f, x, q: (s, [(*o, 0) for o in f], x, q), 'found, picture 0: expected boxes and scores'),
    (lambda s, f, x, q: (s, f, x, q[1:]), 'query_features has shape'),
    (lambda s, f, x, q: (s, f, x, q[:, :2]), 'query_features has shape'),
    (lambda s, f, x, q: (s, f, x, q*np.nan), 'query_features: NaN'),
    (lambda s, f, x, q: (s, f, [o*np.inf for o in x], q), r'features, picture \d: NaN or infinity'),
    (lambda s, f, x, q: (s, f, [o[:-1] for o in x], q), r'picture \d: \d+ boxes, \d+ features'),
    (lambda s, f, x, q: (s, [(b[:, ::-1], c) for b, c in f], x, q), r'found, picture \d: box 0.*not xyxy'),
    (lambda s, f, x, q: (s, [(b, c*np.nan) for b, c in f], x, q), r'found, picture \d: score 0 is nan'),
    (lambda s, f, x, q: (s, [(b, c[:-1]) for b, c in f], x, q), r'found, picture \d, scores has shape'),
    (lambda s, f, x, q: (s, f, [o[0] if len(o) else o for o in x], q), r'picture \d|expected')])
def test_scores_refuse(change, message):
    with pytest.raises(ValueError, match=message): search_scores(*change(*random_case(1)), least=0)


def test_nobody_to_find():
    s, f, x, q = random_case(1)
    s.gallery[:] = False
    with pytest.raises(ValueError, match='no query has its person in its gallery'): search_scores(s, f, x, q)


def test_large_searches_take_seconds():
    "PRW's size at a tenth of the queries: 206 in 6,111 pictures each."
    r = np.random.default_rng(0)
    n = 6112
    row = np.repeat(np.arange(n), 5)
    xy = r.uniform(0, 900, (len(row), 2))
    test = FrameSet(blank(n), r.integers(0, 6, n), np.arange(n), row, np.c_[xy, xy+[60, 150]],
                    r.integers(1, 451, len(row)))
    s = as_search(test[[]], test)
    s = SearchSet(s.train, s.test, s.queries.only(slice(206)), s.gallery[:206])
    x = r.normal(size=(len(row), 32)).astype('f4')
    start = time.process_time()
    scores = search_scores(s, [(b, np.ones(5)) for b in test.xyxy.reshape(n, 5, 4)], x.reshape(n, 5, 32),
                           r.normal(size=(206, 32)))
    assert time.process_time()-start < 20 and scores.recall == 1 and 0 < scores.mAP < .05
