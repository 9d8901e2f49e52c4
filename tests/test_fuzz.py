"""Files that somebody or something has damaged: every reader names them, reports what it drops, or reads the same.

Trees are written once; each damage changes one file, reads, and puts the file back. A damage is never a legal edit
(another valid number, a line less in a list that nothing counts): no reader could know."""
import json
import logging
import random
import re
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save
from scipy.io import loadmat, savemat

from reidlit.core import DataError, Dropped, ReidSet
from reidlit.data.sets import FRAME_READERS, READERS, WRITERS, FrameSet, SearchSet, coco, crop_folder, crowdhuman
from reidlit.data.sets import MultiviewDetections, pets2009, write_coco, write_crowdhuman
from reidlit.data.world import World
from reidlit.experiments import add_seed, read_result
from reidlit.runs import read_checkpoint
from reidlit.verdicts import Claim

PICTURES = {'.jpg', '.png', '.bmp'}
SMALL = (16, 8)


# Trees

def crops(world):
    s = world.crops('train', 2, SMALL)
    return list(zip(s.images, (s.pids+1).tolist(), (s.camids+1).tolist()))


def put(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)


def duke(world, root):
    for i, (x, p, c) in enumerate(crops(world)):
        part = 'bounding_box_train' if p % 2 else 'query' if c == 1 else 'bounding_box_test'
        put(root/part/f'{p:04d}_c{c}_f{i:07d}.jpg', x)


def viper(world, root):
    for x, p, c in crops(world): put(root/f'cam_{"ab"[c-1]}'/f'{p:03d}_{90*c}.bmp', x)


def ward(world, root):
    for i, (x, p, c) in enumerate(crops(world)): put(root/f'{p:04d}{c:04d}{i:04d}.png', x)


def folder(world, root):
    for i, (x, p, c) in enumerate(crops(world)): put(root/f'anna {p}'/f'{i}.jpg', x)


def msmt17(world, root):
    lists = dict(train=[], val=[], query=[], gallery=[])
    for i, (x, p, c) in enumerate(crops(world)):
        home, part = ('train', ('train', 'val')[c-1]) if p % 2 else ('test', ('query', 'gallery')[c-1])
        name = f'{p:04d}/{p:04d}_{i:03d}_{c:02d}_0303morning_{i:04d}_0.jpg'
        put(root/home/name, x)
        lists[part].append(f'{name} {p}\n')
    for k, lines in lists.items(): (root/f'list_{k}.txt').write_text(''.join(lines))


def cuhk03(world, root):
    names, rows = [], dict(train=[], query=[], gallery=[])
    for i, (x, p, c) in enumerate(crops(world), 1):
        names.append(f'1_{p:03d}_{c}_{i:02d}.png')
        put(root/'images_labeled'/names[-1], x)
        rows['train' if p % 2 else 'query' if c == 1 else 'gallery'].append(i)
    who, cam = ([int(n.split('_')[k]) for n in names] for k in (1, 2))
    savemat(root/'cuhk03_new_protocol_config_labeled.mat', dict(
        filelist=np.array(names, object)[:, None], labels=np.array(who)[:, None], camId=np.array(cam)[:, None],
        **{f'{k}_idx': np.array(v)[:, None] for k, v in rows.items()}))


def as_coco(world, root):
    keys = [(c, t) for t in (0, 5) for c in (0, 1)]
    boxes = [world.boxes(c, t) for c, t in keys]
    s = FrameSet([world.frame(c, t) for c, t in keys], *np.transpose(keys), np.repeat(range(4), list(map(len, boxes))),
                 np.concatenate([b.clipped for b in boxes]), None)
    write_coco(s, root)
    f = root/'annotations.json'
    f.write_text(json.dumps(json.loads(f.read_text()), indent=1))


def pets(world, root):
    (root/'detections').mkdir(parents=True)
    rig = {}
    for c, cam in enumerate(world.cameras):
        rig[name := f'View_00{c+1}'] = dict(K=cam.K.tolist(), dist=[0]*5, R=cam.R.tolist(),
                                            t=(1000*cam.t).tolist(), size=cam.size)
        found = [world.boxes(c, t) for t in (0, 5)]
        (root/'detections'/f'{name}.json').write_text(json.dumps(dict(
            bboxes=[b.clipped.tolist() for b in found], scores=[b.visible.tolist() for b in found]), indent=1))
    (root/'calibration.json').write_text(json.dumps(rig, indent=1))


