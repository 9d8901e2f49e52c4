"What a fastai user calls, on the package's learners: each call of docs/fastai.md."
import subprocess
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.interpret import Interpretation
from fastai.learner import load_learner
from fastai.torch_core import trainable_params
from PIL import Image

from reidlit import crossdataset, ics, video
from reidlit.baseline import baseline_learner, baseline_settings, fit_baseline
from reidlit.core import DataError, ReidSet, seed_all
from reidlit.data.world import World
from reidlit.detection.detectors import faster_rcnn
from reidlit.detection.training import detect, detector_learner, world_frames
from reidlit.learner import ReidLoaders, SampledLoader, extract_features, quiet, reid_learner
from reidlit.models import ReidModel
from reidlit.runs import StopAfter, fit

pytestmark = pytest.mark.filterwarnings('ignore')
SIZE = (64, 32)


@pytest.fixture(scope='module')
def world(): return World(people=32, cameras=3, seed=3)


@pytest.fixture(scope='module')
def data(world): return world.crops('train', per_camera=3, size=SIZE), *world.query_gallery('test', size=SIZE)


@pytest.fixture
def learn(data, tmp_path):
    train, query, gallery = data
    dls = ReidLoaders(train, SIZE, 8, query=query, gallery=gallery, device='cpu', path=tmp_path)
    with quiet(): return reid_learner(dls, 'tiny16', lr=3e-3)


def settings(module, **more):
    make = module.ics_settings if module is ics else module.embedding_settings
    return make('drawn', 'ci', p=4, **more)


def test_two_loaders(learn, data):
    assert learn.dls.valid is not learn.dls.train and len(learn.dls.valid_ds) == len(data[1]) + len(data[2])
    learn.fit(1)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'mAP', 'rank1', 'time']


def export(learn, features, tmp_path):
    "Features before and after `export` and `load_learner`; training goes on after."
    learn.path = tmp_path
    with learn.no_bar(): learn.fit(1)
    before = features(learn)
    learn.export('it.pkl')
    again = load_learner(tmp_path/'it.pkl')
    assert torch.equal(features(again), before)
    assert (tmp_path/'it.pkl').stat().st_size < 2*sum(p.nbytes for p in learn.model.state_dict().values()) + 1e5, \
        'the pictures went along'
    with learn.no_bar(): learn.fit(1)
    return again


def test_export_baseline(learn, data, tmp_path):
    again = export(learn, lambda l: l.features(data[1]), tmp_path)
    assert torch.equal(again.predict(data[1].images), again.features(data[1]))
    assert len(again.get_preds(dl=again.dls.test_dl(data[1].images))[0]) == len(data[1])


@pytest.mark.parametrize('variant', ['M1', 'M5', 'M8'])
def test_export_ics(variant, data, tmp_path):
    with quiet(): learn = ics.ics_learner(data[0], variant, settings(ics), device='cpu')
    export(learn, lambda l: l.features(data[1]), tmp_path)


def test_export_embedding(data, tmp_path):
    with quiet(): learn = crossdataset.embedding_learner([data[0]], settings=settings(crossdataset), device='cpu')
    export(learn, lambda l: l.features(data[1]), tmp_path)


