"""Masks of parts beside the network whose maps they divide, scikit-learn's K-means, and a loop over discriminators.

    python benchmarks/parts.py [--threads 1] [--rounds 5] [--device cpu]

64 maps of ResNet-50 at 256 x 128 (16 x 8 places, 2,048 channels) into 3 parts. Demanded: the masks take less time than the
network's forward pass. Discriminators: the 15 pairs of six cameras, forward and backward, grouped against one by one.
"""
import argparse
import time

import torch
from sklearn.cluster import KMeans

from reidlit.models import backbone
from reidlit.padal import CameraDiscriminator, kmeans, part_masks


def best(f, rounds, cuda):
    "Least seconds of a call, after one that warms up."
    times = []
    for _ in range(rounds+1):
        start = time.perf_counter()
        f()
        if cuda: torch.cuda.synchronize()
        times.append(time.perf_counter()-start)
    return min(times[1:])


def peer(x, start):
    "The same clusters by scikit-learn, a picture at a time."
    for a, b in zip(x.numpy(), start.numpy()):
        KMeans(len(b), init=b, n_init=1, algorithm='lloyd', tol=0, max_iter=20).fit(a)


def step(x, cams, networks):
    "Forward and backward of discriminators on the pictures that each one judges."
    loss = 0.
    for d, (a, b) in networks:
        here = (cams == a) | (cams == b)
        loss = loss+d.loss(d(x[here]), (cams[here] == b).long())*here.float().mean()
    loss.backward()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--device', default='cpu')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    cuda = a.device.startswith('cuda')
    torch.manual_seed(0)
    net = backbone('resnet50').eval().to(a.device, memory_format=torch.channels_last)
    x = torch.randn(64, 3, 256, 128, device=a.device).to(memory_format=torch.channels_last)
    rows = []
    with torch.no_grad():
        maps = net(x).float()
        for name, dtype in (('32 bits', None), ('bfloat16', torch.bfloat16)):
            def forward():
                with torch.autocast(a.device.split(':')[0], dtype, enabled=bool(dtype)): net(x)
            rows.append((f'forward pass, {name}', best(forward, min(a.rounds, 2), cuda)))
    rows.append(('part_masks', best(lambda: part_masks(maps, 3), a.rounds, cuda)))
    places = maps.flatten(2).transpose(1, 2).contiguous()
    start = torch.stack([places[:, i::3].mean(1) for i in range(3)], 1)
    rows.append(('kmeans', best(lambda: kmeans(places, start, 20), a.rounds, cuda)))
    rows.append(('scikit-learn, one by one', best(lambda: peer(places.cpu(), start.cpu()), 1, False)))
    f, cams = torch.randn(96, 2048, device=a.device, requires_grad=True), torch.arange(96, device=a.device) % 6
    d = CameraDiscriminator(2048, 6, 'pairs', kernel=1).to(a.device)
    alone = [(CameraDiscriminator(2048, 2, kernel=1).to(a.device), s) for s in d.sets]
    grouped = best(lambda: d.loss(d(f), cams).backward(), a.rounds, cuda)
    looped = best(lambda: step(f, cams, alone), a.rounds, cuda)
    print(f'{a.threads} threads, {a.device}, best of {a.rounds}\n\n| what | ms |\n|---|---|')
    for name, t in rows: print(f'| {name} | {t*1e3:.0f} |')
    print(f'| 15 discriminators, grouped | {grouped*1e3:.0f} |\n| 15 discriminators, a loop | {looped*1e3:.0f} |\n')
    t = dict(rows)
    least = min(t['forward pass, 32 bits'], t['forward pass, bfloat16'])
    print(f"masks / forward pass {t['part_masks']/least:.2f} (demanded: below 1), kmeans / scikit-learn "
          f"{t['kmeans']/t['scikit-learn, one by one']:.2f}, grouped / loop {grouped/looped:.2f}")


if __name__ == '__main__': main()