def results(world, root):
    for seed in range(3):
        add_seed(root/'toy.json', 'toy', 'ci', seed, dict(A=dict(mAP=.5+.1*seed), B=dict(mAP=.3)), [Claim('A', 'B')])


def checkpoint(world, root):
    root.mkdir(parents=True)
    (root/'epoch-0003.safetensors').write_bytes(save({'model.a': np.zeros(3, np.float32)}))
    (root/'checkpoint.json').write_text(json.dumps(dict(tensors='epoch-0003.safetensors', epoch=3, planned=6,
        history=[{}], settings={'lr': .1}, optimiser=[], recipe=None), indent=1))


MORE = dict(dukemtmc=duke, viper=viper, ward=ward, msmt17=msmt17, cuhk03=cuhk03, coco=as_coco, pets2009=pets,
            crop_folder=folder, results=results, checkpoint=checkpoint,
            crowdhuman=lambda w, root: write_crowdhuman(w, root, [0, 5]))
READ = {k: lambda root, v, f=f: f(root, verify=v) for k, f in READERS.items()}
READ |= {k: lambda root, v, f=f: f(root, verify=v) for k, (f, _) in FRAME_READERS.items()}
READ |= dict(prid2011=lambda root, v: READERS['prid2011'](root, min_frames=3, verify=v),
    coco=lambda root, v: coco(root/'images', root/'annotations.json', verify=v),
    cuhk_sysu=lambda root, v: FRAME_READERS['cuhk_sysu'][0](root, 2, v),
    crowdhuman=lambda root, v: crowdhuman(root, verify=v), crop_folder=lambda root, v: crop_folder(root, verify=v),
    pets2009=lambda root, v: pets2009(root), results=lambda root, v: read_result(root/'toy.json'),
    checkpoint=lambda root, v: read_checkpoint(root)[0])
HOW = dict(market1501=dict(per_camera=2, size=SMALL), mars=dict(length=3, size=SMALL),
    prid2011=dict(length=4, size=SMALL), ilids_vid=dict(length=4, size=SMALL), cuhk_sysu=dict(times=[0, 5], galleries=[2]),
    cityflow=dict(times=[0, 1, 2], video=False)) | {k: dict(times=[0, 5]) for k in ('wildtrack', 'multiviewx', 'prw', 'mot17')}
# Sets that are what their pictures' names say: a picture less is another set, not a broken one
BY_NAME = {'market1501', 'dukemtmc', 'viper', 'ward', 'crop_folder', 'prid2011', 'ilids_vid', 'mars'}
COUNTED = {'train_name.txt', 'test_name.txt', 'calibration.txt', 'S01.txt', 'seqinfo.ini'} | {
    f'list_{k}.txt' for k in ('train', 'val', 'query', 'gallery')} # a line less is noticed


@pytest.fixture(scope='module')
def trees(tmp_path_factory):
    home = tmp_path_factory.mktemp('trees')
    worlds = {k: World(24, 2, 1, kind=k, size=(160, 90)) for k in ('people', 'vehicles')}
    for name in READ:
        world = worlds['vehicles' if name == 'cityflow' else 'people']
        if name in MORE:
            if name not in ('coco', 'crowdhuman', 'checkpoint'): (home/name).mkdir()
            MORE[name](world, home/name)
        else: WRITERS[name](world, home/name, **HOW[name])
    return home


# Sameness, whatever the order of rows

