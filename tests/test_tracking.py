"Trackers on pictures whose motion is known, on the world, and on real video; MOT tables, scores, the online tracker."
import contextlib
import io
import itertools
import json
import logging
import shutil
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from command import run
from real import REAL

from reidlit import cli
from reidlit.core import DataError
from reidlit.data.readers.mot import (MotBoxes, drawn_frame, join_boxes, mot17,
                                      mot_sequences, read_mot, write_mot, write_mot17)
from reidlit.data.sets import FRAME_READERS, WRITERS
from reidlit.data.world import World
from reidlit.detection.detectors import Detections
from reidlit.detection.online_tracker import (LOST, OnlineTracker, assign, first_state, gate_distance,
                                              measured_state, next_state, read_detections, to_xyah,
                                              track_film)
from reidlit.films import Film, write_film
from reidlit.metrics.detection import box_iou
from reidlit.metrics.tracking import tracking_scores
from reidlit.detection.trackers import (TRACKERS, Tracks, box_motion, follow_points,
                              track_boxes, track_quality)


def texture(seed=0, size=(300, 400)):
    r = np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)
    return cv2.normalize(cv2.GaussianBlur(r, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)


def clip(dx, dy, T=5):
    "The picture's content moves by (dx, dy) a frame."
    t = texture()
    return np.stack([t[50-k*dy:200-k*dy, 60-k*dx:260-k*dx] for k in range(T)])


BOXES = np.array([[50, 40, 80, 100], [90, 50, 130, 90], [100, 30, 120, 80.]])


@pytest.mark.parametrize('d', [(0, 0), (2, -1), (-5, 3), (6, 6)])
def test_known_shift(d):
    t = track_boxes(clip(*d), BOXES)
    want = BOXES + np.arange(5)[:, None, None]*np.tile(d, 2)
    assert t.ok.all() and t.xyxy.dtype == np.float32 and t.ok.dtype == bool
    assert np.abs(t.xyxy-want).max() < .1


def test_growth():
    t, frames = texture(), []
    for k in range(4):
        M = cv2.getRotationMatrix2D((100, 75), 0, 1.04**k)
        frames.append(cv2.warpAffine(t[50:200, 60:260], M, (200, 150)))
    box = np.array([[75, 45, 125, 105.]])
    size = track_boxes(frames, box).xyxy[3, 0, 2:]-track_boxes(frames, box).xyxy[3, 0, :2]
    np.testing.assert_allclose(size, np.array([50, 60])*1.04**3, rtol=.02)
    fixed = track_boxes(frames, box, scale=False).xyxy[3, 0]
    np.testing.assert_allclose(fixed[2:]-fixed[:2], [50, 60], atol=1e-3)


def test_boxes_do_not_disturb_each_other():
    frames = clip(2, 1)
    every = track_boxes(frames, BOXES)
    again = track_boxes(list(frames), torch.tensor(BOXES))
    np.testing.assert_array_equal(every.xyxy, again.xyxy)
    alone = track_boxes(frames, BOXES[1:2])
    np.testing.assert_allclose(alone.xyxy[:, 0], every.xyxy[:, 1], atol=1e-3)
    many = track_boxes(frames, np.tile(BOXES, (100, 1)))
    np.testing.assert_allclose(many.xyxy[:, -1], every.xyxy[:, -1], atol=1e-3)


def test_lost():
    flat = np.full((4, 150, 200, 3), 80, np.uint8)
    assert not track_boxes(flat, BOXES).ok[1:].any()
    cut = clip(1, 1, 4)
    cut[2:] = 80
    t = track_boxes(cut, BOXES)
    assert t.ok[:2].all() and not t.ok[2:].any() and np.isnan(t.xyxy[2:]).all()
    out = track_boxes(clip(-20, 0, 3), [[5, 40, 35, 100]])
    assert not out.ok[2].any()


@pytest.mark.parametrize('method', list(TRACKERS))
def test_nothing_and_one_frame(method):
    frames = clip(1, 1, 3)
    for none in ([], np.zeros((0, 4))):
        t = track_boxes(frames, none, method)
        assert t.xyxy.shape == (3, 0, 4) and t.ok.shape == (3, 0) and len(t) == 0
    t = track_boxes(frames[:1], BOXES, method)
    assert t.xyxy.shape == (1, 3, 4) and t.ok.all()
    far = track_boxes(frames, [[500, 500, 520, 540], *BOXES], method)
    assert not far.ok[:, 0].any() and (far.xyxy[0, 0] == [500, 500, 520, 540]).all()


@pytest.mark.parametrize('change, words', [
    (dict(method='kcf'), "method='kcf'"),
    (dict(boxes=[[1, 1, 5, 5], [0, 0, np.nan, 5]]), 'box 1'),
    (dict(boxes=[[5, 5, 5, 9]]), 'box 0'), (dict(boxes=[[9, 5, 5, 9]]), 'box 0'),
    (dict(boxes=[[1, 2, 3]]), 'boxes has shape'),
    (dict(frames=[]), 'expected one shape'),
    (dict(frames=[np.zeros((9, 9, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]), 'expected one shape'),
    (dict(frames=np.zeros((2, 9, 9), np.uint8)), 'expected (T,H,W,3) uint8'),
    (dict(frames=np.zeros((2, 9, 9, 3))), 'expected (T,H,W,3) uint8')])
def test_bad_input(change, words):
    args = dict(frames=clip(0, 0, 2), boxes=BOXES) | change
    with pytest.raises(ValueError) as e:
        track_boxes(**args)
    assert words in str(e.value)


def test_options_reach_the_method():
    with pytest.raises(TypeError, match='grids'):
        track_boxes(clip(0, 0, 2), BOXES, grids=(3, 3))


def test_medians_against_numpy():
    r = np.random.default_rng(0)
    p, q, good = r.normal(size=(6, 9, 2)), r.normal(size=(6, 9, 2)), r.random((6, 9)) < .6
    shift, growth = box_motion(p, q, good)
    for n in range(6):
        g = good[n]
        np.testing.assert_allclose(shift[n], np.median((q-p)[n, g], 0))
        i, j = np.triu_indices(g.sum(), 1)
        far = [np.linalg.norm(o[n, g][i]-o[n, g][j], axis=-1) for o in (p, q)]
        assert growth[n] == pytest.approx(np.median(far[1]/far[0]))


def test_points_are_followed():
    a, b = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in clip(3, -2, 2))
    points = np.random.default_rng(0).uniform((20, 20), (180, 130), (50, 2))
    moved, error = follow_points(a, b, points)
    assert np.abs(moved-points-[3, -2]).max() < .2 and error.max() < .2


def test_quality():
    truth = np.random.default_rng(0).uniform(0, 50, (3, 8, 4))
    truth[..., 2:] += truth[..., :2]+5
    truth[2, 3] = np.nan
    moved = np.nan_to_num(truth)+1.
    ok = np.ones((3, 8), bool)
    ok[1:, 0] = False
    q = track_quality(Tracks(moved.astype(np.float32), ok), truth)
    over = np.array([box_iou(m, np.nan_to_num(t)).diagonal() for m, t in zip(moved, truth)])
    over[1:, 0] = 0
    assert q['iou'][1] == pytest.approx(over[1].mean(), abs=1e-5)
    assert q['iou'][2] == pytest.approx(np.delete(over[2], 3).mean(), abs=1e-5)
    assert q['mean_iou'] == pytest.approx(np.r_[over[1], np.delete(over[2], 3)].mean(), abs=1e-5)
    assert q['ok'].tolist() == [1, 7/8, 6/7]
    nobody = track_quality(Tracks(moved, ok), np.full((3, 8, 4), np.nan))
    assert np.isnan(nobody['mean_iou']) and np.isnan(nobody['iou']).all()


@pytest.mark.parametrize('kind', ['people', 'vehicles'])
def test_beats_standing_still_on_the_world(kind):
    world, tracks, truths = World(people=30, cameras=2, seed=5, kind=kind), {}, []
    for c in range(2):
        pids = world.boxes(c, 200, min_visible=.5).pids
        frames, truth = np.stack([world.frame(c, 200+k) for k in range(5)]), []
        for k in range(5):
            b = world.boxes(c, 200+k, min_visible=0.)
            here = dict(zip(b.pids, b.xyxy))
            truth.append([here.get(p, [np.nan]*4) for p in pids])
        truths.append(np.array(truth, np.float32))
        for m in TRACKERS:
            tracks.setdefault(m, []).append(track_boxes(frames, truths[-1][0], m))
    q = {m: track_quality(Tracks(np.concatenate([o.xyxy for o in t], 1),
                                 np.concatenate([o.ok for o in t], 1)),
                          np.concatenate(truths, 1)) for m, t in tracks.items()}
    assert q['flow']['mean_success'] > q['still']['mean_success']+.1


PETS = REAL/'pets2009_s2l1'


@pytest.mark.skipif(not (PETS/'View_001.avi').exists(), reason='no real video')
def test_real_video():
    "Boxes tracked over four frames lie on that frame's detections better than still ones."
    video, frames = cv2.VideoCapture(str(PETS/'View_001.avi')), []
    while len(frames) < 65:
        frames.append(cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB))
    found = json.loads((PETS/'detections'/'View_001.json').read_text())
    boxes_of = lambda k: np.array(found['bboxes'][k])[np.array(found['scores'][k]) > .9]
    share = {m: [] for m in TRACKERS}
    for t in range(10, 60, 10):
        first, last = (boxes_of(k) for k in (t, t+4))
        for m in share:
            o = track_boxes(frames[t:t+5], first, m)
            over = box_iou(o.xyxy[4, o.ok[4]], last).max(1)
            share[m] += [*over, *np.zeros((~o.ok[4]).sum())]
    assert np.mean(share['flow']) > np.mean(share['still'])+.05


# Many people: MOT tables

MOT = REAL/'mot15_tud'


def table(frames, pids, xyxy, **kw): return MotBoxes(np.array(frames), np.array(pids), np.array(xyxy, float), **kw)


def random_film(seed, people=9, frames=40, classes=True):
    "A truth with classes and flags, and a tracker's guess at it."
    r = np.random.default_rng(seed)
    f, p = np.divmod(np.arange(people*frames), people)
    x = 30*p+f*r.normal(0, 2, people)[p]+r.normal(0, 1, len(p))
    box = np.stack([x, 5*(p % 3), x+r.uniform(15, 25, people)[p], 5*(p % 3)+50.], 1)
    here = r.random(len(p)) > .15
    labels = np.where(p < people-3, 1, r.choice([2, 3, 7, 8, 12], people)[p]) if classes else None
    flag = (r.random(people) > .2).astype(float)[p]
    truth = MotBoxes(f+1, p+1, box, flag, labels, r.random(len(p)) if classes else None)[here]
    kept = r.random(len(p)) > .2
    names = np.where(r.random(len(p)) > .9, r.integers(0, people, len(p)), (p+f//25*3) % people)+11
    found = MotBoxes(f+1, names, box+r.normal(0, 2.5, box.shape).round(1), r.random(len(p)))[kept]
    _, first = np.unique([found.frames, found.pids], axis=1, return_index=True)
    return truth, found[np.sort(first)]


def test_mot_files(tmp_path):
    f = tmp_path/'gt.txt'
    f.write_text('\n')
    m = read_mot(f)
    assert m.xyxy.shape == (0, 4) and len(m.frames) == len(m.pids) == 0
    f.write_text('3, 7, 1.5, 2, 3, 4, 1, -1, -1, -1\n3,8,0,0,1,1\n')
    m = read_mot(f, first=0)
    assert m.frames.tolist() == [3, 3] and m.xyxy[0].tolist() == [1.5, 2, 4.5, 6] and m.scores.tolist() == [1, 1]
    assert read_mot(f).xyxy[0].tolist() == [.5, 1, 3.5, 5] and m.labels is None
    for line in ('1,2,3', '1,2,nan,3,4,5', '1.5,2,1,3,4,5', '1,x,1,3,4,5', '1,2,3,4,-5,6', '1,2,3,4,5,6,nan', '-1,2,3,4,5,6',
                 '1 2 3 4 5 6', '1,2,3,4_0,5,6', '1,2.5,3,4,5,6', '٣,2,3,4,5,6'):
        f.write_text('1,2,3,4,5,6\n'+line)
        with pytest.raises(DataError, match='gt.txt: line 2'): read_mot(f)
    with pytest.raises(DataError, match='none.txt: no such file'): read_mot(tmp_path/'none.txt')
    with pytest.raises(DataError, match='not readable'): read_mot(tmp_path)


def test_mot_columns(tmp_path):
    f = tmp_path/'gt.txt'
    f.write_text('1,1,10,20,30,40,1,1,.5\n1,2,10,20,30,40,1,-1,-1\n1,3,10,20,30,40,0,1,2\n1,-1,1,1,9,9,1,1,1\n')
    m = read_mot(f)
    assert m.labels.tolist() == [1, 1, 1, 1] and m.visible.tolist() == [.5, 0, 1, 1]
    assert m.counts.tolist() == [True, True, False, False]
    f.write_text('1,1,10,20,30,40,1,3.5,7.5,2\n')  # MOT15: a place in metres, no class
    assert read_mot(f).labels is None


@pytest.mark.parametrize('seed', range(4))
def test_mot_round_trip(tmp_path, seed):
    for m in random_film(seed):
        back = read_mot(write_mot(tmp_path/'m.txt', m))
        m = m[np.lexsort((m.pids, m.frames))]
        for k in ('frames', 'pids', 'labels'): np.testing.assert_array_equal(getattr(m, k), getattr(back, k))
        np.testing.assert_allclose(back.xyxy, m.xyxy, atol=2e-3)
        np.testing.assert_allclose(back.scores, m.scores, atol=1e-3)


@pytest.fixture(scope='module')
def hall():
    return World(people=12, cameras=2, seed=3, crowd=6, size=(160, 90))


def test_mot17_of_a_world(tmp_path, hall, caplog):
    logging.getLogger('reidlit').setLevel(logging.WARNING)
    out = write_mot17(hall, tmp_path/'w', range(0, 20, 2))
    again = write_mot17(hall, tmp_path/'w2', range(0, 20, 2))
    files = lambda o: {f.relative_to(o).as_posix(): f.read_bytes() for f in o.rglob('*') if f.is_file()}
    assert files(out) == files(again) and len(files(out)) == 2*(3+10)+1
    with pytest.raises(DataError, match='not empty'): write_mot17(hall, out)
    s = FRAME_READERS['mot17'][0](out).train
    truth = read_mot(out/'train'/'MOT17-01-FRCNN'/'gt'/'gt.txt')  # nobody is lost, nor how much of them is seen
    assert sorted(s.visible[s.camids[s.row] == 0]) == sorted(truth.visible[truth.counts]) and s.visible.min() < 1
    assert len(s) == 20 and set(s.camids) == {0, 1} and WRITERS['mot17'] is write_mot17
    for i in (3, 12):
        c, k = s.camids[i], s.frames[i]
        b = hall.boxes(int(c), 2*int(k)-2)
        mine = s.row == i
        assert len(np.unique(s.pids[mine])) == mine.sum() <= len(b)
    a, b = (set(s.pids[s.camids[s.row] == c]) for c in (0, 1))
    assert not a & b  # Each film counts anew
    for name, k in (('DPM', 1), ('SDP', 2)):  # Two more copies, as published
        for f in list((out/'train').glob('*-FRCNN')):
            shutil.copytree(f, f.with_name(f.name.replace('FRCNN', name)))
        (out/'train'/f'MOT17-01-{name}'/'det'/'det.txt').write_text('1,-1,1,1,9,9,.5\n'*k)
    films = mot_sequences(out/'train', 'SDP')
    assert [f.name for f in films] == ['MOT17-01-FRCNN', 'MOT17-02-FRCNN'] and len(films[0].found) == 2
    assert len(mot17(out, 'DPM').train) == 20
    shutil.rmtree(out/'train'/'MOT17-02-DPM')
    with pytest.raises(DataError, match="MOT17-02: no copy of DPM; expected detector='FRCNN'"): mot17(out, 'DPM')


def test_mot17_test_part_and_broken(tmp_path, hall):
    out = write_mot17(hall, tmp_path/'w', range(3))
    for f in (out/'train').iterdir(): shutil.copytree(f, out/'test'/f.name, ignore=shutil.ignore_patterns('gt'))
    s = mot17(out)
    assert len(s.test) == 6 and len(s.test.row) == 0
    one = out/'train'/'MOT17-01-FRCNN'
    (one/'gt'/'gt.txt').write_text('1,1,1,1,9,9,1,1,1\n1,2,x,1,9,9,1,1,1\n')
    with pytest.raises(DataError, match='gt.txt: line 2'): mot17(out)
    (one/'gt'/'gt.txt').write_text('4,1,1,1,9,9,1,1,1\n')
    with pytest.raises(DataError, match='frame 4 of a film with 3'): mot17(out)
    (one/'gt'/'gt.txt').write_text('')
    (one/'img1'/'000002.jpg').unlink()
    with pytest.raises(DataError, match='000002.jpg: no such file, and 0 more'): mot17(out)
    shutil.rmtree(one/'img1')
    with pytest.raises(DataError, match='MOT17-01-FRCNN: no pictures'): mot17(out)
    assert mot_sequences(out/'train')[0].images == []  # Boxes alone are enough for scores
    (one/'seqinfo.ini').write_text('[Sequence]\nseqLength=0\n')
    with pytest.raises(DataError, match="seqLength='0'; expected a number from 1"): mot_sequences(out/'train')
    (one/'seqinfo.ini').write_text('[Sequence]\nseqLength=3\nframeRate=fast\n')
    with pytest.raises(DataError, match="frameRate='fast'"): mot_sequences(out/'train')


# Scores, with TrackEval's own readers as oracle

def official(tmp_path, films, benchmark):
    "TrackEval's whole evaluation of files: benchmark, readers, preprocessing, metrics."
    import trackeval
    gt, results = tmp_path/'gt', tmp_path/'results'/'ours'/'data'
    for k, (truth, found) in films.items():
        write_mot(gt/k/'gt'/'gt.txt', truth)
        write_mot(results/f'{k}.txt', found)
    n = {k: int(max([*t.frames, *f.frames])) for k, (t, f) in films.items()}
    quiet = dict(PRINT_CONFIG=False)
    data = trackeval.datasets.MotChallenge2DBox(quiet | dict(
        GT_FOLDER=str(gt), TRACKERS_FOLDER=str(tmp_path/'results'), SEQ_INFO=n, SKIP_SPLIT_FOL=True,
        BENCHMARK=benchmark))
    job = trackeval.Evaluator(quiet | dict(PRINT_RESULTS=False, OUTPUT_SUMMARY=False, OUTPUT_DETAILED=False,
                                           PLOT_CURVES=False, TIME_PROGRESS=False, LOG_ON_ERROR=None))
    ms = [trackeval.metrics.HOTA(), trackeval.metrics.CLEAR(quiet), trackeval.metrics.Identity(quiet)]
    with contextlib.redirect_stdout(io.StringIO()): out, _ = job.evaluate([data], ms)
    return {k: v['pedestrian'] for k, v in out['MotChallenge2DBox']['ours'].items()}


def agree(s, o):
    h, c, i = o['HOTA'], o['CLEAR'], o['Identity']
    for mine, theirs in ((s.mota, c['MOTA']), (s.idf1, i['IDF1']), (s.hota, h['HOTA'].mean()),
                         (s.det_a, h['DetA'].mean()), (s.ass_a, h['AssA'].mean()),
                         (s.precision, c['CLR_Pr']), (s.recall, c['CLR_Re'])):
        assert mine == pytest.approx(theirs, abs=1e-6)
    assert (s.mt, s.ml, s.switches, s.fp, s.fn) == tuple(int(c[k]) for k in ('MT', 'ML', 'IDSW', 'CLR_FP', 'CLR_FN'))
    np.testing.assert_allclose(s.hota_at, h['HOTA'], atol=1e-6)


@pytest.mark.parametrize('classes', [True, False])
def test_scores_are_the_benchmarks_own(tmp_path, classes):
    films = {f'film{k}': random_film(k, classes=classes) for k in range(5)}
    films['one frame'] = tuple(o[o.frames == 1] for o in random_film(7, classes=classes))
    official_scores = official(tmp_path, films, 'MOT17' if classes else 'MOT15')
    for k, (truth, found) in films.items(): agree(tracking_scores(truth, found), official_scores[k])
    agree(tracking_scores(*map(list, zip(*films.values()))), official_scores['COMBINED_SEQ'])


def tud(name): return [read_mot(MOT/name/f'{k}.txt') for k in ('gt', 'tracker_result')]


@pytest.mark.skipif(not MOT.exists(), reason='no MOT15 files')
def test_scores_on_mot15(tmp_path):
    "A known tracker's known scores: MOTA .555, IDF1 .624, 14 switches, HOTA .400 on both films together."
    films = {k: tud(k) for k in ('TUD-Campus', 'TUD-Stadtmitte')}
    s = tracking_scores(*map(list, zip(*films.values())))
    assert (round(s.mota, 3), round(s.idf1, 3), round(s.hota, 3), s.switches) == (.555, .624, .400, 14)
    theirs = official(tmp_path, films, 'MOT15')
    agree(s, theirs['COMBINED_SEQ'])
    for k, (truth, found) in films.items(): agree(tracking_scores(truth, found), theirs[k])


def test_scores_by_loops():
    "MOTA's and IDF1's definitions, without TrackEval: best naming over all ways."
    for seed in range(6):
        truth, found = random_film(seed, people=4, frames=12, classes=False)
        truth = truth[truth.counts]
        s, n = tracking_scores(truth, found), {}
        for f in range(1, 13):
            t, d = truth.at(f), found.at(f)
            over = box_iou(t.xyxy, d.xyxy)
            for i, j in zip(*np.nonzero(over >= .5)):
                n[t.pids[i], d.pids[j]] = n.get((t.pids[i], d.pids[j]), 0)+1
        people, tracks = np.unique(truth.pids), [*np.unique(found.pids), *[None]*len(np.unique(truth.pids))]
        best = max(sum(n.get(o, 0) for o in zip(people, way)) for way in itertools.permutations(tracks, len(people)))
        assert s.idf1 == pytest.approx(2*best/(len(truth)+len(found)))
        assert s.mota == pytest.approx(1-(s.fn+s.fp+s.switches)/len(truth))


def test_scores_of_odd_tables():
    truth, found = random_film(1)
    shuffled = np.random.default_rng(0).permutation
    a, b = tracking_scores(truth, found), tracking_scores(truth[shuffled(len(truth))], found[shuffled(len(found))])
    assert str(a) == str(b) and a.hota == pytest.approx(b.hota)
    moved = lambda m: MotBoxes(m.frames+7, m.pids+100, m.xyxy*2+5, m.scores, m.labels)
    assert str(tracking_scores(moved(truth), moved(found))) == str(a)
    people = truth[truth.counts]
    best = tracking_scores(truth, people)
    assert (best.mota, best.idf1, best.hota, best.fp, best.ml) == (1, 1, 1, 0, 0) and best.mt == best.people
    empty = tracking_scores([truth[:0], truth], [found[:0], found])
    assert str(empty) == str(a)
    for args, words in (((truth, truth), 'is no track of a person'), ((truth, found[[0, 0]]), '2 times'),
                        ((truth, None), 'NoneType'), (([truth], [found, found]), '1 films of truth, 2 found')):
        with pytest.raises(ValueError, match=words): tracking_scores(*args)


# The online tracker

def textbook(boxes):
    "A Kalman filter with 8 x 8 matrices, a box at a time; NaN is not seen. As DeepSORT's."
    F = np.eye(8)
    F[range(4), range(4, 8)] = 1
    H, m, out = np.eye(4, 8), None, []
    for b in boxes:
        z = np.array([(b[0]+b[2])/2, (b[1]+b[3])/2, (b[2]-b[0])/(b[3]-b[1]), b[3]-b[1]])
        if m is None:
            h = z[3]
            m, P = np.r_[z, np.zeros(4)], np.diag(np.square([h/10, h/10, .01, h/10, h/16, h/16, 1e-5, h/16]))
        else:
            h = m[3]
            Q = np.diag(np.square([h/20, h/20, .01, h/20, h/160, h/160, 1e-5, h/160]))
            m, P = F @ m, F @ P @ F.T + Q
            if np.isfinite(z).all():
                h = m[3]
                S = H @ P @ H.T + np.diag(np.square([h/20, h/20, .1, h/20]))
                K = np.linalg.solve(S, H @ P).T
                m, P = m + K @ (z-H @ m), P - K @ S @ K.T
        out.append((m, P))
    return out


def walk(r, n=25):
    start = r.uniform(0, 300, 2)
    x = start+np.arange(n)[:, None]*r.normal(0, 4, 2)+r.normal(0, 1, (n, 2))
    wh = np.array([20, 50])*r.uniform(.5, 3)*(1+.01*np.arange(n))[:, None]
    return np.c_[x, x+wh]


@pytest.mark.parametrize('seed', range(3))
def test_kalman_is_the_textbooks(seed):
    r = np.random.default_rng(seed)
    films = np.stack([walk(r) for _ in range(5)], 1)
    seen = r.random(films.shape[:2]) > .2
    seen[0] = True
    s = first_state(to_xyah(films[0]))
    for t in range(1, len(films)):
        s = next_state(s)
        s[:, seen[t]] = measured_state(s[:, seen[t]], to_xyah(films[t, seen[t]]))
    for k in range(5):
        m, P = textbook(np.where(seen[:, k, None], films[:, k], np.nan))[-1]
        np.testing.assert_allclose(s[:2, k].ravel(), m, atol=1e-9)
        np.testing.assert_allclose(s[2, k], np.diag(P)[:4], rtol=1e-9)
        np.testing.assert_allclose(s[3, k], P[range(4), range(4, 8)], rtol=1e-7)
        np.testing.assert_allclose(s[4, k], np.diag(P)[4:], rtol=1e-9)
    z = to_xyah(films[-1])
    for k in range(5):
        m, P = textbook(np.where(seen[:, k, None], films[:, k], np.nan))[-1]
        S = P[:4, :4]+np.diag(np.square([m[3]/20, m[3]/20, .1, m[3]/20]))
        d = z-m[:4]
        np.testing.assert_allclose(gate_distance(s, z)[k], np.einsum('ni,ij,nj->n', d, np.linalg.inv(S), d))


@pytest.mark.parametrize('shape', [(3, 5), (5, 3), (4, 4), (0, 3), (3, 0)])
def test_assignment_is_the_best(shape):
    r = np.random.default_rng(0)
    for limit in (.2, .5, .9):
        cost = np.where(r.random(shape) < .2, np.inf, r.random(shape))
        i, j = assign(cost, limit)
        assert (cost[i, j] < limit).all() and len(set(i)) == len(i) and len(set(j)) == len(j)
        a, b = shape
        cols = [*range(b), *[None]*a]
        best = max((sum(max(limit-cost[i, j], 0) for i, j in enumerate(way) if j is not None)
                    for way in set(itertools.permutations(cols, a))), default=0) if a*b <= 16 else None
        if best is not None: assert (limit-cost[i, j]).sum() == pytest.approx(best)


def crossing(n=30, gap=(12, 18), seed=0):
    "Two people walk towards each other; one is not found while behind the other. Boxes, features, who."
    r = np.random.default_rng(seed)
    looks = np.eye(2, 16)
    films = []
    for t in range(n):
        x = [20+10*t, 20+10*(n-1-t)]
        who = [0] if gap[0] <= t < gap[1] else [0, 1]
        box = np.array([[x[k], 50, x[k]+30, 130] for k in who], float)+r.normal(0, .5, (len(who), 4))
        films.append((Detections(box, np.full(len(who), .9)), looks[who]+.05*r.normal(size=(len(who), 16)), who))
    return films


def names(films, tracker, with_looks):
    "`{person: [track of each frame]}`."
    out = {0: [], 1: []}
    for d, f, who in films:
        o = tracker.update(d, f if with_looks else None)
        for k, row in zip(o.ids, o.rows): out[who[row]].append(int(k))
    return out


@pytest.mark.parametrize('with_looks', [True, False])
def test_people_who_cross(with_looks):
    got = names(crossing(), OnlineTracker(rate=10), with_looks)
    assert set(got[0]) == {1} and len(got[0]) == 30
    if with_looks: assert set(got[1]) == {2} and len(got[1]) == 24


@pytest.mark.parametrize('with_looks', [True, False])
def test_who_changes_places_unseen(with_looks):
    "Two people side by side change places while nobody is found: looks follow them, place does not."
    looks, films, none = np.eye(2, 8), [], Detections([])
    for t in range(16):
        x = [100, 112] if t < 6 else [112, 100]
        films.append((none, looks[:0], []) if 6 <= t < 10 else
                     (Detections([[k, 50, k+30, 130] for k in x]), looks, [0, 1]))
    got = names(films, OnlineTracker(rate=10), with_looks)
    assert got == ({0: [1]*12, 1: [2]*12} if with_looks else {0: [1]*6+[2]*6, 1: [2]*6+[1]*6})


@pytest.mark.parametrize('with_looks', [True, False])
def test_nothing_and_all_lost(with_looks):
    t = OnlineTracker(rate=10)
    none = Detections([])
    for _ in range(3): assert len(t.update(none)) == 0
    d, f = Detections([[10, 10, 40, 90], [100, 10, 130, 90]]), np.eye(2) if with_looks else None
    assert [len(t.update(d, f)) for _ in range(3)] == [0, 2, 2]
    for _ in range(30): assert len(t.update(none)) == 0
    assert len(t.ids) == 0  # Forgotten
    assert len(t.update(d, f)) == 0 and t.update(d, f).ids.tolist() == [3, 4]


@pytest.mark.parametrize('with_looks', [True, False])
@pytest.mark.parametrize('every', [2, 3, 5])
def test_a_detector_that_flickers(with_looks, every):
    t, ids, f = OnlineTracker(rate=25), set(), np.eye(3) if with_looks else None
    for k in range(60):
        x = 2*k+np.array([0, 100, 200])
        d = Detections(np.stack([x, 0*x+10, x+30, 0*x+90], 1)) if k % every == 0 else Detections([])
        ids |= set(t.update(d, f if len(d) else None).ids)
    assert ids == {1, 2, 3}


def test_scores_below_the_least_are_not_looked_at():
    t = OnlineTracker()
    d = Detections([[10, 10, 40, 90], [100, 10, 130, 90], [200, 10, 230, 90]], [.9, .39, .4])
    assert t.update(d).rows.tolist() == [0, 2] and t.update(d).scores.tolist() == [np.float32(.9), np.float32(.4)]
    assert t.made == 2


def test_rows_and_boxes():
    "Reported boxes lie on the detections that the rows name."
    r, t = np.random.default_rng(0), OnlineTracker()
    for k in range(20):
        x = 100*np.arange(8)+2.*k
        order = r.permutation(8)
        d = Detections(np.stack([x, 0*x, x+40, 0*x+100], 1)[order]+r.normal(0, 1, (8, 4)))
        o = t.update(d)
        assert (np.diff(o.ids) > 0).all() and o.xyxy.dtype == np.float32
        np.testing.assert_allclose(o.xyxy, d.xyxy[o.rows], atol=6)
        if k == 0: owner = dict(zip(o.ids, order[o.rows]))
        assert [owner[i] for i in o.ids] == order[o.rows].tolist() and len(o) == 8


def test_two_tracks_on_one_person_become_one():
    t, box = OnlineTracker(rate=10), [[10, 10, 50, 110]]
    for _ in range(5): t.update(Detections(box))
    for k in range(1, 5): t.update(Detections(np.add(box, [90, 0, 90, 0])))  # Jumps: a new track, the old one lost
    assert len(t.ids) == 2
    t.motion[0, t.status == LOST] = to_xyah(np.add(box, [90, 0, 90, 0]))
    t.motion[1, t.status == LOST] = 0
    t.update(Detections(np.add(box, [90, 0, 90, 0])))
    assert t.ids.tolist() == [1] or t.ids.tolist() == [2]


@pytest.mark.parametrize('features, words', [
    (np.ones((1, 4)), 'features of 1 boxes, 2 detections'), (np.ones((2, 5)), 'have 5 numbers, 4 before'),
    (None, 'have 0 numbers, 4 before'), (np.ones(2), 'has shape'), ([[1, 2, 3, np.nan]]*2, 'NaN or infinity'),
    (np.ones((2, 4, 1)), 'has shape')])
def test_bad_features(features, words):
    t, d = OnlineTracker(), Detections([[10, 10, 40, 90], [100, 10, 130, 90]])
    t.update(d, np.eye(2, 4))
    with pytest.raises(ValueError, match='frame 2') as e: t.update(d, features)
    assert words in str(e.value)
    assert len(t.update(d, torch.eye(2, 4))) == 2  # A refused frame changes nothing


def test_bad_boxes_and_knobs():
    for box in ([1, 2, np.nan, 4], [1, 2, np.inf, 4], [5, 5, 5, 9], [9, 5, 5, 9]):
        with pytest.raises(ValueError, match='xyxy: box 1'): Detections([[0, 0, 5, 5], box])
    with pytest.raises(ValueError, match='tuple, expected Detections'): OnlineTracker().update(([], []))
    for k, v in (('rate', 0), ('rate', np.nan), ('patience', -1), ('looks', 3), ('overlap', 0), ('loose', 1.1),
                 ('memory', 1), ('memory', -.1), ('widest', 0)):
        with pytest.raises(ValueError, match=f'{k}={v}'): OnlineTracker(**{k: v})
    t = OnlineTracker()
    t.update(Detections([[10, 10, 40, 90]]), [[0., 0.]])  # Features without a length are nobody's
    assert np.isfinite(t.features).all() and len(t.update(Detections([[10, 10, 40, 90]]), [[0., 0.]])) == 1


def test_films_of_tracks(caplog):
    films = crossing()
    d, f, _ = map(list, zip(*films))
    m = track_film(d, f, rate=10)
    assert set(m.frames) <= set(range(1, 31)) and set(m.pids) == {1, 2} and m.labels is None
    logging.getLogger('reidlit').setLevel(logging.WARNING)
    with caplog.at_level(logging.WARNING, 'reidlit'):
        wide = track_film([Detections([[0, 0, 100, 20], [5, 5, 9, 20]])]*2)
    assert len(wide) == 0 and '4 x box too small or too wide (first: frame 1, 1)' in caplog.text
    made = track_film(d, lambda im, b: im[:len(b)], [np.asarray(x) for x in f], rate=10)
    np.testing.assert_array_equal(made.pids, m.pids)
    for bad in (dict(features=f[:4]), dict(features=lambda im, b: b, frames=f[:4])):
        with pytest.raises(ValueError, match='zip'): track_film(d, **bad)


def test_two_hundred_people_keep_their_names():
    r, n, T = np.random.default_rng(0), 200, 12
    spot = np.stack(np.meshgrid(np.arange(20)*95., np.arange(10)*105.), -1).reshape(-1, 2)
    v, looks, t, seconds = r.normal(0, 1.5, (n, 2)), r.normal(size=(n, 64)), OnlineTracker(), []
    for k in range(T):
        xy = spot+k*v
        d = Detections(np.c_[xy, xy+[35, 90]]+r.normal(0, 1, (n, 4)))
        start = time.process_time()
        o = t.update(d, looks+.2*r.normal(size=looks.shape))
        seconds.append(time.process_time()-start)
        assert len(o) == n and (o.ids == o.rows+1).all()
    assert np.median(seconds) < 1/30


def test_no_loop_over_people():
    "Twice the people takes less than twice the calls of Python functions."
    def calls(n):
        t, count, box = OnlineTracker(), [0], np.arange(n)[:, None]*[60., 0, 60, 0]+[0, 0, 40, 90]
        d = Detections(box)
        t.update(d, np.eye(n, 64)+.1)
        def seen(*_): count[0] += 1
        sys.setprofile(seen)
        try: t.update(d, np.eye(n, 64)+.1)
        finally: sys.setprofile(None)
        return count[0]
    assert calls(60) <= calls(30)+10


@pytest.mark.skipif(not MOT.exists(), reason='no MOT15 files')
@pytest.mark.parametrize('name, mota, idf1', [('TUD-Campus', .5, .6), ('TUD-Stadtmitte', .65, .6)])
def test_real_boxes(name, mota, idf1):
    "Boxes of a real detector: better than the result that comes with the files."
    truth, theirs = tud(name)
    d = read_detections(MOT/name/'det.txt', int(truth.frames.max()))
    s, t = tracking_scores(truth, track_film(d, rate=25)), tracking_scores(truth, theirs)
    assert s.mota > mota and s.idf1 > idf1 and s.mota > t.mota and s.hota > t.hota


def test_detections_of_files(tmp_path):
    f = tmp_path/'det.txt'
    f.write_text('3,-1,1,1,10,20,.9\n1,-1,11,1,10,20,.5\n3,-1,5,5,0,20,.8\n')
    logging.getLogger('reidlit').setLevel(logging.ERROR)
    d = read_detections(f)
    assert [len(o) for o in d] == [1, 0, 1] and d[0].xyxy.tolist() == [[10, 0, 20, 20]]
    assert d[2].scores.tolist() == [np.float32(.9)] and [len(o) for o in read_detections(f, 5)] == [1, 0, 1, 0, 0]
    with pytest.raises(DataError, match='1 boxes after frame 2'): read_detections(f, 2)
    f.write_text('')
    assert read_detections(f) == [] and len(read_detections(f, 3)) == 3
    with pytest.raises(DataError, match='no such file'): read_detections(tmp_path/'no.txt')
    with pytest.raises(DataError, match='no such file'): read_detections(tmp_path/'no.json')
    f = tmp_path/'d.json'
    for bad in ('', '{}', '{"bboxes": [[[1, 2, 3, 4]]], "scores": [[]]}', '{"bboxes": [["x"]], "scores": [[1]]}',
                '{"bboxes": [[[1, 2, 3, NaN]]], "scores": [[1]]}'):
        f.write_text(bad)
        with pytest.raises(DataError, match='d.json'): read_detections(f)
    f.write_text('{"bboxes": [[[1, 2, 3, 4]], []], "scores": [[0.5], []]}')
    assert [len(o) for o in read_detections(f, 2)] == [1, 0]


# The command

@pytest.fixture(scope='module')
def scene(tmp_path_factory, hall):
    root = tmp_path_factory.mktemp('scene')
    rows = [drawn_frame(hall, 0, k, k+1) for k in range(25)]
    write_film(root/'v.mp4', [im for im, _, _ in rows], hall.fps)
    write_mot(root/'det.txt', join_boxes([d for _, _, d in rows]))
    return root


def test_track_command(scene, tmp_path):
    out = tmp_path/'out'
    r = run('track', scene/'v.mp4', '--detections', scene/'det.txt', '--least', .25, '--out', out)
    assert r.returncode == 0, r.stderr
    assert '25 frames, 10 a second' in r.stdout and ' tracks, the longest' in r.stdout
    assert sorted(p.name for p in out.iterdir()) == ['tracks.mp4', 'tracks.txt']
    m, film = read_mot(out/'tracks.txt'), Film(out/'tracks.mp4')
    d = read_detections(scene/'det.txt', 25)
    want = track_film(d, rate=10, least=.25)
    np.testing.assert_array_equal(m.pids, want.pids)
    np.testing.assert_allclose(m.xyxy, want.xyxy, atol=2e-3)
    assert len(film) == 25 and film.rate == 10
    before, after = Film(scene/'v.mp4')[12], film[12]
    assert (np.abs(before.astype(int)-after).max(-1) > 60).mean() > .002  # Boxes are on it


def test_world_command_writes_mot17(tmp_path):
    r = run('world', tmp_path/'w', '--layout', 'mot17', '--people', 12, '--cameras', 2, '--moments', 2)
    assert r.returncode == 0 and 'mot17 train: 4 pictures' in r.stdout
    s, = mot_sequences(tmp_path/'w'/'train')[:1]
    assert len(s) == 2 and s.rate == 2 and len(s.found) <= len(s.truth)


@pytest.mark.parametrize('words, message', [
    (['--detections', 'no.txt'], 'no.txt: no such file'), ([], 'detections'),
    (['--detections', '{det}', '--weights', 'no.safetensors'], 'no.safetensors: no such file'),
    (['--detections', '{det}', '--weights', '{det}'], 'not a model'),
    (['--detections', '{det}', '--looks', '7'], 'looks=7'), (['--detections', '{v}'], 'not readable'),
    (['--detections', '{far}'], '1 boxes after frame 25')])
def test_track_command_misuse(scene, tmp_path, words, message):
    (scene/'far.txt').write_text('26,-1,1,1,9,9,.9\n')
    words = [w.format(det=scene/'det.txt', v=scene/'v.mp4', far=scene/'far.txt') for w in words]
    r = run('track', scene/'v.mp4', *words, '--out', tmp_path/'out')
    assert r.returncode == 2 and message in r.stderr and 'Traceback' not in r.stderr
    assert not (tmp_path/'out').exists()
    for name in ('none.avi', 'det.txt'):
        r = run('track', scene/name, '--detections', scene/'det.txt')
        assert r.returncode == 2 and ('no such file' in r.stderr or 'not a video' in r.stderr)


def test_track_command_stopped(scene, tmp_path, monkeypatch):
    "Ctrl-C while the film is written: the old film stays, the new tracks are whole."
    out = tmp_path/'out'
    words = ['track', scene/'v.mp4', '--detections', scene/'det.txt', '--least', .25, '--out', out]
    assert run(*words).returncode == 0
    old, tracks = (out/'tracks.mp4').read_bytes(), (out/'tracks.txt').read_text()
    (out/'tracks.txt').write_text('')
    def stopped(frames, found):
        for k, (im, _) in enumerate(zip(frames, found)):
            if k == 5: raise KeyboardInterrupt
            yield im
    monkeypatch.setattr(cli, 'annotate', stopped)
    r = run(*words)
    assert r.returncode == 130 and 'stopped; what is in' in r.stdout
    assert (out/'tracks.mp4').read_bytes() == old and (out/'tracks.txt').read_text() == tracks
    assert sorted(p.name for p in out.iterdir()) == ['tracks.mp4', 'tracks.txt']


def test_track_command_on_a_film_that_breaks_off(scene, tmp_path):
    data = write_film(tmp_path/'v.avi', [Film(scene/'v.mp4')[k] for k in range(25)]).read_bytes()
    (tmp_path/'v.avi').write_bytes(data[:len(data)*3//4])
    r = run('track', tmp_path/'v.avi', '--detections', scene/'det.txt', '--least', .25, '--out', tmp_path/'out')
    assert r.returncode == 0 and 'could not be read' in r.stdout
    assert len(Film(tmp_path/'out'/'tracks.mp4')) == 25


@pytest.mark.skipif(not (PETS/'View_001.avi').exists(), reason='no real video')
def test_track_command_on_real_video(tmp_path):
    found = json.loads((PETS/'detections'/'View_001.json').read_text())
    part = {k: found[k][:60] for k in ('bboxes', 'scores')}
    (tmp_path/'d.json').write_text(json.dumps(part))
    video, frames = cv2.VideoCapture(str(PETS/'View_001.avi')), []
    while len(frames) < 60: frames.append(cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB))
    write_film(tmp_path/'v.mp4', frames, 10)
    r = run('track', tmp_path/'v.mp4', '--detections', tmp_path/'d.json', '--out', tmp_path/'out')
    assert r.returncode == 0, r.stderr
    m = read_mot(tmp_path/'out'/'tracks.txt')
    long = np.unique(m.pids, return_counts=True)[1]
    assert (long > 40).sum() >= 3 and len(Film(tmp_path/'out'/'tracks.mp4')) == 60
    sure = sum((np.array(s) > .9).sum() for s in part['scores'])
    assert len(m) > .9*sure
