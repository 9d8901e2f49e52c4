"Augmentation: odd sizes, dtypes, agreement sweeps, distributions, devices."
import io

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from reidlit.core import rng_for
from reidlit.data import augment as A

FUNCTIONS = dict(
    flip=lambda x, p, g: A.random_flip(x, p, generator=g),
    crop=lambda x, p, g: A.pad_crop(x, 5 if p else 0, generator=g),
    erasing=lambda x, p, g: A.random_erasing(x, p, generator=g),
    color=lambda x, p, g: A.color_jitter(x, .3, .3, .3, .2, .4, p, generator=g),
    motion=lambda x, p, g: A.motion_blur(x, p=p, generator=g),
    jpeg=lambda x, p, g: A.jpeg(x, (5, 95), p, generator=g))
DEVICES = ['cpu'] + ['cuda']*torch.cuda.is_available()


def pictures(n=4, size=(48, 24), seed=0):
    "Smooth colours with edges and noise, `(n,H,W,3)` uint8."
    g = rng_for('test augment', seed)
    small = g.random((n, 4, 3, 3))
    x = np.stack([np.asarray(Image.fromarray((s*255).astype(np.uint8))
                             .resize(size[::-1], Image.BICUBIC)) for s in small])
    x[:, size[0]//3:size[0]//2, :size[1]//2] //= 2
    return (x+g.normal(0, 5, x.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('device', DEVICES)
def test_contract(name, device):
    f, x = FUNCTIONS[name], A.to_float(pictures(8), device)
    g = lambda: torch.Generator(device).manual_seed(3)
    before, out = x.clone(), f(x, .5, g())
    assert torch.equal(x, before), 'the input was changed'
    assert torch.equal(out, f(x, .5, g())), 'not repeatable'
    assert torch.equal(f(x, 0, g()), x), 'p=0 changed something'
    assert out.shape == x.shape and out.dtype == torch.float32 and out.device == x.device
    assert not torch.equal(f(x, 1, g()), x)
    assert -1e-5 <= out.min() and out.max() <= 1+1e-5
    with torch.autocast(device, torch.bfloat16): assert torch.equal(f(x, .5, g()), out)
    assert f(x.bfloat16(), .5, g()).dtype == torch.float32
    # a generator on the CPU serves any device, with the same draws
    on_cpu = f(x.cpu(), .5, torch.Generator().manual_seed(3))
    from_cpu = f(x, .5, torch.Generator().manual_seed(3)).cpu()
    assert ((on_cpu-from_cpu).abs() < 2e-2).float().mean() > .99


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('size', [(16, 16), (37, 23), (50, 17), (256, 128)])
@pytest.mark.parametrize('n', [1, 3])
def test_sizes(name, size, n):
    x = A.to_float(pictures(n, size))
    assert FUNCTIONS[name](x, 1, torch.Generator().manual_seed(0)).shape == x.shape


@pytest.mark.parametrize('name', sorted(set(FUNCTIONS)-{'crop'}))
def test_pictures_do_not_disturb_each_other(name):
    "A changed neighbour changes nothing; half of the pictures are chosen."
    x = A.to_float(pictures(64, (32, 16)))
    y = x.clone(); y[1::2] = y[1::2].flip(2)
    g = lambda: torch.Generator().manual_seed(1)
    a, b = FUNCTIONS[name](x, .5, g()), FUNCTIONS[name](y, .5, g())
    assert torch.allclose(a[::2], b[::2], atol=1e-6)
    share = (a != x).flatten(1).any(1).float().mean()
    assert .3 < share < .7


@pytest.mark.parametrize('q', [1, 2, 5, 10, 20, 35, 50, 65, 80, 90, 95, 100])
@pytest.mark.parametrize('subsample', [True, False])
@pytest.mark.parametrize('size', [(48, 24), (64, 32), (50, 37)])
def test_jpeg_is_pillows(q, subsample, size):
    x = pictures(4, size, seed=q)
    theirs = []
    for im in x:
        f = io.BytesIO()
        Image.fromarray(im).save(f, 'jpeg', quality=q, subsampling=2*subsample)
        theirs.append(np.asarray(Image.open(f)))
    ours = A.to_uint8(A.compress(A.to_float(x), torch.full((4,), float(q)), subsample))
    gap = np.abs(ours.astype(int)-np.stack(theirs))
    assert gap.mean() < 1, gap.mean()


def test_jpeg_tables_are_pillows_at_every_quality():
    im = Image.fromarray(pictures(1)[0])
    for q in range(1, 101):
        f = io.BytesIO(); im.save(f, 'jpeg', quality=q)
        theirs = torch.tensor([*Image.open(f).quantization.values()])
        assert torch.equal(A.jpeg_tables(torch.tensor([float(q)]))[0].reshape(2, 64).long(), theirs)


@pytest.mark.parametrize('seed', range(5))
def test_colors_are_torchvisions(seed):
    x = A.to_float(pictures(6, seed=seed))
    factors = torch.rand(6, generator=torch.Generator().manual_seed(seed))*2
    for name in ('brightness', 'contrast', 'saturation', 'gamma'):
        theirs = torch.stack([getattr(TF, f'adjust_{name}')(a, f.item()) for a, f in zip(x, factors)])
        assert (A.adjust_color(x, **{name: factors})-theirs).abs().max() < 2e-5, name


def test_erasing_draws_as_the_paper_says():
    "Share and ratio against rejection sampling in a loop."
    g, (H, W) = rng_for('test erasing'), (128, 64)
    def one():
        while True:
            s, r = g.uniform(.02, .4)*H*W, g.uniform(.3, 1/.3)
            h, w = round((s*r)**.5), round((s/r)**.5)
            if h < H and w < W: return g.integers(0, H-h+1), g.integers(0, W-w+1), h, w
    loop = np.array([one() for _ in range(20000)])
    ours = A.erasing_boxes(torch.rand(20000, 10, 4, generator=torch.Generator().manual_seed(0)), (H, W))
    assert (ours[:, 2] > 0).all()
    np.testing.assert_allclose(ours.float().mean(0), loop.mean(0), rtol=.02)
    np.testing.assert_allclose(ours.float().std(0), loop.std(0), rtol=.03)


def test_every_shift_is_as_likely():
    x = torch.zeros(20000, 3, 5, 5); x[:, :, 2, 2] = 1
    out = A.pad_crop(x, 2, generator=torch.Generator().manual_seed(0))[:, 0].mean(0)
    assert (out-1/25).abs().max() < .006


@pytest.mark.parametrize('device', DEVICES)
def test_augment(device):
    everything = A.Augment(brightness=.3, contrast=.3, saturation=.3, gain=.2, gamma=.3,
                           motion=.5, jpeg=.5)
    x = torch.from_numpy(pictures(16)).to(device)
    for aug in (A.Augment(), A.Augment.none(), everything):
        g = lambda: torch.Generator(device).manual_seed(0)
        assert torch.equal(aug(x, g()), aug(A.to_float(x), g()))
        assert torch.equal(aug(x, g()), aug(x.permute(0, 3, 1, 2), g()))
        assert aug(x, g()).device.type == device
        assert eval(repr(aug), vars(A)) == aug
    seeded = []
    for _ in range(2):
        torch.manual_seed(5); seeded.append(everything(x))
    assert torch.equal(*seeded), 'without a generator, torch.manual_seed decides'
