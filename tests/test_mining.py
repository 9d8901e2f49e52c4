"Mining films: groups against slow rules, many films at once, and what is on the disk."
import distributed
import joblib
import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN

from reidlit.core import DataError, Dropped
from reidlit.detection.detectors import Detections
from reidlit.idfree.mining import can_follow, cluster_boxes, link_boxes, mine_clip, mine_tracks, mining_scores


class Walkers(torch.nn.Module):
    "Finds two people in a film whose pictures hold their own number."
    def __init__(self, sure=.9):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))
        self.sure = sure

    def find(self, images, least):
        out = []
        for im in images:
            t = float(im[0, 0, 0]*255)
            b = np.float32([[t, 0, t+20, 50], [100-t, 0, 120-t, 50]])
            n = 2 if self.sure>=least else 0
            out.append((Detections(b[:n], np.full(n, self.sure)), torch.eye(2)[:n]))
        return out


def walk(n=8):
    return np.stack([np.full((60, 130, 3), t, np.uint8) for t in range(n)])


class Torn:
    "A film that breaks off."
    path = 'torn.mp4'
    def __len__(self): return 5
    def __getitem__(self, i): raise DataError('torn.mp4', 'picture 0 cannot be read')


@pytest.mark.parametrize('seed', range(5))
def test_without_time_and_place_links_are_dbscan_of_two(seed):
    r = np.random.default_rng(seed)
    f = r.normal(size=(30, 3)); f /= np.linalg.norm(f, axis=1, keepdims=True)
    boxes = np.tile([0., 0, 20, 50], (30, 1)) # all in one place, each in a frame of its own
    ours = link_boxes(f, np.arange(30), boxes, .05, 2, 1., 99)
    theirs = DBSCAN(eps=.05, min_samples=2, metric='cosine').fit_predict(f)
    assert np.array_equal(ours<0, theirs<0) and len(set(zip(ours, theirs)))==len(set(ours))


@pytest.mark.parametrize('seed', range(5))
def test_scores_are_those_of_counting_pairs(seed):
    r = np.random.default_rng(seed)
    labels, pids = r.integers(-1, 4, 40), r.integers(0, 5, 40)
    pairs = [(labels[i]==labels[j]>=0, pids[i]==pids[j]) for i in range(40) for j in range(i)]
    both = sum(a and b for a, b in pairs)
    s = mining_scores(labels, pids)
    assert s['pairs']==pytest.approx(both/sum(a for a, _ in pairs))
    assert s['found']==pytest.approx(both/sum(b for _, b in pairs))


def test_films_are_mined_side_by_side_as_one_by_one(tmp_path):
    films = [walk(n) for n in (8, 6, 7)]
    alone = mine_tracks(Walkers(), films, least=3)
    for got in (mine_tracks(Walkers(), films, least=3, jobs=2), mine_tracks(Walkers(), films, tmp_path, 2, least=3),
                mine_tracks(Walkers(), films, tmp_path, least=3)):
        assert [m.name for m in got]==[m.name for m in alone]
        for a, b in zip(got, alone): assert np.array_equal(a.labels, b.labels) and np.array_equal(a.xyxy, b.xyxy)
    assert [np.unique(m.labels).tolist() for m in alone]==[[0, 1]]*3


def test_a_dask_cluster_mines_the_same_films(tmp_path):
    films = [walk(n) for n in (8, 6, 7)]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        with distributed.Client(cluster), joblib.parallel_config('dask'):
            there = mine_tracks(Walkers(), films, tmp_path, jobs=-1, least=3)
    for a, b in zip(there, mine_tracks(Walkers(), films, least=3)): assert np.array_equal(a.labels, b.labels)
    assert len(list(tmp_path.glob('*.npz')))==3


def test_a_torn_film_is_counted_and_tried_again(tmp_path):
    lost = Dropped()
    got = mine_tracks(Walkers(), [Torn(), walk()], tmp_path, dropped=lost, least=3)
    assert len(got)==1 and list(lost.reasons)==['picture 0 cannot be read']
    assert [p.name for p in tmp_path.glob('*.npz')]==['000001-film.npz']
    lost = Dropped()
    got = mine_tracks(Walkers(), [walk(), walk()], tmp_path, dropped=lost, least=3)
    assert len(got)==2 and not len(lost)


def test_a_film_without_people_or_with_short_visits_has_no_track():
    lost = Dropped()
    assert mine_tracks(Walkers(.2), [walk()], dropped=lost, sure=.5)==[]
    assert mine_tracks(Walkers(), [walk(3)], dropped=lost, least=4)==[]
    assert list(lost.reasons)==['no track'] and len(lost)==2
    assert len(mine_clip(Walkers(), walk()[:0]).row)==0


def test_tracks_of_another_network_or_setting_are_not_taken(tmp_path):
    mine_tracks(Walkers(), [walk()], tmp_path, least=3)
    other = Walkers()
    with torch.no_grad(): other.p += 1
    with pytest.raises(DataError, match='another network'): mine_tracks(other, [walk()], tmp_path, least=3)
    with pytest.raises(DataError, match='other settings'): mine_tracks(Walkers(), [walk()], tmp_path, least=4)
    (tmp_path/'000000-film.npz').write_bytes(b'PK nonsense')
    with pytest.raises(DataError, match='000000-film.npz: cannot be read'):
        mine_tracks(Walkers(), [walk()], tmp_path, least=3)


def test_boxes_of_a_resized_film_are_in_its_own_pixels():
    class Corner(Walkers):
        def find(self, images, least):
            h, w = images.shape[2:]
            return [(Detections(np.float32([[0, 0, w/2, h/4]])), torch.ones(1, 1)) for _ in images]
    m = mine_clip(Corner(), walk(4), size=(30, 26), least=2)
    assert np.allclose(m.xyxy, [0, 0, 65, 15])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match='boxes'): can_follow([0, 1], [[0, 0, 0, 5], [0, 0, 1, 5]])
    with pytest.raises(ValueError, match='frames'): link_boxes(np.eye(2), [0], [[0, 0, 1, 1]]*2)
    with pytest.raises(ValueError, match='NaN'): cluster_boxes([[np.nan, 1.]])
    class Many: frames, camids, name = np.arange(3), np.array([0, 0, 1]), 'hall'
    Many.__len__ = lambda self: 3
    Many.__getitem__ = lambda self, i: walk(1)[0]
    with pytest.raises(ValueError, match='hall: 2 cameras'): mine_clip(Walkers(), Many())
