"Every method from the terminal: killed, resumed, scored, searched with; on the world, a plain folder, real crops."
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

from reidlit.data.world import World

QUICK = ['--preset', 'ci', '--device', 'cpu', '--p', '4']
METHODS = {'ics': ('stage1', 'stage2'), 'crossdataset': ('sources', 'target')}


def said(*words, run=run):
    done = run(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder per person, cameras in the names."
    root = tmp_path_factory.mktemp('own')
    s = World(people=48, cameras=3, seed=1).crops('train', per_camera=3)
    for i, (p, c) in enumerate(zip(s.pids, s.camids)):
        (root/f'person {p}').mkdir(exist_ok=True)
        Image.fromarray(s.images[i]).save(root/f'person {p}'/f'c{c + 1}_{i:04}.png')
    return root


@pytest.mark.parametrize('method', METHODS)
def test_killed_training_resumes_to_the_same_model(method, folder, tmp_path):
    words = ['train', method, '--data', 'folder', '--root', folder, *QUICK]
    whole = said(*words, '--out', tmp_path/'a', run=run_alone)
    assert 'untrained: mAP' in whole and '3 cameras' in whole
    begun = subprocess.Popen([COMMAND, *map(str, words), '--out', str(tmp_path/'b')],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, end = tmp_path/'b'/METHODS[method][0]/'checkpoint.json', time.time() + 300
    while not first.exists() and begun.poll() is None and time.time() < end: time.sleep(.02)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert first.exists() and not (tmp_path/'b'/'model.safetensors').exists(), 'killed too late'
    refused = run(*words, '--out', tmp_path/'b')
    assert refused.returncode == 2 and 'holds a checkpoint' in refused.stderr
    said(*words, '--out', tmp_path/'b', '--resume', run=run_alone)
    a, b = (load_file(tmp_path/k/'model.safetensors') for k in 'ab')
    assert set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)
    scores = [json.loads((tmp_path/k/'scores.json').read_text()) for k in 'ab']
    assert scores[0]['trained'] == scores[1]['trained'] and scores[0]['paper'] == method
    scored = said('eval', tmp_path/'a')
    assert f"mAP {scores[0]['trained']['mAP']:.2%}" in scored
    found = said('search', next(folder.iterdir()), folder, '--run', tmp_path/'a', '--out', tmp_path/'s', '--top', 3)
    assert 'queries in' in found and (tmp_path/'s'/'search.png').exists()


@pytest.mark.parametrize('method', ['baseline', *METHODS])
def test_methods_on_real_crops(method, tmp_path):
    root = REAL/'market1501_dev'
    if not root.exists(): pytest.skip(f'{root} is absent')
    more = ['--epochs', 1] + (['--set', 'batches=2'] if method == 'crossdataset' else [])
    said('train', method, '--data', 'market1501', '--root', root, *QUICK, *more, '--out', tmp_path/'run')
    scored = said('eval', tmp_path/'run')
    trained = json.loads((tmp_path/'run'/'scores.json').read_text())['trained']
    assert '429 queries' in scored and f"mAP {trained['mAP']:.2%}" in scored


def test_ics_on_the_world(tmp_path):
    said('train', 'ics', '--people', 40, '--cameras', 2, '--variant', 'M3', *QUICK, '--out', tmp_path/'run')
    assert 'mAP' in said('eval', tmp_path/'run')