def test_export_video(tmp_path):
    s = video.video_settings('ci', p=2, k=2)
    n = 2*2*2*s['length']
    images = np.random.default_rng(1).integers(0, 255, (n, *video._stored(s), 3), np.uint8)
    rows = np.arange(n)//s['length']
    train = ReidSet(images, rows//4, rows % 2, rows, np.arange(n))
    with quiet(): learn = video.video_learner(train, s, 'cpu')
    clips = np.random.default_rng(0).integers(0, 255, (3, 2, *s['size'], 3), np.uint8)
    export(learn, lambda l: video.clip_features(l.model, clips), tmp_path)


def test_export_detector(tmp_path):
    items = world_frames(World(12, 2, 1, size=(160, 96), crowd=10), range(2), (50, 90))
    seed_all(0)
    with quiet(): learn = detector_learner(faster_rcnn('smaller'), items, bs=2, lr=1e-3, device='cpu')
    boxes = lambda l: torch.cat([torch.as_tensor(d.xyxy) for d in detect(l.model.detector, items)])
    learn.lr_find(num_it=6, show_plot=False)
    assert learn.loss_history.history == []
    export(learn, boxes, tmp_path)


def test_predictions(learn, data, tmp_path):
    train, query, _ = data
    for i in range(3): Image.fromarray(query.images[i]).save(tmp_path/f'{i}.png')
    want = extract_features(learn.model, query[:3], SIZE)
    for what in (query[:3], query.images[:3], tmp_path, [tmp_path/f'{i}.png' for i in range(3)]):
        assert torch.allclose(learn.predict(what), want, atol=1e-5)
    assert torch.allclose(learn.predict(tmp_path/'1.png'), want[1:2], atol=1e-5)
    plain = extract_features(learn.model, query[:3], SIZE, flip=False)
    f, y = learn.get_preds(dl=learn.dls.test_dl(tmp_path))[:2]
    assert torch.allclose(f, plain, atol=1e-5)
    f, _ = learn.get_preds()[:2]
    assert torch.allclose(f[:3], plain, atol=1e-5) and len(f) == len(learn.dls.valid_ds)
    f, y = learn.get_preds(ds_idx=0)[:2]
    assert len(f) == len(train) and torch.equal(y[0], torch.as_tensor(learn.dls.train_ds.labels))
    with pytest.raises(ValueError, match='uint8'): learn.predict(np.zeros((4, 4, 3)))


def test_interpretation_finds_a_wrong_label(data):
    train = data[0][:]
    pids = train.pids.copy()
    pids[5] = pids[-1]
    train.pids = pids
    with quiet(): learn = reid_learner(ReidLoaders(train, SIZE, 8, device='cpu'), 'tiny16', lr=3e-3)
    learn.fit_one_cycle(40)
    losses, rows = Interpretation.from_learner(learn, ds_idx=0).top_losses(3)
    assert 5 in rows.tolist() and losses.isfinite().all()


def test_validate_and_summary(learn):
    learn.fit(2)
    score = learn.validate()
    last = learn.retrieval.history[-1]
    assert len(learn.retrieval.history) == 2
    assert np.allclose(score, [last['mAP'], last['rank1']])
    with pytest.raises(ValueError, match='get_preds'): learn.validate(dl=learn.dls.train)
    assert 'Total params' in learn.summary() and len(learn.retrieval.history) == 2
    with quiet(): alone = reid_learner(ReidLoaders(learn.dls.train_ds.items, SIZE, 8, device='cpu'), 'tiny16')
    with pytest.raises(ValueError, match='no query and gallery'): alone.validate()


@pytest.mark.parametrize('call', ['to_fp16', 'to_bf16'])
def test_mixed_precision(call, learn, data):
    learn.model.dtype = torch.bfloat16
    getattr(learn, call)().fit(1)
    assert learn.model.dtype is None, 'fastai does it now'
    assert np.isfinite(learn.retrieval.history[0]['train_loss'])
    with quiet(): memory = ics.ics_learner(data[0], 'M5', settings(ics), device='cpu')
    getattr(memory, call)().fit(1)


def test_body_and_head(learn):
    learn.freeze()
    body = learn.model.body
    assert not any(p.requires_grad for m in body.modules() if isinstance(m, torch.nn.Conv2d) for p in m.parameters())
    assert learn.model.classifier.weight.requires_grad
    before = body[0][0][0].weight.clone()
    learn.fit(1)
    assert torch.equal(body[0][0][0].weight, before)
    learn.unfreeze()
    learn.fit(1, slice(1e-4, 1e-3))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-4, 1e-3])
    assert not torch.equal(body[0][0][0].weight, before)
    learn.fine_tune(1)
    assert len(learn.retrieval.history) == 4


def test_lr_find_leaves_no_trace(learn):
    learn.lr_find(num_it=8, show_plot=False)
    assert learn.retrieval.history == []
    learn.fit(1)
    assert len(learn.retrieval.history) == 1


def test_recorder_and_callbacks(learn):
    with pytest.raises(ValueError, match="one of .*'mAP'"): learn.fit(1, cbs=SaveModelCallback())
    learn.fit(3, cbs=[SaveModelCallback(monitor='mAP'), EarlyStoppingCallback(monitor='rank1', patience=5)])
    assert (learn.path/'models'/'model.pth').exists()
    best = max(h['mAP'] for h in learn.retrieval.history)
    assert learn.validate()[0] == pytest.approx(best), 'the best weights are back'
    learn.recorder.plot_loss()
    assert len(learn.show_results()) == 3
    plt.close('all')


