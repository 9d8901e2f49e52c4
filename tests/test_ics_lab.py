"The lab of intra-camera supervision at preset ci: stored, judged, shown, and on other sets."
import csv
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

import reidlit.ics.comparison as comparison
from real import REAL
from reidlit.cli import main
from reidlit.core import ReidSet
from reidlit.data.sets import market_rows
from reidlit.data.world import World
from reidlit.ics import VARIANTS, ics_settings
from reidlit.ics.comparison import (CLAIMS, PAIRS, SHARES_OF_PAIRS, WANTED, few_pictures, ics_world,
                                    label_statistics, pictures, table2)
from reidlit.ics.lab import PAPER, real_core
from reidlit.learner import quiet
from reidlit.report import Page, paper_section
from reidlit.experiments import Run
from reidlit.verdicts import judge


@pytest.fixture(scope='module')
def world():
    "A small world, drawn once; of more pictures the first ones are taken."
    w = World(people=36, cameras=3, layout='disjoint', style=.5, crowd=12)
    train, test = w.crops('train', 8), w.query_gallery('test')
    turn = np.concatenate([np.arange(n) for n in np.unique(train.tids, return_counts=True)[1]])
    return SimpleNamespace(crops=lambda split='train', n=4, size=None: train[turn < n],
                           query_gallery=lambda *args, **kwargs: test)


# One run of the command, at preset ci: a single test, so that it is run once

def check_values(variants):
    pairs = {f'pairs: {k}' for k in PAIRS}
    assert set(variants) == {*VARIANTS, *pairs, WANTED}
    for name, values in variants.items():
        assert all(len(v) == 1 and 0 <= v[0] <= 1 for v in values.values()), name
        assert set(values) == (set(SHARES_OF_PAIRS) if name in pairs else
                               {'precision'} if name == WANTED else {'rank1', 'mAP'})


def check_section(stored, folder):
    page = Page('test')
    paper_section(page, PAPER, folder) # nothing is stored: words only
    assert not any('<figure>' in p or '<table>' in p for p in page.parts)
    os.symlink(stored, folder/'ics-world-laptop.json')
    paper_section(page, PAPER, folder)
    text = str(page)
    assert text.count('<figure>') >= 2
    for words in (*VARIANTS, 'pairs: memory', 'M3 &gt; M2 in mAP', 'undecided', 'one seed'):
        assert f'<td>{words}</td>' in text, words


def test_core_from_command_to_page(tmp_path, monkeypatch):
    monkeypatch.setenv('REIDLIT_PRESET', 'ci')
    words = ['reproduce', 'ics', '--preset', 'ci', '--seeds', '5', '--results', str(tmp_path/'a')]
    assert main(words) == 0
    stored = tmp_path/'a'/'ics-world-ci.json'
    r = json.loads(stored.read_text())
    check_values(r['variants'])
    assert [c['claim'] for c in r['claims']] == list(map(str, CLAIMS))
    assert all(c['verdict'] == 'undecided' and c['ci95'] is None for c in r['claims']), 'one seed'
    assert len(judge(CLAIMS, r['variants'])) == len(CLAIMS)
    (tmp_path/'b').mkdir()
    check_section(stored, tmp_path/'b')


# Table 1

