"The lab's experiments at preset ci, and what its stored results must hold."
import math
from pathlib import Path

import numpy as np
import pytest

from real import REAL
from reidlit.mcssl import lab
from reidlit.core import DataError
from reidlit.data.sets import pets2009
from reidlit.experiments import Run, read_result

RESULTS = Path(__file__).resolve().parent.parent / 'results'


@pytest.fixture(scope='module')
def some():
    run = Run(0, 'ci')
    lab.core(run, arms=('ST', 'MCSSL'))
    return run.values


def test_core_scores_both_cameras_and_counts_the_funnel(some):
    for arm in ('base', 'ST', 'MCSSL', 'MCSSL, backbone'):
        assert set(some[arm]) == {'AP', 'AP50', 'AP80', 'AP80_most', 'AP80_least'}
        assert some[arm]['AP80'] == pytest.approx(np.mean([some[arm]['AP80_most'], some[arm]['AP80_least']]))
    for k in ('most', 'least'):
        pairs = [some[f'pairs, {k} shared: {s}']['pairs'] for s in ('same moment', 'epipolar', 're-identified')]
        assert pairs == sorted(pairs, reverse=True) and pairs[0] > 0
    assert some['gain, most shared']['share'] > some['gain, least shared']['share']


def test_gain_is_measured_from_the_base(some):
    gains = [some[f'gain, {k} shared']['AP50'] for k in ('most', 'least')]
    assert np.mean(gains) == pytest.approx(some['MCSSL']['AP50'] - some['base']['AP50'])


def test_claims_name_variants_that_are_stored(some):
    r = read_result(RESULTS / 'mcssl-world-laptop.json')
    for claim in lab.CLAIMS:
        for name in claim[:2]: assert claim.metric in r['variants'][name]
    assert {c['claim'] for c in r['claims']} == set(map(str, lab.CLAIMS))
    assert len(r['seeds']) >= 3


def test_premise_keeps_the_number_of_steps():
    run = Run(0, 'ci')
    lab.premise(run)
    out = run.values
    names = {f'{p}, noise {x}' for p in ('backbone', 'detection') for x in lab.NOISE}
    assert names <= set(out) and all(math.isfinite(v) for r in out.values() for v in r.values())


def test_unknown_preset_and_kind():
    with pytest.raises((ValueError, KeyError), match='moon'): lab.lab_frames(0, preset='moon')
    with pytest.raises((ValueError, KeyError), match='boats'): lab.lab_frames(0, 'boats', 'ci')


def test_pets_folder_missing(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)): pets2009(tmp_path / 'none')


@pytest.mark.skipif(not (REAL / 'pets2009_s2l1').exists(), reason='no PETS here')
def test_real_cameras_match_in_step_and_fail_when_shuffled():
    d = pets2009(REAL / 'pets2009_s2l1').undistorted()
    step, off = (lab.foot_matches(d, (0, 3), shift, every=25) for shift in (0, 250))
    assert step['factor'] > 1.5 and step['recall'] > .95
    assert step['right'] > .6 and off['right'] < .3
