"Reader of MSMT17: two versions, four lists, and what is broken."
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reidlit.core import DataError
from reidlit.data.readers.msmt17 import VERSIONS, msmt17, msmt17_rows, read_list

SLOTS = ['0113morning', '0113afternoon', '0114morning', '0114noon', '0302noon', '0303morning',
         '0303afternoon']


def name(pid, shot, cam=1, slot='0303morning', frame=8, box=0, ex=''):
    return f'{pid:04d}/{pid:04d}_{shot:03d}_{cam:02d}_{slot}_{frame:04d}_{box}{ex}.jpg'


def entries(people, seed):
    "Names of some pictures; every second moment has its `_ex` as well."
    r = np.random.default_rng(seed)
    for pid in range(people):
        shot = 0
        for k in range(4):
            cam, slot, frame = int(r.integers(1, 16)), SLOTS[pid % len(SLOTS)], int(r.integers(0, 1800))
            for ex in ('', '_ex')[:1+k % 2]:
                yield name(pid, shot, cam, slot, frame, k, ex), pid
                shot += 1


def write(root, version='V1', people=(6, 9), pictures=True):
    "A small set; returns its lists."
    lists = {}
    for folder, (a, b), n, seed in zip(VERSIONS[version], (('train', 'val'), ('query', 'gallery')),
                                       people, (0, 1)):
        rows = list(entries(n, seed))
        lists[b] = [o for i, o in enumerate(rows) if i % 5 in (3, 4)]
        lists[a] = [o for i, o in enumerate(rows) if i % 5 < 3]
        for o, _ in rows:
            (root/folder/o).parent.mkdir(parents=True, exist_ok=True)
            (root/folder/o).touch()
    for k, rows in lists.items():
        save(root, k, rows)
    return lists


def save(root, k, rows):
    (root/f'list_{k}.txt').write_text(''.join(f'{o} {pid}\n' for o, pid in rows))


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('inside', [False, True], ids=['itself', 'above'])
def test_both_versions(tmp_path, version, inside):
    root = tmp_path/f'MSMT17_{version}' if inside else tmp_path
    lists = write(root, version)
    s = msmt17(tmp_path)
    assert s.name == 'msmt17' and list(s) == ['train', 'query', 'gallery']
    folders = VERSIONS[version]
    for k, folder, rows in (('train', folders[0], lists['train']+lists['val']),
                            ('query', folders[1], lists['query']), ('gallery', folders[1], lists['gallery'])):
        part = s[k]
        assert [p.relative_to(root/folder).as_posix() for p in part.images] == [o for o, _ in rows]
        assert part.pids.tolist() == [pid for _, pid in rows]
        assert part.camids.tolist() == [int(o.split('_')[2])-1 for o, _ in rows]
        assert part.name == f'msmt17 {version} {k}' and not part.dropped
        assert part.tids is None and not part.junk.any() and not part.distractor.any()
        assert part.pids.dtype == part.camids.dtype == part.frames.dtype == np.int64
    assert min(s.train.pids) == min(s.query.pids) == 0


def test_train_alone(tmp_path):
    lists = write(tmp_path)
    a, b = msmt17(tmp_path), msmt17(tmp_path, 'train')
    assert len(a.train) == len(lists['train'])+len(lists['val'])
    assert b.train.images == a.train.images[:len(lists['train'])] and not b.train.dropped
    assert b.gallery.images == a.gallery.images
    for bad in ('val', 'trainval', None):
        with pytest.raises(ValueError, match=f"train={bad!r}: expected 'all' or 'train'"):
            msmt17(tmp_path, bad)


def test_frames_grow_with_time(tmp_path):
    rows = [(name(0, i, 1+i, slot, frame), 0) for i, (slot, frame) in enumerate(
        (s, f) for s in SLOTS for f in (0, 1799))]
    save(tmp_path, 'x', rows)
    s = msmt17_rows(tmp_path/'list_x.txt')
    assert (np.diff(s.frames) > 0).all()
    slot, frame = np.divmod(s.frames, 1_000_000)
    assert frame.tolist() == [0, 1799]*len(SLOTS)
    assert slot[::2].tolist() == [1130, 1132, 1140, 1141, 3021, 3030, 3032]
    assert s.camids.tolist() == list(range(len(rows)))


def test_ex_is_a_picture_of_its_own(tmp_path):
    save(tmp_path, 'x', [(name(3, 0), 3), (name(3, 1, ex='_ex'), 3)])
    s = msmt17_rows(tmp_path/'list_x.txt', tmp_path)
    assert len(s) == 2 and s.frames[0] == s.frames[1] and s.images[0] != s.images[1]


@pytest.mark.parametrize('text', ['a.jpg 0\r\nb.jpg 1\r\n', 'a.jpg 0\nb.jpg 1', 'a.jpg 0 \nb.jpg 1\n\n\n'])
def test_list_line_ends(tmp_path, text):
    (tmp_path/'l.txt').write_bytes(text.encode())
    names, numbers = read_list(tmp_path/'l.txt')
    assert names == ['a.jpg', 'b.jpg'] and numbers.tolist() == [0, 1]


@pytest.mark.parametrize('line', ['a.jpg', 'a.jpg -1', 'a.jpg 1.5', 'a.jpg x', '1', '', 'a.jpg ²', 'a.jpg\t1'])
def test_list_line_broken(tmp_path, line):
    (tmp_path/'l.txt').write_text(f'a.jpg 0\n{line}\nb.jpg 1\n')
    with pytest.raises(DataError, match='l.txt: line 2 is .*expected a picture, a space and a number') as e:
        read_list(tmp_path/'l.txt')
    assert e.value.path == tmp_path/'l.txt'


