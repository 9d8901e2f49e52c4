"PointID's loss against loops and another library, its queue against a list, its views against masks."
import copy
import math
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load, save

from reidlit.core import rng_for
from reidlit.idfree import contrastive
from reidlit.idfree.contrastive import (EmbeddingQueue, dense_contrastive_loss, identity_memory, nearest_points,
                                        person_means)
from reidlit.idfree.views import TRANSFORMS, ViewSettings, augment_view, two_views, view_matrix, warp_boxes, warp_frame

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
DEVICES = ['cpu', pytest.param('cuda', marks=GPU)]


def case(seed, P=40, Q=60, D=8, people=12, dtype=torch.float64, device='cpu'):
    "Points, persons, queue, persons; some people with one point, some only in the queue."
    g = torch.Generator().manual_seed(seed)
    unit = lambda n: F.normalize(torch.randn(n, D, generator=g, dtype=dtype)).to(device)
    number = lambda n: torch.randint(people, (n,), generator=g).to(device)
    return unit(P).requires_grad_(), number(P), unit(Q), number(Q)


def loops(points, ids, queue, queue_ids, tau):
    "Eqs. 1 and 2 by their letters."
    total, n_pos = 0., 0
    for i, v in enumerate(points):
        positives = [j for j in range(len(points)) if j != i and ids[j] == ids[i]]
        rivals = sum((torch.exp(v@n/tau) for n, k in zip(queue, queue_ids) if k != ids[i]), torch.zeros((), dtype=v.dtype))
        if not positives: continue
        own = [torch.exp(v@points[j]/tau) for j in positives]
        total, n_pos = total-sum(torch.log(e/(e+rivals)) for e in own)/len(own), n_pos+1
    return total/n_pos


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('tau', [.07, .5])
def test_loss_and_gradient_are_those_of_loops(seed, tau):
    x, y, q, z = case(seed, P=10+5*seed, Q=7*seed)
    ours, plain = dense_contrastive_loss(x, y, q, z, tau), loops(x, y, q, z, tau)
    a, b = (torch.autograd.grad(v, x)[0] for v in (ours, plain))
    assert abs(ours-plain) < 1e-6*max(1, plain) and (a-b).abs().max() < 1e-6
    single = dense_contrastive_loss(x.float(), y, q.float(), z, tau)
    assert single.dtype == torch.float32 and abs(single-plain) < 1e-5*max(1, plain)


@pytest.mark.parametrize('device', DEVICES)
def test_blocks_are_the_whole_table(device):
    "300 anchors against 20,000 rows are two blocks."
    x, y, q, z = case(0, 300, 20_000, 4, 90, torch.float32, device)
    loss = dense_contrastive_loss(x, y, q, z)
    s = (x@q.T/.07).masked_fill(y[:, None] == z, -math.inf).logsumexp(1)
    pair = (y[:, None] == y).fill_diagonal_(False)
    each = torch.where(pair, F.softplus(s[:, None]-x@x.T/.07), 0).sum(1)/pair.sum(1).clamp(min=1)
    plain = each.sum()/pair.any(1).sum()
    a, b = (torch.autograd.grad(v, x)[0] for v in (loss, plain))
    assert torch.allclose(loss, plain, rtol=1e-5) and torch.allclose(a, b, atol=1e-6)


def test_gradcheck():
    x, y, q, z = case(1, 12, 15, 4, 4)
    f = lambda v: dense_contrastive_loss(F.normalize(v), y, q, z)
    assert torch.autograd.gradcheck(f, x.detach().clone().requires_grad_())


@pytest.mark.parametrize('tau', [.07, .2])
def test_agrees_with_another_library(tau):
    "Where everybody has equally many points, the mean over anchors is that over pairs, as pytorch-metric-learning has it."
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    x, _, q, z = case(2, 24, 50, people=9)
    y = torch.arange(6).repeat(4)
    pair = (y[:, None] == y).fill_diagonal_(False).nonzero().T
    a, n = (y[:, None] != z).nonzero().T
    theirs = losses.NTXentLoss(tau)(x, y, indices_tuple=(*pair, a, n+24), ref_emb=torch.cat([x, q]),
                                    ref_labels=torch.cat([y, z]))
    assert torch.allclose(dense_contrastive_loss(x, y, q, z, tau), theirs, rtol=1e-6)


