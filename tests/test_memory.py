"The memory against plain loops, under autocast, with bad input, saved and loaded."
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reidlit.camera_memory import CameraMemory

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
DEVICES = ['cpu', pytest.param('cuda', marks=GPU)]


def case(seed, n=None, dim=16, batch=48, **kw):
    "A memory that has seen some, and a batch; identities in random order of cameras, some cameras with one."
    g = torch.Generator().manual_seed(seed)
    n = n or int(torch.randint(2, 40, (1,), generator=g))
    cams = torch.randint(0, max(1, n//3), (n,), generator=g)
    cams = torch.unique(cams, return_inverse=True)[1]
    memory = CameraMemory(cams, dim, **kw)
    y = torch.randint(0, n, (batch,), generator=g)
    f = F.normalize(torch.randn(batch, dim, generator=g))
    memory.update(f[:batch//2].flip(0), y[:batch//2])
    return memory, f, y


def loop_probability(memory, x, j):
    "Eq. 2 by its letters."
    rivals = range(len(memory.cameras)) if memory.across else \
        [k for k in range(len(memory.cameras)) if memory.cameras[k] == memory.cameras[j]]
    e = {k: torch.exp(memory.centroids[k].double()@x.double()/memory.temperature) for k in rivals}
    return e[int(j)]/sum(e.values()), e


def loop_loss(memory, f, y):
    "Eq. 3 by loops over cameras and pictures."
    each = torch.stack([-loop_probability(memory, x, j)[0].log() for x, j in zip(f, y)])
    if memory.across: return each.mean()
    return sum(each[memory.cameras[y] == c].mean() for c in memory.cameras[y].unique())


def loop_update(rows, f, y, mu, in_order):
    "Eq. 1, picture by picture, or with the batch's mean of each identity."
    pairs = zip(f, y.tolist()) if in_order else [(f[y == j].mean(0), int(j)) for j in y.unique()]
    for x, j in pairs: rows[j] = F.normalize(mu*rows[j]+(1-mu)*x, dim=0)


@pytest.mark.parametrize('seed', range(6))
def test_blocks_of_own_cameras_change_nothing(seed):
    "Identities in the order of their cameras, as `accumulate_ids` gives them, are multiplied camera by camera."
    mixed, f, y = case(seed)
    order = mixed.cameras.argsort(stable=True)
    memory = CameraMemory(mixed.cameras[order], f.shape[1])
    memory.start(F.normalize(torch.randn(len(order), f.shape[1])), torch.arange(len(order)))
    a, b = f.clone().requires_grad_(), f.clone().requires_grad_()
    ours, whole = memory.loss(a, y), memory.loss(b, y, sim=memory.similarities(b))
    ours.backward(), whole.backward()
    assert torch.allclose(ours, whole, atol=1e-6) and torch.allclose(a.grad, b.grad, atol=1e-6)
    assert memory.similarities(f, y).isinf().sum() == sum((memory.cameras != memory.cameras[j]).sum() for j in y)


@pytest.mark.parametrize('across', [False, True])
@pytest.mark.parametrize('seed', range(8))
def test_loss_and_gradient_are_those_of_loops(seed, across):
    memory, f, y = case(seed, across=across, temperature=.2)
    a, b = f.clone().requires_grad_(), f.clone().requires_grad_()
    ours, plain = memory.loss(a, y, memory.cameras[y]), loop_loss(memory, b, y)
    ours.backward(), plain.backward()
    assert abs(ours-plain) < 1e-6*max(1, plain)
    assert (a.grad-b.grad).abs().max() < 1e-6
    p = memory.probabilities(f, y)
    for i in range(0, len(f), 7):
        own, e = loop_probability(memory, f[i], y[i])
        assert abs(p[i, y[i]]-own) < 1e-6 and abs(p[i].sum()-1) < 1e-5
        assert set(p[i].nonzero()[:, 0].tolist()) <= set(e)


@pytest.mark.parametrize('in_order', [True, False])
@pytest.mark.parametrize('mu', [0., .2, .5, .95, 1.])
@pytest.mark.parametrize('seed', range(4))
def test_update_is_that_of_loops(seed, mu, in_order):
    memory, f, y = case(seed, momentum=mu, in_order=in_order)
    for batch in range(3):
        rows = memory.centroids.clone()
        g = F.normalize(f.roll(batch, 0)+.1)
        loop_update(rows, g, y, mu, in_order)
        memory.update(g, y)
        assert (memory.centroids-rows).abs().max() < 1e-6
        assert (memory.seen == (rows != 0).any(1)).all()
        lengths = memory.centroids[memory.seen].norm(dim=1)
        assert (lengths-1).abs().max() < 1e-5 if len(lengths) else mu == 1


def test_order_matters_and_one_step_does_not_care():
    memory, f, y = case(0, n=3)
    for in_order in (True, False):
        ends = []
        for way in (torch.arange(len(y)), torch.arange(len(y)).flip(0)):
            m = copy.deepcopy(memory)
            m.in_order = in_order
            m.update(f[way], y[way])
            ends.append(m.centroids)
        assert ((ends[0]-ends[1]).abs().max() > .1) == in_order


@pytest.mark.parametrize('seed', range(4))
def test_a_shuffle_of_identities_changes_nothing(seed):
    "Order of rows is free: identities of a camera need not stand together."
    memory, f, y = case(seed)
    order = torch.randperm(len(memory.cameras), generator=torch.Generator().manual_seed(seed))
    other = CameraMemory(memory.cameras[order], 16)
    other.centroids.copy_(memory.centroids[order])
    assert torch.isclose(memory.loss(f, y), other.loss(f, order.argsort()[y]), atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('device', DEVICES)
def test_autocast(dtype, device):
    memory, f, y = case(1)
    memory, f, y = memory.to(device), f.to(device), y.to(device)
    w = torch.eye(16, device=device, requires_grad=True)
    exact = memory.loss((f.to(dtype)@torch.eye(16, device=device, dtype=dtype)).float(), y)
    with torch.autocast(device, dtype):
        half = f@w
        assert half.dtype == dtype
        sim = memory.similarities(half)
        loss = memory.loss(half, y, sim=sim)
        assert sim.dtype == loss.dtype == memory.probabilities(half, y).dtype == torch.float32
        assert torch.isclose(loss, exact, atol=1e-6)
        loss.backward()
        memory.update(half, y)
    assert memory.centroids.dtype == torch.float32 and w.grad.isfinite().all()


@GPU
def test_cuda():
    memory, f, y = case(3)
    there = copy.deepcopy(memory).cuda()
    assert torch.isclose(memory.loss(f, y), there.loss(f.cuda(), y.cuda()).cpu(), atol=1e-5)
    memory.update(f, y), there.update(f.cuda(), y.cuda())
    assert (memory.centroids-there.centroids.cpu()).abs().max() < 1e-5


def test_double_precision_gradient():
    memory, f, y = case(2, batch=6)
    memory = memory.double()
    assert torch.autograd.gradcheck(lambda x: memory.loss(x, y), (f.double().requires_grad_(),))


def test_unseen_rows_are_a_logit_of_zero():
    memory = CameraMemory([0, 0, 0], 2)
    f = torch.tensor([[1., 0.]])
    memory.update(f, torch.tensor([1]))
    p = memory.probabilities(f, torch.tensor([1]))[0]
    assert torch.isclose(p[1], torch.tensor(math.exp(15)/(math.exp(15)+2)))
    assert p[0] == p[2] > 0


def test_a_row_that_cancels_counts_as_unseen():
    memory = CameraMemory([0, 0], 2)
    f = torch.tensor([[0., 1.]])
    memory.update(f, torch.tensor([1]))
    memory.update(-f, torch.tensor([1]))
    assert (memory.centroids == 0).all() and not memory.seen.any()
    still = CameraMemory([0], 2, momentum=1.)
    still.update(f, torch.tensor([0]))
    assert not still.seen.any()


def test_half_precision_products_would_be_rough():
    memory, f, _ = case(9, n=30, dim=64)
    with torch.autocast('cpu', torch.bfloat16):
        rough, exact = f@memory.centroids.T, memory.similarities(f)
    assert rough.dtype == torch.bfloat16 and exact.dtype == torch.float32
    assert 15*(rough-exact).abs().max() > 15*(f@memory.centroids.T-exact).abs().max()+.01


def test_one_identity_in_a_camera():
    memory = CameraMemory([0, 1, 1], 4)
    f = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    memory.update(f, torch.arange(3))
    loss = memory.loss(f, torch.tensor([0, 1, 2]))
    loss.backward()
    assert (f.grad[0] == 0).all() and (f.grad[1:] != 0).any()
    assert memory.loss(f[:1], torch.tensor([0])) == 0


def test_too_early_an_update_is_an_error():
    memory, f, y = case(4)
    f.requires_grad_()
    loss = memory.loss(f, y)
    memory.update(f, y)
    with pytest.raises(RuntimeError, match='inplace'): loss.backward()
    loss = memory.loss(f, y)
    loss.backward()
    assert f.grad.isfinite().all() and not memory.centroids.requires_grad


def test_saved_and_loaded(tmp_path):
    memory, f, y = case(5)
    model = torch.nn.ModuleDict(dict(net=torch.nn.Linear(16, 16), memory=memory))
    torch.save(model.state_dict(), tmp_path/'model.pt')
    other = torch.nn.ModuleDict(dict(net=torch.nn.Linear(16, 16), memory=CameraMemory(memory.cameras, 16)))
    other.load_state_dict(torch.load(tmp_path/'model.pt', weights_only=True))
    for m in (model, other): m['memory'].update(f, y)
    assert (other['memory'].centroids == memory.centroids).all()
    assert (other['memory'].seen == memory.seen).all()
    assert other['memory'].loss(f, y) == memory.loss(f, y)
    with pytest.raises(RuntimeError, match='size mismatch'):
        CameraMemory([0, 1], 16).load_state_dict(memory.state_dict())


def test_cameras_are_copied():
    cams = np.array([0, 1])
    memory = CameraMemory(cams, 2)
    cams[0] = 5
    assert memory.cameras.tolist() == [0, 1]


def test_start():
    memory, f, y = case(6, n=5)
    y[:5] = torch.arange(5)
    memory.start(f, y)
    for j in range(5):
        assert (memory.centroids[j]-F.normalize(f[y == j].mean(0), dim=0)).abs().max() < 1e-6
    assert memory.seen.all()


def test_start_with_some_missing(caplog):
    memory = CameraMemory([0, 0, 1], 2)
    f = torch.eye(2)
    memory.start(f, torch.tensor([1, 2]))
    assert '1 of 3 identities have no picture and stay unseen, first 0' in caplog.text
    assert memory.seen.tolist() == [False, True, True] and (memory.centroids[0] == 0).all()
    before = memory.centroids.clone()
    with pytest.raises(ValueError, match='camera 0: none of its'): memory.start(f[:1], torch.tensor([2]))
    assert (memory.centroids == before).all()


@pytest.mark.parametrize('across', [False, True])
def test_bad_input_is_named(across):
    memory, f, y = case(7, n=6, across=across)
    calls = [lambda f, y: memory.loss(f, y), memory.update, memory.start, memory.probabilities]
    for call in calls:
        kept = memory.centroids.clone()
        with pytest.raises(ValueError, match='row 0: label 6, expected 0 to 5'): call(f, y*0+6)
        with pytest.raises(ValueError, match='label -1'): call(f, y-y-1)
        bad = f.clone()
        bad[3, 2] = torch.nan
        with pytest.raises(ValueError, match='NaN .* first in row 3'): call(bad, y)
        with pytest.raises(ValueError, match=r'f has shape \(48, 15\)'): call(f[:, 1:], y)
        assert (memory.centroids == kept).all()
    wrong = memory.cameras[y].clone()
    wrong[4] += 1
    with pytest.raises(ValueError, match=f'row 4: label {y[4]} is of camera'): memory.loss(f, y, wrong)
    with pytest.raises(ValueError, match='sim has shape'): memory.loss(f, y, sim=f)


@pytest.mark.parametrize('kw,message', [
    (dict(cameras=[]), 'no identities'), (dict(cameras=[0, 2]), 'camera 1 has no identity'),
    (dict(cameras=[1, 1]), 'camera 0 has no identity'), (dict(cameras=[0, -2]), 'cameras: -2 in row 1'),
    (dict(cameras=[0., 1.]), 'expected whole numbers'), (dict(dim=0), 'dim=0'), (dict(momentum=1.01), 'momentum=1.01'),
    (dict(momentum=-.1), 'momentum=-0.1'), (dict(momentum=math.nan), 'momentum=nan'),
    (dict(temperature=0), 'temperature=0'), (dict(temperature=-1.), 'temperature=-1')])
def test_bad_settings_are_named(kw, message):
    with pytest.raises(ValueError, match=message): CameraMemory(**{'cameras': [0, 1], 'dim': 2, **kw})
