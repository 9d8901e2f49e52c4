"A notebook imports only notebooks before it in the order of reading."
import ast
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / 'nbs'
FILES = sorted(f for f in NBS.glob('[0-9]*.ipynb'))


def code_cells(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']


def module_of(path):
    found = [re.search(r'^#\s*\|\s*default_exp\s+(\S+)', s, re.M) for s in code_cells(path)]
    return next(('reidlit.' + m[1] for m in found if m), None)


ORDER = [m for m in map(module_of, FILES) if m]


def imports(path):
    "Modules of the package that a notebook's cells import."
    out = set()
    for source in code_cells(path):
        source = '\n'.join(l for l in source.splitlines() if not re.match(r'\s*[%!]', l))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('reidlit'):
                inside = [f'{node.module}.{a.name}' for a in node.names]
                out |= {m for m in inside if m in ORDER} or {node.module}
            if isinstance(node, ast.Import):
                out |= {a.name for a in node.names if a.name.startswith('reidlit')}
    return out


def test_all_modules_have_a_notebook():
    lib = NBS.parent / 'reidlit'
    files = {'.'.join(('reidlit', *f.relative_to(lib).with_suffix('').parts))
             for f in lib.rglob('*.py') if not f.name.startswith('_')}
    assert files == set(ORDER)
    assert len(ORDER) == len(set(ORDER)) >= 15


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_only_lower(path):
    mine = module_of(path)
    before = ORDER[:ORDER.index(mine)] if mine else ORDER
    allowed = {*before, mine}
    assert imports(path) <= allowed, imports(path) - allowed
