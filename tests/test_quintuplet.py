"The quintuplet loss against plain loops; masks, gradients, autocast, bad input."
import copy

import pytest
import torch
import torch.nn.functional as F

from reidlit.camera_memory import CameraMemory
from reidlit.ics.quintuplet import quintuplet_loss

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')


def case(seed, batch=40, dim=12, dtype=torch.float32):
    "Pooled and embedded features, labels, cameras, a memory with some unseen rows; some cameras with one identity."
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(3, 30, (1,), generator=g))
    cams = torch.unique(torch.randint(0, 1+n//2, (n,), generator=g), return_inverse=True)[1]
    memory = CameraMemory(cams, dim).to(dtype)
    known = torch.randperm(n, generator=g)[:max(2, 2*n//3)]
    memory.update(F.normalize(torch.randn(len(known), dim, generator=g, dtype=dtype)), known)
    y = torch.randint(0, n, (batch,), generator=g)
    y[:2] = torch.tensor([0, 1])
    pooled, f = [torch.randn(batch, d, generator=g, dtype=dtype) for d in (7, dim)]
    return pooled, y, cams[y], F.normalize(f)*1.2, memory


def gap(x, margin): return F.softplus(x) if margin == 'soft' else F.relu(x+margin)


def loops(g, y, c, f=None, m=None, m1=.3, m2=.3, reduction='camera'):
    "Eq. 4 anchor by anchor, with counts of the masked."
    halves, masked = [{}, {}], [0, 0]
    for a in range(len(y)):
        pos = [(g[a]-g[i]).norm() for i in range(len(y)) if i != a and y[i] == y[a]]
        neg = [(g[a]-g[i]).norm() for i in range(len(y)) if y[i] != y[a] and c[i] == c[a]]
        if pos and neg: halves[0].setdefault(int(c[a]), []).append(gap(max(pos)-min(neg), m1))
        else: masked[0] += 1
        if m is None: continue
        rivals = [(f[a]-m.centroids[j]).norm() for j in range(len(m.seen))
                  if m.seen[j] and j != y[a] and m.cameras[j] == c[a]]
        if rivals and m.seen[y[a]]:
            own = (f[a]-m.centroids[y[a]]).norm()
            halves[1].setdefault(int(c[a]), []).append(gap(own-min(rivals), m2))
        else: masked[1] += 1
    total = (lambda v: sum(v)/len(v)) if reduction == 'camera' else sum
    active = [[float(x > 0) for v in h.values() for x in v] for h in halves]
    return sum(total(v) for h in halves for v in h.values()), masked, \
        [sum(x)/max(1, len(x)) for x in active]


@pytest.mark.parametrize('reduction', ['camera', 'sum'])
@pytest.mark.parametrize('margins', [(.3, .3), (1., 0.), ('soft', 'soft')])
@pytest.mark.parametrize('seed', range(6))
def test_against_loops(seed, margins, reduction):
    g, y, c, f, memory = case(seed, dtype=torch.float64)
    for args in ((), (f, memory)):
        a, b = [[x.clone().requires_grad_() for x in (g, f)] for _ in range(2)]
        kw = dict(m1=margins[0], m2=margins[1], reduction=reduction)
        ours, s = quintuplet_loss(a[0], y, c, *(args and (a[1], memory)), **kw, stats=True)
        plain, masked, active = loops(b[0], y, c, *(args and (b[1], memory)), **kw)
        if not torch.is_tensor(plain):
            assert ours == 0
            continue
        assert abs(ours-plain) < 1e-6
        assert [s['anchors'], s['no_negative'], s['no_centroid']] == [40, *masked]
        assert abs(s['active_batch']-active[0]) < 1e-9 and abs(s['active_memory']-active[1]) < 1e-9
        ours.backward(), plain.backward()
        for p, q in zip(a, b):
            if p.grad is None: continue
            assert (p.grad-(0 if q.grad is None else q.grad)).abs().max() < 1e-6


@pytest.mark.parametrize('seed', range(4))
def test_float32_is_float64(seed):
    g, y, c, f, memory = case(seed)
    exact = quintuplet_loss(g.double(), y, c, f.double(), copy.deepcopy(memory).double())
    assert abs(quintuplet_loss(g, y, c, f, memory)-exact) < 5e-6


def test_similarities_may_be_passed():
    g, y, c, f, memory = case(2)
    f.requires_grad_()
    sim = memory.similarities(f)
    assert quintuplet_loss(g, y, c, f, memory, sim=sim) == quintuplet_loss(g, y, c, f, memory)
    (memory.loss(f, y, c, sim)+quintuplet_loss(g, y, c, f, memory, sim=sim)).backward()
    assert f.grad.isfinite().all()


def test_all_masked_still_has_a_graph():
    g, f = torch.randn(4, 3).requires_grad_(), torch.randn(4, 2).requires_grad_()
    y = torch.arange(4)
    loss, s = quintuplet_loss(g, y, y, f, CameraMemory(y, 2), stats=True)
    loss.backward()
    assert loss == 0 and (g.grad == 0).all() and (f.grad == 0).all()
    assert (s['no_negative'], s['no_centroid']) == (4, 4)


@pytest.mark.parametrize('margin', [.3, 'soft'])
def test_gradients_are_finite_on_equal_features(margin):
    "Repeated pictures, pictures that sit on a row, masked anchors."
    g, y, c, _, memory = case(1)
    g = torch.ones_like(g).requires_grad_()
    f = memory.centroids[y].clone().requires_grad_()
    loss = quintuplet_loss(g, y, c, f, memory, margin, margin)
    loss.backward()
    assert loss.isfinite() and g.grad.isfinite().all() and f.grad.isfinite().all()


def test_masked_anchors_move_nothing():
    g = torch.tensor([[0.], [1.], [2.], [3.], [5.], [9.]], requires_grad=True)
    y, c = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 1, 1])
    quintuplet_loss(g, y, c).backward()
    assert (g.grad[4:] == 0).all() and (g.grad[:4] != 0).any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=GPU)])
