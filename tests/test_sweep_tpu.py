"""The scripts of docs/sweep-tpu.yaml, run by bash; folders stand for machines and a bucket."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pytest
import yaml

from jaxsteer.model.convert import convert
from tests import tiny
from tests.conftest import ROOT

TASK = yaml.safe_load((ROOT / "docs/sweep-tpu.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_scripts_are_bash(part):
    subprocess.run(["bash", "-n", "-c", TASK[part]], check=True)


def machine(disk: Path, store: Path) -> subprocess.Popen[str]:
    """Start the task on a machine with a disk of its own and a mounted bucket."""
    convert(tiny.save(tiny.llama(), disk / "hf"), disk / "checkpoints/org/tiny", "float32")
    tiny.study_file(disk, ("n = 6", "n = 14"), ("batch = 4", "batch = 2"))
    # On a real machine the task's setup makes this environment.
    activate = disk / "jaxsteer-env/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    given = {"STUDY": "tiny.toml", "MODEL": "org/tiny", "MESH": "model=1"}
    return subprocess.Popen(
        ["bash", "-c", TASK["run"].replace("/store/", f"{store}/")],
        cwd=disk,
        env=os.environ
        | TASK["envs"]
        | given
        | {"STORE": "gs://bucket", "HOME": str(disk), "SKYPILOT_NUM_NODES": "1"}
        | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_machine_after_a_preempted_one_continues_from_the_store(tmp_path):
    out = tmp_path / "bucket/results/tiny-org--tiny"

    def kept() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (out / "shards").glob("*.parquet")}

    preempted = machine(tmp_path / "first", tmp_path / "bucket")
    tick = threading.Event()
    while not kept() and preempted.poll() is None:
        tick.wait(0.002)
    os.killpg(preempted.pid, signal.SIGKILL)
    preempted.communicate()
    assert preempted.returncode == -signal.SIGKILL and not (out / "responses.parquet").exists()
    before = kept()
    after = machine(tmp_path / "second", tmp_path / "bucket")
    said, errors = after.communicate()
    assert after.returncode == 0, errors
    held = sum(pl.read_parquet(io.BytesIO(data)).height for data in before.values())
    assert held > 0 and f"{held}/" in errors
    assert before.items() <= kept().items()
    assert pl.read_parquet(out / "responses.parquet")["row_id"].is_unique().all()
    assert said.strip().endswith(f"are in {out}")
