"Pictures as they come: turned, 16-bit, broken, of another size, with odd names, elsewhere."
import json
import os

import numpy as np
import pytest
from PIL import Image

from command import run_alone
from reidlit.core import DataError, ReidSet, open_picture, picture_size, printable
from reidlit.files import path_in
from reidlit.data.readers.cityflow import cityflow, write_cityflow
from reidlit.data.readers.coco import coco
from reidlit.data.readers.mot import mot17, write_mot17
from reidlit.data.readers.multiviewx import multiviewx, write_multiviewx
from reidlit.data.readers.search import prw, write_prw
from reidlit.data.sets import crop_folder, market1501
from reidlit.data.world import World
from reidlit.data.writers import write_market1501, write_wildtrack

TINY = World(people=10, cameras=2, seed=3, crowd=6, size=(96, 64))
AB = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize('kind', ['png', 'jpg', 'webp'])
@pytest.mark.parametrize('k', range(1, 9))
def test_turned_pictures(tmp_path, kind, k):
    "Stored as EXIF's orientation k asks for, a picture comes back upright."
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's numbers of the way there
    im, exif = Image.fromarray(np.kron(AB, np.ones((8, 8, 1), np.uint8))), Image.Exif()
    exif[0x0112] = k
    stored = im.transpose(Image.Transpose(back[k])) if k in back else im
    options = dict(lossless=True) if kind == 'webp' else {}
    stored.save(f := tmp_path/f'a.{kind}', exif=exif, **options)
    assert picture_size(f) == im.size
    miss = abs(np.asarray(open_picture(f), float) - np.asarray(im))
    assert miss.max() == 0 if kind != 'jpg' else miss.mean() < 12
    assert ReidSet([f], None).read(0).shape == (48, 72, 3)


def test_sixteen_bits(tmp_path):
    x = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    for f, y in (('a.png', x), ('b.png', x.astype('>u2'))):
        Image.fromarray(y).save(tmp_path/f)
        assert np.asarray(open_picture(tmp_path/f))[0, :, 0].tolist() == list(range(256))
    Image.fromarray(x.astype(np.float32)).save(tmp_path/'f.tif')
    with pytest.raises(DataError, match='f.tif: .*float32 values, expected 8 or 16 bits'):
        open_picture(tmp_path/'f.tif')


def odd(folder, kind, monkeypatch):
    "Something at `a.png` that is no picture."
    f = folder/'a.png'
    Image.fromarray(AB).save(f)
    data = f.read_bytes()
    if kind == 'fifo': f.unlink(); os.mkfifo(f)
    if kind == 'folder': f.unlink(); f.mkdir()
    if kind == 'dangling': f.unlink(); f.symlink_to(folder/'gone')
    if kind == 'loop': f.unlink(); f.symlink_to(f)
    if kind == 'empty': f.write_bytes(b'')
    if kind == 'half': f.write_bytes(data[:len(data)//2])
    if kind == 'noise': f.write_bytes(data[:33] + bytes(range(200)))
    if kind == 'bomb': monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    if kind == 'raises':
        def boom(*a, **kw): raise KeyError('anything')
        monkeypatch.setattr(Image.Image, 'convert', boom)
    return f


@pytest.mark.parametrize('kind', ['fifo', 'folder', 'dangling', 'loop', 'empty', 'half', 'noise', 'bomb',
                                  'raises'])
def test_what_is_no_picture(tmp_path, monkeypatch, kind):
    f = odd(tmp_path, kind, monkeypatch)
    with pytest.raises(DataError, match='a.png') as e: ReidSet([f], None).read(0)
    assert '\n' not in str(e.value)
    if kind == 'folder': return  # it is not listed as a picture
    with pytest.raises(DataError, match='nothing to read .*unreadable picture'):
        crop_folder(tmp_path, verify=True)


def test_half_of_the_pictures_are_broken(tmp_path):
    "Under `verify` they are a reported drop."
    root = write_market1501(TINY, tmp_path/'m', 2, (32, 16))
    bad = sorted((root/'query').iterdir())[:2]
    bad[0].unlink(); os.mkfifo(bad[0])
    bad[1].write_bytes(b'')
    d = market1501(root, verify=True).query.dropped
    assert {k: len(v) for k, v in d.reasons.items()} == {'unreadable picture': 2}


# Sizes

def save_coco(root, name='a.png', size=(9, 6), file=None):
    (root/'im').mkdir(exist_ok=True)
    Image.fromarray(AB).save(root/'im'/(file or 'a.png'))
    note = dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 3, 3], iscrowd=0)
    (root/'a.json').write_text(json.dumps(dict(
        images=[dict(id=1, file_name=name, width=size[0], height=size[1])], annotations=[note],
        categories=[dict(id=1, name='person')])))
    return root/'im', root/'a.json'