def test_extreme_similarities_stay_finite():
    x, y, q, z = case(3, dtype=torch.float32)
    for tau in (1e-4, 1e4):
        loss = dense_contrastive_loss(x, y, q, z, tau)
        assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()
    same = x[:1].detach().expand(6, -1).clone().requires_grad_()
    loss = dense_contrastive_loss(same, torch.arange(2).repeat(3), same.detach(), torch.arange(6)+9, 1e-4)
    assert abs(loss-math.log(7)) < 1e-2  # exponents of 10,000 have three digits after the point
    loss.backward()
    assert same.grad.isfinite().all()


def test_no_gradient_to_the_queue_and_second_derivatives_are_refused():
    x, y, q, z = case(4)
    q.requires_grad_()
    loss = dense_contrastive_loss(x, y, q, z)
    g, = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError): g.sum().backward()
    loss = dense_contrastive_loss(x, y, q, z)
    loss.backward()
    assert q.grad is None and x.grad.abs().max() > 0


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype, device):
    x, y, q, z = case(5, dtype=torch.float32, device=device)
    half = x.detach().to(dtype).requires_grad_()
    with torch.autocast(device, dtype): loss = dense_contrastive_loss(half, y, q, z)
    want = dense_contrastive_loss(half.float(), y, q, z)
    assert loss.dtype == torch.float32 and loss == want
    loss.backward()
    assert half.grad.dtype == dtype and half.grad.isfinite().all()


@pytest.mark.parametrize('seed', range(5))
def test_a_cluster_is_never_its_own_rival(seed):
    "Whatever the queue holds of the batch's own person, that person's loss and gradient stay."
    x, y, q, z = case(seed, people=6)
    i = y == y[0]
    moved = torch.where((z == y[0])[:, None], q.flip(0), q)
    a, b = (dense_contrastive_loss(x[i], y[i], rows, z) for rows in (q, moved))
    assert a == b and torch.equal(*(torch.autograd.grad(v, x)[0] for v in (a, b)))
    without = dense_contrastive_loss(x[i], y[i], q[z != y[0]], z[z != y[0]])
    assert torch.allclose(a, without)
    # other people of the batch are no rivals before they are in the queue
    own = torch.autograd.grad(dense_contrastive_loss(x, y, q, z, stats=True)[0], x)[0]
    turned = torch.where(i[:, None], x, x.flip(1))
    assert torch.allclose(own[i], torch.autograd.grad(dense_contrastive_loss(turned, y, q, z), x)[0][i])


