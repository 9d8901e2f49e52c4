"Two processes at once, and processes that are killed: nothing is lost, nothing stays in the way."
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command import COMMAND, run
from safetensors.numpy import load_file

from reidlit.core import DataError, locked, write_atomic
from reidlit.data.world import World
from reidlit.data.writers import save_picture, write_wildtrack, writing
from reidlit.experiments import add_seed, read_result

TRAIN = ['train', 'baseline', '--people', 40, '--cameras', 2, '--preset', 'ci', '--epochs', 4, '--device', 'cpu', '--out']


def _add(path, seed): add_seed(path, 'x', 'ci', seed, dict(A=dict(mAP=seed/8)))


def test_eight_processes_lose_no_seed(tmp_path):
    f, context = tmp_path/'x.json', multiprocessing.get_context('fork')
    all_ = [context.Process(target=_add, args=(f, s)) for s in range(8)]
    for p in all_: p.start()
    for p in all_: p.join()
    assert [p.exitcode for p in all_] == [0]*8
    r = read_result(f)
    assert r['seeds'] == list(range(8)) and r['variants']['A']['mAP'] == [s/8 for s in range(8)]


def test_a_second_training_is_one_line_and_a_killed_one_holds_nothing(tmp_path):
    folder = tmp_path/'run'
    first = subprocess.Popen([COMMAND, *map(str, TRAIN), folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time()+180
    while not (folder/'.model.safetensors.lock').exists():
        assert first.poll() is None and time.time() < end
        time.sleep(.02)
    first.send_signal(signal.SIGSTOP)  # as slow as can be
    for more in ([], ['--resume']):
        second = run(*TRAIN, folder, *more)
        assert second.returncode == 2 and 'is being written by another process' in second.stderr
        assert str(folder) in second.stderr and second.stderr.count('\n') == 1
    first.send_signal(signal.SIGKILL)
    first.wait()
    begun = (folder/'checkpoint.json').exists()
    third = run(*TRAIN, folder, '--resume')
    assert third.returncode == 0, third.stderr
    assert f"{folder}: {'goes on' if begun else 'no checkpoint to go on from, begins anew'}" in third.stdout


SLOW = """
import os, sys, time
from pathlib import Path
from reidlit import core
def wait(fd): Path(sys.argv[1]+'.ready').touch(); time.sleep(60)
os.fsync = wait
core.write_atomic(sys.argv[1], b'new')
"""


def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path):
    f = write_atomic(tmp_path/'a.json', b'old')
    child = subprocess.Popen([sys.executable, '-c', SLOW, str(f)])
    end = time.time()+60
    while not (tmp_path/'a.json.ready').exists(): assert time.time() < end; time.sleep(.02)
    left = [o for o in os.listdir(tmp_path) if o.startswith('.a-')]
    assert len(left) == 1
    write_atomic(f, b'between')
    assert (tmp_path/left[0]).exists(), 'its writer lives'
    child.kill()
    child.wait()
    assert f.read_bytes() == b'between'
    write_atomic(f, b'after')
    assert sorted(os.listdir(tmp_path)) == ['a.json', 'a.json.ready'] and f.read_bytes() == b'after'


def _full(*_, **__): raise OSError(28, 'No space left on device')


def test_a_full_disk_names_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr('os.fsync', _full)
    done = run(*TRAIN, tmp_path/'run')
    assert done.returncode == 2 and 'No space left on device' in done.stderr and str(tmp_path/'run') in done.stderr
    monkeypatch.undo()
    monkeypatch.setattr('PIL.Image.Image.save', _full)
    with pytest.raises(OSError, match='set'), writing(tmp_path/'set', 'x') as half:
        save_picture(np.zeros((2, 2, 3), np.uint8), half/'a.png')


def test_a_customised_camera_is_the_same_wherever_it_was_stopped(tmp_path):
    root = write_wildtrack(World(12, 2, 0, 'plaza', crowd=8, size=(320, 180)), tmp_path/'set', times=range(0, 20, 5))
    words = lambda out: ['customise', '--root', root, '--camera', 'C1', '--preset', 'ci', '--device', 'cpu',
                         '--out', tmp_path/out]
    assert run(*words('warm')).returncode == 0
    start = time.time()
    assert run(*words('whole')).returncode == 0
    took, whole = time.time()-start, load_file(tmp_path/'whole'/'detector.safetensors')
    def stop(*_): raise KeyboardInterrupt
    was = signal.signal(signal.SIGALRM, stop)
    try:
        for k, part in enumerate(np.random.default_rng(0).uniform(.05, .95, 3)):
            signal.setitimer(signal.ITIMER_REAL, part*took)
            done = run(*words(f'run{k}'))
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert done.returncode in (130, 0), done.stderr
            again = run(*words(f'run{k}'), '--resume')
            assert again.returncode == 0, again.stderr
            assert 'goes on' in again.stdout or 'begins anew' in again.stdout
            made = load_file(tmp_path/f'run{k}'/'detector.safetensors')
            assert set(made) == set(whole) and all(np.array_equal(made[n], whole[n]) for n in whole), part
            assert not [o for o in (tmp_path/f'run{k}').rglob('.*') if o.suffix != '.lock']
    finally: signal.signal(signal.SIGALRM, was)


def test_a_busy_file_is_named(tmp_path):
    with locked(tmp_path/'x.json'), pytest.raises(DataError, match='x.json: is being written'):
        with locked(tmp_path/'x.json', .1): pass
