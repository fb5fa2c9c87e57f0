"""A real sweep in its own process, killed again and again: the table must come out the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pytest

from jaxsteer.data.wheels import cache_dir
from jaxsteer.model.convert import convert
from tests import tiny

# Whole sweeps in processes of their own, some of them killed.
pytestmark = pytest.mark.slow

# Small batches, so that a run writes many shards for a kill to land between.
SMALL = (("n = 6", "n = 60"), ("batch = 4", "batch = 2"))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    model = convert(tiny.save(tiny.llama(), folder / "hf"), folder / "model", "float32")
    study = tiny.study_file(folder, *SMALL)
    return [
        *(sys.executable, "-m", "jaxsteer.cli", "sweep", str(study), "--model", str(model), "--out")
    ]


def start(command: list[str], out: Path) -> subprocess.Popen[str]:
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache_dir() / "xla-tests")}
    return subprocess.Popen(
        [*command, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def kill_after(process: subprocess.Popen[str], shards: int, folder: Path, number: int) -> bool:
    """Send the signal once `shards` more shards are there; False when the run ended first."""
    before = len(list(folder.glob("shards/*.parquet")))
    tick = threading.Event()
    while process.poll() is None:
        if len(list(folder.glob("shards/*.parquet"))) >= before + shards:
            process.send_signal(number)
            process.wait()
            return True
        tick.wait(0.002)
    return False


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "results"
    process = start(command, out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return pl.read_parquet(out / "responses.parquet")


def test_25_kills_at_random_moments_change_nothing(command, uninterrupted, tmp_path, rng):
    out = tmp_path / "results"
    kills = 0
    while kills < 25:
        # 0 more shards: in start-up, setup or the first batch; otherwise somewhere in the rows.
        process = start(command, out)
        if not kill_after(process, int(rng.integers(0, 8)), out, signal.SIGKILL):
            assert process.returncode == 0, process.stderr.read()
            (out / "responses.parquet").unlink()
            for shard in sorted((out / "shards").glob("*.parquet"))[::2]:
                shard.unlink()
            continue
        kills += 1
    process = start(command, out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert pl.read_parquet(out / "responses.parquet").equals(uninterrupted)
    assert not [path for path in out.rglob(".*") if not path.name.endswith(".lock")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_stop_keeps_the_rows_and_says_how_to_go_on(
    command, uninterrupted, tmp_path, number, code
):
    out = tmp_path / "results"
    process = start(command, out)
    assert kill_after(process, 3, out, number)
    said = process.stderr.read().strip().splitlines()[-1]
    assert process.returncode == code and "run again" in said
    again = start(command, out)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert pl.read_parquet(out / "responses.parquet").equals(uninterrupted)


def test_two_processes_do_not_share_a_folder(command, tmp_path):
    out = tmp_path / "results"
    first = start(command, out)
    tick = threading.Event()
    while not list(out.glob("shards/*.parquet")) and first.poll() is None:
        tick.wait(0.002)
    # Held where it is, so that it cannot finish before the other has asked for the folder.
    first.send_signal(signal.SIGSTOP)
    second = start(command, out)
    _, errors = second.communicate()
    assert second.returncode == 2 and "in use" in errors
    first.send_signal(signal.SIGCONT)
    first.terminate()
    first.communicate()