def test_ids_in_any_order_and_large():
    x, y, q, z = case(6)
    names = torch.randperm(2**40 // 2**20, generator=torch.Generator().manual_seed(0))[:12]*2**30
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    a, b = dense_contrastive_loss(x, y, q, z), dense_contrastive_loss(x[order], names[y][order], q, names[z])
    assert torch.allclose(a, b)


@pytest.mark.parametrize('size', [1, 7, 50])
def test_ring_is_a_list_that_forgets(size):
    r, q, held, n = rng_for(size, 'ring'), EmbeddingQueue(3, size), [], 0
    for _ in range(25):
        m = int(r.integers(0, 12))
        x, ids = F.normalize(torch.tensor(r.normal(size=(m, 3)), dtype=torch.float32)), torch.arange(n, n+m)
        n += m
        q.enqueue(x, ids)
        held = (held+[(int(i), f) for i, f in zip(ids, x)])[-size:]
        feats, who = q.latest()
        assert len(q) == len(held) and dict(zip(who.tolist(), range(size))).keys() == dict(held).keys()
        for i, f in zip(who.tolist(), feats): assert torch.allclose(f, dict(held)[i])
        limit = int(r.integers(1, 9))
        assert sorted(q.latest(limit)[1].tolist()) == [i for i, _ in held[-limit:]]


def test_queue_is_stored_copied_and_moved():
    x = F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    q = EmbeddingQueue(4, 6)
    q.enqueue(x, torch.arange(9))
    again = EmbeddingQueue(4, 6)
    again.load_state_dict(load(save(q.state_dict())))
    twin = copy.deepcopy(q)
    for o in (q, again, twin): o.enqueue(-x[:2], torch.arange(2))
    for o in (again, twin):
        assert torch.equal(o.feats, q.feats) and torch.equal(o.ids, q.ids) and len(o) == 6
    assert not q.feats.requires_grad and q.double().feats.dtype == torch.float64
    with pytest.raises(RuntimeError, match='size mismatch'): EmbeddingQueue(4, 7).load_state_dict(again.state_dict())


def test_means_are_a_row_for_each_person_and_view():
    x, y, *_ = case(7, P=60)
    views = torch.arange(60) % 3
    means, who = person_means(x, y, views)
    keys = sorted({(int(p), int(v)) for p, v in zip(y, views)})
    assert who.tolist() == [p for p, _ in keys]
    for f, (p, v) in zip(means, keys): assert torch.allclose(f, F.normalize(x[(y == p) & (views == v)].mean(0), dim=0))
    far = torch.randn(60, generator=torch.Generator().manual_seed(0))
    rows = nearest_points(y, views, far)
    for i, (p, v) in zip(rows, keys):
        here = ((y == p) & (views == v)).nonzero()[:, 0]
        assert i == here[far[here].argmin()]


def test_memory_is_eq_1_with_one_positive():
    bank, (x, y, *_) = identity_memory(12, 8), case(8, dtype=torch.float32)
    bank.update(x.detach(), y)
    other = case(9, dtype=torch.float32)
    total = 0.
    for v, i in zip(other[0], other[1]):
        rivals = bank.centroids[torch.arange(12) != i]
        total = total+F.softplus((rivals@v/.07).logsumexp(0)-bank.centroids[i]@v/.07)
    assert torch.allclose(bank.loss(*other[:2]), total/40, rtol=1e-5)


def process(rank, folder, port):
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    torch.set_num_threads(1)
    q = EmbeddingQueue(3, 20)
    for t, sizes in enumerate([(2, 5), (0, 4), (0, 0), (3, 0), (9, 9)]):
        g = torch.Generator().manual_seed(10*t+rank)
        q.enqueue(F.normalize(torch.randn(sizes[rank], 3, generator=g)), torch.arange(sizes[rank])+100*t+50*rank)
    torch.save(q.state_dict(), folder/f'{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.filterwarnings('ignore')
def test_two_processes_hold_everybody(tmp_path):
    with socket.socket() as s:
        s.bind(('', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(process, (tmp_path, port), nprocs=2)
    a, b = (torch.load(tmp_path/f'{rank}.pt') for rank in (0, 1))
    alone = EmbeddingQueue(3, 20)
    for t, sizes in enumerate([(2, 5), (0, 4), (0, 0), (3, 0), (9, 9)]):
        for rank, n in enumerate(sizes):
            g = torch.Generator().manual_seed(10*t+rank)
            alone.enqueue(F.normalize(torch.randn(n, 3, generator=g)), torch.arange(n)+100*t+50*rank)
    for k, v in alone.state_dict().items(): assert torch.equal(a[k], b[k]) and torch.equal(a[k], v), k


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu_as_on_a_cpu():
    x, y, q, z = case(11, dtype=torch.float32)
    queues = [EmbeddingQueue(8, 30), EmbeddingQueue(8, 30).cuda()]
    for o, to in zip(queues, ('cpu', 'cuda')): o.enqueue(x.to(to), y.to(to), (torch.arange(40) % 2).to(to))
    assert torch.allclose(queues[0].feats, queues[1].feats.cpu(), atol=1e-6)
    a, b = (dense_contrastive_loss(x.to(t), y.to(t), *o.latest(9), stats=True) for o, t in zip(queues, ('cpu', 'cuda')))
    assert torch.allclose(a[0], b[0].cpu(), rtol=1e-4) and torch.allclose(a[1]['chance'], b[1]['chance'].cpu())


# views

def picture(seed, size=(90, 160)):
    return rng_for(seed, 'picture').integers(0, 256, (*size, 3), np.uint8)


def people(seed, size=(90, 160), n=6):
    "Boxes of any size, some beyond the border."
    r, (H, W) = rng_for(seed, 'people'), size
    lo = r.uniform([-.1*W, -.1*H], [.9*W, .9*H], (n, 2))
    return np.concatenate([lo, lo+r.uniform([.05*W, .1*H], [.3*W, .6*H], (n, 2))], 1)


@pytest.mark.parametrize('seed', range(30))
def test_a_view_keeps_its_promises(seed):
    r = rng_for(seed, 'promises')
    size = int(r.integers(20, 200)), int(r.integers(20, 200))
    frame, boxes = picture(seed, size), people(seed, size)
    names = tuple(n for n in TRANSFORMS if r.random() < .6)
    s = ViewSettings(zoom=.3, rotation=20, occlusion=1., mirror=1.)
    before = frame.copy(), boxes.copy()
    one, two = two_views(frame, boxes, rng_for(seed), names, s)
    assert np.array_equal(frame, before[0]) and np.array_equal(boxes, before[1])
    H, W = size
    for v in (one, two):
        assert v.frame.shape == frame.shape and v.frame.dtype == np.uint8 and v.boxes.dtype == np.float32
        assert (v.boxes[:, :2] < v.boxes[:, 2:]).all() and (v.boxes >= 0).all() and (v.boxes <= [W, H, W, H]).all()
        assert (np.diff(v.rows) > 0).all() and len(v.rows) == len(v.boxes)
    assert set(two.rows) <= set(one.rows) and (len(two.rows) > 0 or not len(one.rows))
    again = two_views(frame, boxes, rng_for(seed), names[::-1], s)
    for a, b in zip((one, two), again):
        for p, q in zip(a, b): assert np.array_equal(p, q)


@pytest.mark.parametrize('seed', range(12))
def test_boxes_follow_what_is_drawn(seed):
    "A filled box in a black frame, through the same draws: its extent in the view is the view's box."
    r = rng_for(seed, 'drawn')
    x, y, w, h = r.integers([60, 40, 15, 20], [120, 70, 50, 60])
    white = np.zeros((160, 240, 3), np.uint8)
    white[y:y+h, x:x+w] = 255
    v = augment_view(white, [[x, y, x+w, y+h]], r, ('rotation', 'zoom', 'mirror'), ViewSettings(20., .25))
    on = (v.frame[:, :, 0] > 127) & (np.abs(v.frame.astype(int)-v.frame[:, :, :1]).max(2) == 0)  # not the border's colour
    at = np.argwhere(on)[:, ::-1]
    assert np.abs(np.r_[at.min(0), at.max(0)+1]-v.boxes[0]).max() < 1.01


@pytest.mark.parametrize('seed', range(6))
def test_a_hull_holds_the_person(seed):
    "An ellipse in a box stays inside the moved box, and nearly fills it when nothing turns."
    import cv2
    r, box = rng_for(seed, 'ellipse'), np.array([90, 40, 130, 120])
    frame = np.zeros((160, 240, 3), np.uint8)
    cv2.ellipse(frame, (110, 80), (20, 40), 0, 0, 360, (255, 255, 255), -1)
    side = r.uniform(.8, 1)
    for turn in (0., r.uniform(5, 25)):
        A = view_matrix((160, 240), turn, (*r.uniform(0, 1-side, 2), side), r.random() < .5)
        on = np.argwhere(warp_frame(frame, A).min(2) > 127)[:, ::-1]
        seen, hull = np.r_[on.min(0), on.max(0)+1], warp_boxes(box[None], A)[0]
        inside = np.r_[seen[:2]-hull[:2], hull[2:]-seen[2:]]
        assert inside.min() > -2 and (turn or np.abs(inside).max() < 2)


def test_a_matrix_takes_corners_where_it_says():
    A = view_matrix((90, 160), 17., (.1, .12, .8), True)
    boxes = people(0)
    corners = np.stack(np.meshgrid([0, 2], [1, 3]), -1).reshape(-1, 2)
    for b, moved in zip(boxes, warp_boxes(boxes, A)):
        p = np.array([[b[i], b[j], 1] for i, j in corners])@A.T
        assert np.allclose(np.r_[p[:, :2].min(0), p[:, :2].max(0)], moved, atol=1e-3)
    back = warp_boxes([[10, 20, 30, 50]], np.linalg.inv(view_matrix((90, 160), 0, (.1, .1, .5)))@view_matrix((90, 160), 0, (.1, .1, .5)))
    assert np.allclose(back, [[10, 20, 30, 50]], atol=1e-4)


@pytest.mark.parametrize('off', TRANSFORMS)
def test_a_change_that_is_off_leaves_the_others(off):
    "Boxes do not depend on colours, and no draw on another's name."
    frame, boxes = picture(1), people(1)
    pair = [augment_view(frame, boxes, rng_for(3), n) for n in (TRANSFORMS, tuple(n for n in TRANSFORMS if n != off))]
    if off in ('occlusion', 'color', 'video'):
        assert np.array_equal(pair[0].boxes, pair[1].boxes) and np.array_equal(pair[0].rows, pair[1].rows)
    r = [rng_for(3) for _ in range(2)]
    for g, n in zip(r, (TRANSFORMS, (off,))): augment_view(frame, boxes, g, n)
    assert r[0].random() == r[1].random()  # as many numbers were drawn


def test_chances_and_strengths():
    frame, box = picture(2), [[60, 20, 100, 80]]
    views = [augment_view(frame, box, rng_for(k, 'chance'), ('mirror',)) for k in range(400)]
    flipped = np.mean([np.array_equal(v.frame, frame[:, ::-1]) for v in views])
    assert abs(flipped-.5) < .08 and all(np.array_equal(v.frame, frame) or np.array_equal(v.frame, frame[:, ::-1]) for v in views)
    zoomed = [augment_view(frame, box, rng_for(k, 'chance'), ('zoom',)).boxes[0] for k in range(200)]
    growth = np.array([(b[2]-b[0])/40 for b in zoomed])
    assert 1 <= growth.min() < 1.03 and 1.19 < growth.max() <= 1/.8+1e-6
    none = ViewSettings(0, 0, 0, 0, brightness=0, contrast=0, saturation=0)
    still = augment_view(frame, box, rng_for(0), ('rotation', 'zoom', 'mirror', 'occlusion', 'color'), none)
    assert np.array_equal(still.frame, frame) and np.array_equal(still.boxes, np.float32(box))


def test_input_that_is_wrong():
    frame, box, r = picture(3), [[10, 10, 30, 40]], rng_for(0)
    for args, text in (((frame.astype(float), box), 'frame is float64'), ((frame[:0], box), 'with pixels'), ((frame[..., :2], box), 'frame has shape'),
                       ((frame, [[10, 10, 5, 40]]), 'ends before it starts'), ((frame, [[10, 10, np.nan, 40]]), 'not finite'),
                       ((frame, [[1, 2, 3]]), 'boxes has shape')):
        with pytest.raises(ValueError, match=text): two_views(*args, r)
    with pytest.raises(ValueError, match='names='): two_views(frame, box, r, ('flip',))
    gone = two_views(frame, [[-50, 0, -10, 40], [10, 10, 10, 40]], r)
    assert [len(v.rows) for v in gone] == [0, 0]


def test_frames_in_any_order_of_memory():
    frame, box = picture(4), [[20, 10, 60, 80]]
    for f in (frame[:, ::-1], frame[..., ::-1], np.asfortranarray(frame), frame[::2]):
        a, b = (augment_view(g, box, rng_for(0)) for g in (f, np.ascontiguousarray(f)))
        assert np.array_equal(a.frame, b.frame) and np.array_equal(a.boxes, b.boxes)


def test_numbers_of_any_width():
    x, y, q, z = case(12, dtype=torch.float32)
    want, queue = dense_contrastive_loss(x, y, q, z), EmbeddingQueue(8, 9)
    assert dense_contrastive_loss(x, y.int(), q, z.short()) == want
    queue.enqueue(x, y.int(), torch.zeros(40, dtype=torch.int16))
    for f in (lambda: queue.enqueue(x, y.float()), lambda: dense_contrastive_loss(x, y, q, z.double()),
              lambda: person_means(x, y, y > 2), lambda: nearest_points(y.float(), y, y)):
        with pytest.raises(ValueError, match='expected whole numbers'): f()


def test_package_has_no_names_left_over():
    assert set(contrastive.__all__) == {'dense_contrastive_loss', 'person_means', 'EmbeddingQueue', 'nearest_points',
                                        'identity_memory'}
