"Random tracklets, for comparisons with plain loops."
import numpy as np
import torch

from reidlit.core import rng_for


def case(seed, tracks=12):
    "Features, tracklets in any order of rows, and the tracklets' labels."
    g = rng_for('test cameras', seed)
    ids = np.sort(g.choice(1000, tracks, replace=False))
    which = g.permutation(np.repeat(np.arange(tracks), g.integers(1, 9, tracks)))
    cams, pids = g.integers(0, 3, tracks), g.integers(0, 5, tracks)
    x = torch.tensor(g.normal(2, 3, (len(which), 7)), dtype=torch.float32)
    return g, x, ids, which, cams, pids
