#!/usr/bin/env bash
# Build the wheel, install it with the newest fastai and fastcore into .wheel, and use it there.
set -eu
cd "$(dirname "$0")/.."
rm -rf dist build
.venv/bin/python -m build -q --wheel --no-isolation >/dev/null
[ -d .wheel ] || .venv/bin/python -m venv .wheel
.wheel/bin/pip install -q --upgrade --force-reinstall --no-deps dist/*.whl
.wheel/bin/pip install -q --upgrade fastai fastcore dist/*.whl pytest
.wheel/bin/pip check
.wheel/bin/pip list 2>/dev/null | grep -E '^(fastai|fastcore|torch|torchvision|numpy) '
cp tests/test_wheel.py .wheel/
cd .wheel && bin/python -m pytest -q -p no:cacheprovider test_wheel.py
