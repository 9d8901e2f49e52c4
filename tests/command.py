"The command, run in this process: importing torch anew for each call would take most of the tests' time."
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

from reidlit.cli import main

COMMAND = str(Path(sys.executable).with_name('reidlit'))


def run(*words):
    "What `reidlit WORDS` prints and returns."
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err): code = main([str(w) for w in words])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def run_alone(*words):
    "The same in a process of its own: bits may depend on what a process has loaded (flushed denormals)."
    return subprocess.run([COMMAND, *map(str, words)], capture_output=True, text=True)
