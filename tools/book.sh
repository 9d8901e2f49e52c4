#!/usr/bin/env bash
# The book, in _book/_build/html; arguments go to jupyter-book (-W -n: a warning is an error).
set -eu
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
python tools/nbs.py book
jupyter-book build "$@" _book
echo "open _book/_build/html/index.html"
