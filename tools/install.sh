#!/usr/bin/env bash
# .venv with the package (editable) and its tools, at the versions of constraints.txt.
set -eu
cd "$(dirname "$0")/.."
"$PYTHON" - <<'P' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f'reidlit needs Python 3.11 or newer; {sys.executable} is '
             f'{sys.version.split()[0]}. Try: make PYTHON=python3.11 ...')
P
"$PYTHON" -m venv .venv || { echo 'no venv: on Debian, apt-get install python3-venv'; exit 1; }
echo 'installing into .venv (about 6.5 GB with PyTorch; some minutes) ...'
.venv/bin/pip install -q -c constraints.txt 'setuptools>=70' wheel
.venv/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[dev,weights,distributed]'
bash tools/system.sh .venv/bin/python
.venv/bin/nbdev_install_hooks || echo 'no git checkout: hooks not installed'
touch .venv/installed
