"A paper and a data set are added as docs/ says, in a copy of this checkout."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def blocks(page):
    "The Python blocks of a page of docs/."
    return re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs' / page).read_text(encoding='utf-8'), re.M | re.S)


@pytest.fixture
def copy(tmp_path):
    "The tracked files, as they are now."
    files = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if files.returncode: pytest.skip('no git checkout')
    for f in filter(None, files.stdout.split('\0')):
        if not (ROOT / f).is_file() or f.startswith('results/'): continue
        (tmp_path / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, tmp_path / f)
    return tmp_path


def add_notebook(home, name, cells):
    "A notebook of code cells."
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, outputs=[], execution_count=None,
                  source=s.rstrip()) for i, s in enumerate(cells)]
    (home / 'nbs' / name).write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))


def change(path, old, new):
    "One place of a text file changed."
    text = path.read_text(encoding='utf-8')
    assert text.count(old) == 1, f'{path.name}: {text.count(old)} times {old!r}'
    path.write_text(text.replace(old, new), encoding='utf-8')


def call(home, *command):
    "A command in the copy, with its library: (exit status, what it printed)."
    env = os.environ | dict(PYTHONPATH=str(home), PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1')
    done = subprocess.run([str(c) for c in command], cwd=home, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def python(home, code):
    status, said = call(home, sys.executable, '-c', code)
    assert status == 0, said
    return said


def export(home):
    status, said = call(home, BIN / 'nbdev_export')
    assert status == 0, said


def test_a_paper_is_a_notebook_and_a_line(copy):
    add_notebook(copy, '45_toy.lab.ipynb', blocks('add_a_paper.md'))
    export(copy)
    status, said = call(copy, BIN / 'lint-imports')
    assert status and 'reidlit.toy' in said
    layer = next(l for l in (copy / '.importlinter').read_text().splitlines() if 'ics |' in l)
    change(copy / '.importlinter', layer, layer + ' | toy')
    status, said = call(copy, BIN / 'lint-imports')
    assert status == 0, said
    said = python(copy, '''
import reidlit
from reidlit.experiments import load_paper, papers, read_result, reproduce
from reidlit.report import Page, paper_section
assert 'toy' in papers(), papers()
toy = load_paper('toy')
path = reproduce(toy, preset='ci', seeds=[0, 1], results='out')
page = Page('All')
paper_section(page, toy, 'out')
page = ' '.join(page.parts)
assert 'Nothing is trained.' in page and 'A &gt; B in mAP' in page, page
print(reidlit.__file__, path)
''')
    assert str(copy / 'reidlit') in said
    stored = json.loads((copy / 'out' / 'toy-world-ci.json').read_text())
    assert stored['paper'] == 'toy-world' and stored['seeds'] == [0, 1]
    assert list(stored['variants']) == ['A', 'B']
    assert [c['verdict'] for c in stored['claims']] == ['holds']
    assert [f.name for f in (copy / 'out').iterdir() if f.is_dir()] == []


def test_papers_may_not_import_each_other(copy):
    marks, lab = blocks('add_a_paper.md')
    lab = lab.replace('from reidlit.core', 'from reidlit.ics import lab as other\nfrom reidlit.core')
    add_notebook(copy, '45_toy.lab.ipynb', [marks, lab])
    change(copy / '.importlinter', 'crossdataset | ics', 'crossdataset | toy | ics')
    export(copy)
    status, said = call(copy, BIN / 'lint-imports')
    assert status and 'reidlit.toy is not allowed to import reidlit.ics' in said


def test_a_data_set_is_a_notebook_and_a_row(copy):
    marks, reader, imported, row = blocks('add_a_data_set.md')
    add_notebook(copy, '04z_data.readers.shop.ipynb', [marks, reader])
    index = copy / 'nbs' / '05f_data.sets.ipynb'
    nb = json.loads(index.read_text(encoding='utf-8'))
    cell = next(c for c in nb['cells'] if ''.join(c['source']).startswith('#| export\nREADERS'))
    cell['source'] = ''.join(cell['source']).replace('#| export\n', '#| export\n' + imported) + '\n' + row
    index.write_text(json.dumps(nb))
    export(copy)
    status, said = call(copy, BIN / 'lint-imports')
    assert status == 0, said
    for f in ('train/door1/0007-000031', 'train/door2/0000-000120', 'query/door1/0008-000001',
              'gallery/door2/0008-000009', 'gallery/door2/logo'):
        path = copy / 'shop' / f'{f}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 16)).save(path)
    python(copy, '''
from reidlit.data.sets import READERS, open_data
d = open_data('shop', 'shop')
assert d.train.pids.tolist() == [7, 0] and d.train.junk.tolist() == [False, True]
assert d.gallery.camids.tolist() == [1] and len(d.query) == 1 and d.kind == 'real'
assert str(d.gallery.dropped).startswith('1 x name not understood'), d.gallery.dropped
try: READERS['shop']('shop/train')
except ValueError as e: assert 'has no train' in str(e), e
else: raise AssertionError('no error')
''')
