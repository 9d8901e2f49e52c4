"Detection AP against plain loops, its invariants, and input that is not right."
import ast
import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou as torch_iou

from reidlit.metrics import detection
from reidlit.metrics.detection import (COCO_IOUS, MCSSL_IOUS, box_iou,
                                       detection_ap, match_boxes,
                                       precision_recall)


def task(seed, pictures=8, people=7, ties=False, ignore=False):
    "Random pictures: moved truths, false alarms, some empty."
    r = np.random.default_rng(seed)
    found, truths, flags = [], [], []
    for i in range(pictures):
        a = r.uniform(0, 200, (r.integers(0, people+1), 2))
        t = np.c_[a, a+r.uniform(10, 60, a.shape)]
        near = t[r.random(len(t)) < .8]
        near = near + r.normal(0, 3, near.shape)
        b = r.uniform(0, 200, (r.integers(0, 5), 2))
        f = np.r_[near, np.c_[b, b+r.uniform(10, 60, b.shape)]]
        f[:, 2:] = np.maximum(f[:, :2]+1, f[:, 2:])
        s = r.random(len(f))
        found.append((f, np.round(4*s) if ties else s))
        truths.append(t)
        flags.append(r.random(len(t)) < .3 if ignore else np.zeros(len(t), bool))
    return found, truths, flags


def loops(found, truths, flags, t, max_dets=100):
    "COCO's AP at one IoU in plain loops."
    rows, n = [], 0
    for (f, s), g, skip in zip(found, truths, flags):
        n += int((~skip).sum())
        free = set(np.flatnonzero(~skip))
        for i in np.argsort(-s, kind='stable')[:max_dets]:
            best, who = t, None
            for j in sorted(free):
                o = box_iou(f[i:i+1], g[j:j+1])[0, 0]
                if o >= best:
                    best, who = o, j
            if who is not None:
                free.remove(who)
                rows.append((s[i], 1))
                continue
            w, h = f[i, 2:]-f[i, :2]
            inside = 0
            for j in np.flatnonzero(skip):
                both = (np.minimum(f[i, 2:], g[j, 2:])-np.maximum(f[i, :2], g[j, :2])).clip(0)
                inside = max(inside, both.prod()/(w*h))
            if inside < t:
                rows.append((s[i], 0))
    if not n:
        return np.nan
    rows = sorted(rows, key=lambda o: -o[0])
    hits = np.cumsum([o for _, o in rows])
    precision, recall = hits/np.arange(1, len(hits)+1), hits/n
    return np.mean([precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)])


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('ignore', [False, True])
@pytest.mark.parametrize('ties', [False, True])
def test_against_loops(seed, ignore, ties):
    found, truths, flags = task(seed, ties=ties, ignore=ignore)
    got = detection_ap(found, truths, ignore=flags)
    want = [loops(found, truths, flags, t) for t in COCO_IOUS]
    np.testing.assert_allclose(list(got.at.values()), want, atol=1e-9)
    assert got.ap == pytest.approx(np.mean(want))
    assert got.n_truths == sum((~g).sum() for g in flags)


def test_max_dets():
    found, truths, flags = task(0)
    got = detection_ap(found, truths, .5, max_dets=3)
    assert got.at[.5] == pytest.approx(loops(found, truths, flags, .5, 3))
    assert got.n_found == sum(min(3, len(s)) for _, s in found)


def test_match_agrees_with_ap():
    found, truths, _ = task(5)
    for t in (.5, .75, .9):
        right = np.concatenate([match_boxes(f, s, g, t) >= 0 for (f, s), g in zip(found, truths)])
        p, r = precision_recall(np.concatenate([s for _, s in found]), right, sum(map(len, truths)))
        ap = np.mean([p[r >= q].max(initial=0) for q in np.linspace(0, 1, 101)])
        assert detection_ap(found, truths, t).ap == pytest.approx(ap)