def plain(s):
    "What a reader gave, as something that can be compared."
    if isinstance(s, SearchSet): return [plain(s.train), plain(s.test), plain(s.queries), int(s.gallery.sum())]
    if isinstance(s, MultiviewDetections):
        return [[(b.tolist(), v.tolist()) for b, v in view] for view in s.boxes], cameras(s.cameras)
    if isinstance(s, ReidSet):
        first = {} # a tracklet is its first picture
        for t, p in sorted(zip([0]*len(s) if s.tids is None else s.tids.tolist(), s.images)): first.setdefault(t, p)
        columns = [column(x) for x in (s.pids, s.camids, s.frames, s.junk, s.distractor)]
        tracks = [0]*len(s) if s.tids is None else [str(first[t]) for t in s.tids.tolist()]
        return sorted(zip(map(str, s.images), tracks, *(c or [0]*len(s) for c in columns)))
    if isinstance(s, FrameSet):
        each = [column(x) or [0]*len(s.row) for x in (s.xyxy, s.pids, s.ground, s.cut, s.unnamed)]
        boxes = sorted((str(s.images[r]), *map(str, b)) for r, *b in zip(s.row.tolist(), *each))
        moments = [column(x) or [0]*len(s) for x in (s.camids, s.frames)]
        return sorted(zip(map(str, s.images), *moments)), boxes, cameras(s.cameras)
    if 'variants' in s: return {k: s[k] for k in ('paper', 'preset', 'seeds', 'variants', 'claims', 'seconds')}
    if 'tensors' in s: return {k: s[k] for k in ('tensors', 'epoch', 'planned')}
    return {k: plain(v) for k, v in s.items()}


def column(x): return None if x is None else np.round(np.asarray(x, float), 4).tolist()


def cameras(found):
    return [c and [np.round(m, 6).tolist() for m in (c.K, c.R, c.t)] for c in found or ()]


def dropped(s):
    if isinstance(s, SearchSet): return sum(map(dropped, (s.train, s.test, s.queries)))
    if hasattr(s, 'dropped'): return len(s.dropped)
    return sum(map(dropped, s.values())) if hasattr(s, 'name') else 0


# Damages: each takes bytes and a `random.Random`, gives bytes, or `None` where it cannot be done

NUMBER = re.compile(r'(?<![\w."-])-?\d+(\.\d+)?(e-?\d+)?(?![\w."])')


def number(word):
    "A damage that puts a word in the place of a number."
    def change(data, r):
        text = data.decode()
        hits = list(NUMBER.finditer(text))
        if not hits: return None
        m = r.choice(hits)
        return (text[:m.start()]+word+text[m.end():]).encode()
    return change


def lines(change):
    def do(data, r):
        rows = data.decode().splitlines(keepends=True)
        return ''.join(change(rows, r)).encode() if len(rows) > 1 else None
    return do


def doubled(rows, r):
    i = r.randrange(len(rows)); return rows[:i]+[rows[i].rstrip('\r\n')+'\n']+rows[i:]


def removed(rows, r):
    i = r.randrange(len(rows)); return rows[:i]+rows[i+1:]


def swapped(rows, r):
    i = r.randrange(len(rows)-1); return [*rows[:i], rows[i+1].rstrip('\n')+'\n', rows[i].rstrip('\n')+'\n', *rows[i+2:]]


def cut(data, r): return data[:r.randrange(1, max(2, len(data.rstrip())-1))]


def cut_line(data, r):
    "The end is missing, and all but a letter of the line before."
    rows = data.decode().splitlines(keepends=True)
    i = r.randrange(len(rows))
    return (''.join(rows[:i])+rows[i][:1]).encode()


def byte(value):
    def change(data, r):
        i = r.randrange(len(data))
        return data[:i]+value+data[i+1:]
    return change


def crlf(data, r): return b'\xef\xbb\xbf'+data.replace(b'\r\n', b'\n').replace(b'\n', b'\r\n')


def matrix(change):
    "A damage of a table of numbers in a MATLAB file."
    def do(data, r):
        mat = {k: v for k, v in loadmat(BytesIO(data)).items() if k[:2] != '__'}
        tables = [k for k, v in mat.items() if v.dtype.kind in 'iuf' and v.size]
        if not tables: return None
        k = r.choice(tables)
        mat[k] = change(mat[k].astype(float), r)
        savemat(out := BytesIO(), mat)
        return out.getvalue()
    return do


def cell(value):
    def change(x, r): x.flat[r.randrange(x.size)] = value; return x
    return change


def row_twice(x, r):
    axis = int(x.shape[0] == 1)
    return np.concatenate([x, np.take(x, [r.randrange(x.shape[axis])], axis)], axis)


EMPTY, WHOLE = dict(empty=lambda data, r: b''), dict(zero=byte(b'\0'), ff=byte(b'\xff'))
TEXT = EMPTY | WHOLE | dict(cut=cut_line, crlf=crlf, doubled=lines(doubled), swapped=lines(swapped)) | {
    w: number(w) for w in ('NaN', 'x', '1_0', '٣', '9'*400)}
