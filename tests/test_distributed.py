"Two processes that train together learn what one learns from their joined batches."
import json
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from reidlit.core import ReidSet, seed_all
from reidlit.data.augment import Augment
from reidlit.data.sampling import PKSampler
from reidlit.ics import (VARIANTS, CameraMemory, IcsLoss, IcsOutput, UpdateMemory, associate, ics_learner, ics_settings,
                         identity_centroids)
from reidlit.learner import ReidLoaders, SampledLoader, quiet, reid_learner
from reidlit.runs import fit

CAMERAS = [0, 0, 0, 0, 1, 1, 1, 1]
SETTINGS = ics_settings('drawn', 'ci', p=4, k=2, size=(16, 8))


class Plain(nn.Module):
    "No batch normalisation: a half batch has other statistics than a whole one."
    def __init__(self):
        super().__init__()
        self.body, self.head, self.memory = nn.Conv2d(3, 12, 5, 2), nn.Linear(12, 6), CameraMemory(CAMERAS, 6)

    def forward(self, x):
        pooled = self.body(x).relu().mean((2, 3))
        return IcsOutput(pooled, F.normalize(self.head(pooled)), None) if self.training else pooled


def pictures():
    r = np.random.default_rng(0)
    pids = np.repeat(np.arange(8), 6)
    return ReidSet(r.integers(0, 255, (48, 16, 8, 3), np.uint8), pids, np.array(CAMERAS)[pids])


def train(folder):
    seed_all(0)
    items = pictures()
    test = replace(items, camids=None)
    dls = ReidLoaders(items, (16, 8), 4, 2, augment=Augment.none(), query=test[::6], gallery=test[1::6], device='cpu')
    model = Plain()
    loss = IcsLoss(model, CAMERAS, VARIANTS['M5'], SETTINGS)
    with quiet(): learn = reid_learner(dls, model, loss=loss, lr=1e-2, cbs=[UpdateMemory(model.memory, 2)])
    fit(learn, 3, folder, dict(epochs=3))
    if folder is not None:  # half batches have other statistics; yet both processes associate alike
        with quiet(): m5 = ics_learner(items, 'M5', SETTINGS, device='cpu')
        fit(m5, 1)
        ids = identity_centroids(m5.model, items, m5.ids, SETTINGS | dict(centroids='features'))
        torch.save((ids, associate(ids, m5.ids.cameras).labels), folder.parent/f'ids{dist.get_rank()}.pt')
        dist.barrier()
    return dict(learn.model.state_dict(), history=torch.tensor([h['train_loss'] for h in learn.retrieval.history]))


def process(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    torch.save(train(folder/'run'), folder/f'{rank}.pt')


@pytest.mark.filterwarnings('ignore')
def test_two_processes_learn_what_one_does(tmp_path):
    with socket.socket() as s:
        s.bind(('', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(process, (tmp_path, port), nprocs=2)
    a, b = (torch.load(tmp_path/f'{rank}.pt') for rank in (0, 1))
    alone = train(None)
    for k, v in alone.items():
        assert torch.equal(a[k], b[k]), k
        assert torch.allclose(a[k].float(), v.float(), atol=1e-5), k
    assert alone['memory.seen'].all()
    a, b = (torch.load(tmp_path/f'ids{rank}.pt', weights_only=False) for rank in (0, 1))
    assert torch.equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert json.loads((tmp_path/'run'/'checkpoint.json').read_text())['epoch'] == 3


def test_shares_of_a_batch(monkeypatch):
    dataset, rows = list(range(48)), []
    whole = list(PKSampler(pictures().pids, 4, 2))
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, 'get_rank', lambda: rank)
        loader = SampledLoader(dataset, PKSampler(pictures().pids, 4, 2))
        rows.append([np.asarray(b).tolist() for b in loader])
        assert len(rows[rank]) == len(loader)
    assert [x + y for x, y in zip(*rows)] == [np.ravel(b).tolist() for b in whole]
    monkeypatch.setattr(dist, 'get_world_size', lambda: 3)
    with pytest.raises(ValueError, match='batches of 8 for 3 processes'): loader.get_idxs()
