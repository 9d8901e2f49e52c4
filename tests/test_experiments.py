"Runs that are interrupted, files that two processes write, stored results that still stand."
import json
import multiprocessing
from pathlib import Path

import pytest

from reidlit.core import DataError
from reidlit.data.world import World
from reidlit.experiments import (Experiment, Paper, Run, add_seed, load_paper, papers, read_result,
                                 reproduce)
from reidlit.ics import ics_settings
from reidlit.ics.comparison import table2
from reidlit.learner import quiet
from reidlit.report import Page, result_section
from reidlit.runs import Checkpoints
from reidlit.verdicts import Claim, judge

RESULTS = Path(__file__).resolve().parent.parent/'results'
STORED = sorted(RESULTS.glob('*.json'))


def experiment_of(path):
    "Paper and experiment of a stored file, by its name."
    name, *what, data, preset = path.stem.split('-')
    paper = load_paper(name)
    return paper.experiments[what[0] if what else 'core'] if data == 'world' else paper.real


def test_there_are_results(): assert len(STORED) >= 16 and {f.name.split('-')[0] for f in STORED} <= set(papers())


@pytest.mark.parametrize('path', STORED, ids=lambda p: p.stem)
def test_stored_results_load_are_shown_and_judged_as_they_are(path):
    r = read_result(path)
    page = Page('test')
    result_section(page, path)
    assert f"{r['paper']}, preset {r['preset']}" in str(page)
    claims = experiment_of(path).claims
    assert [str(c) for c in claims] == [c['claim'] for c in r['claims']]
    for now, stored in zip(judge(claims, r['variants']), r['claims']):
        assert now['verdict'] == stored['verdict'] and stored['tried'] in ('', now['tried'])
        assert (now['margin'], now['needed']) == (stored['margin'], stored['needed'])
        assert now['mean_diff'] == pytest.approx(stored['mean_diff'], abs=1e-12)


@pytest.fixture(scope='module')
def data():
    w = World(people=36, cameras=3, layout='disjoint', style=.5, crowd=12)
    return w.crops('train', 3), *w.query_gallery('test')


def run_table(data, folder=None):
    run = Run(0, 'ci', 'cpu', folder=folder)
    with quiet(): table2(run, *data, ics_settings('drawn', 'ci', p=4), ('M1', 'M5', 'M8'))
    return run.values


def test_interrupted_experiment_ends_as_a_whole_one(data, tmp_path, monkeypatch):
    whole, saved, was = run_table(data), [], Checkpoints.after_validate
    def stop(self):
        was(self)
        saved.append(1)
        if len(saved) == 3: raise KeyboardInterrupt # in the first epoch of M5
    monkeypatch.setattr(Checkpoints, 'after_validate', stop)
    with pytest.raises(KeyboardInterrupt): run_table(data, tmp_path)
    assert list(json.loads((tmp_path/'values.json').read_text())['values']) == ['M1']
    assert run_table(data, tmp_path) == whole
    assert len(saved) == 6, 'M1 was not trained again, M5 went on'


def _core(run):
    for name in 'AB': run.arm(name, lambda: dict(mAP=(run.seed+ord(name))/128))


TOY = Paper('toy', '', '', dict(core=Experiment(_core, (Claim('B', 'A'),))))


def _seeds(folder, seeds): reproduce(TOY, preset='ci', seeds=seeds, results=folder)


def test_two_processes_lose_no_seed(tmp_path):
    context = multiprocessing.get_context('fork')
    both = [context.Process(target=_seeds, args=(tmp_path, range(k, 40, 2))) for k in (0, 1)]
    for p in both: p.start()
    for p in both: p.join()
    r = read_result(tmp_path/'toy-world-ci.json')
    assert r['seeds'] == list(range(40)) and r['variants']['A']['mAP'] == [(s+65)/128 for s in range(40)]
    assert not [p for p in tmp_path.iterdir() if p.is_dir()], 'no folder of a seed is left'


def test_one_seed_is_run_by_one_process(tmp_path):
    def again(run): _seeds(tmp_path, [run.seed])
    twice = Paper('toy', '', '', dict(core=Experiment(again)))
    with pytest.raises(DataError, match='another process'):
        reproduce(twice, preset='ci', seeds=[0], results=tmp_path)


def test_other_variants_are_refused(tmp_path):
    f = tmp_path/'x.json'
    add_seed(f, 'x', 'ci', 0, dict(A=dict(mAP=1.)))
    with pytest.raises(DataError, match='has variants'): add_seed(f, 'x', 'ci', 1, dict(B=dict(mAP=1.)))


def test_unknown_papers_and_experiments():
    for name in papers(): assert load_paper(name).name == name
    with pytest.raises(ValueError, match="'moon'"): load_paper('moon')
    with pytest.raises(ValueError, match="'moon' on 'world'"): reproduce(load_paper('ics'), 'moon')
    with pytest.raises(ValueError, match='pets2009'): reproduce(load_paper('mcssl'), data='market1501', root='.')
