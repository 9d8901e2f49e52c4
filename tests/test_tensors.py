"Tensors that no network can use, and features that few digits would spoil."
import json

import numpy as np
import pytest
import torch
from command import run
from safetensors.torch import load_file, save_file

from reidlit.camera_bias import group_means
from reidlit.camera_memory import CameraMemory
from reidlit.core import DataError, as_labels
from reidlit.crossdataset.triplet_mining import hardest_triplets, triplet_gaps
from reidlit.data.sampling import CameraPKSampler, PKSampler, TrackletSampler, deal
from reidlit.data.sets import FrameSet
from reidlit.detection import yolov3
from reidlit.detection.detectors import Detections, load_detector, make_detector, save_detector
from reidlit.detection.online_tracker import to_xyah
from reidlit.geometry import Camera
from reidlit.ics.quintuplet import quintuplet_loss
from reidlit.losses import batch_all_triplet, batch_hard_triplet, triplet_masks
from reidlit.mcssl.consistency import consistency_loss
from reidlit.mcssl.epipolar import undistort_boxes
from reidlit.mcssl.pseudolabels import pids_of
from reidlit.metrics.detection import detection_ap, precision_recall
from reidlit.metrics.rerank import rerank
from reidlit.metrics.retrieval import distance_chunks, reid_scores
from reidlit.metrics.thresholds import pair_distances
from reidlit.models import ReidModel, load_backbone
from reidlit.runs import load_model, save_model
from reidlit.video import cut_crops
from reidlit.viz import show_boxes

BROKEN = dict(nan=lambda v: v*torch.nan, int=lambda v: v.long(), shape=lambda v: v[:1], rows=lambda v: v.flatten(),
              complex=lambda v: v.float()*1j)


def spoil(f, change, ending, keep=None):
    "The file, with its first tensor of that ending changed."
    from safetensors import safe_open
    with safe_open(f, 'pt') as o: marks = o.metadata()
    state = load_file(f)
    name = next(k for k in state if k.endswith(ending) and state[k].numel() > 1)
    state[name] = change(state[name]).contiguous()
    save_file(state, f, marks)
    return name


@pytest.mark.parametrize('kind', BROKEN)
@pytest.mark.parametrize('what', ['reid', 'detector', 'backbone'])
def test_broken_weights_are_refused_on_load(what, kind, tmp_path):
    f = tmp_path/'w.safetensors'
    if what == 'reid': save_model(ReidModel('tiny16'), f, size=[64, 32])
    elif what == 'detector': save_detector(make_detector('faster_rcnn', backbone='smaller'), f)
    else: save_file(load_backbone('tiny').state_dict(), f)
    open_ = dict(reid=load_model, detector=load_detector, backbone=lambda f: load_backbone('tiny', f))[what]
    open_(f)
    spoil(f, BROKEN[kind], '.0.weight' if what != 'detector' else '.weight')
    with pytest.raises(DataError, match='w.safetensors: '): open_(f)


@pytest.mark.parametrize('open_', [load_model, lambda f: load_backbone('tiny', f)])
def test_negative_variances_are_refused(open_, tmp_path):
    f = tmp_path/'w.safetensors'
    if open_ is load_model: save_model(ReidModel('tiny16'), f)
    else: save_file(load_backbone('tiny').state_dict(), f)
    name = spoil(f, lambda v: -v, 'running_var')
    with pytest.raises(DataError, match=f'{name}: a negative variance'): open_(f)


def test_nothing_broken_is_written(tmp_path):
    net = ReidModel('tiny16')
    net.neck.weight.data[0] = torch.nan
    with pytest.raises(DataError, match='neck.weight: holds NaN'): save_model(net, tmp_path/'x.safetensors')


def test_a_checkpoint_with_another_optimiser_is_refused(tmp_path):
    words = ['train', 'baseline', '--people', 20, '--cameras', 2, '--preset', 'ci', '--epochs', 1, '--set', 'p=4',
             '--device', 'cpu', '--out', tmp_path]
    assert run(*words).returncode == 0
    name = json.loads((tmp_path/'checkpoint.json').read_text())['tensors']
    good = load_file(tmp_path/name)
    key = next(k for k in good if k.endswith('sqr_avg'))
    for bad, said in ((good[key][..., :1], 'do not fit the network'), (-good[key]-1, 'negative variance'),
                      (good[key]*torch.nan, 'NaN or infinity')):
        save_file(good | {key: bad.contiguous()}, tmp_path/name)
        done = run(*words, '--resume')
        assert done.returncode == 2 and said in done.stderr and name in done.stderr, done.stderr
        assert 'Traceback' not in done.stderr


