"Clusters against loops; the rounds against what they may not touch."
import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from reidlit.core import ReidSet, rng_for, seed_all
from reidlit.learner import quiet
from reidlit.crossdataset.progressive import Classified, Clusters, pul, reliable_clusters
from reidlit.crossdataset.triplet_mining import EmbeddingNet

SIZE = (32, 16)
SETTINGS = dict(size=SIZE, pad=0., seed=0, pul_lr=1e-3)


@pytest.mark.parametrize('seed', range(10))
def test_clusters_against_loops(seed):
    g = rng_for('test pul', seed)
    n, k = int(g.integers(8, 60)), int(g.integers(2, 8))
    x = g.normal(size=(n, 5))+2*np.eye(5)[g.integers(0, 5, n)]
    keep = float(g.uniform(.3, .95))
    c = reliable_clusters(x, k, keep, seed)
    assert c.labels.dtype == np.int64 and set(c.labels) == set(range(k))
    unit = x/np.linalg.norm(x, axis=1, keepdims=True)
    for j in range(k):
        mean = unit[c.labels == j].mean(0)
        np.testing.assert_allclose(c.centres[j], mean/np.linalg.norm(mean), atol=1e-5)
    for i in range(n):
        near = [np.sum((unit[i]-unit[c.labels == j].mean(0))**2) for j in range(k)]
        assert near[c.labels[i]] <= min(near)+1e-5
        cosine = unit[i]@c.centres[c.labels[i]]
        assert abs(c.similarity[i]-cosine) < 1e-5
        assert c.reliable[i] == (c.similarity[i] > keep)
        mates = (c.reliable & (c.labels == c.labels[i])).sum()
        assert c.used[i] == (c.reliable[i] and mates > 1)
    long = reliable_clusters(torch.tensor(x)*8, k, keep, seed)
    assert (long.labels == c.labels).all() and (long.reliable == c.reliable).all()


def test_used_with_empty_clusters():
    c = Clusters(np.array([4, 4, 2]), np.eye(6), np.ones(3), np.array([True]*3))
    assert c.used.tolist() == [True, True, False]
    c.reliable[:] = False
    assert not c.used.any()


@pytest.mark.parametrize('change, text', [
    (dict(n_people=1), 'n_people=1: expected 2 to 6'),
    (dict(n_people=7), 'n_people=7: expected 2 to 6'),
    (dict(keep=85), 'keep=85'), (dict(keep=float('nan')), 'keep=nan'),
    (dict(features=np.full((6, 2), np.inf)), 'in 6 of 6 rows'),
    (dict(features=np.zeros(6)), 'features has shape')])
def test_misuse(change, text):
    kw = dict(features=np.random.default_rng(0).normal(size=(6, 2)), n_people=2)
    with pytest.raises(ValueError) as e: reliable_clusters(**kw | change)
    assert text in str(e.value)


def test_classifier_trains_embedding_and_weights():
    seed_all(0)
    body, centres = nn.Linear(4, 3, bias=False), np.eye(3)[:2]
    net, x, y = Classified(body, centres, 5.), torch.randn(8, 4), torch.arange(8) % 2
    want = 5*F.normalize(body(x))@torch.tensor(centres).float().T
    torch.testing.assert_close(net(x), want)
    F.cross_entropy(net(x), y).backward()
    assert body.weight.grad.norm() > 0 and net.weight.grad.norm() > 0
    assert (centres == np.eye(3)[:2]).all() # a copy learns
    assert net.normalize is True # the default of `extract_features`
    torch.testing.assert_close(net.eval()(x), body(x))


@pytest.fixture(scope='module')
def case():
    "Four colours with noise, eight pictures of each, and an untrained network."
    g = rng_for('test pul pictures')
    pids = np.repeat(np.arange(4), 8)
    color = g.integers(40, 200, (4, 1, 1, 3))[pids]
    images = (color+g.integers(-40, 40, (32, *SIZE, 3))).clip(0, 255).astype(np.uint8)
    seed_all(0)
    return ReidSet(images, pids), EmbeddingNet('tiny16', hidden=16, out=8)


def run(case, pids=None, **kw):
    items, model = case
    with quiet():
        return pul(model, ReidSet(items.images, pids), 4, SETTINGS, **kw)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return [k for k in a if torch.equal(a[k], b[k])]


def test_labels_and_model_are_left_alone(case):
    was = copy.deepcopy(case[1])
    a, history = run(case, rounds=2, epochs=1, keep=.5)
    b, _ = run(case, case[0].pids*0, rounds=2, epochs=1, keep=.5)
    assert len(same(a, b)) == len(same(was, case[1])) == len(was.state_dict())
    assert len(same(a, was)) < len(was.state_dict()) and not a.training
    assert [sorted(h) for h in history] == [['clusters', 'reliable', 'used']]*2
    assert all(0 < h['used'] <= h['reliable'] <= 32 for h in history)


def test_zero_rate_changes_statistics_only(case):
    tuned, _ = run(case, rounds=1, epochs=1, lr=0.)
    kept = same(tuned, case[1])
    weights = dict(tuned.named_parameters())
    assert set(weights) <= set(kept)
    assert not [k for k in kept if 'running' in k]


def test_nothing_reliable_is_said(case, caplog):
    items = ReidSet(case[0].images[::8], None) # each of them is a cluster
    with quiet(): tuned, history = pul(case[1], items, 4, SETTINGS)
    assert history == [dict(reliable=4, used=0, clusters=0)]
    assert 'PUL stops in round 1' in caplog.text
    assert len(same(tuned, case[1])) == len(tuned.state_dict())
