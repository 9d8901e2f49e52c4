#!/usr/bin/env bash
# Build the wheel, install it with the newest fastai and fastcore into .wheel, and use it there;
# the same on Python 3.12, in .wheel312, where there is one.
set -eu
cd "$(dirname "$0")/.."
rm -rf dist build
.venv/bin/python -m build -q --wheel --no-isolation >/dev/null

try() { # an environment, the Python that makes it
    [ -x "$1/bin/python" ] || "$2" -m venv "$1"
    "$1/bin/pip" install -q --upgrade --force-reinstall --no-deps dist/*.whl
    "$1/bin/pip" install -q --upgrade fastai fastcore dist/*.whl pytest
    "$1/bin/pip" check
    "$1/bin/python" --version
    "$1/bin/pip" list 2>/dev/null | grep -E '^(fastai|fastcore|torch|torchvision|numpy) '
    cp tests/test_wheel.py "$1/"
    (cd "$1" && bin/python -m pytest -q -p no:cacheprovider test_wheel.py)
}

try .wheel .venv/bin/python
if [ "$(python3.12 -c 'import ensurepip, sys; print(sys.version_info[:2])' 2>/dev/null)" = '(3, 12)' ]; then
    try .wheel312 python3.12
else
    echo 'no working python3.12 on PATH: the wheel was not tried on Python 3.12'
fi
