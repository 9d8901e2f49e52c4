"Triplets against loops, on random features with ties; views against slices."
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from reidlit.core import ReidSet, rng_for
from reidlit.learner import extract_features
from reidlit.losses import batch_all_triplet, batch_hard_triplet, pairwise_distances
from reidlit.crossdataset.triplet_mining import (EmbeddingNet, TenCrops, TripletLoss,
                                    first_k_triplet, hardest_triplets, ten_views,
                                    triplet_gaps)


def case(seed, whole=False):
    "Features and identities of uneven sizes; whole numbers give many ties."
    g = rng_for('test triplets', seed)
    n = int(g.integers(3, 24))
    y = g.integers(0, 1+n//3, n)
    y[0] = y.max()+1 # two identities at least, one with a single picture
    x = g.integers(0, 3, (n, 2)) if whole else g.normal(0, 1, (n, 4))
    return torch.tensor(x, dtype=torch.float64), torch.tensor(y)


def rows(y, a):
    same = [i for i in range(len(y)) if i != a and y[i] == y[a]]
    return same, [i for i in range(len(y)) if y[i] != y[a]]


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('whole', [False, True])
def test_hardest_and_gaps_against_loops(seed, whole):
    x, y = case(seed, whole)
    d = pairwise_distances(x)
    p, n = hardest_triplets(x, y)
    gaps, hardest = [], []
    for a in range(len(y)):
        pos, neg = rows(y, a)
        # Python's max and min give the first of equals, as asked
        assert p[a] == (max(pos, key=lambda i: d[a, i]) if pos else -1)
        assert n[a] == (min(neg, key=lambda i: d[a, i]) if neg else -1)
        gaps += [d[a, i]-d[a, j] for i in pos for j in neg]
        if pos and neg: hardest.append(d[a, p[a]]-d[a, n[a]])
    got = triplet_gaps(x, y)
    assert len(got) == len(gaps)
    if not gaps: return
    torch.testing.assert_close(got, torch.stack(gaps))
    mean = F.softplus(torch.stack(hardest)).mean()
    torch.testing.assert_close(TripletLoss()(x, y, None, None), mean)
    for margin, each in ((.5, (got+.5).relu()), ('soft', F.softplus(got))):
        torch.testing.assert_close(
            batch_all_triplet(x, y, margin, nonzero=False), each.mean())


@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('margin', [.3, 'soft'])
def test_first_k_against_a_loop(seed, margin):
    g = rng_for('test first k', seed)
    n = int(g.integers(3, 20))
    k = int(g.integers(2, n))
    x = torch.tensor(g.normal(0, 1, (n, 3)), requires_grad=True)
    d = pairwise_distances(x)
    gaps = torch.stack([max(d[a, i] for i in range(k) if i != a)-min(d[a, k:])
                        for a in range(k)])
    loop = (F.softplus(gaps) if margin == 'soft' else F.relu(gaps+margin)).mean()
    ours, stats = first_k_triplet(x, k, margin, stats=True)
    assert (stats['anchors'], stats['valid']) == (n, k)
    torch.testing.assert_close(ours, loop)
    torch.testing.assert_close(*[torch.autograd.grad(v, x)[0] for v in (ours, loop)])
    turn = torch.tensor(g.permutation(n-k))+k # strangers have no order
    other = first_k_triplet(torch.cat([x[:k], x[turn]]), k, margin)
    torch.testing.assert_close(other, ours)


def test_first_k_is_the_plain_loss_with_own_labels():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6])
    assert first_k_triplet(x, 3, .3) == batch_hard_triplet(x, y, .3)


@pytest.mark.parametrize('n, k', [(5, 1), (5, 0), (5, 5), (5, 6), (1, 1)])
def test_first_k_refuses(n, k):
    with pytest.raises(ValueError, match=f'k={k} of {n} pictures'):
        first_k_triplet(torch.zeros(n, 2), k)


def test_bad_numbers_are_errors():
    y = torch.tensor([0, 0, 1, 1])
    for bad in (torch.nan, torch.inf):
        x = torch.zeros(4, 2)
        x[2, 1] = bad
        for f in (triplet_gaps, hardest_triplets, TripletLoss()):
            with pytest.raises(ValueError, match='first in row 2'): f(x, y)
        with pytest.raises(ValueError, match='first in row 2'): first_k_triplet(x, 2)
    for f in (triplet_gaps, hardest_triplets, TripletLoss()):
        with pytest.raises(ValueError, match='one identity'): f(torch.zeros(4, 2), y*0)


class Flat(nn.Module):
    "A linear model: the pixels themselves."
    def forward(self, x): return x.flatten(1)


@pytest.mark.parametrize('H, W, h, w', [(9, 5, 8, 4), (8, 4, 8, 4), (12, 9, 7, 4),
                                        (6, 9, 6, 2)])
def test_ten_crops_against_slices(H, W, h, w):
    x = torch.tensor(rng_for('views', H, W).normal(0, 1, (2, 3, H, W)),
                     dtype=torch.float32)
    t, l = (H-h)//2, (W-w)//2
    five = lambda v: [v[..., :h, :w], v[..., :h, W-w:], v[..., H-h:, :w],
                      v[..., H-h:, W-w:], v[..., t:t+h, l:l+w]]
    views = five(x)+five(torch.flip(x, [3]))
    for a, b in zip(ten_views(x, (h, w)), views, strict=True): assert a.equal(b)
    ten = TenCrops(Flat(), (h, w))
    mean = torch.stack([v.flatten(1) for v in views]).mean(0)
    torch.testing.assert_close(ten(x), mean)
    torch.testing.assert_close(ten(x.flip(3)), ten(x))


def test_too_small_pictures_are_named():
    for shape in ((7, 9), (9, 3)):
        with pytest.raises(ValueError, match=f'{shape[0]} x {shape[1]}: expected 8 x 4'):
            ten_views(torch.zeros(1, 3, *shape), (8, 4))


def test_embedding_net_and_its_views():
    torch.manual_seed(0)
    net = EmbeddingNet('tiny', hidden=32, out=6, dropout=.5)
    x = torch.randn(5, 3, 32, 16)
    for mode in (True, False):
        out = net.train(mode)(x)
        assert out.shape == (5, 6) and out.dtype == torch.float32
    assert isinstance(net.head[3], nn.Dropout) and net.head[3].p == .5
    torch.testing.assert_close(net(x), net.head(net.body(x).mean((2, 3))))
    with torch.autocast('cpu', torch.bfloat16): out = net(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, net(x)) # the network decides, not the outside
    half = EmbeddingNet(net.body, 32, 6, dtype=torch.bfloat16).eval()
    half.load_state_dict(net.state_dict())
    assert half(x).dtype == torch.float32 and not half(x).equal(net(x))
    images = rng_for('pictures').integers(0, 256, (4, 36, 18, 3)).astype(np.uint8)
    items = ReidSet(images, [0, 0, 1, 1])
    f = extract_features(TenCrops(net, (32, 16)), items, (36, 18), flip=False)
    assert f.shape == (4, 6)
    unit = extract_features(TenCrops(net, (32, 16)), items, (36, 18), flip=False,
                            normalize=True)
    torch.testing.assert_close(F.normalize(f), unit)
    assert (f.norm(dim=1)-1).abs().max() > .01
