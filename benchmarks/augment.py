"""Milliseconds per batch of each augmentation, beside torchvision picture by picture.

    python benchmarks/augment.py [--n 64] [--size 128 64] [--threads 2] [--rounds 9] [--device cpu]

Both sides run in the same process on the same batch, in turn; the best round counts. All chances are 1, so that both
do all the work; `Augment()` has its own. `ratio` is torchvision / ours. On a machine with other work take `--threads 1`:
threads that wait for each other measure the other work.
"""
import argparse
import time

import torch
import torchvision.transforms.v2 as T

from reidlit.data import augment as A


def best_of(f, rounds, device):
    "The least milliseconds of some rounds, after one that does not count."
    f()
    times = []
    for _ in range(rounds):
        if device.type == 'cuda': torch.cuda.synchronize()
        t = time.perf_counter()
        f()
        if device.type == 'cuda': torch.cuda.synchronize()
        times.append((time.perf_counter()-t)*1e3)
    return min(times)


def pairs(size):
    "Name, ours on a batch, torchvision on one picture; settings as equal as they can be."
    pad = round(10*size[0]/256)
    byte = lambda t: lambda x: t((x*255).byte()).float()/255
    mean, std = A.MEAN, A.STD
    every = A.Augment(flip=1., brightness=.2, contrast=.15, jpeg=1., erasing=1.)
    jpeg = byte(T.JPEG((30, 95)))
    crop, flip = T.RandomCrop(size, pad), T.RandomHorizontalFlip(1.)
    erase, norm = T.RandomErasing(1., (.02, .4), (.3, 1/.3)), T.Normalize(mean, std)
    jitter = T.ColorJitter(.2, .15)
    return [
        ('flip', lambda x: A.random_flip(x, 1.), flip),
        ('pad_crop', lambda x: A.pad_crop(x, pad), crop),
        ('erasing', lambda x: A.random_erasing(x, 1.), erase),
        ('brightness, contrast', lambda x: A.color_jitter(x, .2, .15), jitter),
        ('saturation', lambda x: A.color_jitter(x, 0, 0, .2), T.ColorJitter(saturation=.2)),
        ('gamma, gains', lambda x: A.color_jitter(x, 0, 0, 0, .2, .2), None),
        ('motion_blur', lambda x: A.motion_blur(x, p=1.), None),
        ('jpeg 4:2:0', lambda x: A.jpeg(x, p=1.), jpeg),
        ('jpeg 4:4:4', lambda x: A.jpeg(x, p=1., subsample=False), None),
        ('normalize', A.normalize, norm),
        ('Augment()', A.Augment(), T.Compose([T.RandomHorizontalFlip(.5), crop, norm,
                                              T.RandomErasing(.5, (.02, .4), (.3, 1/.3))])),
        ('Augment(everything)', every, T.Compose([flip, crop, jitter, jpeg, norm, erase]))]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=64)
    p.add_argument('--size', type=int, nargs=2, default=(128, 64))
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--device', default='cpu')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    device = torch.device(a.device)
    torch.manual_seed(0)
    x = torch.rand(a.n, 3, *a.size, device=device)
    print(f'batch {a.n} x 3 x {a.size[0]} x {a.size[1]}, {device}, {a.threads} threads, best of {a.rounds}\n')
    print('| | ours, ms | torchvision, ms | ratio |\n|---|---|---|---|')
    for name, ours, theirs in pairs(tuple(a.size)):
        ms = best_of(lambda: ours(x), a.rounds, device)
        if theirs is None:
            print(f'| {name} | {ms:.1f} | - | - |')
            continue
        try: peer = best_of(lambda: torch.stack([theirs(i) for i in x]), a.rounds, device)
        except (RuntimeError, TypeError, ValueError) as e:
            print(f'| {name} | {ms:.1f} | cannot ({type(e).__name__}) | - |')
            continue
        print(f'| {name} | {ms:.1f} | {peer:.1f} | {peer/ms:.1f} |')


if __name__ == '__main__': main()