@pytest.fixture(scope='module')
def crowd():
    "Features of 30 people in 4 cameras, with some confusion."
    rng = np.random.default_rng(0)
    pids, cams = np.repeat(np.arange(30), 8), np.tile(np.arange(4), 60)
    x = rng.normal(size=(30, 32))[pids]+rng.normal(size=(240, 32))*1.6
    return torch.tensor(x, dtype=torch.float32), pids, cams


@pytest.mark.parametrize('metric', ['euclidean', 'cosine'])
@pytest.mark.parametrize('change', [lambda x: x*1e-30, lambda x: x*1e25, lambda x: x*1e-12, lambda x: x.double()*1e-40])
def test_scores_do_not_hang_on_the_unit(crowd, metric, change):
    x, pids, cams = crowd
    of = lambda f: reid_scores(f, f, pids, pids, cams, cams, metric=metric).mAP
    assert .2 < of(x) < .9 and of(change(x)) == pytest.approx(of(x), abs=1e-4)


@pytest.mark.parametrize('offset', [1e2, 1e4, 1e6])
def test_scores_do_not_hang_on_an_offset(crowd, offset):
    "The rows lose digits when they are stored; the distances of what is stored must be right."
    x, pids, cams = crowd
    y = x+offset
    exact = torch.cdist(y.double(), y.double(), compute_mode='donot_use_mm_for_euclid_dist').numpy()
    d = np.concatenate(list(distance_chunks(y, y, device='cpu')))
    off = ~np.eye(len(y), dtype=bool)
    assert np.abs(d-exact)[off].max() < (1e-4 if offset > 1e3 else .02)
    s = reid_scores(y, y, pids, pids, cams, cams)
    assert s.mAP == pytest.approx(reid_scores(x, x, pids, pids, cams, cams).mAP, abs=.02)
    wide = reid_scores(x.double()+offset, x.double()+offset, pids, pids, cams, cams)
    assert wide.mAP == pytest.approx(reid_scores(x, x, pids, pids, cams, cams).mAP, abs=1e-4)
    assert rerank(y, y).mean() == pytest.approx(rerank(y.double(), y.double()).mean(), abs=1e-3)
    a, b = (pair_distances(f, pids)[0] for f in (y, y.double()))
    assert np.allclose(a, b)


def test_usual_features_stay_in_32_bits_and_as_they_were(crowd):
    x, *_ = crowd
    for f, metric in ((x, 'euclidean'), (torch.nn.functional.normalize(x), 'euclidean')):
        d = np.concatenate(list(distance_chunks(f, f, metric, device='cpu')))
        plain = (f@f.T).mul_(-2).add_((f*f).sum(1)).add_((f*f).sum(1)[:, None]).clamp_(0).sqrt_().numpy()
        assert d.dtype == np.float32 and np.array_equal(d, plain)


def test_complex_features_and_odd_labels_are_named(crowd):
    x, pids, cams = crowd
    with pytest.raises(ValueError, match='query: torch.complex64'): reid_scores(x*1j, x, pids, pids)
    with pytest.raises(ValueError, match='q_pids.*64 bits'): reid_scores(x, x, pids.astype(np.uint64)+2**63, pids)
    with pytest.raises(ValueError, match='g_junk'): reid_scores(x, x, pids, pids, g_junk=['yes']*240)
    with pytest.raises(ValueError, match='g_junk'): reid_scores(x, x, pids, pids, g_junk=np.arange(240))
    assert as_labels(np.uint64([1, 2]), 'pids').dtype == np.int64


FOUR, WHO = torch.tensor([[0.], [2.], [3.], [7.]]), torch.tensor([0, 0, 1, 1])
CAMS = torch.zeros(4, dtype=torch.int64)
LOSSES = dict(hard=batch_hard_triplet, all=batch_all_triplet, gaps=triplet_gaps, rows=hardest_triplets,
              masks=lambda x, y: triplet_masks(y), five=lambda x, y: quintuplet_loss(x, y, CAMS))


@pytest.mark.parametrize('name', LOSSES)
def test_labels_of_a_batch(name):
    loss = LOSSES[name]
    flat = lambda o: torch.cat([p.reshape(-1).float() for p in (o if isinstance(o, tuple) else [o])])
    right = flat(loss(FOUR, WHO))
    for same in (WHO.tolist(), WHO.numpy(), WHO.int(), WHO.numpy().astype(np.uint8)):
        assert torch.equal(flat(loss(FOUR, same)), right)
    for bad in (WHO[:, None], WHO[None], WHO.float(), [0., 0, 1, 1], ['a', 'a', 'b', 'b'], WHO.bool(), None):
        with pytest.raises(ValueError, match='pids|labels'): loss(FOUR, bad)
    if name != 'masks':
        for bad in (WHO[:3], [0, 1], WHO[:1]):
            with pytest.raises(ValueError, match='pids|labels|pooled|cameras'): loss(FOUR, bad)


