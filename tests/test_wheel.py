"The installed package on its own: imports, one small main job, the command."
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np


def test_every_module_imports():
    import reidlit
    names = [m.name for m in pkgutil.walk_packages(reidlit.__path__, 'reidlit.')]
    assert len(names) >= 18
    for name in names: importlib.import_module(name)


def test_fixed_names():
    from reidlit.data.sets import market1501, mars, wildtrack
    from reidlit.data.world import World
    from reidlit.geometry import Camera, epipolar_lines, fundamental_matrix
    from reidlit.metrics.retrieval import pick_threshold, reid_scores
    a, b = World(people=10, cameras=2, seed=0).cameras
    assert isinstance(a, Camera)
    F = fundamental_matrix(a, b)
    point = np.array([0., 0., 1.])
    x1, x2 = a.project(point)[0], b.project(point)[0]
    assert abs(epipolar_lines(x1, F) @ np.append(x2, 1)) < 1e-6
    s = reid_scores(np.eye(3), np.eye(3), [1, 2, 3], [1, 2, 3], [0] * 3, [1] * 3)
    assert s.mAP == 1 and s.cmc[0] == 1 and s.skipped == 0
    assert .2 < pick_threshold([.1, .2], [.8, .9], fmr=.01).threshold <= .8
    assert callable(market1501) and callable(mars) and callable(wildtrack)


def test_training_lowers_the_loss_and_resumes(tmp_path):
    from reidlit.core import seed_all
    from reidlit.data.world import World
    from reidlit.learner import ReidLoaders, reid_learner
    from reidlit.runs import fit, load_model
    from reidlit.models import ReidModel
    train = World(people=40, cameras=3, seed=0).crops('train', per_camera=2)

    def learner():
        seed_all(0)
        dls = ReidLoaders(train, (64, 32), p=8, device='cpu')
        learn = reid_learner(dls, ReidModel('tiny', len(dls.classes)), lr=3e-3)
        learn.logger = lambda *_: None
        return learn
    with learner().no_bar() as learn:
        try: fit(learn, 3, tmp_path, {'backbone': 'tiny', 'pool': 'gap'}, stop_after=2)
        except KeyboardInterrupt: pass
    with learner().no_bar() as learn:
        fit(learn, 3, tmp_path, {'backbone': 'tiny', 'pool': 'gap'}, resume=True)
    history = learn.retrieval.history
    assert len(history) == 3 and history[2]['train_loss'] < history[0]['train_loss']
    model, _ = load_model(tmp_path, 'cpu')
    assert np.array_equal(model.neck.weight.detach(), learn.model.neck.weight.detach().cpu())


def test_command():
    command = Path(sys.executable).with_name('reidlit')
    done = subprocess.run([command, 'doctor'], capture_output=True, text=True)
    assert done.returncode == 0 and 'torch ' in done.stdout
    wrong = subprocess.run([command, 'train', 'baseline', '--data', 'moon'],
                           capture_output=True, text=True)
    assert wrong.returncode == 2 and "data 'moon'" in wrong.stderr
    assert 'Traceback' not in wrong.stderr


def test_shipped_weights_came_along():
    from reidlit.detection.detectors import to_images
    from reidlit.detection.training import base_detector
    from reidlit.runs import WEIGHTS
    from reidlit.video import reid_for
    assert list(WEIGHTS.glob('base-*.safetensors'))
    found = base_detector(device='cpu').predict(to_images(np.zeros((1, 96, 160, 3), np.uint8)))
    assert len(found) == 1
    for kind in ('people', 'vehicles'): assert 0 < reid_for(kind, 'cpu')[1] < 2


def test_type_information_came_along():
    import reidlit
    assert (Path(reidlit.__file__).parent / 'py.typed').exists()
