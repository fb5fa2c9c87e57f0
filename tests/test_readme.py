"""What the README shows is run as it stands there."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_python_example_runs_and_is_short(smollm2, monkeypatch, capsys):
    # The fixture makes sure that the model is there.
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code.count("\n") <= 10
    if not (ROOT / "checkpoints/smollm2-135m/manifest.json").is_file():
        pytest.fail("no checkpoints/smollm2-135m; run `make model`")
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert all(f"│ {name} " in shown for name in ("plain", "steered", "restored"))


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_every_local_link_and_picture_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