def test_coco_says_another_size(tmp_path):
    assert len(coco(*save_coco(tmp_path)).row) == 1
    for verify in (False, True):
        with pytest.raises(DataError, match='a.png: is 9x6, but a.json says 18x12'):
            coco(*save_coco(tmp_path, size=(18, 12)), verify=verify)


def shrink(f):
    with Image.open(f) as im: half = im.resize((im.width//2, im.height//2))
    half.save(f)


@pytest.mark.parametrize('write, read, which', [
    (write_wildtrack, 'wildtrack', 'Image_subsets/C2/00000005.png'),
    (write_multiviewx, 'multiviewx', 'Image_subsets/C2/0005.png')])
def test_one_frame_of_another_size(tmp_path, write, read, which):
    from reidlit.data import sets
    root = write(TINY, tmp_path/'m', [0, 5])
    shrink(root/which)
    with pytest.raises(DataError, match='0005.png: is 48x32, but .*png says 96x64'):
        getattr(sets, read)(root)


def test_all_frames_of_another_size(tmp_path):
    "The calibration is of the large pictures."
    root = write_wildtrack(TINY, tmp_path/'m', [0])
    for f in root.rglob('*.png'): shrink(f)
    from reidlit.data.sets import wildtrack
    with pytest.raises(DataError, match='intr_C1.xml: K is of pictures of about 95x63, these are 48x32'):
        wildtrack(root)


def test_cityflow_sizes(tmp_path):
    road = World(kind='vehicles', people=12, cameras=2, seed=2, crowd=6, size=(128, 72))
    root = write_cityflow(road, tmp_path/'c', [0, 5], video=False)
    shrink(root/'train'/'S01'/'c001'/'img1'/'000002.png')
    with pytest.raises(DataError, match='000002.png: is 64x36, but 000001.png says 128x72'): cityflow(root)
    shrink(root/'train'/'S01'/'c001'/'img1'/'000001.png')
    with pytest.raises(DataError, match='K is of pictures of about 127x71, these are 64x36'): cityflow(root)
    for rate in (-1, 0, float('nan'), 'ten', None):
        (root/'reidlit.json').write_text(json.dumps(dict(rate=rate)))
        with pytest.raises(DataError, match='reidlit.json: rate'): cityflow(root)


def test_mot_sizes(tmp_path):
    root = write_mot17(TINY, tmp_path/'m', range(2))
    folder = root/'train'/'MOT17-01-FRCNN'
    ini = (folder/'seqinfo.ini').read_text()
    for a, b, text in (('imWidth=96', 'imWidth=192', '000001.jpg: is 96x64, but seqinfo.ini says 192x64'),
                       ('imDir=img1', 'imDir=../img1', "seqinfo.ini: names '../img1'"),
                       ('imDir=img1', 'imDir=/', "seqinfo.ini: names '/'"),
                       ('frameRate=', 'frameRate=-', 'seqinfo.ini: frameRate=-'),
                       ('frameRate=', 'frameRate=0.000', 'seqinfo.ini: frameRate=0')):
        (folder/'seqinfo.ini').write_text(ini.replace(a, b))
        if a == 'frameRate=' and '0' in b:
            (folder/'seqinfo.ini').write_text('\n'.join('frameRate=0' if o.startswith(a) else o
                                                        for o in ini.splitlines()))
        with pytest.raises(DataError, match=text): mot17(root)


# Names

@pytest.mark.parametrize('name', ['/etc/hostname', '../secret.png', 'x/../../secret.png', '', '.', '..', 'a\0.png',
                                  'x'*4000 + '.png'])
def test_names_that_leave_the_set(tmp_path, name):
    Image.fromarray(AB).save(tmp_path/'secret.png')
    with pytest.raises(DataError, match='a.json: names .* expected a file below im'):
        coco(*save_coco(tmp_path, name))
    with pytest.raises(DataError, match='a.json: names'): path_in(tmp_path, name, 'a.json')


def test_endings_in_any_case(tmp_path):
    assert coco(*save_coco(tmp_path, file='a.PNG')).images[0].name == 'a.PNG' if \
        not (tmp_path/'im').mkdir() else 0
    root = write_market1501(TINY, tmp_path/'m', 2, (32, 16))
    n = len(market1501(root).train)
    for f in (root/'bounding_box_train').iterdir(): f.rename(f.with_suffix('.JPG'))
    s = market1501(root).train
    assert len(s) == n and not s.dropped and s.read(0).shape == (32, 16, 3)
    out = write_multiviewx(TINY, tmp_path/'x', [0])
    for f in out.rglob('*.png'): f.rename(f.with_suffix('.PNG'))
    assert len(multiviewx(out, train_share=1).train) == 2
    out = write_prw(TINY, tmp_path/'p', range(0, 40, 10))
    n = len(prw(out).train)
    for f in (out/'frames').iterdir(): f.rename(f.with_suffix('.JPG'))
    assert len(prw(out).train) == n and prw(out).train.read(0).shape == (64, 96, 3)
    out = write_mot17(TINY, tmp_path/'o', range(2))
    for f in out.rglob('*.jpg'): f.rename(f.with_suffix('.JPG'))
    assert len(mot17(out).train) == 4


def test_printable():
    assert printable('ab ü.jpg') == 'ab ü.jpg'
    assert printable('a\nb\x1b[31m\udcff') == 'a\\nb\\x1b[31m\\udcff'
    assert str(DataError('a\nb.jpg', 'is\todd')) == 'a\\nb.jpg: is\\todd'


ODD = ['two\nlines', 'not\udcfftext', '$\\bad{$', 'x'*200, '\x1b[31mred', 'ünïcode', '"quote",comma']


def test_odd_names_do_not_end_a_search(tmp_path):
    "All is found, listed and drawn, whatever the pictures are called."
    from reidlit.cli import train_method
    train_method('baseline', preset='ci', out=tmp_path/'run', people=60, cameras=2, say=lambda *_: 0)
    (tmp_path/'g').mkdir()
    for i, n in enumerate(ODD):
        Image.fromarray(np.roll(AB, i, 0)).resize((32, 64)).save(tmp_path/'g'/f'{n}.png')
    out = run_alone('search', tmp_path/'g'/f'{ODD[1]}.png', tmp_path/'g', '--run', tmp_path/'run',
                  '--out', tmp_path/'out\udcfe')
    assert out.returncode == 0, out.stderr
    rows = (tmp_path/'out\udcfe'/'search.csv').read_text('utf-8').splitlines()
    assert len(rows) == len(ODD) and 'two\\nlines' in ''.join(rows)
    assert (tmp_path/'out\udcfe'/'search.png').stat().st_size


@pytest.mark.parametrize('more', [{}, dict(progressive=True), dict(quality=1, optimize=True), dict(mode='L'), dict(mode='CMYK'),
    dict(exif=6), dict(exif=3), dict(xmp=6), dict(icc_profile=b'x'*9000), dict(comment=b'\xff\xda'*99), dict(format='PNG'),
    dict(format='BMP'), dict(format='WEBP'), dict(format='WEBP', exif=8), dict(format='TIFF', exif=5)])
def test_a_size_is_that_of_the_open_picture_whatever_its_head_says(more, tmp_path):
    more, f = {'format': 'JPEG'} | more, tmp_path/'a.jpg'
    im = Image.new(more.pop('mode', 'RGB'), (30, 20))
    if 'exif' in more:
        (exif := Image.Exif())[0x0112] = more['exif']
        more['exif'] = exif
    if 'xmp' in more: more['xmp'] = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>' % more['xmp'])
    im.save(f, **more)
    assert picture_size(f) == open_picture(f).size
    data = f.read_bytes()
    for n in (0, 2, 9, 20, 100, 150) if more['format'] == 'JPEG' else ():
        f.write_bytes(data[:n])
        with pytest.raises(DataError, match='a.jpg'): picture_size(f) and open_picture(f)
