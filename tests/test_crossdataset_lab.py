"The whole experiment at preset ci, stored and read by the command and the report."
import json
import os

from reidlit.cli import main
from reidlit.crossdataset.lab import CLAIMS, CORE_ARMS, PAPER
from reidlit.report import Page, paper_section


def test_core_from_command_to_page(tmp_path, monkeypatch):
    monkeypatch.setenv('REIDLIT_PRESET', 'ci')
    words = ['reproduce', 'crossdataset', '--preset', 'ci', '--seeds', '5', '--results', str(tmp_path)]
    assert main(words) == 0
    stored = json.loads((tmp_path / 'crossdataset-world-ci.json').read_text())
    assert stored['seeds'] == [5]
    assert set(CORE_ARMS) < set(stored['variants'])
    assert [c['claim'] for c in stored['claims']] == list(map(str, CLAIMS))
    assert all(c['ci95'] is None for c in stored['claims']), 'one seed has no interval'
    for values in stored['variants'].values():
        assert all(0 <= v[0] <= 1 for v in values.values())
    os.rename(tmp_path / 'crossdataset-world-ci.json', tmp_path / 'crossdataset-world-laptop.json')
    page = Page('test')
    paper_section(page, PAPER, tmp_path)
    assert sum('<figure>' in p for p in page.parts) == 3
