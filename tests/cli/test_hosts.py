"""Real sweeps shared by two processes on the loopback: the table of one, and an end for both."""

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
from jaxsteer.generation import engine as rows
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.study import planned, spec, validate
from tests import tiny

# Whole sweeps in several processes, some of them killed.
pytestmark = pytest.mark.slow

# Small batches, so that both processes write many shards.
SMALL = (("harmful = 6", "harmful = 14"), ("batch = 4", "batch = 2"))


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


@pytest.fixture(scope="module")
def lanes(command):
    """The name of the lane of every row of the study, in the table's order."""
    study, model = spec.load(command[4]), ChatModel.load(Path(command[6]))
    compiled = validate.deepest(study, model.config.n_layers)
    crossed = planned.cross(compiled, planned.prompts(study))
    limit = model.config.max_position - study.decoding.max_new_tokens
    packed = rows.pack(planned.requests(study, model, compiled, crossed), limit)
    return [f"lane {lane}" for lane in packed.lane]


def shards(out: Path) -> dict[str, list[str]]:
    return {
        path.name: pl.read_parquet(path)["row_id"].to_list()
        for path in (out / "shards").glob("*.parquet")
    }


def test_two_processes_give_the_table_of_one(alone, shared):
    out, _ = shared
    assert pl.read_parquet(out / "responses.parquet").equals(alone)
    assert (out / "receipt.json").is_file() and (out / "summary.json").is_file()


def test_every_shard_is_of_one_process_and_each_wrote_its_half(alone, shared, lanes):
    out, _ = shared
    for process in range(2):
        share = distributed.Hosts(process=process, count=2).share(lanes)
        its = {alone["row_id"][i] for i in share}
        written = [rows for rows in shards(out).values() if its & set(rows)]
        assert its == {row for rows in written for row in rows}
        assert abs(len(its) - alone.height / 2) < 1


def test_only_the_first_prints_the_table_and_the_other_says_its_share(alone, shared):
    _, ((table, progress), (nothing, share)) = shared
    assert "baseline" in table and f"{alone.height}/{alone.height} rows" in progress
    half = alone.height // 2
    assert nothing == "" and share == f"process 1 of 2: {half} of its {half} rows to run\n"


@pytest.mark.parametrize(("victim", "again"), [(0, start_two), (1, lambda *a: [start(*a)])])
def test_killing_one_ends_the_other_with_one_line_and_a_restart_goes_on(
    command, alone, tmp_path, victim, again
):
    out = tmp_path / "results"
    both = start_two(command, out)
    tick = threading.Event()
    while len(shards(out)) < 4 and both[0].poll() is None:
        tick.wait(0.002)
    # Held where they are, in the middle of their rows.
    for process in both:
        process.send_signal(signal.SIGSTOP)
    kept = shards(out)
    both[victim].kill()
    both[victim].communicate()
    both[1 - victim].send_signal(signal.SIGCONT)
    _, errors = both[1 - victim].communicate(timeout=2 * distributed.HEARTBEAT)
    assert both[1 - victim].returncode != 0
    assert errors.splitlines()[-1] == f"jaxsteer: lost process {victim}; {distributed.GO_ON}"
    assert errors.count("lost") == 1 and "stack trace" not in errors
    assert not (out / "responses.parquet").exists()
    # With as many processes, or another number.
    finish(*again(command, out))
    assert pl.read_parquet(out / "responses.parquet").equals(alone)
    run = [row for rows in shards(out).values() for row in rows]
    assert kept.items() <= shards(out).items() and len(run) == len(set(run)) == alone.height
