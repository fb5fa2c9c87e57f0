"""What is launched on a TPU: refusals before money is spent, and the task's own commands run."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from jaxsteer import cloud
from jaxsteer.cli.common import app
from jaxsteer.data import prompts as data
from jaxsteer.errors import UserError
from jaxsteer.model.convert import convert
from tests import tiny
from tests.conftest import ROOT

ZONE = ("--zone", "us-west4-a")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that could be launched from, to be in."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_ours(monkeypatch):
    monkeypatch.chdir(ROOT)


def launch(*arguments: object) -> str:
    """Run the command in this process; its errors are raised as they are."""
    done = CliRunner().invoke(app, ["launch", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("name", "accelerator", "runtime", "single"),
    [
        ("v5e-8", "tpu-v5litepod-8", "v2-alpha-tpuv5-lite", True),
        ("v5litepod-256", "tpu-v5litepod-256", "v2-alpha-tpuv5-lite", False),
        ("v6e-16", "tpu-v6e-16", "v2-alpha-tpuv6e", False),
        ("tpu-v5p-8", "tpu-v5p-8", "v2-alpha-tpuv5", True),
        ("v5p-384", "tpu-v5p-384", "v2-alpha-tpuv5", False),
        ("v4-8", "tpu-v4-8", "tpu-ubuntu2204-base", True),
    ],
)
def test_tpu_names_are_spelt_as_skypilot_and_google_do(name, accelerator, runtime, single):
    assert cloud.tpu(name) == cloud.Tpu(accelerator=accelerator, runtime=runtime, single=single)


@pytest.mark.parametrize(
    "name", ["v5e-7", "v5e-512", "v5p-100", "v5p-1", "v4-16384", "v7x-8", "H100", "v5e", "v6e-08"]
)
def test_a_tpu_that_does_not_exist_is_refused(name):
    with pytest.raises(UserError, match=f"there is no TPU '{name}'"):
        cloud.tpu(name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("smollm2-dem", "--tpu", "v5e-8", *ZONE), "no study"),
        (("smollm2-demo", "--tpu", "v5e-8", "--zone", "us-west4"), "no zone"),
        (("smollm2-demo", "--tpu", "v5e-16", *ZONE), "slice share results; give --store"),
        (("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--spot"), "disk goes with it; give --store"),
        (("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--store", "s3://x"), "neither gs://BUCKET"),
        (("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--mesh", "8"), "mesh '8'"),
        (("smollm2-demo", "--tpu", "v5e-4", *ZONE, "--mesh", "model=8"), "tpu-v5litepod-4, which"),
        (("smollm2-demo", "--tpu", "v4-8", *ZONE, "--mesh", "model=8"), "which has 4; ask for"),
        (("smollm2-demo", "--tpu", "v5e-64", *ZONE, "--mesh", "model=8"), "which has 4; ask for"),
        (("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--mesh", "data=3"), "data=3 does not divide"),
        (("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--model", "a; b"), "neither a hub id"),
        (("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--model", "smollm2-135"), "neither a hub id"),
        (("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--model", "/a/../b"), "neither a hub id"),
        (("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--model", "./mine"), "neither a hub id"),
        (("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--model=-x"), "neither a hub id"),
        (("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--out", "../x"), "'../x' is no name"),
    ],
)
def test_what_would_fail_on_the_machine_is_refused_here(arguments, said):
    with pytest.raises(UserError, match=said):
        launch(*arguments, "--dry-run")


@pytest.mark.parametrize(
    ("name", "used", "said"),
    [
        ("v5e-8", 1, "1 of 8 chips would be used; --mesh model=8 or data=8 would use all"),
        ("v4-8", 2, "2 of 4 chips"),
        ("v5e-8", 8, None),
        ("v5e-1", 1, None),
        ("v5e-64", 1, "every host of the slice would use one of its chips"),
        ("v5e-64", 2, "host of the slice would use 2 of its chips; --mesh model=4 or data=4 would"),
        ("v5e-64", 4, None),
        ("v4-16", 4, None),
    ],
)
def test_chips_that_would_stand_idle_are_named(name, used, said):
    note = cloud.idle_chips(cloud.tpu(name), used)
    assert note is None if said is None else said in note


def test_a_study_the_machine_would_not_get_is_refused(tmp_path):
    with pytest.raises(UserError, match="what the machine gets"):
        launch(tiny.study_file(tmp_path), "--tpu", "v5e-8", *ZONE, "--dry-run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([('"compliant"', '"complaint"')], "no trait complaint"),
        ([("dose = 3.0\n", "")], "dose is open"),
        ([('at = "late"', 'at = "latter"')], "'persona, out': cannot read layer 'latter'"),
        ([("[data]", 'modes = ["i-tho"]\n[data]')], "no mode 'i-tho'"),
    ],
)
def test_what_a_study_names_is_looked_up_before_a_machine_is_paid_for(repository, changes, said):
    tiny.study_file(repository, *changes)
    with pytest.raises(UserError, match=said):
        launch("tiny.toml", "--tpu", "v5e-8", *ZONE, "--dry-run")


def test_files_that_the_machine_does_not_get_are_refused(repository):
    shipped = (Path(data.__file__).parent / "traits/compliant.toml").read_bytes()
    subprocess.run(["git", "init", "--quiet"], check=True)
    (repository / ".gitignore").write_text("results\n")
    (repository / "results").mkdir()
    (repository / "link").symlink_to(repository.parent)
    for name in ("own.toml", "results/own.toml", "../own.toml"):
        (repository / name).write_bytes(shipped)
    for name, said in {
        "own.toml": None,
        "../own.toml": "is not below .* which is what the machine gets",
        "link/own.toml": "is not below",
        # The machine's folder has another name.
        "../repository/own.toml": "is not below",
        str(repository / "own.toml"): "the machine has no .*own.toml; name it from",
        "results/own.toml": "git ignores results/own.toml",
    }.items():
        tiny.study_file(repository, ('"compliant"', f'"{name}"'))
        if said is None:
            assert "STUDY: tiny.toml" in launch("tiny.toml", "--tpu", "v5e-8", *ZONE, "--dry-run")
        else:
            with pytest.raises(UserError, match=said):
                launch("tiny.toml", "--tpu", "v5e-8", *ZONE, "--dry-run")


def test_a_study_is_named_as_the_machine_finds_it(repository):
    (repository.parent / "link").symlink_to(repository)
    tiny.study_file(repository)
    for study in ("../link/tiny.toml", repository / "tiny.toml"):
        assert "STUDY: tiny.toml" in launch(study, "--tpu", "v5e-8", *ZONE, "--dry-run")


def test_a_folder_that_jaxsteer_cannot_be_installed_from_is_refused(repository):
    (repository / "constraints.txt").unlink()
    with pytest.raises(UserError, match=r"has no constraints.txt; .* run launch in its repository"):
        launch("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--dry-run")


def test_a_checkpoint_that_is_here_only_is_refused(repository):
    (repository / "checkpoints/mine").mkdir(parents=True)
    (repository / "checkpoints/mine/manifest.json").touch()
    with pytest.raises(UserError, match="checkpoints/mine is a checkpoint here, which the machine"):
        launch("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--model", "checkpoints/mine", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ((), "smollm2-demo"),
        (("--model", "org/Model-8B", "--full"), "smollm2-demo-org--Model-8B-full"),
        (("--model", "/org/Model-8B"), "smollm2-demo---org--Model-8B"),
        (("--model", "org/Model-8B", "--out", "second.try"), "second.try"),
    ],
)
def test_every_model_of_a_study_has_a_results_folder_of_its_own(arguments, folder):
    said = launch("smollm2-demo", "--tpu", "v5e-1", *ZONE, *arguments, "--dry-run")
    assert yaml.safe_load(said)["envs"]["OUT"] == f"results/{folder}"


def test_a_mesh_is_handed_on_in_one_word():
    said = launch("smollm2-demo", "--tpu", "v5e-8", *ZONE, "--mesh", "data=2, model=4", "--dry-run")
    assert yaml.safe_load(said)["envs"]["OPTIONS"] == "--mesh data=2,model=4"


def test_a_dry_run_prints_the_task_and_the_command_and_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    options = ("--store", "gs://mine", "--spot", "--limit", 20, "--mesh", "data=2,model=4")
    said = launch("smollm2-demo", "--tpu", "v5e-8", *ZONE, *options, "--dry-run")
    task = yaml.safe_load(said)
    assert task["resources"]["accelerators"] == "tpu-v5litepod-8" and task["resources"]["use_spot"]
    assert task["resources"]["infra"] == "gcp/us-west4/us-west4-a"
    assert task["file_mounts"] == {"/store": {"source": "gs://mine", "mode": "MOUNT"}}
    assert task["envs"]["OUT"] == "/store/results/smollm2-demo-limit-20"
    assert task["envs"]["OPTIONS"] == "--limit 20 --mesh data=2,model=4"
    assert said.splitlines()[-1].endswith("jobs launch TASK.yaml --secret HF_TOKEN")
    assert "hf_secret" not in said


def test_a_machine_that_keeps_its_results_is_stopped_and_not_deleted():
    kept = cloud.command(Path("f"), spot=False, kept=True, token=False)
    held = cloud.command(Path("f"), spot=False, kept=False, token=False)
    assert "--down" in kept and "--down" not in held
    assert "--idle-minutes-to-autostop" in held


def test_without_skypilot_one_line_says_how_to_install_it(monkeypatch, repository):
    # And without git, which has a say in what the machine gets.
    monkeypatch.setenv("PATH", str(repository))
    tiny.study_file(repository)
    with pytest.raises(UserError, match="not installed; `make sky`"):
        launch("tiny.toml", "--tpu", "v5e-8", *ZONE)


def test_outside_of_a_git_repository_nothing_of_git_is_shown(monkeypatch, repository, capfd):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.parent))
    tiny.study_file(repository)
    launch("tiny.toml", "--tpu", "v5e-8", *ZONE, "--dry-run")
    assert "git" not in capfd.readouterr().err


def machine(disk, study, store, options=""):
    """A machine with a disk of its own that has begun the task's commands."""
    model = convert(tiny.save(tiny.llama(), disk / "hf"), disk / "model", "float32")
    # On the machine this environment is made by the task's setup.
    activate = disk / "jaxsteer-env/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    filled = cloud.task(
        str(study),
        name="tiny",
        machine=cloud.tpu("v5e-8"),
        zone="us-west4-a",
        store=str(store),
        spot=True,
        model=str(model),
        options=options,
    )
    return subprocess.Popen(
        ["bash", "-c", yaml.safe_load(cloud.text(filled))["run"]],
        env=os.environ | filled["envs"] | {"HOME": str(disk), "SKYPILOT_NUM_NODES": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_tasks_commands_run_a_study(tmp_path):
    done = machine(tmp_path / "disk", tiny.study_file(tmp_path), tmp_path, "--limit 2")
    said, errors = done.communicate()
    assert done.returncode == 0, errors
    out = tmp_path / "results/tiny"
    assert pl.read_parquet(out / "responses.parquet").height == 18
    assert re.search(rf"are in {out}$", said.strip())


def test_a_machine_that_takes_over_goes_on_from_the_store(tmp_path):
    study = tiny.study_file(tmp_path, ("harmful = 6", "harmful = 14"), ("batch = 4", "batch = 2"))
    out = tmp_path / "results/tiny"

    def kept():
        return {path.name: path.read_bytes() for path in (out / "shards").glob("*.parquet")}

    preempted = machine(tmp_path / "first", study, tmp_path)
    tick = threading.Event()
    while not kept() and preempted.poll() is None:
        tick.wait(0.002)
    os.killpg(preempted.pid, signal.SIGKILL)
    preempted.communicate()
    assert preempted.returncode == -signal.SIGKILL and not (out / "responses.parquet").exists()
    before = kept()
    # With a disk of its own, on which the model was converted anew.
    after = machine(tmp_path / "second", study, tmp_path)
    _, errors = after.communicate()
    assert after.returncode == 0, errors
    held = sum(pl.read_parquet(io.BytesIO(data)).height for data in before.values())
    assert held > 0 and f"{held}/" in errors
    assert before.items() <= kept().items()
    assert pl.read_parquet(out / "responses.parquet")["row_id"].is_unique().all()


def test_the_scripts_are_bash():
    task = yaml.safe_load((Path(cloud.__file__).parent / "sweep.yaml").read_text())
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)
