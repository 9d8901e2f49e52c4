"""Batches from JPEG files and from memory beside torchvision's `ImageFolder` and PyTorch's loader.

    python benchmarks/loading.py [--rounds 4] [--pictures 1024] [--size 256 128] [--workers 2]

Both draw the same batches of 64 by the same `PKSampler`, from crops of 128x64 that are resized to `--size`; neither
augments. The peer gives float batches (`v2.Resize`, `PILToTensor`, then `/255`), ours too. `files` reads with worker
processes, `memory` after the pictures were read once (torchvision has no such thing: its figure is that of files). In
turn, the best round of each. Demanded: ours at least as many pictures a second.
"""
import argparse
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from reidlit.data.augment import Augment
from reidlit.data.sampling import PKSampler
from reidlit.data.sets import crop_folder
from reidlit.loaders import ReidLoaders


def write(folder, n, per=16):
    "Pictures with some structure, a subfolder for each person."
    rng = np.random.default_rng(0)
    for i in range(n):
        (where := folder/f'{i//per:04}').mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 255, (16, 8, 3), np.uint8))
        small.resize((64, 128), Image.BICUBIC).save(where/f'{i:06}.jpg', quality=92)


class Rows:
    "The sampler's batches as lists, for PyTorch's loader."
    def __init__(self, sampler): self.sampler = sampler
    def __len__(self): return len(self.sampler)
    def __iter__(self): return (np.ravel(b).tolist() for b in self.sampler)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=4)
    p.add_argument('--pictures', type=int, default=1024)
    p.add_argument('--size', type=int, nargs=2, default=(256, 128))
    p.add_argument('--workers', type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as t:
        write(Path(t), a.pictures)
        items = crop_folder(t)
        kw = dict(size=a.size, device='cpu', augment=Augment.none(), num_workers=a.workers)
        files, memory = ReidLoaders(items, room=0, **kw), ReidLoaders(items, **kw)
        folder = ImageFolder(t, v2.Compose([v2.Resize(a.size), v2.PILToTensor()]))
        peer = torch.utils.data.DataLoader(folder, batch_sampler=Rows(PKSampler(folder.targets)), num_workers=a.workers)

        def theirs(): return sum(len(x.float()/255) for x, y in peer)
        def ours(dls): return sum(len(b[0]) for b in dls.train)
        functions = dict(torchvision=theirs, files=lambda: ours(files), memory=lambda: ours(memory))
        best = dict.fromkeys(functions, 0.)
        for r in range(a.rounds+1):
            for k, f in functions.items():
                start = time.perf_counter()
                n = f()
                if r: best[k] = max(best[k], n/(time.perf_counter()-start))
    print(f'{a.pictures} JPEG files at {a.size[0]}x{a.size[1]}, {a.workers} workers, best of {a.rounds}\n\n'
          '| | pictures a second | times torchvision |\n|---|---|---|')
    for k, v in best.items(): print(f'| {k} | {v:,.0f} | {v/best["torchvision"]:.2f} |')


if __name__ == '__main__': main()
