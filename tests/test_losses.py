"Losses against loops, another library, numerical gradients and bad numbers."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reidlit.losses import (batch_all_triplet, batch_hard_triplet,
                            pairwise_distances, triplet_masks)

MARGINS = (.3, 1., 'soft')


def case(seed, dtype=torch.float64):
    "Random features, identities of uneven sizes, and masks."
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 40, (1,), generator=g))
    f = torch.randn(n, 5, generator=g, dtype=dtype)
    y = torch.randint(0, 1+n//3, (n,), generator=g)
    return f, y, *(torch.rand(2, n, n, generator=g) < .6)


def loops(f, y, margin, positives, negatives, hard):
    "The losses by plain loops: every valid triplet's, or the hardest of an anchor."
    d = (f[:, None]-f[None]).norm(dim=2)
    gap = F.softplus if margin == 'soft' else lambda x: F.relu(x+margin)
    n, out = range(len(f)), []
    for a in n:
        pos = [d[a, i] for i in n if i != a and y[i] == y[a] and positives[a, i]]
        neg = [d[a, i] for i in n if y[i] != y[a] and negatives[a, i]]
        if not pos or not neg: continue
        if hard: out.append(gap(max(pos)-min(neg)))
        else: out += [gap(p-q) for p in pos for q in neg]
    return torch.stack(out) if out else torch.zeros(0)


@pytest.mark.parametrize('seed', range(25))
@pytest.mark.parametrize('margin', MARGINS)
def test_against_loops(seed, margin):
    f, y, positives, negatives = case(seed)
    masks = dict(positives=positives, negatives=negatives)
    if len(y.unique()) == 1:
        for loss in (batch_hard_triplet, batch_all_triplet):
            with pytest.raises(ValueError, match='one identity'): loss(f, y, margin)
        return
    each = loops(f, y, margin, positives, negatives, True)
    loss, s = batch_hard_triplet(f, y, margin, **masks, stats=True)
    assert int(s['valid']) == len(each)
    assert torch.isclose(loss, each.mean() if len(each) else f.sum()*0)
    each = loops(f, y, margin, positives, negatives, False)
    mean = each.mean() if len(each) else f.sum()*0
    assert torch.isclose(batch_all_triplet(f, y, margin, **masks, nonzero=False), mean)
    over = each[each > 0]
    mean = over.mean() if len(over) else f.sum()*0
    assert torch.isclose(batch_all_triplet(f, y, margin, **masks), mean)


@pytest.mark.parametrize('n,d', [(8, 3), (64, 16), (96, 128), (64, 2048)])
@pytest.mark.parametrize('margin', MARGINS)
def test_against_pytorch_metric_learning(n, d, margin):
    pml = pytest.importorskip('pytorch_metric_learning')
    from pytorch_metric_learning import distances, losses, miners, reducers
    raw = distances.LpDistance(normalize_embeddings=False)
    soft = margin == 'soft'
    loss = losses.TripletMarginLoss(0 if soft else margin, smooth_loss=soft,
                                    distance=raw, reducer=reducers.MeanReducer())
    y = torch.arange(n)//4
    for dtype, tol in ((torch.float64, 1e-6), (torch.float32, 2e-4)):
        a, b = [torch.randn(n, d, generator=torch.Generator().manual_seed(n),
                            dtype=dtype, requires_grad=True) for _ in range(2)]
        ours = batch_hard_triplet(a, y, margin)
        other = loss(b, y, miners.BatchHardMiner(distance=raw)(b, y))
        ours.backward(), other.backward()
        assert abs(ours-other) < tol and (a.grad-b.grad).abs().max() < tol, pml.__version__


@pytest.mark.parametrize('loss', [batch_hard_triplet, batch_all_triplet])
@pytest.mark.parametrize('margin', MARGINS)
def test_gradients(loss, margin):
    f, *_ = case(3)
    assert len(f) >= 6
    f, y = f[:12].clone().requires_grad_(), torch.arange(len(f[:12]))//3
    assert torch.autograd.gradcheck(lambda x: loss(x, y, margin), (f,))


@pytest.mark.parametrize('loss', [batch_hard_triplet, batch_all_triplet])
@pytest.mark.parametrize('margin', MARGINS)
def test_one_identity_and_nan_are_errors(loss, margin):
    f, y, *_ = case(5, torch.float32)
    with pytest.raises(ValueError, match=f'{len(f)} pids of one identity'): loss(f, y*0, margin)
    f[3, 1] = torch.nan
    with pytest.raises(ValueError, match='1 of .* rows, first in row 3'): loss(f, y, margin)


@pytest.mark.parametrize('loss', [batch_hard_triplet, batch_all_triplet])
@pytest.mark.parametrize('margin', MARGINS)
def test_finite_where_others_are_not(loss, margin):
    "Repeated rows, equal features, single pictures, huge and tiny features."
    f, y, positives, negatives = case(5, torch.float32)
    repeated = f.clone()
    repeated[1::2] = repeated[::2][:len(repeated[1::2])]
    for x in (repeated, f*0, f*1e6, f*1e-12):
        for who in (y, torch.arange(len(f))):
            for kw in ({}, dict(positives=positives, negatives=negatives)):
                leaf = x.clone().requires_grad_()
                value = loss(leaf, who, margin, **kw)
                value.backward()
                assert value.isfinite() and leaf.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    f, y, *_ = case(7, torch.float32)
    w = torch.eye(5, requires_grad=True)
    with torch.autocast('cpu', dtype):
        feats = f@w
        assert feats.dtype == dtype
        for loss in (batch_hard_triplet, batch_all_triplet):
            value = loss(feats, y)
            assert value.dtype == torch.float32
            assert torch.isclose(value, loss(feats.float(), y))
    value.backward()
    assert w.grad.isfinite().all()


def test_distances_of_equal_rows_stay_zero():
    x = torch.randn(40, 2048, generator=torch.Generator().manual_seed(0))*10+50
    x[1] = x[0]
    assert pairwise_distances(x)[0, 1] < 1e-5
    exact = torch.cdist(x.double(), x.double(),
                        compute_mode='donot_use_mm_for_euclid_dist')
    np.testing.assert_allclose(pairwise_distances(x), exact, rtol=1e-5, atol=1e-5)


def test_masks_are_symmetric_without_masks():
    _, y, *_ = case(9)
    pos, neg, ok = triplet_masks(y)
    assert (pos == pos.T).all() and (neg == neg.T).all()
    assert not pos.diagonal().any() and not (pos & neg).any()
    assert (ok == (pos.any(0) & neg.any(0))).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_cuda():
    f, y, *_ = case(11, torch.float32)
    for loss in (batch_hard_triplet, batch_all_triplet):
        a, b = f.clone().requires_grad_(), f.cuda().requires_grad_()
        loss(a, y).backward(), loss(b, y.cuda()).backward()
        assert torch.allclose(a.grad, b.grad.cpu(), atol=1e-5)
