"`make release` refuses what is not ready, and tags what is, in a temporary clone."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def git(home, *words):
    return subprocess.run(['git', '-c', 'user.name=reidlit', '-c', 'user.email=reidlit@example.invalid',
                           '-c', 'core.hooksPath=none', *words], cwd=home, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path):
    "A clone with this checkout's release script; `python` is a fake that builds two empty files."
    home, tools = tmp_path / 'clone', tmp_path / 'bin'
    if git(ROOT, 'clone', '-q', '--depth', '1', '--no-tags', f'file://{ROOT}', home).returncode:
        pytest.skip('no git checkout')
    for f in ('tools/release.sh', 'CHANGELOG.md', 'settings.ini', 'reidlit/__init__.py'):
        (home / f).write_bytes((ROOT / f).read_bytes())
    git(home, 'add', '-A')
    git(home, 'commit', '-qm', 'As in the checkout')
    tools.mkdir()
    (tools / 'python').write_text('#!/bin/sh\nmkdir dist\necho "$@" >dist/command\ntouch dist/reidlit.whl\n')
    (tools / 'python').chmod(0o755)
    return home


def release(home, **env):
    "Exit status, and what was said."
    path = f'{home.parent / "bin"}:{os.environ["PATH"]}'
    names = {f'GIT_{k}_{n}': v for k in ('AUTHOR', 'COMMITTER')
             for n, v in (('NAME', 'reidlit'), ('EMAIL', 'reidlit@example.invalid'))}
    done = subprocess.run(['bash', 'tools/release.sh'], cwd=home, capture_output=True, text=True,
                          env=os.environ | names | dict(PATH=path) | env)
    return done.returncode, done.stdout + done.stderr


def version(): return re.search(r'^version = (\S+)', (ROOT / 'settings.ini').read_text(), re.M)[1]


def test_a_changed_checkout_is_refused(clone):
    (clone / 'new.txt').write_text('x')
    status, said = release(clone, SKIP_CHECKS='1')
    assert status == 1 and 'the checkout has changes' in said
    assert not git(clone, 'tag').stdout


def test_a_version_without_notes_is_refused(clone):
    for notes in ('# Changelog\n\n## [Unreleased]\n\n- much\n',
                  f'# Changelog\n\n## [{version()}] - 2026-01-01\n\n## [0.0.1]\n\n- old\n'):
        (clone / 'CHANGELOG.md').write_text(notes)
        git(clone, 'commit', '-qam', 'Other notes')
        status, said = release(clone, SKIP_CHECKS='1')
        assert status == 1 and f'nothing under \'## [{version()}]\'' in said
    assert not git(clone, 'tag').stdout


def test_a_failing_check_is_no_release(clone):
    (clone / 'tools' / 'check.sh').write_text('echo checked; exit 3\n')
    git(clone, 'commit', '-qam', 'A check that fails')
    status, said = release(clone)
    assert status == 3 and 'checked' in said and not git(clone, 'tag').stdout


def test_a_ready_version_is_built_and_tagged_once(clone):
    notes = f'# Changelog\n\n## [{version()}] - 2026-01-01\n\n### Added\n\n- all of it\n'
    (clone / 'CHANGELOG.md').write_text(notes)
    git(clone, 'commit', '-qam', 'Notes')
    status, said = release(clone, SKIP_CHECKS='1')
    assert status == 0, said
    assert 'reidlit.whl' in said and 'nothing was uploaded' in said
    assert (clone / 'dist' / 'command').read_text() == '-m build --no-isolation\n'
    assert git(clone, 'cat-file', '-t', f'v{version()}').stdout.strip() == 'tag'
    message = git(clone, 'tag', '-n9', '-l', f'v{version()}').stdout
    assert f'reidlit {version()}' in message and '### Added' in message and 'all of it' in message
    status, said = release(clone, SKIP_CHECKS='1')
    assert status == 1 and 'is a tag already' in said


def test_this_version_has_notes():
    heads = re.findall(r'^## \[(.+?)\]', (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    assert heads[0] == 'Unreleased' and version() in heads


def test_a_checkout_with_other_line_ends_is_in_step(tmp_path):
    "Git may be told to write CRLF; the notebooks and what is made of them stay the same to the byte."
    home = tmp_path / 'clone'
    if git(ROOT, 'clone', '-q', '--depth', '1', '-c', 'core.autocrlf=true', f'file://{ROOT}', home).returncode:
        pytest.skip('no git checkout')
    assert not [f.name for f in (*home.glob('nbs/**/*.ipynb'), *home.glob('reidlit/**/*.py'),
                                 *home.glob('*.md')) if b'\r\n' in f.read_bytes()]
    done = subprocess.run([sys.executable, 'tools/nbs.py', 'check'], cwd=home, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(home)))
    assert done.returncode == 0, done.stdout + done.stderr
