"ID-free training: rivals of the loss, what films may be, and going on after a stop in any stage."
import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command import run as cli
from PIL import Image

from reidlit import idfree
from reidlit.core import DataError
from reidlit.data.world import World
from reidlit.detection.detectors import Detections
from reidlit.detection.training import world_frames
from reidlit.idfree import (LOSSES, FramePairs, IdentityLoss, PointID, SimilarityLoss, ViewPairs, fit_idfree, idfree_settings,
                            view_batch, search_person, stage_learner)
from reidlit.idfree.mining import MinedClip
from reidlit.learner import quiet
from reidlit.runs import load_model


@pytest.fixture(scope='module')
def world(): return World(30, 2, 3, 'ring', style=.3, crowd=8, size=(160, 96))


@pytest.fixture(scope='module')
def photos(world): return world_frames(world, [0], [100, 700, 1300])


@pytest.fixture(scope='module')
def track(world):
    f = world_frames(world, [1], range(300, 332, 4))
    return MinedClip('film', f.row, f.xyxy, np.unique(f.pids, return_inverse=True)[1], f)


@pytest.fixture
def small(): return idfree_settings('drawn', 'ci', size=(96, 160), bs=2)


def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize('kind', LOSSES)
def test_every_loss_pulls_a_person_together(kind):
    torch.manual_seed(0)
    loss, x = IdentityLoss(8, 4, kind, queue=16, temperature=.3), torch.nn.Parameter(torch.randn(16, 8))
    ids, views = torch.arange(4).repeat(4), torch.arange(4).repeat_interleave(4)
    opt = torch.optim.Adam([x, *loss.parameters()], .05)
    for _ in range(60):
        opt.zero_grad()
        loss(F.normalize(x, dim=1), ids, views).backward()
        opt.step()
    s = F.normalize(x, dim=1).detach()
    s, same = s@s.T, ids[:, None]==ids
    assert s[same].mean()-s[~same].mean()>.7


def test_unknown_people_are_boxes_and_no_anchors(photos, small):
    some = np.where(np.arange(len(photos.row)) % 2, photos.pids, -1)
    data = ViewPairs(photos, some, size=small['size'])
    frames, targets, ids = batch = view_batch([data[0], data[1]])
    loss = SimilarityLoss(IdentityLoss(128, queue=64))
    net = PointID('tiny')
    for _ in range(2): out = loss(net, *batch)
    assert set(loss.identity.queue.latest()[1].tolist()) <= set(some[some>=0].tolist())
    assert [len(t) for t in targets]==[len(i) for i in ids] and out['identity']>0
    nobody = ViewPairs(photos, np.full(len(photos.row), -1), size=small['size'])
    out = SimilarityLoss(IdentityLoss(128, queue=64))(net, *view_batch([nobody[0]]))
    assert out['identity']==0 and out['loss_class']>0


@pytest.mark.parametrize('change', [dict(loss='memory'), dict(loss='classifier'), dict(sample='random'), dict(sample='one'),
                                    dict(optimiser='sgd', lr=.01), dict(both=True)])
def test_each_variant_goes_through_all_stages(change, photos, track, small):
    with quiet(): f = fit_idfree(photos, [track], small | change, ids=photos.pids, device='cpu')
    assert list(f.history)==['images', 'video', 'head']
    assert weights(f.detector).isfinite().all()


def test_detection_alone_sees_no_films(photos, track, small):
    with quiet(): f = fit_idfree(photos, (), small | dict(weight=0.), device='cpu')
    assert list(f.history)==['images'] and 'identity' not in f.history['images'][0]
    with pytest.raises(ValueError, match='weight=0'): fit_idfree(photos, [track], small | dict(weight=0.), device='cpu')


def test_a_batch_of_identity_alone_has_no_loss_without_people(track, small):
    empty = MinedClip('e', track.row, track.xyxy, track.labels, np.zeros((8, 96, 160, 3), np.uint8))
    frames, targets, ids = view_batch([FramePairs([empty])[0]])
    none = [Detections([]) for _ in targets]
    out = SimilarityLoss(IdentityLoss(128, queue=8), detect=False)(PointID('tiny'), frames, none, [i[:0] for i in ids])
    assert out['identity']==0
    out['identity'].backward()


