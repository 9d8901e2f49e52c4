"`reidlit customise` on folders that the world wrote, and on folders that are broken."
import shutil

import pytest

from reidlit.cli import main
from reidlit.data import writers
from reidlit.data.sets import write_cityflow, write_multiviewx
from reidlit.data.world import World
from reidlit.detection.detectors import load_detector
from reidlit.runs import WEIGHTS

WRITE = dict(wildtrack=writers.write_wildtrack, multiviewx=write_multiviewx)


@pytest.fixture(scope='module', params=list(WRITE))
def network(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / 'set'
    world = World(20, 2, 0, 'plaza', crowd=10, size=(320, 180))
    return request.param, WRITE[request.param](world, out, times=range(0, 40, 5))


def test_a_written_folder_gives_a_detector(network, tmp_path, capsys):
    data, root = network
    words = ['customise', '--data', data, '--root', str(root), '--camera', 'C1', '--preset', 'ci',
             '--device', 'cpu', '--out', str(tmp_path / 'run')]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert 'after geometry' in said and 'base: AP' in said and 'custom: AP' in said
    made = load_detector(tmp_path / 'run' / 'detector.safetensors', 'cpu')
    assert made.info['camera'] == 'C1'
    assert main(words) == 2 and 'not empty' in capsys.readouterr().err
    assert main([*words, '--resume']) == 0


def test_a_missing_calibration_is_named(network, tmp_path, capsys):
    data, root = network
    broken = shutil.copytree(root, tmp_path / 'broken')
    file = next((broken / 'calibrations').rglob('extr_*.xml'))
    file.write_text('not xml')
    words = ['customise', '--data', data, '--root', str(broken), '--camera', 'C1', '--preset', 'ci']
    assert main(words) == 2 and file.name in capsys.readouterr().err
    file.unlink()
    assert main(words) == 2 and 'extr_' in capsys.readouterr().err


@pytest.mark.parametrize('words,said', [
    (['--camera', 'C9'], "'C9': expected C1 to C2"), (['--camera', 'left'], "'left'"),
    (['--camera', 'C1', '--others', 'C1,C7'], "'C7'"),
    (['--camera', 'C1', '--detector', 'none.safetensors'], 'none.safetensors')])
def test_misuse_is_one_line(network, words, said, capsys):
    data, root = network
    assert main(['customise', '--data', data, '--root', str(root), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and 'Traceback' not in err


def test_unknown_data_and_weights(tmp_path, capsys):
    assert main(['customise', '--data', 'moon', '--root', str(tmp_path), '--camera', 'C1']) == 2
    assert "'moon'" in capsys.readouterr().err
    assert main(['make', 'nothing']) == 2 and "'nothing'" in capsys.readouterr().err
    assert main(['reproduce', 'mcssl', '--data', 'market1501', '--root', str(tmp_path)]) == 2
    assert 'pets2009' in capsys.readouterr().err


def test_vehicles_whose_cameras_start_late(tmp_path, capsys):
    world = World(12, 3, 0, 'plaza', 'vehicles', size=(160, 96), crowd=8)
    root = write_cityflow(world, tmp_path / 'road', times=range(0, 40, 2), late=[0, 2, 1], video=False)
    words = ['customise', '--data', 'cityflow', '--root', str(root), '--camera', 'C1', '--preset', 'ci',
             '--device', 'cpu', '--detector', str(next(WEIGHTS.glob('base-*people*')))]
    assert main([*words, '--out', str(tmp_path / 'run')]) == 0
    assert 'moments left out' in capsys.readouterr().out
    for file in root.rglob('calibration.txt'):
        file.write_text('\n'.join(o for o in file.read_text().splitlines() if o.startswith('Homography')))
    for note in root.rglob('reidlit.json'): note.unlink()
    assert main([*words, '--out', str(tmp_path / 'other')]) == 2
    err = capsys.readouterr().err
    assert 'calibrat' in err and 'Traceback' not in err


@pytest.mark.parametrize('words,said', [(['--kind', 'dogs'], "'dogs'"), (['--preset', 'moon'], "'moon'")])
def test_make_names_what_it_does_not_know(words, said, capsys):
    assert main(['make', 'base', *words]) == 2 and said in capsys.readouterr().err
