"""What the README shows is run as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def python_example():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return code


def test_the_python_example_is_short():
    assert python_example().count("\n") <= 10


@pytest.mark.slow
def test_the_python_example_runs(smollm2, monkeypatch, capsys):
    # The fixture makes sure that the model is there.
    if not (ROOT / "checkpoints/smollm2-135m/manifest.json").is_file():
        pytest.fail("no checkpoints/smollm2-135m; run `make model`")
    monkeypatch.chdir(ROOT)
    exec(compile(python_example(), "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert all(f"│ {name} " in shown for name in ("plain", "steered", "restored"))


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_every_local_link_and_picture_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


# The README's lines, and the conditions of the demo that they are about.
LINES = {
    "policy alone": "baseline",
    "+ persona direction at `resid_post.17`, x4": "persona",
    "+ persona measured against an ordinary manner": "neutral persona",
    "persona, projected out of the window": "persona, out of window",
    "that projection alone, without steering": "persona, out of window, unsteered",
    "persona, each layer's own vector projected out": "persona, own vectors out of window",
    "persona, refusal direction added early": "persona, refusal added early",
    "persona, refusal direction added late": "persona, refusal added late",
}


@pytest.mark.slow
def test_its_table_is_that_of_the_demo():
    command = [sys.executable, "-m", "jaxsteer.cli", "sweep", "smollm2-demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = ROOT / "results/smollm2-demo-smollm2-135m"
    summary = json.loads((folder / "summary.json").read_text())
    rates = {r["condition"]: r for r in summary if r["family"] == "strongreject"}
    cells = dict(re.findall(r"^\| (.+?) \| (\d+ % \| \d+ to \d+) \|$", README, re.MULTILINE))
    for line, condition in LINES.items():
        row = rates[condition]
        rate, low, high = (round(100 * row[f"refusal{end}"]) for end in ("", "_low", "_high"))
        assert cells[line] == f"{rate} % | {low} to {high}", line
    assert len(cells) == len(LINES)