JSON = EMPTY | WHOLE | dict(cut=cut, crlf=crlf, doubled=lines(doubled), nested=lambda data, r: b'['*100_000) | {
    w: number(w) for w in ('NaN', '"7"', 'null', '[]', '{}', '1e999', '1_0', 'true')}
XML = EMPTY | dict(cut=cut, crlf=crlf, zero=byte(b'\0')) | {w: number(w) for w in ('NaN', 'x', '1_0', '1e999')}
MAT = EMPTY | dict(cut=lambda data, r: data[:r.randrange(1, len(data)*9//10)], nan=matrix(cell(np.nan)),
                   infinite=matrix(cell(np.inf)), twice=matrix(row_twice), text=lambda data, r: b'MATLAB'*99)
PICTURE = EMPTY | dict(cut=lambda data, r: data[:r.randrange(1, len(data)//2)], text=lambda data, r: b'no picture'*9)
KINDS = {'.json': JSON, '.odgt': JSON, '.xml': XML, '.mat': MAT} | dict.fromkeys(PICTURES, PICTURE)
MOVES = ('missing', 'folder')
ODD_NAMES = ('x{}', '٣{}', '{}.part', '99999999999999999999{}')


def plan(name, root):
    "Damages of a tree, without end: a file, a word, and what makes the new bytes."
    r = random.Random(f'fuzz {name}')
    files = sorted(f for f in root.rglob('*') if f.is_file() and f.name[0] != '.')
    tables, pictures = ([f for f in files if (f.suffix in PICTURES) == k] for k in (False, True))
    while True:
        f = r.choice(tables if tables and r.random() < .8 or not pictures else pictures)
        words = {**KINDS.get(f.suffix, TEXT)} | dict.fromkeys(MOVES)
        if f.name in COUNTED: words['removed'] = lines(removed)
        if f.suffix in PICTURES and name != 'crop_folder': words['name'] = None
        if f.suffix in PICTURES and name in BY_NAME or f.name == 'reidlit.json': del words['missing']
        if f.suffix == '.safetensors': words = {k: words[k] for k in ('empty', *MOVES)}
        word = r.choice(sorted(words))
        yield f, word, words[word], r


def harm(f, word, change, r):
    "Do it; a function that undoes it, or `None` if it cannot be done."
    data = f.read_bytes()
    if word == 'name':
        new = f.with_name(r.choice(ODD_NAMES).format(f.name))
        f.rename(new)
        return lambda: new.rename(f)
    new = None if word in MOVES else change(data, r)
    if word not in MOVES and new is None: return None
    f.unlink()
    if word == 'folder': f.mkdir()
    elif new is not None: f.write_bytes(new)
    def undo():
        if f.is_dir(): f.rmdir()
        f.write_bytes(data)
    return undo


def names_it(e, f, root):
    "Does an error name the file, or a folder that it is in?"
    said = Path(e.path)
    return f.name in str(e) or said == f or said in f.parents and (said == root or root in said.parents)


SETS = sorted(READ)
EACH = 26


def test_there_are_enough(): assert EACH*len(SETS) >= 500 and set(READERS) | set(FRAME_READERS) < set(SETS)


@pytest.mark.parametrize('name', SETS)
def test_a_damaged_file_is_never_read_as_if_it_were_whole(name, trees, caplog):
    caplog.set_level(logging.CRITICAL)
    root, bad, done = trees/name, [], {}
    for verify in (False, True): done[verify] = READ[name](root, verify)
    same, before = plain(done[False]), dropped(done[False])
    n = 0
    for f, word, change, r in plan(name, root):
        if n == EACH: break
        if (undo := harm(f, word, change, r)) is None: continue
        n += 1
        what = f'{f.relative_to(root)}, {word}: '
        try:
            s = READ[name](root, f.suffix in PICTURES)
            if plain(s) != same and dropped(s) <= before: bad.append(what+'read in silence')
        except DataError as e:
            if not names_it(e, f, root): bad.append(f'{what}not named: {e}')
        except Exception as e: bad.append(f'{what}{type(e).__name__}: {e}')
        finally: undo()
    assert not bad, '\n'.join(bad)
    assert plain(READ[name](root, False)) == same
