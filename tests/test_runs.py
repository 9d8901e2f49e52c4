"Files of networks: old ones, foreign ones, and runs that were made before 0.2."
import json
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reidlit.baseline import baseline_learner, baseline_settings
from reidlit.core import DataError
from reidlit.crossdataset import EmbeddingNet
from reidlit.data.world import World
from reidlit.ics import CameraMemory, IcsModel
from reidlit.learner import quiet
from reidlit.models import ReidModel
from reidlit.runs import build_model, fit, load_model, make_settings, save_model, shipped
from reidlit.video import VideoReid

NETWORKS = dict(reid=lambda: ReidModel('tiny', 5, 'gem'), embedding=lambda: EmbeddingNet('tiny16', 8, 4),
                video=lambda: VideoReid('tiny16', 3, hidden=8, pool='gem'))


@pytest.mark.parametrize('kind', NETWORKS)
def test_a_network_comes_back_without_its_heads(kind, tmp_path):
    net = NETWORKS[kind]().eval()
    f = save_model(net, tmp_path/'x.safetensors', note=[1, 2])
    back, info = load_model(f, 'cpu')
    assert type(back) is type(net) and info == dict(note=[1, 2]) and not back.training
    x = torch.randn(2, 3, 64, 32)
    assert torch.equal(back(x), net(x))
    assert getattr(back, 'classifier', None) is None


def test_ics_is_kept_as_what_searches(tmp_path):
    net = IcsModel('tiny', CameraMemory([0, 1], 16)).eval()
    back, _ = load_model(save_model(net, tmp_path/'x.safetensors'), 'cpu')
    x = torch.randn(2, 3, 64, 32)
    assert type(back) is ReidModel and torch.equal(back(x), net(x))


def old_run(folder, settings, model):
    folder.mkdir()
    save_file({f'model.{k}': v for k, v in model.state_dict().items()}, folder/'epoch-0001.safetensors')
    (folder/'checkpoint.json').write_text(json.dumps(dict(tensors='epoch-0001.safetensors', epoch=1, history=[],
                                                          settings=settings, optimiser=[])))
    return folder


def test_run_folders_without_a_recipe(tmp_path):
    net = ReidModel('tiny', 4).eval()
    back, s = load_model(old_run(tmp_path/'a', dict(backbone='tiny', pool='gap', size=[64, 32]), net), 'cpu')
    x = torch.randn(2, 3, 64, 32)
    assert torch.equal(back(x), net(x)) and s['size'] == [64, 32]
    with pytest.raises(DataError, match='not a model that this version knows'):
        load_model(old_run(tmp_path/'b', dict(backbone='tiny', pool='gap'), EmbeddingNet('tiny', 8, 4)), 'cpu')


@pytest.mark.parametrize('where', ['os:system', 'reidlit.core:seed_all', 'reidlit.models:load_backbones',
                                   'reidlit.nowhere:x', 'reidlit:', '', 'builtins:eval'])
def test_a_recipe_names_networks_only(where):
    with pytest.raises((ValueError, ImportError)): build_model(dict(model=where))


def test_foreign_files_are_named(tmp_path):
    f = tmp_path/'x.safetensors'
    save_file({'a': torch.zeros(2)}, f)
    with pytest.raises(DataError, match='x.safetensors: not a model'): load_model(f)
    text = json.dumps(dict(recipe=dict(model='os:system', command='x'), info={}))
    save_file({'a': torch.zeros(2)}, f, dict(reidlit=text))
    with pytest.raises(DataError, match='x.safetensors: not a model'): load_model(f)
    with pytest.raises(ValueError, match='no recipe'): save_model(nn.Linear(1, 1), f)


def test_settings_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"unknown settings \['b'\]"): make_settings({}, dict(ci=dict(a=1)), 'ci', b=2)
    with pytest.raises(ValueError, match='huge'): make_settings({}, dict(ci={}), 'huge')


def test_shipped_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv('REIDLIT_DATA', str(tmp_path))
    monkeypatch.setattr('reidlit.runs.WEIGHTS', tmp_path/'package')
    made = []
    def make(path): made.append(path); path.parent.mkdir(parents=True); path.write_text('x'); return path
    assert shipped('n', make, 'ci') == shipped('n', make, 'ci') == tmp_path/'models'/'ci'/'n' and len(made) == 1
    (tmp_path/'package').mkdir()
    (tmp_path/'package'/'n').write_text('y')
    assert shipped('n', make, 'ci') == tmp_path/'package'/'n'


def test_names_of_before_work_and_say_where_they_are():
    sys.modules.pop('reidlit.memory', None) # a module warns once
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        from reidlit.ics import PAPER, SETTINGS
        from reidlit.learner import baseline_settings, fit_resumable
        from reidlit.memory import CameraMemory as old
        from reidlit.video import cut_films
    assert old is CameraMemory and PAPER['k'] == 4 and SETTINGS and fit_resumable and baseline_settings and cut_films
    text = ' '.join(str(w.message) for w in said)
    for place in ('reidlit.camera_memory', 'reidlit.runs.fit', 'reidlit.ics.PUBLISHED', 'reidlit.video.cut_clips'):
        assert place in text


def test_a_run_does_not_go_on_with_other_people(tmp_path):
    s = baseline_settings('drawn', 'ci', p=4, epochs=2)
    few, more = (World(people=n, cameras=2, seed=1).crops('train', 2) for n in (12, 16))
    with quiet():
        with pytest.raises(KeyboardInterrupt): fit(baseline_learner(few, None, None, s, 'cpu'), 2, tmp_path, s, stop_after=1)
        with pytest.raises(DataError, match='checkpoint.json: is of another network or other people'):
            fit(baseline_learner(more, None, None, s, 'cpu'), 2, tmp_path, s, resume=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_resuming_on_a_gpu_differs_as_equal_runs_do(tmp_path):
    train = World(20, 2, 1).crops('train', per_camera=3, size=(64, 32))
    s = baseline_settings('drawn', 'ci', p=4, epochs=4)

    def run(folder, stop=None, resume=False):
        with quiet(): learn = baseline_learner(train, None, None, s, 'cuda')
        try: fit(learn, 4, folder, s, resume, stop)
        except KeyboardInterrupt: return run(folder, resume=True)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    a, b, c = run(None), run(None), run(tmp_path, stop=2)
    assert (a-c).abs().max() <= 10*(a-b).abs().max() + 1e-4
