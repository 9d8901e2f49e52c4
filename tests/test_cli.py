"The command as a user meets it: interrupted, killed, resumed, misused."
import json
import signal
import subprocess
import time

import numpy as np
import pytest
from command import COMMAND, run, run_alone
from PIL import Image
from real import REAL
from safetensors.numpy import load_file

WORLD = ['--people', '40', '--cameras', '2', '--preset', 'ci']


def weights(folder):
    state = json.loads((folder / 'checkpoint.json').read_text())
    return state, load_file(folder / state['tensors'])


def train(folder, *more):
    return ['train', 'baseline', *WORLD, '--epochs', '6', '--device', 'cpu', '--out', str(folder), *more]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    done = run_alone(*train(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGKILL], ids=['ctrl-c', 'kill'])
def test_stopped_training_resumes_to_the_same_weights(sign, whole, tmp_path):
    folder = tmp_path / 'run'
    process = subprocess.Popen([COMMAND, *train(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    end = time.time() + 180
    while not (folder / 'checkpoint.json').exists() and process.poll() is None:
        assert time.time() < end
        time.sleep(.02)
    process.send_signal(sign)
    out, _ = process.communicate()
    done = json.loads((folder / 'checkpoint.json').read_text())['epoch']
    assert 1 <= done < 6, 'stopped too late to test anything'
    if sign == signal.SIGINT:
        assert process.returncode == 130 and '--resume' in out
    again = run(*train(folder))
    assert again.returncode == 2 and 'holds a checkpoint' in again.stderr
    more = run_alone(*train(folder, '--resume'))
    assert more.returncode == 0, more.stderr
    (a, x), (b, y) = weights(whole), weights(folder)
    assert a['history'] == b['history'] and len(a['history']) == 6
    assert set(x) == set(y) and all(np.array_equal(x[k], y[k]) for k in x)
    assert len(list(folder.glob('epoch-*.safetensors'))) == 1


def test_resume_with_other_settings_is_refused(whole):
    done = run(*train(whole, '--resume', '--lr', '.5'))
    assert done.returncode == 2 and "['lr']" in done.stderr


def test_resume_on_other_people_is_refused(whole):
    words = ['train', 'baseline', '--people', '42', *WORLD[2:], '--epochs', '6', '--out', whole, '--resume']
    done = run(*words)
    assert done.returncode == 2 and "['data']" in done.stderr and 'Traceback' not in done.stderr


def test_reproduce_adds_seeds_and_demo_writes_its_page(tmp_path):
    done = run('reproduce', 'baseline', '--preset', 'ci', '--seeds', '3', '--results', tmp_path / 'r')
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / 'r' / 'baseline-world-ci.json').read_text())
    assert stored['seeds'] == [3] and set(stored['variants']) == {'untrained', 'trained'}
    assert stored['claims'][0]['verdict'] == 'undecided', 'one seed proves nothing'
    done = run('demo', '--preset', 'ci', '--people', '60', '--out', tmp_path / 'report', '--results', tmp_path / 'r')
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'report' / 'index.html').read_text()
    assert page.count('<img') >= 9 and 'baseline-world, preset ci' in page


