"`reidlit customise` on folders that the world wrote, and on folders that are broken."
import json
import shutil

import numpy as np
import pytest
from real import REAL

from reidlit.cli import main
from reidlit.data import writers
from reidlit.data.sets import FrameSet, pets_frames, write_cityflow, write_multiviewx
from reidlit.data.world import World
from reidlit.detection.detectors import load_detector
from reidlit.detection.training import HEIGHT, network_size
from reidlit.films import film_world
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


@pytest.fixture(scope='module')
def park(tmp_path_factory):
    "PETS's form, with the films of two of three views."
    root, rig = tmp_path_factory.mktemp('pets'), {}
    world = World(20, 3, 0, 'plaza', crowd=10, size=(320, 180))
    (root / 'detections').mkdir()
    for c, cam in enumerate(world.cameras):
        found = [world.boxes(c, t) for t in range(8)]
        rig[name := f'View_00{c+1}'] = dict(K=cam.K.tolist(), R=cam.R.tolist(), t=(1000*cam.t).tolist(), size=cam.size)
        (root / 'detections' / f'{name}.json').write_text(json.dumps(dict(
            bboxes=[b.clipped.tolist() for b in found], scores=[b.visible.tolist() for b in found])))
        if c != 1: film_world(world, c, root / f'{name}.avi', range(8))
    (root / 'calibration.json').write_text(json.dumps(rig))
    return root


def test_pets_is_offered(park, tmp_path, capsys):
    words = ['customise', '--data', 'pets2009', '--camera', 'C2', '--preset', 'ci', '--device', 'cpu']
    assert main([*words, '--root', str(park), '--out', str(tmp_path / 'run')]) == 0
    said = capsys.readouterr().out
    assert 'pets2009 train: 14 pictures' in said and 'custom: AP' in said
    alone = shutil.copytree(park, tmp_path / 'alone')
    (alone / 'View_003.avi').unlink()
    assert main([*words, '--root', str(alone), '--out', str(tmp_path / 'one')]) == 2
    assert 'frames of one camera; expected two' in capsys.readouterr().err


def test_pets_names_size_and_film_that_differ(park, tmp_path):
    root = shutil.copytree(park, tmp_path / 'p')
    rig = json.loads((root / 'calibration.json').read_text())
    for change, text in ((dict(size=[640, 360]), '640x360, but View_001.avi is 320x180'),
                         (dict(K=(2*np.array(rig['View_001']['K'])/[[1], [1], [2]]).tolist()),
                          'K is of pictures of about 638x358, these are 320x180'),
                         (dict(dist=[1e308, 0, 0, 0, 0]), 'View_001: dist is not finite, or above'),
                         (dict(dist=[0]*3), '3 coefficients')):
        (root / 'calibration.json').write_text(json.dumps(rig | dict(View_001=rig['View_001'] | change)))
        with pytest.raises(ValueError, match=text): pets_frames(root)
    (root / 'calibration.json').write_text(json.dumps({'../View_001': rig['View_001']}))
    with pytest.raises(ValueError, match="calibration.json: names '../View_001.avi'"): pets_frames(root)


def test_size_by_height(tmp_path):
    "Wide frames of small people stay as they are: at half their size they would vanish."
    def frames(height, size=(1080, 1920)):
        return FrameSet([np.zeros((*size, 3), np.uint8)], [0], [0], [0], [[0, 0, 9, height]], None)
    assert network_size(frames(40, (576, 768))) is None and network_size(frames(71)) is None
    assert network_size(frames(142)) == (540, 960) and network_size(frames(284)) == (270, 480)
    assert network_size(frames(62), HEIGHT['vehicles']) == (540, 960)


@pytest.mark.skipif(not (REAL / 'pets2009_s2l1').exists(), reason='no PETS here')
def test_real_pets_keeps_its_size():
    s = pets_frames(REAL / 'pets2009_s2l1')
    assert network_size(s.train) is None and len(s.train) + len(s.test) == 795


def test_a_base_detector_that_finds_nothing_is_reported(network, tmp_path, capsys, caplog):
    "People's detector, shown boxes that hold nobody."
    data, root = network
    if data != 'wildtrack': pytest.skip('one set is enough')
    other = shutil.copytree(root, tmp_path / 'o')
    for f in (other / 'annotations_positions').iterdir():
        people = json.loads(f.read_text())
        for v in [v for p in people for v in p['views'] if v['xmax'] > 0]: v.update(xmax=v['xmin'] + 2, ymax=v['ymin'] + 60)
        f.write_text(json.dumps(people))
    assert main(['customise', '--data', data, '--root', str(other), '--camera', 'C1', '--preset', 'ci', '--device', 'cpu',
                 '--out', str(tmp_path / 'run')]) == 0
    assert 'the base detector finds next to nothing (AP50 0.0' in caplog.text