@pytest.mark.parametrize('margin', [float('nan'), float('inf'), 'x', np.nan])
def test_margins_are_numbers(margin):
    with pytest.raises(ValueError, match='margin'): batch_hard_triplet(FOUR, WHO, margin)
    with pytest.raises(ValueError, match='margin'): batch_all_triplet(FOUR, WHO, margin)


def test_nothing_to_deal_does_not_hang():
    with pytest.raises(ValueError, match='none to deal'): deal([], [2], np.random.default_rng(0))
    pids = np.repeat(np.arange(4), 4)
    with pytest.raises(ValueError, match='camids'): CameraPKSampler(pids, np.where(pids == 1, np.nan, 0.), 2, 2)
    with pytest.raises(ValueError, match='pids'): PKSampler(pids[:, None], 2, 2)
    with pytest.raises(ValueError, match='tids'): TrackletSampler(pids, pids*np.nan, 2, 2)


BOX, ROWS = [[0., 0, 5, 5]], torch.eye(4)
ODD = dict(
    words=(lambda: precision_recall([.5, .6], ['yes', 'no'], 3), 'right'),
    halves=(lambda: precision_recall([.5, .6], [.5, .6], 3), 'right'),
    column=(lambda: precision_recall([[.5], [.6]], [1, 0], 3), 'found, scores'),
    truths=(lambda: precision_recall([.5, .6], [1, 0], np.nan), 'n_truths'),
    ignore=(lambda: detection_ap([(BOX, [.5])], [BOX], ignore=[['no']]), 'ignore, picture 0'),
    one=(lambda: detection_ap([(BOX, .5)], [BOX]), 'found, picture 0, scores'),
    consistency=(lambda: consistency_loss(ROWS*7, ROWS), 'scores1: 7'),
    nan=(lambda: consistency_loss(ROWS, ROWS*torch.nan), 'scores2: nan'),
    groups=(lambda: group_means(ROWS, [0, 0, 1]), 'which'),
    update=(lambda: CameraMemory([0, 0, 1, 1], 4).update(ROWS, torch.tensor([0, 1, 2])), 'labels'),
    flags=(lambda: Detections(BOX, gold=['yes']), 'gold'), label=(lambda: Detections(BOX, labels=[1.5]), 'labels'),
    row=(lambda: FrameSet([0], [0], [0], [1], BOX, [1]), 'row: 1 to 1'),
    person=(lambda: FrameSet([0], [0], [0], [0], BOX, [1.5]), 'pids'))


@pytest.mark.parametrize('name', ODD)
def test_what_is_no_flag_no_label_no_score_is_named(name):
    "All of these were taken, and gave a wrong value."
    f, said = ODD[name]
    with pytest.raises(ValueError, match=said): f()


FLAT, TURNED = [0, 0, 8, 8, 1, 1, 5, 5], [[9., 0, 5, 9]]
IMAGE = np.zeros((16, 16, 3), np.uint8)
TAKE_BOXES = dict(crops=lambda b: cut_crops(IMAGE, b), shown=lambda b: show_boxes(IMAGE, b),
    who=lambda b: pids_of(FrameSet([0], [0], [0], [0], BOX, [1]), [0]*len(b), b), corners=to_xyah,
    lens=lambda b: undistort_boxes(b, Camera(np.eye(3), np.eye(3), np.zeros(3), (16, 16))),
    faster_rcnn=lambda b: make_detector('faster_rcnn', backbone='smaller').class_scores(torch.rand(1, 3, 64, 64), [b]),
    tiny_yolov3=lambda b: yolov3.tiny_yolov3().class_scores(torch.rand(1, 3, 64, 64), [b]))


@pytest.mark.parametrize('name', TAKE_BOXES)
@pytest.mark.parametrize('bad, said', [(FLAT, 'shape'), (TURNED, 'ends before'), ([[0, 0, np.inf, 5]], 'not finite'),
                                       ([[0, 0, 1e300, 5]], 'not finite'), ([['a']*4], 'real numbers')])
def test_every_place_that_takes_boxes_names_one_that_is_none(name, bad, said):
    "A flat list was taken for two boxes; an infinite one ended the process inside RoIAlign."
    with pytest.raises(ValueError, match=said): TAKE_BOXES[name](bad)