def statistics_by_loop(pids, camids):
    each = {}
    for p, c in zip(pids, camids): each.setdefault(p, set()).add(c)
    n, pairs = len(pids), sum(len(s)*(len(s)-1)//2 for s in each.values())
    many = sum(map(len, each.values()))
    return dict(cameras=len(set(camids)), people=len(each), pictures=n, identities=many,
                IP=n/len(each), ICP=n/many, true_pairs=pairs)


def test_statistics_by_hand():
    "Person 3 in cameras 0, 1 and 2, person 5 in 0 and 2, person 9 in camera 1 alone."
    pids, cams = [3, 3, 3, 3, 5, 5, 9, 3, 5], [0, 0, 1, 2, 0, 2, 1, 1, 2]
    s = label_statistics(ReidSet(np.zeros((9, 2, 1, 3), np.uint8), pids, cams))
    assert s == dict(cameras=3, people=3, pictures=9, identities=6, IP=3., ICP=1.5, true_pairs=4)
    assert s == statistics_by_loop(pids, cams)


def test_statistics_of_a_world(world):
    t = world.crops()
    assert label_statistics(t) == statistics_by_loop(t.pids.tolist(), t.camids.tolist())


def test_statistics_of_market():
    "Table 1 of the paper, from the official list of training pictures."
    lists = REAL/'market1501_lists'/'market1501_train.csv'
    if not lists.exists(): pytest.skip(f'{lists} is absent')
    with open(lists) as f: s = label_statistics(market_rows([path for _, path in csv.reader(f)]))
    counts = {k: s[k] for k in ('cameras', 'people', 'pictures', 'identities', 'true_pairs')}
    assert counts == dict(cameras=6, people=751, pictures=12936, identities=3262, true_pairs=5874)
    assert round(s['IP'], 2) == 17.23 and round(s['ICP'], 2) == 3.97


# Table 2 and 3

def test_real_core_on_any_set(world):
    "Pictures of another size, one of them junk and one nobody's: all of Table 2 and 3."
    def cut(s): return ReidSet(s.images[:, 8:56, 4:28], s.pids, s.camids)
    train, query, gallery = map(cut, (world.crops(), *world.query_gallery()))
    train.junk[0] = train.distractor[1] = True
    train.pids[:2] = -1 # an error if they were used
    lines = []
    d = SimpleNamespace(train=train, query=query, gallery=gallery)
    run = Run(1, 'ci', 'cpu', lines.append, 'real', lambda: d)
    real_core(run)
    out = run.values
    assert set(out) == {'first weights', *VARIANTS, *(f'pairs: {k}' for k in PAIRS), WANTED}
    assert [l.split(': rank1')[0] for l in lines][:9] == ['first weights', *VARIANTS]
    for name, values in out.items():
        assert all(0 <= v <= 1 for v in values.values()), name
    one = {k: {m: [v] for m, v in values.items()} for k, values in out.items()}
    assert {c['verdict'] for c in judge(PAPER.real.claims, one)} == {'undecided'}
    assert PAPER.real.claims == CLAIMS


@pytest.fixture
def asked(monkeypatch):
    "Trainings that the lab asks for: variant, first, learner, settings; none is trained."
    out, was = [], comparison.fit_ics
    def fit(train, variant, settings, first=None, **kwargs):
        f = was(train, variant, settings, first=first, **kwargs)
        out.append((variant, first, f.learn, settings))
        return f
    monkeypatch.setattr('reidlit.ics.fit_stage', lambda learn, *args, **kwargs: learn)
    monkeypatch.setattr(comparison, 'fit_ics', fit)
    return out


def test_variants_share_one_m5(world, asked):
    s, names = ics_settings('drawn', 'ci', p=4), ('M1', 'M5', 'M8')
    run = Run(device='cpu')
    with quiet(): fits = table2(run, world.crops(), *world.query_gallery(), s, names)
    assert list(fits) == list(run.values) == list(names) == [v for v, *_ in asked]
    assert [first for _, first, *_ in asked] == [None, None, fits['M5'].learn]


def test_few_pictures_takes_as_many_steps(world, asked):
    "Batches have four pictures of each identity, also where it has but two."
    s, counts = ics_settings('drawn', 'laptop', p=8), (4, 4, 2, 2, 8, 8)
    run = Run(device='cpu')
    with quiet(): few_pictures(run, world, s, counts[::2])
    assert list(run.values) == [f'{m}, {n} pictures' for n in (4, 2, 8) for m in ('M1', 'M3')]
    assert [v for v, *_ in asked] == ['M1', 'M3']*3
    for n, (_, _, l, _) in zip(counts, asked): assert np.bincount(l.ids.labels).max() == n
    for when in (lambda t: t['epochs'][0], lambda t: t['milestones'][0][0]):
        steps = [len(l.dls.train)*when(t) for _, _, l, t in asked]
        assert steps == pytest.approx([steps[0]]*6, rel=.1)


def test_gain_of_the_memory_with_fewer_pictures(monkeypatch):
    scores = {'M1': dict(rank1=.2, mAP=.1), 'M3': dict(rank1=.5, mAP=.3)}
    monkeypatch.setattr('reidlit.ics.comparison.few_pictures', lambda run, *_: run.add({
        f'{m}, {n} pictures': v for n in (2, 8) for m, v in scores.items()}))
    run = Run(0, 'ci')
    pictures(run)
    out = run.values
    assert out['M3 - M1, 2 pictures'] == pytest.approx(dict(rank1=.3, mAP=.2))
    assert judge(PAPER.experiments['pictures'].claims, {k: {m: [x] for m, x in v.items()} for k, v in out.items()})


@pytest.mark.parametrize('preset, people', [('ci', 48), ('laptop', 300)])
def test_worlds_of_the_lab(preset, people):
    w = ics_world(1, preset)
    assert (w.people, w.crowd, len(w.cameras), w.layout) == (people, people//3, 6, 'disjoint')