@pytest.mark.parametrize('stage', ['images', 'video', 'head'])
def test_a_stop_in_any_stage_is_gone_on_from(stage, photos, track, small, tmp_path, monkeypatch):
    with quiet(): whole = fit_idfree(photos, [track], small | dict(steps=(4, 2, 2)), device='cpu')
    real = idfree._fit_stage

    def stops(learn, steps, folder, s, resume, stop_after):
        return real(learn, steps, folder, s, resume, 1 if folder.name==stage else None)
    monkeypatch.setattr(idfree, '_fit_stage', stops)
    s = small | dict(steps=(4, 2, 2))
    with quiet():
        with pytest.raises(KeyboardInterrupt): fit_idfree(photos, [track], s, folder=tmp_path, device='cpu')
        monkeypatch.setattr(idfree, '_fit_stage', real)
        with pytest.raises(DataError, match='holds a checkpoint'): fit_idfree(photos, [track], s, folder=tmp_path, device='cpu')
        again = fit_idfree(photos, [track], s, folder=tmp_path, resume=True, device='cpu')
    assert torch.equal(weights(again.detector), weights(whole.detector))
    back, info = load_model(tmp_path, 'cpu')
    assert torch.equal(weights(back), weights(again.detector)) and info['steps']==[4, 2, 2]


def test_films_without_a_track_are_reported(photos, small, caplog):
    films = [np.zeros((6, 96, 160, 3), np.uint8)]
    with quiet(), caplog.at_level(logging.WARNING, 'reidlit'):
        f = fit_idfree(photos, films, small | dict(sure=.99), device='cpu')
    assert list(f.history)==['images'] and f.mined==[]
    assert 'no track in 1 films' in caplog.text


def test_the_head_is_frozen_while_films_are_seen(track, small):
    net = PointID('tiny')
    with quiet():
        learn = stage_learner(net, 'video', FramePairs([track, track], size=small['size']), small, 'cpu')
        before = {k: v.clone() for k, v in net.state_dict().items()}
        learn.fit(2)
    after = net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith('head'))
    assert not torch.equal(before['encoder.out.weight'], after['encoder.out.weight'])


def test_search_skips_empty_frames_and_names_bad_boxes(photos):
    class Picky(PointID):
        def find(self, images, least, **kw):
            n = int(images.mean()>.05)
            b = np.float32([[0, 0, 20, 40]]*n).reshape(-1, 4)
            return [(Detections(b), np.float32(np.ones((n, 128))/128**.5))]
    net = Picky('tiny')
    frames = [photos.images[0], np.zeros_like(photos.images[0]), photos.images[1]]
    hits = search_person(net, frames[0], [10, 10, 30, 60], frames)
    assert sorted(h.frame for h in hits)==[0, 2]
    assert len(search_person(net, frames[0], [10, 10, 30, 60], frames, top=1))==1
    assert search_person(net, frames[0], [10, 10, 30, 60], [])==[]
    assert np.allclose(search_person(net, frames[0], [10, 10, 30, 60], frames[:1], size=(48, 80))[0].box, [0, 0, 40, 80])
    for bad in ([10, 10, 5, 60], [0, 0, np.nan, 4], [1, 2, 3]):
        with pytest.raises(ValueError, match='box'): search_person(net, frames[0], bad, frames)


def test_the_tables_are_stored_and_a_stopped_seed_goes_on(tmp_path, monkeypatch):
    from reidlit.experiments import Run, load_paper, reproduce
    paper = load_paper('idfree')
    arm, asked = Run.arm, []
    def stop(self, name, make):
        asked.append(name)
        if name == 'random': raise KeyboardInterrupt
        return arm(self, name, make)
    with monkeypatch.context() as m:
        m.setattr(Run, 'arm', stop)
        with pytest.raises(KeyboardInterrupt):
            reproduce(paper, preset='ci', seeds=(100,), results=tmp_path, device='cpu')
    done = [n for n in asked if n != 'random']
    said = []
    path = reproduce(paper, preset='ci', seeds=(100,), results=tmp_path, device='cpu', say=said.append)
    assert all(f'{n}: kept' in said for n in done)
    stored = json.loads(path.read_text())
    assert {'untrained, true boxes', 'boxes', 'labels', 'biased', 'mixed tracks', 'mining'} <= set(stored['variants'])
    assert len(stored['claims']) == len(paper.experiments['core'].claims)


