"""Run a notebook as a script, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


def process(notebook: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python NOTEBOOK -- ARGUMENTS`, as a user types it."""
    command = [sys.executable, str(notebook), "--", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    done.stderr = _without_notice(done.stderr)
    return done


def here(notebook: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported most of it already."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(notebook), "--", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(notebook), run_name="__main__")
            except SystemExit as end:
                code = end.code
    assert code is None or isinstance(code, int)
    said = _without_notice(err.getvalue())
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), said)


def _without_notice(said: str) -> str:
    """Without marimo 0.25's warning that it ignores [tool.marimo.opengraph], which it does read."""
    lines = said.splitlines(keepends=True)
    return "".join(line for line in lines if "tool.marimo.opengraph in script" not in line)
