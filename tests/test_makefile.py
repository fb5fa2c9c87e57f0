"""What the Makefile runs, as `make -n` prints it."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("target", "start"),
    [("sweep", ["sweep", "my study.toml"]), ("sweep-tpu", ["launch", "my study.toml"])],
)
def test_a_study_and_folders_may_have_spaces_in_their_names(target, start):
    told = ["STUDY=my study.toml", "MODEL=my model", "OUT=a b", "STORE=c d", "TPU=v5e-8", "ZONE=z"]
    done = subprocess.run(
        ["make", "-n", target, *told], cwd=ROOT, capture_output=True, text=True, check=True
    )
    words = shlex.split(done.stdout[done.stdout.index(f"jaxsteer {start[0]} ") :])
    assert words[1:3] == start and words[words.index("--model") + 1] == "my model"
    place = {"sweep": ("--out", "a b"), "sweep-tpu": ("--store", "c d")}[target]
    assert words[words.index(place[0]) + 1] == place[1]
