"Consistency of two views: values, gradients, pairs of frames, training and resuming."
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.optimizer import Adam

from reidlit.mcssl.consistency import (DETACH, PairDataset, consistency_learner, consistency_loss,
                                 pair_batch)
from reidlit.core import seed_all
from reidlit.data.sets import FrameSet
from reidlit.data.world import World
from reidlit.detection.detectors import faster_rcnn
from reidlit.detection.training import FrameDataset,ShuffleSampler,world_frames
from reidlit.learner import quiet
from reidlit.runs import fit
from reidlit.mcssl.pairs import Pairs

TWO = torch.tensor([[.4, .6], [.7, .3]]), torch.tensor([[.1, .9], [.5, .5]])


@pytest.fixture(scope='module')
def few():
    "Frames of two cameras at two moments, and pairs of their true boxes."
    items = world_frames(World(20, 2, 1, size=(160, 96), crowd=16), range(2), (50, 90))
    at = items.row[:, None] // 2 == items.row // 2
    i, j = np.nonzero(at & (items.pids[:, None] == items.pids) & (items.row[:, None] < items.row))
    assert len(i) >= 4 and len(set(items.row[i])) == 2
    return items, Pairs(items.row[i], items.xyxy[i], items.row[j], items.xyxy[j], i, j)


def small(seed=0):
    seed_all(seed)
    return faster_rcnn('smaller')


def learner(d, few, *args, **kwargs):
    kw = dict(bs=1, lr=1e-3, opt_func=Adam, device='cpu') | kwargs
    with quiet(): return consistency_learner(d, *few, *args, **kw)


def state(d): return {k: v.clone() for k, v in d.state_dict().items()}


def equal(a, b): return all(torch.equal(a[k], b[k]) for k in a)


def test_values_by_hand():
    hand = torch.tensor([-.1*np.log(.4) - .9*np.log(.6), -.5*np.log(.7) - .5*np.log(.3)])
    for d in ('second', 'none'):
        assert torch.isclose(consistency_loss(*TWO, detach=d, reduction='sum'), hand.sum().float())
        assert torch.isclose(consistency_loss(*TWO, detach=d), hand.mean().float())
    assert torch.isclose(consistency_loss(*TWO, detach='first'), consistency_loss(*TWO[::-1]))


def test_agrees_with_torch():
    z, w = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    ours = consistency_loss(z.softmax(-1), w.softmax(-1), reduction='sum')
    assert torch.isclose(ours, F.cross_entropy(z, w.softmax(-1), reduction='sum'), rtol=1e-4)
    ours = consistency_loss(z.sigmoid(), w.sigmoid(), binary=True, reduction='sum')
    theirs = F.binary_cross_entropy_with_logits(z, w.sigmoid(), reduction='sum')
    assert torch.isclose(ours, theirs, rtol=1e-4)


def test_one_binary_class_is_a_softmax_of_two():
    for d in DETACH:
        one = consistency_loss(*(s[:, 1:] for s in TWO), binary=True, detach=d)
        assert torch.isclose(one, consistency_loss(*TWO, detach=d))


@pytest.mark.parametrize('detach', DETACH)
def test_the_detached_side_gets_no_gradient(detach):
    s, t = (x.clone().requires_grad_() for x in TWO)
    consistency_loss(s, t, detach=detach).backward()
    has = tuple(x.grad is not None and bool(x.grad.any()) for x in (s, t))
    assert has == dict(second=(True, False), first=(False, True), none=(True, True))[detach]


def test_slopes():
    "By the logits p-q, and towards certainty for a target that may move."
    for p, q in ((.6, .9), (.4, .1), (.3, .8)):
        z = torch.tensor([p, q], dtype=torch.float64).logit().requires_grad_()
        s = z.sigmoid()[:, None]
        g = {d: torch.autograd.grad(consistency_loss(s[:1], s[1:], True, d), z,
                                    retain_graph=True)[0].tolist() for d in DETACH}
        assert g['second'] == pytest.approx([p-q, 0])
        assert g['first'] == pytest.approx([0, q-p])
        assert g['none'] == pytest.approx([p-q, -q*(1-q)*np.log(p/(1-p))])


