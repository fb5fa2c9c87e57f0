"""The commands of the Makefile, as `make -n` prints them."""

from __future__ import annotations

import shlex
import subprocess

from tests.conftest import ROOT

NAMES = ("STUDY=my study.toml", "MODEL=my model", "OUT=a b")


def words(target: str, *variables: str) -> list[str]:
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", target, *NAMES, *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(done.stdout.splitlines()[-1])


def test_a_swept_study_and_its_folders_may_have_spaces_in_their_names():
    command = words("sweep")
    start = command.index("sweep")
    assert command[start + 1] == "my study.toml"
    assert command[start + 2 : start + 6] == ["--model", "my model", "--out", "a b"]


def test_what_is_swept_on_a_tpu_may_have_spaces_in_its_names():
    command = words("sweep-tpu", "TPU=v5e-8", "ZONE=z", "STORE=gs://s", "MESH=data=2, model=4")
    assert "tpu-v5litepod-8" in command
    for given in (*NAMES, "STORE=gs://s", "MESH=data=2, model=4"):
        assert given in command


def test_a_tpu_sweep_without_a_store_is_refused():
    asked = ["make", "-n", "sweep-tpu", "TPU=v5e-8", "ZONE=z"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "needs STORE" in done.stderr


def test_an_export_of_a_folder_without_a_study_stops_at_once():
    asked = [
        "make",
        "notebook-html",
        "RESULTS=results/typo",
        "-o",
        ".venv/made-notebooks",
        "-o",
        "model",
    ]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "results/typo holds no study" in done.stdout
