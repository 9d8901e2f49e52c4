"Films: reading by number, what is broken, folders, writing in one step, boxes on pictures."
import logging
import multiprocessing
import os
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from reidlit.core import DataError, Dropped
from reidlit.data.world import World
from reidlit.films import (Film, annotate, even_step, film_folder, film_world,
                           paint_boxes, write_film)
from reidlit.viz import identity_color


def greys(n=12, size=(16, 32)): return [np.full((*size, 3), 20*(k % 12), np.uint8) for k in range(n)]


def level(film_and_number):
    film, i = film_and_number
    return float(film[i].mean())


def test_pictures_by_number(tmp_path):
    film = Film(write_film(tmp_path/'v.avi', greys()))
    for i in (3, 3, 4, 0, 11, 1): assert abs(film[i].mean() - 20*i) < 3
    film[5][:] = 0
    assert film[5].mean() > 90
    with multiprocessing.get_context('fork').Pool(2) as pool:
        out = pool.map(level, [(film, i) for i in (9, 2, 7, 0)])
    np.testing.assert_allclose(out, [180, 40, 140, 0], atol=3)
    copy = pickle.loads(pickle.dumps(film))
    np.testing.assert_array_equal(copy[6], film[6])
    with pytest.raises(IndexError): film[-1]
    assert len(list(film)) == 12  # A film is a sequence
    with pytest.raises(DataError, match='no.avi: no such file'): Film(tmp_path/'no.avi')


@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='no /proc')
def test_a_list_of_films_holds_no_file_open(tmp_path):
    write_film(tmp_path/'v.avi', greys(3))
    Film(tmp_path/'v.avi')
    held = len(os.listdir('/proc/self/fd'))
    films = [Film(tmp_path/'v.avi') for _ in range(20)]
    assert len(os.listdir('/proc/self/fd')) == held and films[7][2].shape == (16, 32, 3)


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    "A film of noise and its bytes; picture k begins at `starts[k]`."
    r = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    path = write_film(tmp_path_factory.mktemp('noise')/'n.avi', [r+np.uint8(k) for k in range(20)])
    data = path.read_bytes()
    return data, [m.start() for m in re.finditer(b'\xff\xd8\xff', data)]


@pytest.mark.parametrize('which', [[7], [0, 1], [19], [3, 4, 5, 18]])
def test_undecodable_pictures_keep_their_numbers(tmp_path, noise, which, caplog):
    data, starts = bytearray(noise[0]), noise[1]
    for k in which: data[starts[k]:starts[k]+900] = bytes(900)
    (tmp_path/'bad.avi').write_bytes(data)
    (tmp_path/'good.avi').write_bytes(noise[0])
    bad, good = Film(tmp_path/'bad.avi'), Film(tmp_path/'good.avi')
    with caplog.at_level(logging.WARNING, 'reidlit'): there = dict(bad.numbered())
    assert sorted(there) == [k for k in range(20) if k not in which] and bad.unread == which
    assert f'{len(which)} of 20 pictures cannot be read, first {which[0]}' in caplog.text
    for k in there: np.testing.assert_array_equal(there[k], good[k])
    filled = list(bad.filled())
    assert len(filled) == 20
    for k in range(20):
        if k in which: np.testing.assert_array_equal(filled[k], filled[k-1] if k else 0*filled[0])
    with pytest.raises(DataError, match=f'picture {which[0]} cannot be read'): bad[which[0]]
    np.testing.assert_array_equal(bad[12], good[12])


