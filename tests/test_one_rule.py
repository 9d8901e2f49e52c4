"One number, one rule: what `eval` says, `search` says; a broken picture, a film, a frame are named."
import os
import re
import shutil

import numpy as np
import pytest
from command import run
from PIL import Image

from reidlit import cli, learner, tracklets


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A set on disk, some of whose queries have no match, and a short run."
    t = tmp_path_factory.mktemp('rule')
    assert run('world', t/'w', '--people', 30, '--cameras', 3).returncode == 0
    for f in sorted((t/'w'/'bounding_box_test').glob('*.jpg'))[:6]:
        for other in (t/'w'/'bounding_box_test').glob(f'{f.name[:4]}_*'): other.unlink()
    words = ['--data', 'market1501', '--root', t/'w', '--preset', 'ci', '--epochs', 1, '--set', 'p=4', '--device', 'cpu']
    done = run('train', 'baseline', *words, '--out', t/'run')
    assert done.returncode == 0 and 'mirror image' in done.stdout, done.stderr
    return t


def test_search_and_eval_say_the_same(made, monkeypatch):
    seen, was = [], learner.extract_features
    for m in (cli, learner, tracklets): monkeypatch.setattr(m, 'extract_features', lambda model, s, *a, **k: (
        seen.append(len(s)), was(model, s, *a, **k))[1])
    scored = run('eval', made/'run')
    assert len(seen) == 2, 'each part once'
    found = run('search', made/'w'/'query', made/'w'/'bounding_box_test', '--run', made/'run', '--out', made/'s')
    rank1 = re.search(r'rank-1 ([\d.]+%)', scored.stdout)[1]
    asked, left = map(int, re.search(r'(\d+) queries, (\d+) without a match: left out', scored.stdout).groups())
    assert left > 0
    assert f'right at rank 1: {rank1} of {asked-left} queries, {left} without a match left out' in found.stdout
    stored = run('eval', made/'run', '--data', 'market1501', '--root', made/'w')
    assert rank1 in stored.stdout


def copy(made, tmp_path, part='bounding_box_test'):
    return shutil.copytree(made/'w'/part, tmp_path/part)


def test_a_truncated_picture_is_named_and_can_be_left_out(made, tmp_path):
    for part in ('query', 'bounding_box_test', 'bounding_box_train'):
        f = sorted(copy(made, tmp_path, part).glob('*.jpg'))[3]
        f.write_bytes(f.read_bytes()[:200])
    words = ['search', tmp_path/'query', tmp_path/'bounding_box_test', '--run', made/'run', '--out', tmp_path/'s']
    run_on = ['eval', made/'run', '--data', 'market1501', '--root', tmp_path]
    learn = ['train', 'baseline', '--data', 'market1501', '--root', tmp_path, '--preset', 'ci', '--epochs', 1,
             '--set', 'p=4', '--device', 'cpu', '--out', tmp_path/'run']
    for w, n in ((words, 2), (run_on, 2), (learn, 3)):
        done = run(*w)
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr
        assert '.jpg' in done.stderr and '--skip-broken' in done.stderr
        done = run(*w, '--skip-broken')
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('left out, not readable: ') == n
    assert run('eval', tmp_path/'run').stdout.count('left out, not readable') == 2, 'a run knows how its data were read'


def test_films_and_frames_are_named(made, tmp_path):
    (tmp_path/'films').mkdir()
    for name in ('a.mp4', 'b.AVI'): (tmp_path/'films'/name).write_bytes(b'x')
    gallery = made/'w'/'bounding_box_test'
    for q, g in ((made/'w'/'query', tmp_path/'films'), (tmp_path/'films'/'a.mp4', gallery)):
        done = run('search', q, g, '--run', made/'run', '--out', tmp_path/'s')
        assert done.returncode == 2 and 'reidlit track' in done.stderr and 'film' in done.stderr
    (tmp_path/'frames').mkdir()
    for k in range(3): Image.fromarray(np.full((108, 192, 3), 40*k, np.uint8)).save(tmp_path/'frames'/f'{k}.png')
    done = run('search', made/'w'/'query', tmp_path/'frames', '--run', made/'run', '--out', tmp_path/'s')
    assert done.returncode == 0 and 'search-frames' in done.stdout and '192 x 108' in done.stdout
    done = run('search', made/'w'/'query', gallery, '--run', made/'run', '--out', tmp_path/'s')
    assert 'search-frames' not in done.stdout


def test_a_pipe_and_a_bomb_among_crops_are_named(made, tmp_path):
    "A pipe would be waited for; Pillow has an error of its own for a picture that unpacks to gigabytes."
    for name, make in (('a.jpg', os.mkfifo), ('b.png', lambda f: Image.new('1', (20000, 20000)).save(f))):
        shutil.copytree(made/'w'/'query', tmp_path/'g', dirs_exist_ok=True)
        make(tmp_path/'g'/name)
        words = 'search', made/'w'/'query', tmp_path/'g', '--run', made/'run', '--out', tmp_path/'s'
        done = run(*words)
        assert done.returncode == 2 and name in done.stderr and 'Traceback' not in done.stderr, done.stderr
        done = run(*words, '--skip-broken')
        assert done.returncode == 0 and f'g/{name}' in done.stdout
        (tmp_path/'g'/name).unlink()


@pytest.fixture(scope='module')
def named(made, tmp_path_factory):
    "The same crops, in a subfolder a person with a camera in each name, in another spelling."
    t = tmp_path_factory.mktemp('named')
    for part in ('query', 'bounding_box_test'):
        for f in sorted((made/'w'/part).glob('[0-9]*.jpg')):
            pid, cam = re.match(r'(\d+)_c(\d)', f.name).groups()
            to = t/part/f'person {pid}'/f'door{cam} {f.stem[5:]}.jpg'
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f, to)
    return t


def test_a_pattern_finds_people_and_cameras(made, named, tmp_path):
    search = lambda *more: run('search', named/'query', named/'bounding_box_test', '--run', made/'run', '--out',
                               tmp_path/'s', *more)
    whole = run('search', made/'w'/'query', made/'w'/'bounding_box_test', '--run', made/'run', '--out', tmp_path/'t')
    line = lambda done: next(o for o in done.stdout.splitlines() if o.startswith('right at'))
    assert line(search('--pattern', r'(?P<pid>[^/]+)/door(?P<camid>\d).*')) == line(whole)
    assert "no camera ids: pictures from the query's own camera count" in line(search())
    for pattern, said in ((r'(?P<pid>\d+)\.jpg', r'(?P<pid>\d+)\.jpg'), ('(', 'pattern'), ('(?P<age>.*)', 'age')):
        done = search('--pattern', pattern)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count('\n') == 1, done.stderr
    done = run('train', 'baseline', '--data', 'folder', '--root', named/'bounding_box_test', '--preset', 'ci', '--epochs', 1,
               '--set', 'p=2', '--device', 'cpu', '--out', tmp_path/'run', '--pattern', r'(?P<pid>[^/]+)/door(?P<camid>\d).*')
    assert done.returncode == 0 and '3 cameras' in done.stdout, done.stderr
    again = run('eval', tmp_path/'run')
    assert again.returncode == 0 and 'same person in the same camera' in again.stdout
    done = run('eval', tmp_path/'run', '--data', 'market1501', '--root', made/'w', '--pattern', '(?P<pid>.)')
    assert done.returncode == 2 and "only for data 'folder'" in done.stderr