def test_the_installed_command(tmp_path):
    done = subprocess.run([COMMAND, 'train', 'moon'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "paper 'moon'" in done.stderr and 'Traceback' not in done.stderr


def test_broken_checkpoint_is_named(whole, tmp_path):
    (tmp_path / 'checkpoint.json').write_text((whole / 'checkpoint.json').read_text())
    done = run('eval', tmp_path)
    assert done.returncode == 2 and 'epoch-0006.safetensors' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('change', [
    lambda s: None, lambda s: [], lambda s: s | dict(tensors=3), lambda s: s | dict(settings=[]),
    lambda s: s | dict(recipe=s['recipe'] | dict(body='tiny16')), lambda s: s | dict(recipe=3),
    lambda s: s | dict(recipe=s['recipe'] | dict(body='moon')), lambda s: s | dict(epoch=float('nan')),
    lambda s: s | dict(settings=s['settings'] | dict(size='64')), lambda s: s | dict(settings={}),
    lambda s: s | dict(settings=s['settings'] | dict(data=7))])
def test_an_edited_checkpoint_is_one_line(whole, tmp_path, change):
    state, _ = weights(whole)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / state['tensors']).write_bytes((whole / state['tensors']).read_bytes())
    (tmp_path / 'run' / 'checkpoint.json').write_text(json.dumps(change(state)))
    for words in (['search', tmp_path, tmp_path], ['eval']):
        done = run(*words, *['--run'] * (words[0] == 'search'), tmp_path / 'run')
        assert done.returncode == 2 and str(tmp_path / 'run') in done.stderr and 'Traceback' not in done.stderr


def test_search_with_and_without_labels(whole, tmp_path):
    done = run('world', tmp_path / 'w', '--people', 20, '--cameras', 2)
    assert done.returncode == 0, done.stderr
    query, gallery = tmp_path / 'w' / 'query', tmp_path / 'w' / 'bounding_box_test'
    done = run('search', query, gallery, '--run', whole, '--out', tmp_path / 's', '--top', 5)
    assert done.returncode == 0 and 'right at rank 1' in done.stdout
    rows = (tmp_path / 's' / 'search.csv').read_text().splitlines()
    assert len(rows) == 1 + 5 * len(list(query.glob('*.jpg')))
    plain = tmp_path / 'plain'
    plain.mkdir()
    for i, f in enumerate(sorted(gallery.glob('*.jpg'))[:8]):
        Image.open(f).save(plain / f'visitor {i}.png')
    done = run('search', plain / 'visitor 0.png', plain, '--run', whole, '--out', tmp_path / 't')
    rows = (tmp_path / 't' / 'search.csv').read_text().splitlines()
    assert done.returncode == 0 and len(rows) == 8, 'seven others, the query itself left out'
    assert all(r.endswith(',') for r in rows[1:])


def test_plain_folder_of_people_trains(tmp_path):
    from reidlit.data.world import World
    s = World(people=60, cameras=2, seed=1).crops('train', per_camera=2)
    for i, p in enumerate(s.pids):
        (tmp_path / 'people' / str(p)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(s.images[i]).save(tmp_path / 'people' / str(p) / f'{i}.jpg')
    done = run('train', 'baseline', '--data', 'folder', '--root', tmp_path / 'people', '--preset', 'ci',
               '--epochs', 1, '--out', tmp_path / 'run')
    assert done.returncode == 0, done.stderr
    assert 'no camera ids' in done.stdout


@pytest.mark.parametrize('words, said', [
    (['train', 'baseline', '--data', 'market1501', '--root', 'nowhere'], 'nowhere: no such folder'),
    (['reproduce', 'moon'], "paper 'moon'"),
    (['reproduce', 'baseline', '--what', 'figures'], "'figures' on 'world'"),
    (['train', 'mcssl'], 'customise'), (['train', 'ics', '--variant', 'M9'], "'M9'"),
    (['train', 'ics', '--set', 'tau=.1', '--preset', 'ci'], "['tau']"),
    (['train', 'baseline', '--set', 'lr', '--preset', 'ci'], 'NAME=VALUE'),
    (['train', 'ics', '--source', 'ward=.'], 'ward'),
    (['reproduce', 'crossdataset', '--data', 'market1501', '--root', 'nowhere'], 'nowhere: no such folder'),
    (['reproduce', 'crossdataset', '--data', 'market1501', '--root', '.', '--source', 'moon=.'], "'moon=.'"),
    (['train', 'baseline', '--preset', 'huge'], 'huge'),
    (['train', 'baseline', '--device', 'cuda:99', '--people', '40', '--preset', 'ci'], 'cuda:99'),
    (['train', 'baseline', '--device', 'gpu', '--people', '40', '--preset', 'ci'], "device 'gpu'"),
    (['search', 'nowhere', 'nowhere', '--run', 'nowhere'], 'nowhere: no such file'),
    (['world', 'out', '--layout', 'moon'], "layout 'moon'"),
    (['reproduce', 'baseline', '--seeds', 'x'], '--seeds'), (['reproduce', 'baseline', '--seeds', ''], '--seeds'),
    (['reproduce', 'baseline', '--seeds', '0,x'], '--seeds'), (['reproduce', 'baseline', '--seeds', '0,1.5'], '--seeds'),
    (['train', 'baseline', '--lr', 'nan'], '--lr'), (['train', 'baseline', '--epochs', '1_0'], '--epochs'),
    (['train', 'baseline', '--seed', '٣'], '--seed'), (['train', 'baseline', '--set', 'wd=NaN', '--preset', 'ci'], 'wd nan'),
    (['train', 'baseline', '--set', 'p=3.5', '--preset', 'ci'], 'p 3.5'),
    (['train', 'baseline', '--set', 'lr=-1', '--preset', 'ci'], 'lr -1'),
    (['world', 'out', '--people', 'many'], '--people')])
def test_misuse_is_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('REIDLIT_DATA', str(tmp_path / 'data'))
    done = run(*words)
    assert done.returncode == 2 and said in done.stderr and 'Traceback' not in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not (REAL / 'market1501_dev').is_dir(), reason='no real crops at hand')
def test_real_crops_beat_chance(tmp_path):
    "One epoch of the smallest preset on real photographs: the whole path, not the score."
    done = run('train', 'baseline', '--data', 'market1501', '--root', REAL / 'market1501_dev',
               '--preset', 'ci', '--epochs', 1, '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / 'scores.json').read_text())
    assert scores['rules'][0].startswith('429 queries, 4 without a match')
    assert scores['trained']['mAP'] > scores['untrained']['mAP']
