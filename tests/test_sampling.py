"Samplers on random label sets: what they promise holds for all of them."

import numpy as np
import pytest

from real import REAL
from reidlit.core import rng_for
from reidlit.data.sampling import (CameraPKSampler, PKSampler, TrackletSampler,
                                   arrange, camera_shares, deal, pick_frames)



def labels(seed):
    "Random identities, cameras, and a p and k that fit them."
    g = rng_for('test sampling', seed)
    n = int(g.integers(6, 40))
    sizes = np.maximum(1, g.lognormal(1.2, 1, n)).astype(int)
    pids = g.permutation(np.repeat(g.choice(1000, n, replace=False), sizes))
    camids = g.integers(0, g.integers(1, 7), len(pids))
    return pids, camids, int(g.integers(1, n+1)), int(g.integers(1, 6))


@pytest.mark.parametrize('seed', range(40))
@pytest.mark.parametrize('kind', ['pk', 'camera'])
def test_promises(seed, kind):
    pids, camids, p, k = labels(seed)
    s = PKSampler(pids, p, k, seed) if kind == 'pk' else CameraPKSampler(pids, camids, p, k, seed=seed)
    for epoch in (0, 1):
        batches = list(s)
        assert len(batches) == len(s) and s.epoch == epoch+1
        for rows in batches:
            assert rows.shape == (p*k,)
            # every person of the batch k times, in one hand
            hands = pids[rows].reshape(-1, k)
            assert (hands == hands[:, :1]).all()
            assert len(set(hands[:, 0])) == p
            for hand in rows.reshape(-1, k):
                owned = (pids == pids[hand[0]]).sum()
                assert len(set(hand)) == min(k, owned) or kind == 'camera'
                if kind == 'camera':
                    cams = len(set(camids[pids == pids[hand[0]]]))
                    assert len(set(camids[hand])) == min(k, cams)
                    if owned >= k: assert len(set(hand)) == k
        rows = np.concatenate(batches)
        assert (np.bincount(rows, minlength=len(pids)) == s.counts(epoch)).all()
        assert set(rows) == set(range(len(pids)))
    got = s.summary()
    assert got['missed'] == 0 and got['drawn'] == len(s)*p*k
    assert got['drawn']-got['repeats'] == got['rows'] == len(pids)


@pytest.mark.parametrize('seed', range(20))
def test_no_batch_more_than_needed(seed):
    "The length is the least that shows everything: seats or the largest person."
    pids, _, p, k = labels(seed)
    need = -(-np.unique(pids, return_counts=True)[1]//k)
    assert len(PKSampler(pids, p, k)) == max(-(-need.sum()//p), need.max())
    once = PKSampler(pids, p, k, visits=1)
    assert len(once) == -(-len(need)//p)
    if len(need) % p == 0: assert len(np.unique(pids[once.plan(0)[..., 0]])) == len(need)


@pytest.mark.parametrize('seed', range(40))
def test_arrange_never_gets_stuck(seed):
    g = rng_for('test arrange', seed)
    p, batches = int(g.integers(1, 9)), int(g.integers(1, 30))
    n = int(g.integers(p, 60))
    hands = np.zeros(n, int)
    while (spare := p*batches-hands.sum()) > 0:
        hands[g.permutation(np.flatnonzero(hands < batches))[:spare]] += g.integers(0, 2)
    who = arrange(hands, batches, p, g)
    assert who.shape == (batches, p)
    assert (np.bincount(who.ravel(), minlength=n) == hands).all()
    assert all(len(set(b)) == p for b in who)


@pytest.mark.parametrize('seed', range(40))
def test_deal(seed):
    g = rng_for('test deal', seed)
    rows, sizes = g.choice(99, g.integers(1, 12), replace=False), g.integers(0, 9, 15)
    hands = deal(rows, sizes, g)
    assert [len(h) for h in hands] == list(sizes)
    dealt, n = np.array(sum(hands, [])), len(rows)
    assert set(dealt[:n]) == set(rows) or len(dealt) < n
    for h in hands:
        c = np.unique(h, return_counts=True)[1]
        assert len(h) > n or (c == 1).all()


@pytest.mark.parametrize('seed', range(40))
def test_camera_shares_do_not_depend_on_ties(seed):
    g = rng_for('test shares', seed)
    n, k = g.integers(1, 9, g.integers(1, 8)), int(g.integers(1, 7))
    lengths = {len(camera_shares(n, k, rng_for(seed, i))) for i in range(8)}
    assert len(lengths) == 1
    s = camera_shares(n, k, g)
    assert (s.sum(1) == k).all() and (s.sum(0) >= n).all()
    assert ((s > 0).sum(1) == min(k, len(n))).all()
    if n.sum() >= k: assert (s <= n).all()


@pytest.mark.parametrize('seed', range(20))
def test_tracklets(seed):
    g = rng_for('test tracklets', seed)
    lengths = g.integers(1, 12, 24)
    tids = np.repeat(g.permutation(24), lengths)
    frames = np.concatenate([g.permutation(n) for n in lengths])
    s = TrackletSampler(tids % 6, tids, p=3, k=2, n=5, frames=frames, seed=seed)
    assert set(tids[s.plan(3).ravel()]) == set(range(24))
    for batch in s:
        assert batch.shape == (6, 5)
        assert (tids[batch] == tids[batch][:, :1]).all()
        assert (np.diff(frames[batch]) >= 0).all()
    for n in lengths:
        assert set(pick_frames(n, 12)) == set(range(n))


def test_large_sets_are_planned_in_seconds():
    "A set of MSMT17's size: 1,041 people, 32,621 pictures."
    import time
    g = rng_for('test large')
    pids = np.concatenate([np.arange(1041), g.integers(0, 1041, 32621-1041)])
    t = time.process_time()
    s = PKSampler(pids)
    assert s.summary()['missed'] == 0
    assert time.process_time()-t < 20


MARKET = REAL/'market1501_lists'/'market1501_train.csv'


@pytest.mark.skipif(not MARKET.exists(), reason='no Market-1501 lists')
def test_market1501():
    "The real label distribution: 751 people, 12,936 pictures, six cameras."
    rows = [r.split(',') for r in MARKET.read_text().split()]
    pids = np.array([int(p) for p, _ in rows])
    camids = np.array([int(f.split('_c')[1][0])-1 for _, f in rows])
    s = PKSampler(pids).summary()
    assert (s['people'], s['rows'], s['missed']) == (751, 12936, 0)
    assert s['repeats'] < .12*s['rows']
    once = PKSampler(pids, visits=1).summary()
    assert once['batches'] == 47 and once['missed'] > .7*s['rows']
    cam = CameraPKSampler(pids, camids).summary()
    assert cam['missed'] == 0 and cam['batches'] < 2*s['batches']
