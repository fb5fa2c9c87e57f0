"""One hand-made results folder with its receipt, shared by the tests that only read it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jaxsteer.receipt import build
from tests.receipt import made


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A results folder with receipt.json and receipt.html."""
    folder = made.folder(tmp_path_factory.mktemp("receipt") / "made")
    build.write(folder, samples=3)
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    shutil.copytree(finished, tmp_path / "made")
    return tmp_path / "made"