def test_sum_is_mean_times_pairs_and_order_does_not_matter():
    s, t = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(1))
    turn = torch.arange(6, -1, -1)
    for d in DETACH:
        assert torch.isclose(consistency_loss(s, t, detach=d, reduction='sum'),
                             7*consistency_loss(s, t, detach=d))
        assert torch.isclose(consistency_loss(s, t, detach=d),
                             consistency_loss(s[turn], t[turn], detach=d))


def test_extremes_are_finite():
    ends = torch.tensor([[0., 1.], [1., 0.]])
    for binary in (False, True):
        for d in DETACH:
            s, t = ends.clone().requires_grad_(), ends.flip(0).clone().requires_grad_()
            loss = consistency_loss(s, t, binary, d)
            loss.backward()
            assert 10 < loss < 30
            assert all(x.grad is None or x.grad.isfinite().all() for x in (s, t))
            assert consistency_loss(ends, ends, binary, d) < 1e-5


@pytest.mark.parametrize('reduction', ('mean', 'sum'))
@pytest.mark.parametrize('binary', (False, True))
def test_no_pair_is_zero(binary, reduction):
    none = torch.zeros(0, 2, requires_grad=True)
    loss = consistency_loss(none, none, binary, reduction=reduction)
    loss.backward()
    assert float(loss.detach()) == 0 and none.grad.shape == (0, 2)


def test_misuse_of_the_loss():
    with pytest.raises(ValueError, match="detach='both'"): consistency_loss(*TWO, detach='both')
    with pytest.raises(ValueError, match="reduction='max'"):
        consistency_loss(*TWO, reduction='max')
    with pytest.raises(ValueError, match=r'\(2, 2\) and \(1, 2\)'):
        consistency_loss(TWO[0], TWO[1][:1])


def test_groups_hold_every_pair_once(few):
    items, pairs = few
    data = PairDataset(items, pairs)
    assert sorted(np.concatenate(data.groups).tolist()) == list(range(len(pairs)))
    assert len(data) == len(set(zip(pairs.row1.tolist(), pairs.row2.tolist())))
    for i, (g, (r1, r2)) in enumerate(zip(data.groups, data.keys)):
        assert (pairs.row1[g] == r1).all() and (pairs.row2[g] == r2).all()
        im1, b1, im2, b2 = data[i]
        assert np.array_equal(im1, items.read(r1)) and np.array_equal(im2, items.read(r2))
        assert np.array_equal(b1, pairs.box1[g]) and np.array_equal(b2, pairs.box2[g])
    assert [len(x) for x in PairDataset(items, pairs, most=1)[0][1::2]] == [1, 1]


def test_size_scales_frames_and_boxes(few):
    items, pairs = few
    plain, scaled = (PairDataset(items, pairs, size=s)[0] for s in (None, (192, 80)))
    for k in (0, 2):
        assert plain[k].shape == (96, 160, 3) and scaled[k].shape == (192, 80, 3)
        assert np.allclose(scaled[k+1], plain[k+1]*[.5, 2, .5, 2])
        assert scaled[k+1].dtype == np.float32


def test_rows_may_be_of_one_camera_and_come_in_any_order():
    items = FrameSet([np.full((8, 8, 3), g, np.uint8) for g in range(3)], None, None, [],
                     np.zeros((0, 4)), None)
    box = np.float32([[0, 0, k+1, 4] for k in range(4)])
    data = PairDataset(items, Pairs(np.array([2, 0, 2, 2]), box, np.array([1, 1, 0, 1]), box,
                                    None, None))
    assert data.keys.tolist() == [[0, 1], [2, 0], [2, 1]]
    assert [g.tolist() for g in data.groups] == [[1], [2], [0, 3]]
    assert data[2][1].tolist() == box[[0, 3]].tolist() and data[2][0].max() == 2


def test_batches(few):
    data = PairDataset(*few)
    im1, b1, im2, b2 = pair_batch([data[0], data[1]])
    assert im1.shape == im2.shape == (2, 96, 160, 3) and im1.dtype == torch.uint8
    assert [len(b) for b in b1] == [len(b) for b in b2] == [len(g) for g in data.groups[:2]]