def test_invariants():
    found, truths, _ = task(3)
    base = detection_ap(found, truths, MCSSL_IOUS)
    order = np.random.default_rng(0).permutation(len(found))
    assert detection_ap([found[i] for i in order], [truths[i] for i in order],
                        MCSSL_IOUS).ap == pytest.approx(base.ap)
    assert detection_ap([(f, s**3) for f, s in found], truths, MCSSL_IOUS).ap == pytest.approx(base.ap)
    assert detection_ap([(2*f+7, s) for f, s in found], [2*t+7 for t in truths],
                        MCSSL_IOUS).ap == pytest.approx(base.ap)
    at = list(detection_ap(found, truths).at.values())
    assert (np.diff(at) <= 1e-12).all()
    assert detection_ap([(t, np.ones(len(t))) for t in truths], truths).ap == pytest.approx(1)


def test_iou_takes_arrays_and_tensors():
    r = np.random.default_rng(0).uniform(0, 90, (2, 40, 4))
    r[..., 2:] += r[..., :2]
    np.testing.assert_allclose(box_iou(*r), torch_iou(*torch.tensor(r)).numpy(), atol=1e-9)
    t = torch.tensor(r[0], dtype=torch.float32, requires_grad=True)
    assert box_iou(t, t).diagonal() == pytest.approx(1)
    assert box_iou([[1, 1, 1, 5]], [[0, 0, 9, 9], [1, 1, 1, 5]]).tolist() == [[0, 0]]


def test_exactly_at_the_threshold():
    a, b = [[0, 0, 10, 10]], [[0, 0, 10, 5]]
    assert match_boxes(a, [1], b, .5).tolist() == [0]
    assert detection_ap([(np.array(a), [1])], [b], .5).ap == pytest.approx(1)
    assert detection_ap([(np.array(a), [1])], [a], 1.).ap == pytest.approx(1)
    assert match_boxes(a, [1], a, 1).tolist() == [0]


def test_nothing():
    none, box = np.zeros((0, 4)), np.array([[0, 0, 5, 5]])
    assert detection_ap([(none, [])], [box]).ap == 0
    assert np.isnan(detection_ap([(box, [1])], [none]).ap)
    assert np.isnan(detection_ap([(box, [1])], [box], ignore=[[True]]).ap)
    assert np.isnan(detection_ap([], []).ap)
    assert 'nan' in str(detection_ap([], [], .5))
    assert detection_ap([([], []), (box, [1])], [[], box]).ap == pytest.approx(1)
    assert match_boxes(none, [], none).shape == (0,)
    p, r = precision_recall([], [], 3)
    assert len(p) == len(r) == 0


@pytest.mark.parametrize('change, words', [
    (dict(found=[]), '0 pictures found, 1 with truths'),
    (dict(found=[([[5, 0, 1, 5]], [1])]), 'found, picture 0: box 0'),
    (dict(found=[([[0, 0, np.inf, 5]], [1])]), 'found, picture 0: box 0'),
    (dict(found=[([[0, 0, 5, 5]], [np.nan])]), 'found, picture 0: score 0'),
    (dict(found=[([[0, 0, 5, 5]], [1, 2])]), 'picture 0: 1 boxes, 2 scores'),
    (dict(found=[([[0, 0, 5]], [1])]), 'expected (N 4)'),
    (dict(found=[np.zeros((3, 4))]), 'expected boxes and scores'),
    (dict(truths=[[[0, 5, 5, 0]]]), 'truths, picture 0'),
    (dict(ignore=[[True, False]]), 'picture 0: 1 boxes, 2 ignore'),
    (dict(ignore=[]), '0 with ignore'),
    (dict(ious=[]), 'ious'), (dict(ious=0), 'ious'), (dict(max_dets=0), 'max_dets'),
    (dict(max_dets=float('nan')), 'max_dets'), (dict(max_dets=1.5), 'max_dets')])
def test_bad_input(change, words):
    args = dict(found=[([[0, 0, 5, 5]], [1.])], truths=[[[0, 0, 5, 5]]]) | change
    with pytest.raises(ValueError) as e:
        detection_ap(**args)
    assert words in str(e.value)


def test_silent_and_lazy():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        detection_ap(*task(1)[:2])
    assert out.getvalue() == ''
    top = ast.parse(Path(detection.__file__).read_text()).body
    names = [n.module or '' for n in top if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in top if isinstance(n, ast.Import) for a in n.names]
    assert names and not any('pycocotools' in n for n in names)