def test_nan_ends_the_training(learn):
    with pytest.raises(ValueError, match='epoch 0: the loss is nan'):
        learn.loss_func = lambda pred, *_: pred.pooled.sum()*torch.nan
        learn.fit(2)
    assert learn.retrieval.history == []


SPAWN = '''
import sys, torch, fastai.data.load as load
from pathlib import Path
from reidlit.learner import ReidLoaders, quiet, reid_learner
if __name__ == '__main__':
    torch.multiprocessing.set_start_method('spawn')
    dls = ReidLoaders.from_folder(sys.argv[1], size=(64, 32), p=4, num_workers=2, room=0, device='cpu')
    assert dls.train.fake_l.num_workers == 2
    with quiet(): learn = reid_learner(dls, 'tiny16')
    learn.fit(1)
    print('history', learn.retrieval.history)
'''


def test_first_lines_from_a_folder_and_spawned_workers(data, tmp_path):
    train = data[0]
    for i, (p, c) in enumerate(zip(train.pids, train.camids)):
        (tmp_path/'own'/f'p{p}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(train.images[i]).save(tmp_path/'own'/f'p{p}'/f'c{c + 1}_{i}.png')
    dls = ReidLoaders.from_folder(tmp_path/'own', size=SIZE, p=4, device='cpu', path=tmp_path)
    with quiet(): learn = reid_learner(dls)
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit_one_cycle(1)
    learn.show_results()
    learn.export()
    assert (tmp_path/'export.pkl').exists()
    (tmp_path/'spawn.py').write_text(SPAWN)
    done = subprocess.run([sys.executable, tmp_path/'spawn.py', tmp_path/'own'], capture_output=True, text=True)
    assert done.returncode == 0 and "'mAP'" in done.stdout, done.stderr[-2000:]


def test_distributed_can_be_imported():
    import fastai.distributed
    assert hasattr(fastai.learner.Learner, 'distrib_ctx')


def test_more_epochs_on_resume(data, tmp_path):
    "Steps that count epochs may be prolonged, a cycle over all epochs may not."
    def run(epochs, folder, resume=False):
        s = settings(ics, epochs=(epochs, 1), milestones=((1,), (1,)))
        with quiet(): learn = ics.ics_learner(data[0], 'M5', s, device='cpu')
        return ics.fit_stage(learn, s, folder, resume)
    run(2, tmp_path/'a')
    a, b = run(4, tmp_path/'a', resume=True), run(4, tmp_path/'b')
    assert a.retrieval.history == b.retrieval.history and len(a.retrieval.history) == 4
    x, y = (learn.model.state_dict() for learn in (a, b))
    assert all(torch.equal(x[k], y[k]) for k in y)
    with pytest.raises(DataError, match='other settings'): run(3, tmp_path/'a', resume=True)
    s = baseline_settings('drawn', 'ci', p=4)
    fit_baseline(data[0], s, folder=tmp_path/'c', device='cpu')
    with pytest.raises(DataError, match='planned over all epochs'):
        fit_baseline(data[0], s | dict(epochs=9), folder=tmp_path/'c', resume=True, device='cpu')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('name', ['baseline', 'M1', 'M5', 'M8', 'embedding'])
def test_a_step_does_not_wait_for_the_gpu(name, data):
    with quiet():
        if name == 'baseline': learn = baseline_learner(data[0], None, None, baseline_settings('drawn', 'ci', p=4), 'cuda')
        elif name == 'embedding':
            learn = crossdataset.embedding_learner([data[0]], settings=settings(crossdataset), device='cuda')
        else: learn = ics.ics_learner(data[0], name, settings(ics), device='cuda')
    assert learn.dls.train_ds.pixels.is_cuda and isinstance(learn.opt_func, type)
    learn.fit(1)

    class Watch(Callback):
        "The first step of an epoch copies the order of its rows."
        def after_batch(self):
            torch.cuda.set_sync_debug_mode('error' if self.training and self.iter+1 < self.n_iter else 'default')
    try: learn.fit(1, cbs=Watch())
    finally: torch.cuda.set_sync_debug_mode('default')


def test_a_resumed_training_keeps_its_callbacks(data, tmp_path):
    train, query, gallery = data

    def make():
        dls = ReidLoaders(train, SIZE, 8, query=query, gallery=gallery, device='cpu', path=tmp_path)
        cbs = [SaveModelCallback(monitor='mAP'), EarlyStoppingCallback(monitor='mAP', patience=9)]
        with quiet(): return reid_learner(dls, 'tiny16', lr=3e-3, cbs=cbs)
    with pytest.raises(KeyboardInterrupt): fit(make(), 4, tmp_path/'run', stop_after=2)
    learn, saved = make(), []
    learn.save = lambda *a, **k: saved.append(learn.epoch)  # the best of before is in its file already
    learn.load = lambda *a, **k: learn
    fit(learn, 4, tmp_path/'run', resume=True)
    assert len(learn.retrieval.history) == 4 and all(e >= 2 for e in saved)
    assert [len(v) for v in learn.recorder.values] == [3]*4


def test_second_fits_see_other_batches(learn):
    learn.fit(1)
    first = learn.dls.train.sampler.epoch
    learn.fit(1)
    assert (first, learn.dls.train.sampler.epoch) == (1, 2)
    learn.fit(1, cbs=StopAfter(9))
    assert learn.epoch_seed.number == 2


def test_plans_and_settings_are_checked_before_an_epoch(learn, data, tmp_path):
    fit(learn, 1, tmp_path/'a')
    with pytest.raises(DataError, match='planned over all epochs'): fit(learn, 2, tmp_path/'a', resume=True)
    with pytest.raises(ValueError, match="settings 'where'.*JSON"): fit(learn, 1, tmp_path/'b', dict(where=tmp_path))
    assert not (tmp_path/'b').exists()


@pytest.mark.parametrize('spoil,said', [
    (lambda q, g: (q[:0], g), 'query: expected'), (lambda q, g: (q, None), 'or neither'),
    (lambda q, g: (replace(q, pids=None), g), 'query: expected'), (lambda q, g: ('q', g), 'query: expected'),
    (lambda q, g: (replace(q, camids=None), g), 'one of query and gallery'),
    (lambda q, g: (replace(q, pids=q.pids+1000), g), 'no query has a match')])
def test_what_cannot_be_scored_is_refused_at_once(spoil, said, data):
    with pytest.raises(ValueError, match=said):
        q, g = spoil(*data[1:])
        ReidLoaders(data[0], SIZE, 8, query=q, gallery=g, device='cpu')


def test_misuse_is_named(learn, data):
    with pytest.raises(ValueError, match='float32, expected uint8'): ReidSet(data[0].images/np.float32(255), None)
    with pytest.raises(ValueError, match='no identities'): ReidLoaders(ReidSet(data[0].images, None), SIZE)
    with pytest.raises(ValueError, match='no classifier'):
        with quiet(): reid_learner(learn.dls, ReidModel('tiny16')).fit(1)
    with pytest.raises(ValueError, match='every=0'): reid_learner(learn.dls, every=0)
    with pytest.raises(ValueError, match='scores of each epoch'):
        with quiet(): reid_learner(learn.dls, 'tiny16', every=2, cbs=SaveModelCallback(monitor='mAP')).fit(1)
    with pytest.raises(ValueError, match='str: expected a ReidSet'): learn.evaluate('q', 'g')
    with pytest.raises(ValueError, match='give both'): learn.evaluate(gallery=data[2])
    with pytest.raises(TypeError, match='BatchSampler'): SampledLoader(learn.dls.train_ds, [[0, 1]])


def test_checkpoints_of_one_parameter_group_go_on(data, tmp_path):
    "Before 0.2 a learner had one group; the order of its tensors is the same."
    def make(**changes):
        with quiet(): learn = reid_learner(ReidLoaders(data[0], SIZE, 8, device='cpu'), 'tiny16', lr=3e-3)
        for k, v in changes.items(): setattr(learn, k, v)
        return learn
    seed_all(0)
    whole = fit(make(), 3)
    seed_all(0)
    with pytest.raises(KeyboardInterrupt): fit(make(splitter=trainable_params), 3, tmp_path, stop_after=1)
    later = fit(make(), 3, tmp_path, resume=True)
    x, y = (learn.model.state_dict() for learn in (whole, later))
    assert all(torch.equal(x[k], y[k]) for k in x)