def test_list_is_no_text(tmp_path):
    (tmp_path/'l.txt').write_bytes(b'\xff\xd8\xff\xe0 1\n')
    with pytest.raises(DataError, match='l.txt: not readable .Unicode'):
        read_list(tmp_path/'l.txt')
    with pytest.raises(DataError, match='none.txt: no such file'):
        read_list(tmp_path/'none.txt')


@pytest.mark.parametrize('change, message', [
    (lambda o, p: (o.replace('_01_', '_16_'), p), 'line 2 names 0002/0002_000_16_'),
    (lambda o, p: (o.replace('_01_', '_00_'), p), 'line 2 names'),
    (lambda o, p: (o.replace('morning', 'night'), p), 'line 2 names .*0303night'),
    (lambda o, p: (o.replace('.jpg', '.jpg.jpg'), p), 'line 2 names'),
    (lambda o, p: ('../'+o, p), 'line 2 names ../0002'),
    (lambda o, p: (o.split('/')[1], p), 'line 2 names 0002_000'),
    (lambda o, p: ('0003'+o[4:], p), 'line 2: 0003/0002_000.* has number 2; expected one person'),
    (lambda o, p: (o.replace('/0002', '/0003'), p), 'line 2: 0002/0003_000.* has number 2'),
    (lambda o, p: (o, 7), 'line 2: 0002/0002_000.* has number 7')])
def test_rows_that_do_not_fit(tmp_path, change, message):
    save(tmp_path, 'x', [(name(1, 0), 1), change(name(2, 0), 2)])
    with pytest.raises(DataError, match='list_x.txt: '+message):
        msmt17_rows(tmp_path/'list_x.txt')


def test_which_version(tmp_path):
    with pytest.raises(DataError, match='nowhere: no such folder'):
        msmt17(tmp_path/'nowhere')
    with pytest.raises(DataError, match='has no train or mask_train_v2; expected folders train and test or'):
        msmt17(tmp_path)
    write(tmp_path)
    write(tmp_path, 'V2')
    with pytest.raises(DataError, match='holds train and mask_train_v2; expected one version'):
        msmt17(tmp_path)
    write(tmp_path/'above'/'MSMT17_V1')
    write(tmp_path/'above'/'MSMT17_V2', 'V2')
    with pytest.raises(DataError, match='holds MSMT17_V1/train and MSMT17_V2/mask_train_v2'):
        msmt17(tmp_path/'above')
    assert 'V2' in msmt17(tmp_path/'above'/'MSMT17_V2').train.name


def test_something_is_not_there(tmp_path):
    write(tmp_path, 'V2')
    (tmp_path/'list_val.txt').unlink()
    (tmp_path/'mask_test_v2').rename(tmp_path/'test')
    with pytest.raises(DataError, match=r'has no mask_test_v2, list_val.txt; expected folders'):
        msmt17(tmp_path)


@pytest.mark.parametrize('k, folder', [('train', 'train'), ('val', 'train'), ('query', 'test'), ('gallery', 'test')])
def test_missing_pictures(tmp_path, k, folder):
    lists = write(tmp_path)
    for i in (2, 4):
        (tmp_path/folder/lists[k][i][0]).unlink()
    with pytest.raises(DataError, match=rf'list_{k}.txt: line 3: no picture .*{lists[k][2][0]} '
                       rf'\(2 of {len(lists[k])} are missing\)'):
        msmt17(tmp_path)


def test_empty_lists(tmp_path):
    write(tmp_path)
    save(tmp_path, 'val', [])
    assert len(msmt17(tmp_path).train)
    save(tmp_path, 'query', [])
    with pytest.raises(DataError, match='list_query.txt: nothing to read'):
        msmt17(tmp_path)


def test_left_out_and_said_so(tmp_path, caplog):
    write(tmp_path)
    (tmp_path/'train'/name(0, 99)).touch()
    (tmp_path/'test'/'.DS_Store').touch()
    (tmp_path/'test'/'0000'/'._0000_000.jpg').touch()
    for train in ('all', 'train'):
        caplog.clear()
        with caplog.at_level(logging.WARNING, 'reidlit'):
            s = msmt17(tmp_path, train)
        assert s.train.dropped.reasons == {'in no list': [Path(name(0, 99)).name]}
        assert sorted(s.query.dropped.reasons['hidden file']) == ['.DS_Store', '._0000_000.jpg']
        assert not s.gallery.dropped and len(caplog.records) == 2


def test_verify(tmp_path):
    lists = write(tmp_path, people=(3, 3))
    for f in tmp_path.rglob('*.jpg'):
        Image.fromarray(np.full((12, 6, 3), 90, np.uint8)).save(f)
    assert not any(p.dropped for p in msmt17(tmp_path, verify=True).values())
    gone, broken = (tmp_path/'train'/lists['val'][0][0], tmp_path/'test'/lists['query'][1][0])
    gone.unlink()
    broken.write_bytes(broken.read_bytes()[:80])
    s = msmt17(tmp_path, verify=True)
    assert s.train.dropped.reasons == {'unreadable picture': [str(gone)]}
    assert s.query.dropped.reasons == {'unreadable picture': [str(broken)]}
    assert len(s.train) == len(lists['train'])+len(lists['val'])-1


def test_command_knows_it(tmp_path):
    write(tmp_path)
    from reidlit.data.sets import READERS, open_data, read_sources
    assert len(open_data('msmt17', tmp_path).query) == len(msmt17(tmp_path).query)
    assert list(read_sources([f'msmt17={tmp_path}'])) == ['msmt17']
    assert 'msmt17' in READERS
