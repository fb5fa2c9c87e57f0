"""Two commands at the same time on the same files: nothing is lost, and nothing is half-written."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from jaxsteer.data.wheels import cache_dir
from jaxsteer.directions import direction as directions
from jaxsteer.judges import human, verdicts
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.receipt import verify
from jaxsteer.study import results
from tests import tiny
from tests.receipt import made

# Every test starts several processes that import JAX.
pytestmark = pytest.mark.slow


def together(*commands: list[object], **variables: str) -> list[tuple[int, str]]:
    """(exit code, stderr) of commands that were started at the same moment."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache_dir() / "xla-tests")} | variables
    start = [sys.executable, "-m", "jaxsteer.cli"]
    running = [
        subprocess.Popen(
            [*start, *map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for command in commands
    ]
    said = [process.communicate()[1] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


def finished(ended: list[tuple[int, str]]) -> list[bool]:
    """Which commands did their work; any other says in one line that the files are in use."""
    for code, said in ended:
        assert code == 0 or (code == 2 and "is in use by another process" in said), said
    return [code == 0 for code, _ in ended]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("together") / "hf")


def test_directions_of_three_processes_are_kept_and_their_model_is_converted_once(source, tmp_path):
    names = {"compliant", "evil", "callous"}
    commands = [["extract", name, "--model", source] for name in names]
    ended = together(*commands, JAXSTEER_CACHE=str(tmp_path))
    assert all(finished(ended))
    assert sum("converting" in said for _, said in ended) == 1
    (file,) = tmp_path.rglob("*.safetensors")
    assert set(directions.load(file)) == names


def test_a_model_converted_twice_at_once_is_whole(source, tmp_path):
    ended = together(*[["convert", source, "--out", tmp_path / "model"]] * 2)
    assert any(code == 0 for code, _ in ended), ended
    assert ChatModel.load(tmp_path / "model").config.n_layers == 3


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, Path]:
    """A results folder, and a sample of its replies labelled by hand."""
    folder = tmp_path_factory.mktemp("study") / "made"
    made.folder(folder)
    found = results.load(folder)
    drawn, audit = human.sample(found.rows, {}, 12, 0), folder.parent / "audit.csv"
    human.export(drawn, {name: "a prompt" for name in drawn["prompt_id"]}, audit)
    for entry in human.entries(audit):
        human.fill(audit, entry.item, "refusal")
    return folder, audit


WORK = {
    "keyword": lambda folder, audit: ["judge", folder, "--judge", "keyword"],
    "degenerate": lambda folder, audit: ["judge", folder, "--judge", "degenerate"],
    "import": lambda folder, audit: ["audit", "import", folder, audit],
    "receipt": lambda folder, audit: ["receipt", folder],
}


@pytest.mark.parametrize(
    "names", itertools.combinations_with_replacement(WORK, 2), ids=" and ".join
)
def test_two_commands_on_one_results_folder_lose_nothing(study, tmp_path, names):
    folder = shutil.copytree(study[0], tmp_path / "made")
    commands = [WORK[name](folder, study[1]) for name in names]
    done = finished(together(*commands))
    assert any(done)
    for command, ended in zip(commands, done, strict=True):
        assert ended or together(command)[0][0] == 0
    assert together(WORK["receipt"](folder, study[1]))[0][0] == 0
    assert verify.passed(verify.verify(folder / "receipt.json", folder=folder))
    found = verdicts.read_all(folder)
    for name in set(names) - {"receipt"}:
        judge = "human" if name == "import" else name
        assert found[judge].height == (12 if judge == "human" else results.load(folder).rows.height)


@pytest.fixture(scope="module")
def swept(source, tmp_path_factory) -> tuple[list[object], Path]:
    """The command of a sweep, all but its folder, and the folder that it leaves."""
    folder = tmp_path_factory.mktemp("swept")
    model = convert(source, folder / "model", "float32")
    command = ["sweep", tiny.study_file(folder), "--model", model, "--out"]
    assert all(finished(together([*command, folder / "results"])))
    return command, folder / "results"


BESIDE = {
    "judge": lambda folder, model: ["judge", folder, "--judge", "keyword"],
    "receipt": lambda folder, model: ["receipt", folder],
    # Into the sweep's own file.
    "extract": lambda folder, model: [
        *("extract", "evil", "--model", model, "--out", folder / "directions.safetensors")
    ],
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_sweep_that_goes_on_and_another_command_lose_nothing(swept, tmp_path, name):
    sweep, whole = swept
    folder = shutil.copytree(whole, tmp_path / "results")
    for shard in sorted(folder.glob("shards/*.parquet"))[::2]:
        shard.unlink()
    if name == "extract":
        # The sweep makes its directions again, into the file that `extract` adds to.
        (folder / "directions.safetensors").unlink()
    commands = [[*sweep, folder], BESIDE[name](folder, sweep[3])]
    done = finished(together(*commands))
    assert any(done)
    for command, ended in zip(commands, done, strict=True):
        assert ended or together(command)[0][0] == 0
    tables = [pl.read_parquet(path / "responses.parquet") for path in (folder, whole)]
    assert tables[0].equals(tables[1])
    known = directions.load(whole / "directions.safetensors")
    assert {*directions.load(folder / "directions.safetensors")} == {*known} | (
        {"evil"} if name == "extract" else set()
    )
    if name == "judge":
        assert verdicts.read_all(folder)["keyword"].height == tables[0].height
    # Whatever the order was, nothing stands in the way of another sweep and its receipt.
    assert all(finished(together([*sweep, folder])))
    assert verify.passed(verify.verify(folder / "receipt.json", folder=folder))
