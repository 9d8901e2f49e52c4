"Links lead somewhere, README is in step, and the table of places is true."
import ast
import base64
import importlib.util
import io
import json
import pkgutil
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
FILES = sorted(NBS.rglob('*.ipynb'))
FILES = [f for f in FILES if '.ipynb_checkpoints' not in f.parts]


def texts(path, kind='markdown'):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == kind]


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.relative_to(NBS).as_posix())
def test_links(path):
    links = re.findall(r'\]\(([^)#\s]+)', '\n'.join(texts(path)))
    for link in links:
        if not re.match(r'https?:|mailto:', link):
            assert (path.parent / link).exists(), f'{path.name} links to {link}'


def test_every_course_notebook_has_its_solutions():
    for f in NBS.glob('[0-7]*.ipynb'):
        text = '\n'.join(texts(f))
        assert '## Questions' in text, f.name
        assert (NBS / 'solutions' / f.name).exists(), f.name
        assert f'solutions/{f.name}' in text, f.name


def test_readme_links():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)#\s]+)', text)
    assert len(links) > 15
    for link in links:
        if not re.match(r'https?:', link): assert (ROOT / link).exists(), link


@pytest.mark.parametrize('path', [ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))],
                         ids=lambda p: p.name)
def test_page_links(path):
    for link in re.findall(r'\]\(([^)#\s]+)', path.read_text(encoding='utf-8')):
        if not re.match(r'https?:', link): assert (path.parent / link).exists(), link


def test_stored_pictures_keep_the_house_colours():
    sys.path.insert(0, str(ROOT / 'tools'))
    import nbs
    from reidlit.viz import IGNORED, PALETTE, RIGHT, WRONG, identity_color
    own = [ImageColor.getrgb(c) for c in (*PALETTE, RIGHT, WRONG, IGNORED, *map(identity_color, range(30)))]
    im = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    for k, c in enumerate(own): im[5*k:5*k+2] = c # lines in a noisy picture
    def png(im):
        Image.fromarray(im).save(f := io.BytesIO(), 'png')
        return base64.b64encode(f.getvalue()).decode()
    stored = nbs.smaller(png(im))
    assert len(stored) < len(png(im))/2
    out = np.array(Image.open(io.BytesIO(base64.b64decode(stored))).convert('RGB'))
    for k, c in enumerate(own): assert (out[5*k:5*k+2] == c).all(), k
    assert len(np.unique(out.reshape(-1, 3), axis=0)) > 200 and abs(out[290:]*1. - im[290:]).mean() < 20
    flat = np.full_like(im, own[0])
    for few in (png(flat), png(flat[:9])): assert nbs.smaller(few) == few # a small file stays


def test_readme_is_in_step():
    sys.path.insert(0, str(ROOT / 'tools'))
    import nbs
    assert nbs.readme_text() == (ROOT / 'README.md').read_text(encoding='utf-8')


def test_links_of_outputs_are_text_in_the_book(tmp_path):
    sys.path.insert(0, str(ROOT / 'tools'))
    import nbs
    nbs.plain(NBS / 'index.ipynb', tmp_path / 'index.ipynb')
    cells = json.loads((tmp_path / 'index.ipynb').read_text(encoding='utf-8'))['cells']
    assert any('[00_core](00_core.ipynb)' in t for t in texts(tmp_path / 'index.ipynb'))
    for c in cells: assert '.ipynb)' not in json.dumps(c.get('outputs', []))


def test_index_lists_all_notebooks():
    sys.path.insert(0, str(ROOT / 'tools'))
    import nbs
    table, stored = nbs.contents(), json.loads((NBS / 'index.ipynb').read_text(encoding='utf-8'))
    for f in NBS.glob('[0-9]*.ipynb'): assert f'| [{f.stem}]({f.name}) | ' in table
    assert '**2x: Across data sets**' in table
    outputs = [''.join(o['data']['text/markdown']) for c in stored['cells']
               if 'contents()' in ''.join(c['source']) for o in c['outputs']]
    assert outputs == [table], 'run: python tools/nbs.py readme'


def test_public_names_are_unique():
    "Each paper's package and lab has the same names for the same things; other functions and classes do not."
    at = {}
    for f in (ROOT / 'reidlit').rglob('*.py'):
        if f.name in ('_modidx.py', '_moved.py', 'lab.py', 'comparison.py'): continue
        for n in ast.parse(f.read_text(encoding='utf-8')).body:
            patched = 'patch' in ' '.join(map(ast.unparse, getattr(n, 'decorator_list', ())))
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_' and not patched:
                at.setdefault(n.name, []).append(f.relative_to(ROOT).as_posix())
    assert len(at) > 300 and not {k: v for k, v in at.items() if len(v) > 1}


def places():
    "Rows of the tables in 91: what, source, notebook, section, names."
    for text in texts(NBS / '91_where_is_what.ipynb'):
        for line in text.splitlines():
            cells = [c.strip() for c in line.strip('|').split('|')]
            if line.startswith('|') and '.ipynb' in line:
                assert len(cells) == 5, line
                yield cells


