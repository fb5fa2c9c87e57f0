"""When CI runs the tests with the lowest versions."""

from __future__ import annotations

import os
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

from tests.conftest import ROOT

# A Wednesday.
NOW = datetime(2026, 11, 25, 12).astimezone()
EARLIER_TODAY = NOW - timedelta(hours=1)
LAST_WEEK, THIS_WEEK = NOW - timedelta(days=7), NOW - timedelta(hours=9)


def git(folder: Path, *words: str, when: datetime = NOW) -> None:
    of = {f"GIT_{who}_{key}": "a" for who in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    of |= {f"GIT_{who}_DATE": when.isoformat() for who in ("AUTHOR", "COMMITTER")}
    subprocess.run(["git", *words], cwd=folder, env=os.environ | of, check=True)


def why(folder: Path, *commits: tuple[datetime, str]) -> str:
    git(folder, "init", "--quiet")
    for number, (when, name) in enumerate(commits):
        (folder / name).write_text(str(number))
        git(folder, "add", name)
        git(folder, "commit", "--quiet", "--message", "a", when=when)
    asked = ["bash", str(ROOT / ".ci/floor-is-due"), NOW.isoformat()]
    return subprocess.run(asked, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_lowest_versions_are_tested_when_pyproject_changed(tmp_path):
    commits = (THIS_WEEK, "pyproject.toml"), (EARLIER_TODAY, "pyproject.toml"), (NOW, "README.md")
    assert why(tmp_path, *commits).startswith("pyproject.toml changed")


def test_the_lowest_versions_are_not_tested_in_every_run(tmp_path):
    commits = (LAST_WEEK, "pyproject.toml"), (THIS_WEEK, "README.md"), (NOW, "README.md")
    assert why(tmp_path, *commits) == ""


def test_the_lowest_versions_are_tested_in_a_new_week(tmp_path):
    commits = (LAST_WEEK, "pyproject.toml"), (EARLIER_TODAY, "README.md")
    assert why(tmp_path, *commits).startswith("nothing older")


def test_the_lowest_versions_are_tested_in_a_clone_of_one_commit(tmp_path):
    assert why(tmp_path, (NOW, "pyproject.toml")).startswith("no older commit")
