"""Run the notebooks, write README.md from index.ipynb, and lay out the book.

    python tools/nbs.py run [NAME ...]   run in place and keep the outputs
    python tools/nbs.py test             run copies at preset ci, count the cells
    python tools/nbs.py readme           README.md (and docs/readme/*.png)
    python tools/nbs.py check            are notebooks clean, library and README in step?
    python tools/nbs.py book             _book/, ready for `jupyter-book build`
"""
import base64
import hashlib
import io
import os
import re
import shutil
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image, ImageColor

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
DIRECTIVES = re.compile(r'\A(?:[ \t]*#[ \t]*\|.*(?:\n|\Z))+')
# torch says on import that fastai uses a deprecated function; no reader can act on it
os.environ.setdefault('PYTHONWARNINGS', 'ignore::FutureWarning')
SKIPPED = {'slow', 'gpu', 'data', 'notest', 'eval:false'}
PARTS = {'0': 'Ground', '1': 'Tools', '2': 'Across data sets',
         '3': 'Intra-camera supervision', '4': 'Aligned domains',
         '5': 'Identity-free', '6': 'Custom detectors', '7': 'Together',
         '8': 'Command', '9': 'Appendix'}


def notebooks():
    "All notebooks in the order of reading; solutions last."
    files = (f for f in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
    return sorted(files, key=lambda f: (len(f.relative_to(NBS).parts), f.name))


def split_cell(source):
    "The directives on a cell's first lines, and the rest."
    head = DIRECTIVES.match(source)
    if not head: return [], source
    marks = [l.split('|', 1)[1].strip().replace(': ', ':') for l in head[0].splitlines()]
    return marks, source[head.end():]


def is_skipped(cell): return bool(SKIPPED & set(split_cell(cell.source)[0]))


def run_nb(path):
    "Execute one notebook in place with a real kernel; returns the number of cells run."
    nb = nbformat.read(path, 4)
    code = [c for c in nb.cells if c.cell_type == 'code' and c.source.strip()]
    for c in code:
        if is_skipped(c): c.metadata['tags'] = ['skip-execution']
    client = NotebookClient(nb, timeout=900, kernel_name='python3',
                            resources=dict(metadata=dict(path=str(path.parent))))
    client.execute()
    ran = sum(c.execution_count is not None for c in code)
    for c in code:
        c.metadata.pop('tags', None)
        c.outputs = merged(c.outputs)
        for o in c.outputs:
            if 'image/png' in o.get('data', {}): o.data['image/png'] = smaller(o.data['image/png'])
    nbformat.write(nb, path)
    return ran


def smaller(png):
    """A stored picture (base64 PNG) in 256 colours, a third of the size.

    The colours of `reidlit.viz` are among them, those of the first people too, and stay as they are."""
    from reidlit.viz import IGNORED, PALETTE, RIGHT, WRONG, identity_color
    raw = base64.b64decode(png)
    if len(raw) < 20_000: return png
    image = Image.open(io.BytesIO(raw)).convert('RGB')
    people = map(identity_color, range(30))
    own = [ImageColor.getrgb(c) for c in (*PALETTE, RIGHT, WRONG, IGNORED, *people)]
    n = 256-len(own)
    few = image.quantize(n, dither=Image.Dither.NONE)
    rows, pixels = np.array(few), np.array(image)
    for k, color in enumerate(own, n): rows[(pixels == color).all(-1)] = k
    few.frombytes(rows.tobytes())
    few.putpalette((few.getpalette() + [0]*768)[:3*n] + [v for color in own for v in color])
    out = io.BytesIO()
    few.save(out, 'png', optimize=True)
    return base64.b64encode(min(out.getvalue(), raw, key=len)).decode()


def merged(outputs):
    "Neighbouring pieces of one stream as one output, so that timing leaves no trace."
    kept = []
    for o in outputs:
        same = kept and 'name' in o and kept[-1].get('name') == o.name
        if same: kept[-1].text += o.text
        else: kept.append(o)
    return kept


def run(*names):
    "Run the named notebooks (all if none is named) in place, then clean them."
    from nbdev.clean import nbdev_clean
    for f in notebooks():
        if names and f.stem not in names: continue
        start = time.time()
        print(f'{f.relative_to(NBS)}: {run_nb(f)} cells, {time.time()-start:.1f} s', flush=True)
    nbdev_clean.__wrapped__()


def _test_one(f):
    "A notebook's cells run in this process: file, cells run, seconds, error or `None`."
    from execnb.shell import CaptureShell
    start, ran = time.time(), 0
    os.chdir(f.parent)
    sys.path.insert(0, str(f.parent))
    shell = CaptureShell(mpl_format='png')
    for c in nbformat.read(f, 4).cells:
        if c.cell_type != 'code' or not c.source.strip() or is_skipped(c): continue
        if e := shell.run_cell(c.source).exception:
            what = ''.join(traceback.format_exception(type(e), e, e.__traceback__))[-2000:]
            return f, ran, time.time()-start, f'{c.source}\n\n{what}'
        ran += 1
    return f, ran, time.time()-start, None


def test():
    """Run every notebook at preset ci, two at a time; fail unless every cell ran.

    Each has a process of its own, forked from one that has imported what takes seconds."""
    os.environ.update(REIDLIT_PRESET='ci', OMP_NUM_THREADS='1')
    files, failed, total = notebooks(), 0, 0
    expected = {f: sum(c.cell_type == 'code' and bool(c.source.strip()) and not is_skipped(c)
                       for c in nbformat.read(f, 4).cells) for f in files}
    assert len(files) >= 15, f'found only {len(files)} notebooks under {NBS}'
    context = get_context('forkserver')
    context.set_forkserver_preload(['reidlit.cli', 'execnb.shell', '__main__'])
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        for f, ran, seconds, error in pool.map(_test_one, files):
            print(f'{f.relative_to(NBS)}: {ran} cells, {seconds:.1f} s', flush=True)
            if error is None and ran != expected[f]: error = f'{ran} cells ran, {expected[f]} expected'
            if error: print(error)
            failed += error is not None
            total += ran
    print(f'{len(files)} notebooks, {total} cells run')
    if failed: sys.exit(f'{failed} notebooks failed')
    assert total == sum(expected.values())


def is_hidden(marks): return any(re.match(r'(hide|default_exp|include:false)\b', m) for m in marks)


def as_markdown(output, picture):
    "One stored output as Markdown; a picture is written to `picture`."
    if output.output_type == 'stream': return f'```\n{output.text.rstrip()}\n```'
    data = output.get('data', {})
    if 'image/png' in data:
        picture.parent.mkdir(exist_ok=True, parents=True)
        picture.write_bytes(base64.b64decode(data['image/png']))
        return f'![]({picture.relative_to(ROOT)})'
    if 'text/markdown' in data: return data['text/markdown']
    return f"```\n{data.get('text/plain', '').rstrip()}\n```"


def to_repo(markdown):
    "Links between notebooks, as links from the repository's root."
    markdown = markdown.replace('](../docs/', '](docs/')
    return re.sub(r'\]\((?!https?:|#|nbs/|docs/)([\w./-]+\.ipynb)', r'](nbs/\1', markdown)


def readme_text():
    "README.md as text, from index.ipynb."
    parts = []
    shutil.rmtree(ROOT / 'docs' / 'readme', ignore_errors=True)
    for i, c in enumerate(nbformat.read(NBS / 'index.ipynb', 4).cells):
        if c.cell_type == 'markdown': parts.append(to_repo(c.source)); continue
        marks, code = split_cell(c.source)
        if c.cell_type != 'code' or is_hidden(marks): continue
        if code.strip() and 'echo:false' not in marks: parts.append(f'```python\n{code.strip()}\n```')
        parts += [to_repo(as_markdown(o, ROOT / 'docs' / 'readme' / f'{i}.png')) for o in c.outputs]
    return '\n\n'.join(parts).strip() + '\n'


def refresh():
    "Bring the stored table of notebooks in index.ipynb up to date, without running anything else."
    nb = nbformat.read(NBS / 'index.ipynb', 4)
    data = next(c for c in nb.cells if 'contents()' in c.source).outputs[0].data
    if data['text/markdown'] == contents(): return
    data['text/markdown'] = contents()
    nbformat.write(nb, NBS / 'index.ipynb')


def readme():
    "Write README.md, after index.ipynb lists all notebooks."
    refresh()
    (ROOT / 'README.md').write_text(readme_text(), encoding='utf-8', newline='\n')


def contents():
    "All notebooks with title and question, a table per part, for index.ipynb."
    lines, part = [], None
    for f in notebooks():
        if f.parent != NBS or f.stem == 'index': continue
        title, question = re.match(r'# (.+)\n+> (.+)', nbformat.read(f, 4).cells[0].source).groups()
        if f.stem[0] != part:
            part = f.stem[0]
            lines += ['', f'**{part}x: {PARTS[part]}**', '', '| notebook | title | question |', '|---|---|---|']
        cells = f'[{f.stem}]({f.name})', title, question
        lines.append('| ' + ' | '.join(c.replace('|', r'\|') for c in cells) + ' |')
    return '\n'.join(lines[1:])


def fingerprints():
    "A hash of every notebook, module and README file."
    files = [*notebooks(), *ROOT.glob('reidlit/**/*.py'), ROOT / 'README.md',
             *ROOT.glob('docs/readme/*'), ROOT / 'pyproject.toml']
    return {f.relative_to(ROOT).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in files if f.exists()}


def check():
    "Clean, export and write README.md; fail if that changes any file."
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export
    before = fingerprints()
    nbdev_clean.__wrapped__()
    nbdev_export.__wrapped__()
    readme()
    after = fingerprints()
    changed = sorted(f for f in {*before, *after} if before.get(f) != after.get(f))
    if changed: sys.exit('not in step, commit the result of this command:\n' + '\n'.join(changed))
    print(f'{len(after)} files clean and in step')


def plain(src, dest):
    "A copy without directives or hidden cells, for the book."
    nb, cells = nbformat.read(src, 4), []
    for c in nb.cells:
        if c.cell_type == 'code':
            marks, c.source = split_cell(c.source)
            if is_hidden(marks): continue
            if 'echo:false' in marks: c.metadata['tags'] = ['remove-input']
            words = [o.get('data', {}).get('text/markdown', '') for o in c.outputs]
            if 'echo:false' in marks and any('.ipynb)' in w for w in words): # a book follows links in text only
                c = nbformat.v4.new_markdown_cell('\n\n'.join(words), id=c.id)
        if c.cell_type == 'markdown': c.source = c.source.replace('](../docs/', '](')
        if c.source.strip(): cells.append(c)
    nb.cells = cells
    dest.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, dest)