def test_a_pointid_is_trained_scored_and_searched_with_by_the_command(tmp_path):
    run = tmp_path/'run'
    out = cli('train', 'idfree', '--preset', 'ci', '--out', run, '--device', 'cpu')
    assert out.returncode == 0 and 'untrained: mAP' in out.stdout, out.stderr
    scores = json.loads((run/'scores.json').read_text())
    assert 0 <= scores['trained']['mAP'] <= 1 and scores['settings']['films'] == ''
    frames = tmp_path/'frames'; frames.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3): Image.fromarray(rng.integers(0, 255, (136, 240, 3), np.uint8)).save(frames/f'{i}.png')
    found = cli('search-frames', frames/'0.png', frames, '--run', run, '--box', '10,10,60,120', '--sure', '0',
                '--out', tmp_path/'found')
    assert found.returncode == 0 and (tmp_path/'found'/'search.csv').exists(), found.stderr
    for words, message in ((('eval', run), 'by crops'), (('train', 'idfree', '--preset', 'ci', '--out', run), 'checkpoint'),
                           (('train', 'idfree', '--data', 'market1501', '--out', tmp_path/'x'), "'market1501'"),
                           (('train', 'idfree', '--data', 'prw', '--out', tmp_path/'x'), '--root')):
        bad = cli(*words)
        assert bad.returncode and message in bad.stderr and 'Traceback' not in bad.stderr, bad.stderr


@pytest.mark.parametrize('what, count', [('losses', 4), ('films', 4), ('labels', 12), ('tracking', 4), ('views', 3)])
def test_every_other_experiment_runs(what, count, tmp_path, monkeypatch):
    from reidlit.experiments import load_paper, reproduce
    from reidlit.idfree import lab
    monkeypatch.setattr(lab, 'TRANSFORMS', ('zoom', 'mirror')) # three trainings of views, not 21
    path = reproduce(load_paper('idfree'), what, preset='ci', seeds=(100,), results=tmp_path, device='cpu')
    found = json.loads(path.read_text())['variants']
    assert len(found) == count
    assert all(np.isfinite(v).all() for m in found.values() for v in m.values())


def test_a_longer_queue_is_used(monkeypatch):
    from reidlit.experiments import Run
    from reidlit.idfree import lab
    asked = {}
    def fit(images, films, s, *args):
        asked[s['queue']] = s['short']
        return type('Fit', (), dict(detector=None))
    monkeypatch.setattr(lab, 'fit_idfree', fit)
    monkeypatch.setattr(Run, 'arm', lambda *args: None)
    lab.losses(Run(100, 'ci', 'cpu'))
    assert all(asked[q] == q for q in lab.QUEUES) # `warm` may never end: then only `short` rows are rivals


def test_what_was_learned_is_tried_on_photographs(tmp_path):
    from reidlit.data.readers.pets2009 import MultiviewDetections
    from reidlit.data.writers import write_market1501
    from reidlit.experiments import Run, load_paper, reproduce
    from reidlit.idfree.lab import real_core
    write_market1501(World(12, 2, 3), tmp_path/'set')
    path = reproduce(load_paper('idfree'), data='market1501', root=tmp_path/'set', preset='ci', seeds=(100,),
                     results=tmp_path, device='cpu')
    found = json.loads(path.read_text())['variants']
    assert set(found) == {'untrained', 'L_id', 'L_id + films'} and all(0 <= v['mAP'][0] <= 1 for v in found.values())
    w = World(12, 5, 1)
    views = [[(b := w.boxes(c, t).xyxy, np.ones(len(b), np.float32)) for t in range(6)] for c in range(5)]
    class Shown:
        rate = w.fps
        def __getitem__(self, t): return w.frame(0, t)
    d = MultiviewDetections(list(w.cameras), views, tuple('abcde'), [Shown(), *[None]*4])
    run = Run(100, 'ci', 'cpu', kind='real', data=lambda: d)
    real_core(run)
    assert set(run.values) == {'overlap', 'untrained', 'L_id', 'L_id + films'}
    assert all(set(v) == {'IDF1', 'HOTA', 'kept'} for v in run.values.values())
