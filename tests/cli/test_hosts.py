"""Real sweeps shared by two processes on the loopback: their table is that of one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pytest

from jaxsteer.data.wheels import cache_dir
from jaxsteer.generation import distributed
from jaxsteer.model.convert import convert
from tests import tiny

# Whole sweeps in several processes, some of them killed.
pytestmark = pytest.mark.slow

# Small batches, so that both processes write many shards.
SMALL = (("n = 6", "n = 14"), ("batch = 4", "batch = 2"))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    model = convert(tiny.save(tiny.llama(), folder / "hf"), folder / "model", "float32")
    study = tiny.study_file(folder, *SMALL)
    return [
        *(sys.executable, "-m", "jaxsteer.cli", "sweep", str(study), "--model", str(model), "--out")
    ]


def start(command: list[str], out: Path, *options: object) -> subprocess.Popen[str]:
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache_dir() / "xla-tests")}
    return subprocess.Popen(
        [*command, str(out), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def start_two(command: list[str], out: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(command, out, "--hosts", address, "--processes", 2, "--process", process)
        for process in range(2)
    ]


def finish(*processes: subprocess.Popen[str]) -> list[tuple[str, str]]:
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "results"
    finish(start(command, out))
    return pl.read_parquet(out / "responses.parquet")


@pytest.fixture(scope="module")
def shared(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("together") / "results"
    return out, finish(*start_two(command, out))


def shards(out: Path) -> dict[str, list[str]]:
    return {
        path.name: pl.read_parquet(path)["row_id"].to_list()
        for path in (out / "shards").glob("*.parquet")
    }


def test_two_processes_give_the_table_of_one(alone, shared):
    out, _ = shared
    assert pl.read_parquet(out / "responses.parquet").equals(alone)
    assert (out / "receipt.json").is_file() and (out / "summary.json").is_file()


def test_every_row_is_run_by_one_process(alone, shared):
    out, _ = shared
    run = [row for rows in shards(out).values() for row in rows]
    assert sorted(run) == sorted(alone["row_id"])


def test_only_the_first_prints_the_table_and_both_say_their_share(alone, shared):
    _, ((table, progress), (nothing, share)) = shared
    half = alone.height // 2
    assert "baseline" in table and f"share 1 of 2: {half}/{half} rows" in progress
    assert nothing == "" and f"share 2 of 2: {half}/{half} rows" in share


@pytest.mark.parametrize(("victim", "again"), [(0, start_two), (1, lambda *a: [start(*a)])])
def test_killing_one_ends_the_other_and_a_restart_continues(
    command, alone, tmp_path, victim, again
):
    out = tmp_path / "results"
    both = start_two(command, out)
    tick = threading.Event()
    while len(shards(out)) < 4 and both[0].poll() is None:
        tick.wait(0.002)
    # Both stop in the middle of their rows.
    for process in both:
        process.send_signal(signal.SIGSTOP)
    kept = shards(out)
    both[victim].kill()
    both[victim].communicate()
    both[1 - victim].send_signal(signal.SIGCONT)
    both[1 - victim].communicate(timeout=2 * distributed.HEARTBEAT)
    assert both[1 - victim].returncode != 0
    assert not (out / "responses.parquet").exists()
    # With the same number of processes, or another.
    finish(*again(command, out))
    assert pl.read_parquet(out / "responses.parquet").equals(alone)
    run = [row for rows in shards(out).values() for row in rows]
    assert kept.items() <= shards(out).items() and len(run) == len(set(run)) == alone.height