def toc(files, pages, api):
    "The book's table of contents, a part per decade; pages of docs/ and of modules at the end."
    lines, part = ['format: jb-book', 'root: index', 'parts:'], None
    places = [(PARTS[f.stem[0]] if f.parent == NBS else 'Solutions',
               f.relative_to(NBS).with_suffix('').as_posix()) for f in files if f.stem != 'index']
    places += [('API', f'api/{m}') for m in api] + [('Working on it', f.stem) for f in pages]
    for here, name in places:
        if here != part: lines += [f'- caption: {here}', '  chapters:']
        part = here
        lines.append(f'  - file: {name}')
    return '\n'.join(lines) + '\n'


def book():
    "Plain copies of all notebooks beside the book's settings, in `_book/`, and pages made from docments."
    import api
    dest = ROOT / '_book'
    shutil.rmtree(dest, ignore_errors=True)
    shutil.copytree(ROOT / 'docs', dest, ignore=shutil.ignore_patterns('readme'))
    files, pages = notebooks(), sorted(dest.glob('*.md'))
    for f in files: plain(f, dest / f.relative_to(NBS))
    for f in pages: f.write_text(f.read_text(encoding='utf-8').replace('](../nbs/', ']('), encoding='utf-8')
    (dest / '_toc.yml').write_text(toc(files, pages, api.write(dest / 'api')))


if __name__ == '__main__':
    commands = dict(run=run, test=test, readme=readme, check=check, book=book)
    if len(sys.argv) < 2 or sys.argv[1] not in commands: sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