def resolvable(name):
    "`data.world.World.boxes` as pkgutil wants it: `reidlit.data.world:World.boxes`."
    parts = name.split('.')
    depth = max(i for i in range(1, len(parts)) if find_spec('reidlit.' + '.'.join(parts[:i])))
    return 'reidlit.' + '.'.join(parts[:depth]) + ':' + '.'.join(parts[depth:])


def find_spec(name):
    try: return importlib.util.find_spec(name)
    except ModuleNotFoundError: return None


def test_where_is_what():
    rows = list(places())
    assert len(rows) >= 25
    for what, source, link, section, names in rows:
        file = re.search(r'\(([^)]+\.ipynb)\)', link)[1]
        heads = re.findall(r'^#+ (.+)$', '\n'.join(texts(NBS / file)), re.M)
        assert section in heads, f'{what}: {file} has no section {section!r}, only {heads}'
        for name in re.findall(r'`([\w.]+)`', names):
            assert pkgutil.resolve_name(resolvable(name)), name


def test_no_machine_or_registry_in_any_file():
    bad = re.compile(r'/(?:home|root|Users|work)/\w+|pypi\.org|pythonhosted|registry\.npmjs')
    for f in [*NBS.rglob('*.ipynb'), *ROOT.glob('*.md'), *ROOT.glob('tools/*'),
              *ROOT.glob('reidlit/**/*.py'), ROOT / 'constraints.txt', ROOT / 'settings.ini']:
        if '.ipynb_checkpoints' in f.parts or not f.is_file(): continue
        text = f.read_text(encoding='utf-8')
        if f.suffix == '.ipynb':
            text = re.sub(r'"image/(png|jpeg)": "[^"]*"', '', text)
        assert not bad.search(text), f'{f}: {bad.search(text)[0]}'


def test_citation():
    import yaml
    text = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
    cff = yaml.safe_load(text)
    assert cff['cff-version'] == '1.2.0' and {'title', 'message', 'authors'} <= set(cff)
    settings = (ROOT / 'settings.ini').read_text(encoding='utf-8')
    assert f"version = {cff['version']}\n" in settings, 'CITATION.cff has another version'
    assert len(cff['references']) == 5 and 'doi' not in text
    for r in cff['references']: assert r['title'] and all(a['family-names'] for a in r['authors'])


def test_templates():
    import yaml
    files = sorted((ROOT / '.github' / 'ISSUE_TEMPLATE').glob('*.md'))
    assert [f.name for f in files] == ['add-a-set.md', 'bug.md', 'question.md']
    for f in files:
        head = yaml.safe_load(f.read_text(encoding='utf-8').split('---\n')[1])
        assert head['name'] and head['about'], f.name
    for link in re.findall(r'`((?:docs|tools)/[\w./]+|[A-Z]+\.md)', (ROOT / '.github' / 'pull_request_template.md').read_text()):
        assert (ROOT / link).exists(), link


def test_no_made_up_address():
    for name in ('settings.ini', 'reidlit/_modidx.py', 'setup.py'):
        text = (ROOT / name).read_text(encoding='utf-8')
        assert not re.search(r'example\.|github\.io|github\.com', text), name


def test_api_page(tmp_path):
    sys.path.insert(0, str(ROOT / 'tools'))
    import api
    assert api.write(tmp_path, 'reidlit.core', 'reidlit.data.sets') == ['reidlit.core', 'reidlit.data.sets']
    text = (tmp_path / 'reidlit.core.md').read_text(encoding='utf-8')
    assert text.startswith('# reidlit.core\n\n> How can a run be repeated')
    assert '](../00_core.ipynb)' in text and '\n## seed\\_all\n' in text
    assert 'seed_all(seed: int) -> torch.Generator' in text and '| `seed` | Any integer from 0 |' in text
    assert '| *gives* | A fresh generator with the same seed |' in text
    assert 'ReidSet(images, pids' in text and '| `camids` | Cameras `(N,)` |' in text and '### ReidSet.read\n' in text
    rows = [l for l in text.splitlines() if l.startswith('|')]
    assert {len(re.findall(r'(?<!\\)\|', l)) for l in rows} == {3}
    assert ' at 0x' not in text and str(ROOT) not in text
    index = (tmp_path / 'reidlit.data.sets.md').read_text(encoding='utf-8')
    assert '`market1501` (from [reidlit.data.readers.market](reidlit.data.readers.market.md))' in index


def test_toc():
    sys.path.insert(0, str(ROOT / 'tools'))
    import api, nbs
    toc = nbs.toc(nbs.notebooks(), sorted((ROOT / 'docs').glob('*.md')), api.modules())
    for name in ('00_core', 'solutions/00_core', 'api/reidlit.core', 'api/reidlit.ics', 'decisions', 'add_a_paper'):
        assert f'  - file: {name}\n' in toc, name