def test_no_pairs(few):
    items, pairs = few
    with pytest.raises(ValueError, match='no pairs'): PairDataset(items, pairs[:0])
    with pytest.raises(ValueError, match='no pairs'): learner(small(), (items, pairs[:0]))


def test_only_the_backbone_learns(few):
    d = small()
    d.fixed_stats = True
    was, learn = state(d), learner(d, few)
    learn.fit(1)
    new = d.state_dict()
    moved = {k for k in was if not torch.equal(was[k], new[k])}
    assert moved and all(k.startswith('net.backbone') for k in moved)
    assert not any('running' in k or 'batches' in k for k in moved)
    assert set(learn.loss_history.history[0]) == {'consistency'}


def test_statistics_move_if_they_are_not_fixed(few):
    d = small()
    was = state(d)
    learner(d, few).fit(1)
    assert any('running' in k and not torch.equal(was[k], v) for k, v in d.state_dict().items())


def test_one_step_is_the_loss_by_hand(few):
    "The first batch's loss and gradient, against scores computed one by one."
    d = small()
    d.fixed_stats = True
    learn = learner(d, few, 'second', 'sum', bs=2, opt_func=partial(Adam, wd=0.))
    items, pairs = few
    d.train()
    s, t = ([], [])
    for r1, r2, a, b in zip(pairs.row1, pairs.row2, pairs.box1, pairs.box2):
        for r, box, out in ((r1, a, s), (r2, b, t)):
            x = torch.tensor(items.read(int(r))).permute(2, 0, 1)[None]/255
            out.append(d.class_scores(x, [torch.tensor(box[None])]))
    s, t = torch.cat(s), torch.cat(t).detach()
    hand = -(t*s.log()).sum()
    learn.fit(1, 1e-3)
    assert learn.loss_history.history[0]['consistency'] == pytest.approx(float(hand.detach()),
                                                                         rel=1e-4)


def test_sides_change_places_with_the_cameras(few):
    "Detaching the first is detaching the second of exchanged pairs."
    items, p = few
    turned = Pairs(p.row2, p.box2, p.row1, p.box1, p.id2, p.id1)
    a, b = small(), small()
    a.fixed_stats = b.fixed_stats = True
    learner(a, (items, p), 'first').fit(1)
    learner(b, (items, turned), 'second').fit(1)
    assert equal(a.state_dict(), b.state_dict())


def test_the_same_seed_gives_the_same_weights(few):
    order = lambda seed: ShuffleSampler(2, 1, seed).plan(0).tolist()
    other, out = next(s for s in range(4, 99) if order(s) != order(3)), []
    for seed in (3, 3, other):
        d = small()
        learner(d, few, seed=seed).fit(1)
        out.append(state(d))
    assert equal(out[0], out[1]) and not equal(out[0], out[2])


def test_resumed_to_the_bit(few, tmp_path):
    whole = small()
    fit(learner(whole, few), 3, tmp_path/'whole', {})
    with pytest.raises(KeyboardInterrupt):
        fit(learner(small(), few), 3, tmp_path/'cut', {}, stop_after=1)
    rest = small(5)
    learn = fit(learner(rest, few), 3, tmp_path/'cut', {}, resume=True)
    assert equal(whole.state_dict(), rest.state_dict())
    assert len(learn.loss_history.history) == 3


def test_gold_beside_consistency(few):
    with pytest.raises(ValueError, match='beta=0.5 needs gold'): learner(small(), few, beta=.5)
    d, half, gold = small(), small(), FrameDataset(few[0][[0, 2]], flip=False)
    d.fixed_stats = half.fixed_stats = True
    was, history = state(d), []
    for x, beta in ((d, 1.), (half, .5)):
        learn = learner(x, few, bs=2, beta=beta, gold=gold)
        learn.fit(1)
        history.append(learn.loss_history.history[0])
    a, b = history
    assert set(a) == {'consistency', 'loss_classifier', 'loss_box_reg', 'loss_objectness',
                      'loss_rpn_box_reg'}
    assert all(b[k] == pytest.approx(a[k]*(1 if k == 'consistency' else .5), rel=1e-4) for k in a)
    moved = {k for k, v in d.state_dict().items() if not torch.equal(was[k], v)}
    assert moved and all(k.startswith('net.backbone') for k in moved)
