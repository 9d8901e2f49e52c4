"""Pages of the book from docments: what a module's public names take and give.

    python tools/api.py DIR [MODULE ...]   DIR/MODULE.md for each (all if none is named)
"""
import ast
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
FIELD = re.compile(r'^    (\w+) *:.*?# (.+)$', re.M) # of a named tuple


def modules():
    "Exported modules and their notebooks' stems, in the order of reading: `{'reidlit.core': '00_core'}`."
    found = {}
    for f in sorted((ROOT / 'nbs').glob('[0-9]*.ipynb')):
        if name := re.search(r'#\| *default_exp ([\w.]+)', f.read_text(encoding='utf-8')):
            found['reidlit.' + name[1].removesuffix('.__init__')] = f.stem
    return found


def text(words):
    "Words as Markdown in a table's cell: only code in backticks keeps its signs."
    parts = ' '.join(words.split()).split('`')
    parts[::2] = [re.sub(r'([*_$<>{}\[\]~])', r'\\\1', p) for p in parts[::2]]
    return '`'.join(parts).replace('|', r'\|')


def signature(thing, name):
    "How it is called, as its source says it."
    f = inspect.unwrap(getattr(thing, 'py_func', thing))
    if inspect.isclass(f):
        if not inspect.isfunction(vars(f).get('__init__')) or hasattr(f, '__dataclass_fields__'):
            try: return f'{name}({", ".join(inspect.signature(f).parameters)})'
            except ValueError: return name
        f = f.__init__
    node = ast.parse(textwrap.dedent(inspect.getsource(f))).body[0]
    if isinstance(node.args, ast.arguments) and (*node.args.posonlyargs, *node.args.args)[:1]:
        if node.args.args[0].arg == 'self': del node.args.args[0]
    back = f' -> {ast.unparse(node.returns)}' if node.returns else ''
    return f'{name}({ast.unparse(node.args)}){back}'


def parameters(thing):
    "Each parameter's meaning, from the comment beside it; `return` is the last."
    if inspect.isclass(thing) and hasattr(thing, '_fields'): return dict(FIELD.findall(inspect.getsource(thing)))
    found = docments(inspect.unwrap(getattr(thing, 'py_func', thing)))
    return {k:v for k,v in found.items() if v and k != 'self'}


def entry(thing, name, level=2):
    "A function or class as Markdown: call, one line, table; a class's public methods follow."
    lines = ['#'*level + f' {text(name)}', f'```python\n{signature(thing, name)}\n```']
    if doc := (thing.__doc__ or '').strip(): lines.append(text(doc.split('\n\n')[0]))
    if rows := parameters(thing):
        rows = [f'| {"*gives*" if k == "return" else f"`{k}`"} | {text(v)} |' for k,v in rows.items()]
        lines.append('\n'.join(['| parameter | meaning |', '|---|---|', *rows]))
    if inspect.isclass(thing):
        for k,f in vars(thing).items():
            if inspect.isfunction(f) and not k.startswith('_') and f.__module__.startswith('reidlit.'):
                lines += entry(f, f'{thing.__name__}.{k}', level + 1)
    return lines


def page(name, stem):
    "A module's page."
    module = importlib.import_module(name)
    lines = [f'# {name}', f'> {module.__doc__}', f'Explained in [{text(stem)}](../{stem}.ipynb).']
    own, other = [], []
    for k in sorted(getattr(module, '__all__', ())):
        thing = getattr(module, k)
        here = getattr(thing, '__module__', name)
        if callable(thing) and here == name and hasattr(thing, '__name__'): own += entry(thing, k)
        else: other.append(f'`{k}`' if here == name or not here.startswith('reidlit.') else
                           f'`{k}` (from [{text(here)}]({here}.md))')
    if other: lines.append('Also here: ' + ', '.join(other) + '.')
    return '\n\n'.join(lines + own) + '\n'


def write(dest, *names):
    "Write the pages; returns their modules."
    dest, found = Path(dest), modules()
    dest.mkdir(parents=True, exist_ok=True)
    for name in names or found: (dest / f'{name}.md').write_text(page(name, found[name]), encoding='utf-8')
    return list(names or found)


if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    write(*sys.argv[1:])
