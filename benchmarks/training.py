"""A training step of the package's learners beside the same network, loss and optimiser bare; and features.

    python benchmarks/training.py [--device cuda] [--rounds 5] [--backbone resnet50] [--size 256 128] [--people 200]

A bare step is forward, loss, backward and a fused AdamW step on one batch that is ready on the device; a learner's step
also draws the batch, augments it, records it and updates a memory. `learner` trains whole epochs under fastai's loop.
Rows are the supervised baseline, ICS stage one (M5) and stage two (M7), and the metric embedding; `features` is
`extract_features` without mirrored pictures beside a bare loop over batches that are ready. Bare and learner run in turn,
the best round of each counts. On the CPU the default is MobileNetV2 at 128x64. Demanded: learner / bare at most 1.2 on
a GPU, 1.1 on the CPU; features at least .9 of the bare loop.
"""
import argparse
import time
import warnings

warnings.filterwarnings('ignore')

import numpy as np
import torch
import torch.nn.functional as F

from reidlit import crossdataset, ics
from reidlit.baseline import baseline_learner, baseline_settings
from reidlit.core import ReidSet, seed_all
from reidlit.data.augment import Augment
from reidlit.learner import extract_features, quiet


def pictures(people, size, per=16, cameras=4):
    "Noise with labels: what is in a picture does not change its cost."
    n = people*per
    images = np.random.default_rng(0).integers(0, 255, (n, *size, 3), np.uint8)
    return ReidSet(images, np.arange(n)//per, np.arange(n) % cameras, name='noise')


def learners(items, a):
    "Name and learner of each row."
    common = dict(backbone=a.backbone, weights=None, size=tuple(a.size), p=a.batch//4)
    i = ics.ics_settings('real', 'laptop', **common)
    e = crossdataset.embedding_settings('real', 'laptop', **common, batches=len(items)//a.batch)
    with quiet(): return {
        'baseline': baseline_learner(items, None, None, baseline_settings('real', 'laptop', **common), a.device),
        'ICS stage one': ics.ics_learner(items, 'M5', i, device=a.device),
        'ICS stage two': ics.ics_learner(items, 'M7', i, device=a.device),
        'embedding': crossdataset.embedding_learner([items], settings=e, device=a.device)}


def bare_step(learn):
    "A step of the learner's network and loss on one batch, with torch's optimiser."
    x, *rest = learn.dls.train.one_batch()
    loss, model = learn.loss_func, learn.model
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5,
                            fused=x.is_cuda or None)

    def step():
        loss(model(x), *rest).backward()
        opt.step()
        opt.zero_grad()
    return step


def clock(f, cuda):
    if cuda: torch.cuda.synchronize()
    t = time.perf_counter()
    f()
    if cuda: torch.cuda.synchronize()
    return time.perf_counter()-t


def compare(bare, ours, rounds, cuda):
    "Best seconds of each, run in turn."
    best = [np.inf, np.inf]
    for r in range(rounds+1):  # the first warms up
        for i, f in enumerate((bare, ours)):
            t = clock(f, cuda)
            if r: best[i] = min(best[i], t)
    return best


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cpu')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--backbone')
    p.add_argument('--size', type=int, nargs=2)
    p.add_argument('--people', type=int)
    a = p.parse_args()
    cuda = a.device.startswith('cuda')
    a.backbone = a.backbone or ('resnet50' if cuda else 'mobilenet_v2')
    a.size = a.size or ((256, 128) if cuda else (128, 64))
    a.people = a.people or (200 if cuda else 16)
    torch.set_num_threads(a.threads)
    seed_all(0)
    items = pictures(a.people, a.size)
    print(f'{a.backbone}, {a.size[0]}x{a.size[1]}, batch {a.batch}, {a.device}, torch {torch.__version__}, '
          f'best of {a.rounds}\n\n| ms a step | bare | learner | ratio |\n|---|---|---|---|')
    for name, learn in learners(items, a).items():
        steps = len(learn.dls.train)
        step = bare_step(learn)

        def bare():
            learn.model.train()
            for _ in range(steps): step()

        def ours(): learn.fit(1, 1e-5)
        b, o = (t/steps*1e3 for t in compare(bare, ours, a.rounds, cuda))
        print(f'| {name} | {b:.2f} | {o:.2f} | {o/b:.2f} |', flush=True)
    model, n = learn.model.eval(), len(items)
    ready = [Augment.none()(torch.as_tensor(items.images[i:i+128]).permute(0, 3, 1, 2).to(a.device))
             for i in range(0, n, 128)]

    @torch.no_grad()
    def bare(): torch.cat([F.normalize(model(x).float()) for x in ready]).cpu()
    def ours(): extract_features(model, items, tuple(a.size), flip=False)
    b, o = compare(bare, ours, a.rounds, cuda)
    print(f'\n| pictures a second | bare | extract_features | share |\n|---|---|---|---|\n'
          f'| features | {n/b:,.0f} | {n/o:,.0f} | {b/o:.2f} |')


if __name__ == '__main__': main()