def test_autocast(dtype, device):
    g, y, c, f, memory = [x.to(device) for x in case(3)]
    w = torch.eye(12, device=device, requires_grad=True)
    with torch.autocast(device, dtype):
        half = f@w
        assert half.dtype == dtype
        loss = quintuplet_loss(g.to(dtype), y, c, half, memory)
        assert loss.dtype == torch.float32
    assert torch.isclose(loss, quintuplet_loss(g.to(dtype).float(), y, c, half.float(), memory), atol=1e-6)
    loss.backward()
    assert w.grad.isfinite().all()


def test_the_memory_gets_no_gradient_and_may_move_later():
    g, y, c, f, memory = case(5)
    f.requires_grad_()
    loss = quintuplet_loss(g.requires_grad_(), y, c, f, memory)
    before = memory.centroids.clone()
    loss.backward()
    assert (memory.centroids == before).all() and memory.centroids.grad is None
    memory.update(f, y)


def test_labels_that_do_not_fit_are_named():
    g, y, c, f, memory = case(4)
    wrong = c.clone()
    wrong[7] = wrong[7]+1
    with pytest.raises(ValueError, match=f'row 7: label {y[7]} is of camera'): quintuplet_loss(g, y, wrong, f, memory)
    with pytest.raises(ValueError, match=f'label {len(memory.cameras)}, expected'):
        quintuplet_loss(g, y*0+len(memory.cameras), c, f, memory)
    twice = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 0])
    with pytest.raises(ValueError, match='label 0 in cameras 0 and 1'): quintuplet_loss(g[:4], *twice)
    with pytest.raises(ValueError, match='embedding is None'): quintuplet_loss(g, y, c, memory=memory)
    with pytest.raises(ValueError, match='40 pids of one identity'): quintuplet_loss(g, y*0, c*0)
    with pytest.raises(ValueError, match="reduction='mean'"): quintuplet_loss(g, y, c, reduction='mean')
    with pytest.raises(ValueError, match="margin='hard'"): quintuplet_loss(g, y, c, m1='hard')
    with pytest.raises(ValueError, match='cameras has shape'): quintuplet_loss(g, y, c[:-1])
    with pytest.raises(ValueError, match='pooled has shape'): quintuplet_loss(g[:-1], y, c)
    with pytest.raises(ValueError, match='embedding has shape'): quintuplet_loss(g, y, c, f[:-1], memory)
    with pytest.raises(ValueError, match='sim has shape'): quintuplet_loss(g, y, c, f, memory, sim=f)


@pytest.mark.parametrize('which', [0, 1])
def test_nan_is_an_error(which):
    g, y, c, f, memory = case(6)
    (g, f)[which][5, 2] = torch.nan
    with pytest.raises(ValueError, match='NaN .* first in row 5'): quintuplet_loss(g, y, c, f, memory)