def test_broken_off_and_not_films(tmp_path, noise):
    data = noise[0]
    (tmp_path/'cut.avi').write_bytes(data[:len(data)//2])
    cut = Film(tmp_path/'cut.avi')
    n = len(list(cut.numbered()))
    assert 5 < n < 15 and cut.unread == list(range(n, 20)) and len(list(cut.filled())) == 20
    whole = write_film(tmp_path/'w.mp4', greys(30, (48, 64)))
    (tmp_path/'cut.mp4').write_bytes(whole.read_bytes()[:-900])
    for name, content in (('empty.avi', b''), ('text.mp4', b'hello'), ('random.avi', bytes(range(256))*9),
                          ('boxes.mp4', b'1,-1,281,187,79,209,.99\n'*300)):
        (tmp_path/name).write_bytes(content)
    for name in ('empty.avi', 'text.mp4', 'random.avi', 'cut.mp4', 'boxes.mp4'):
        with pytest.raises(DataError, match=f'{name}: not a video'): Film(tmp_path/name)
    with pytest.raises(DataError, match='no such file'): Film(tmp_path)
    films = film_folder(tmp_path, d := Dropped())
    assert [f.path.name for f in films] == ['cut.avi', 'w.mp4']
    assert sorted(d.reasons['not a video']) == ['boxes.mp4', 'cut.mp4', 'empty.avi', 'random.avi', 'text.mp4']


def test_silent_about_broken_films(tmp_path, noise, capfd):
    "FFmpeg itself writes nothing to the terminal."
    data = bytearray(noise[0])
    data[noise[1][7]:noise[1][7]+900] = bytes(900)
    (tmp_path/'bad.avi').write_bytes(data)
    assert len(list(Film(tmp_path/'bad.avi').numbered())) == 19
    assert capfd.readouterr() == ('', '')


def test_folder(tmp_path):
    (tmp_path/'a'/'deep').mkdir(parents=True)
    for name in ('b.MP4', 'a/deep/c.avi', 'a/x.avi'):
        write_film(tmp_path/name, greys(2, (16, 16)))
    (tmp_path/'notes.txt').touch()
    (tmp_path/'.hidden.avi').touch()
    films = film_folder(tmp_path, d := Dropped())
    assert [f.path.relative_to(tmp_path).as_posix() for f in films] == ['a/deep/c.avi', 'a/x.avi', 'b.MP4']
    assert d.reasons == {'hidden file': ['.hidden.avi'], 'not a film': ['notes.txt']}
    with pytest.raises(DataError, match='no films.*notes.txt'):
        for f in films: f.path.unlink()
        film_folder(tmp_path)


@pytest.mark.parametrize('name, size, rate, back', [
    ('a.avi', (17, 33), 10, (33, 17)), ('a.mp4', (17, 33), 10, (34, 18)), ('a.mp4', (16, 32), 29.97, (32, 16)),
    ('a.mp4', (16, 32), .5, (32, 16))])
def test_written_films_come_back(tmp_path, name, size, rate, back):
    f = Film(write_film(tmp_path/'new'/name, iter(greys(9, size)), rate))
    assert (len(f), f.size) == (9, back) and f.rate == pytest.approx(rate, abs=1e-3)
    np.testing.assert_allclose([im.mean() for _, im in f.numbered()], 20*np.arange(9), atol=4)
    assert [p.name for p in (tmp_path/'new').iterdir()] == [name]


def test_colours_come_back(tmp_path):
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    for name in ('r.avi', 'r.mp4'):
        im = Film(write_film(tmp_path/name, [red]*3))[1].reshape(-1, 3).mean(0)
        np.testing.assert_allclose(im, [200, 0, 0], atol=8)


def test_a_failed_write_leaves_the_old_film(tmp_path):
    old = write_film(tmp_path/'v.avi', greys(5)).read_bytes()
    def fails():
        yield greys(1)[0]
        raise RuntimeError('camera gone')
    for frames, error in ((fails(), RuntimeError), ([greys(1)[0], np.zeros((3, 3, 3), np.uint8)], ValueError)):
        with pytest.raises(error): write_film(tmp_path/'v.avi', frames)
    assert (tmp_path/'v.avi').read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2.VideoWriter, 'isOpened', lambda self: False)
    with pytest.raises(DataError, match='cannot write .mp4 as mp4v'): write_film(tmp_path/'v.mp4', greys(2))
    assert not list(tmp_path.iterdir())


def test_film_of_a_world(tmp_path):
    w = World(people=10, cameras=1, seed=1, size=(96, 64), crowd=4)
    f = Film(film_world(w, 0, tmp_path/'w.mp4', range(10, 40, 4)))
    assert (len(f), f.size) == (8, (96, 64)) and f.rate == pytest.approx(2.5)
    assert np.abs(f[3].astype(float)-w.frame(0, 22)).mean() < 8
    for times in ([], [3, 1], [1, 2, 4]):
        with pytest.raises(ValueError, match='not evenly spaced'): even_step(times)


def test_painted_boxes():
    im = np.full((30, 40, 3), 100, np.uint8)
    out = paint_boxes(im, [[5, 6, 15, 20], [20, -9, 99, 99]], [3, 4], 1)
    color = [int(identity_color(3)[i:i+2], 16) for i in (1, 3, 5)]
    assert (out[18, 5] == color).all() and (out[18, 14] == color).all() and (out[18, 15] != color).any()
    assert (im == 100).all() and out.dtype == np.uint8
    for bad, words in (([[5, 6, 1, 20]], 'box 0'), ([[5, 6, np.inf, 20]], 'box 0')):
        with pytest.raises(ValueError, match=words): paint_boxes(im, bad)
    with pytest.raises(ValueError, match='frame'): paint_boxes(im[..., 0], [])
    with pytest.raises(ValueError, match='whole numbers'): paint_boxes(im, [[1, 2, 3, 4]], [.5])
    shown = list(annotate([im]*2, [([], []), ([[5, 6, 15, 20]], [3])]))
    assert (shown[0] == 100).all() and (shown[1] != 100).any()
    with pytest.raises(ValueError): list(annotate([im], []))
