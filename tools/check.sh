#!/usr/bin/env bash
# All that CI runs, in .venv: one line before each part, stops at the first failure.
set -eu
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=agg PYTHONWARNINGS=ignore::FutureWarning
part() { echo; echo "== $1 ($((SECONDS / 60)) min)"; }

part 'notebooks clean, library and README in step with them'
python tools/nbs.py check
part 'a notebook imports only lower numbers'
lint-imports
ruff check -q --isolated --select F401,F405,F821 --exclude _modidx.py reidlit
part 'every notebook runs, at preset ci'
python tools/nbs.py test
part 'the book builds, no broken link'
bash tools/book.sh -W -n
part 'the wheel works on its own'
bash tools/wheel.sh
part 'tests/'
REIDLIT_PRESET=ci OMP_NUM_THREADS=1 python -m pytest -q -n 2 --durations=5 tests
