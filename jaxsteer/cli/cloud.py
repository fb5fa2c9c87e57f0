"""Commands about machines elsewhere: launch."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from jaxsteer.cli.common import DEMO_MODEL, app
from jaxsteer.errors import UserError


@app.command()
def launch(
    study: Annotated[str, typer.Argument(help="A shipped study's name, or a .toml file.")],
    tpu: Annotated[str, typer.Option(help="Generation and size, such as v5e-8 or v6e-64.")],
    zone: Annotated[str, typer.Option(help="Zone of Google Cloud, such as us-west4-a.")],
    store: Annotated[
        str | None, typer.Option(help="gs://BUCKET, or a path every host has, for results.")
    ] = None,
    spot: Annotated[
        bool, typer.Option("--spot", help="Cheaper; taken away at times, and started again.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="A hub id, or a checkpoint's absolute path on the machine.")
    ] = DEMO_MODEL.name,
    out: Annotated[
        str | None, typer.Option(help="Name of the results folder; default STUDY-MODEL.")
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="Of each host's chips: data=2,model=4.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="StrongREJECT prompts to run.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All 313 StrongREJECT prompts.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the task and the command; start nothing.")
    ] = False,
) -> None:
    """Run a study on a Google Cloud TPU with SkyPilot; go on where it was when it is taken away.

    For a gated model, have your hub token in $HF_TOKEN.

    Example: jaxsteer launch smollm2-demo --tpu v5e-8 --zone us-west4-a --store gs://mine --spot
    """
    from jaxsteer import cloud
    from jaxsteer.model import sharding
    from jaxsteer.study import spec, validate

    if full and limit:
        raise UserError("--full and --limit exclude each other; give one")
    _check_folder()
    asked = spec.load(study)
    if study.endswith(".toml"):
        study = os.path.relpath(Path(study).resolve())
        _check_sent(study)
    for named in validate.without_model(asked):
        _check_sent(named)
    _check_model(model)
    if out is not None and not re.fullmatch(r"\w[\w.-]*", out):
        raise UserError(f"--out {out!r} is no name; a folder of that name is made in the store")
    options = [f"--limit {limit}"] if limit else ["--full"] if full else []
    machine = cloud.tpu(tpu)
    sizes = sharding.parse(mesh) if mesh is not None else {}
    if note := cloud.idle_chips(machine, math.prod(sizes.values())):
        typer.echo(f"note: {note}", err=True)
    if sizes:
        # Not as it was typed: the machine's shell would cut it at a space.
        options.append(f"--mesh {sharding.written(sizes)}")
    # One store holds the results of a study on several models.
    of = "" if model == DEMO_MODEL.name else f"-{model.replace('/', '--')}"
    suffix = "-full" if full else f"-limit-{limit}" if limit else ""
    task = cloud.text(
        cloud.task(
            study,
            name=out or f"{asked.name}{of}{suffix}",
            machine=machine,
            zone=zone,
            store=store,
            spot=spot,
            model=model,
            options=" ".join(options),
        )
    )
    token = bool(os.environ.get("HF_TOKEN"))
    if dry_run:
        command = cloud.command(Path("TASK.yaml"), spot=spot, kept=store is not None, token=token)
        typer.echo(f"{task}\n# {' '.join(command)}")
        return
    cloud.installed()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.yaml"
        file.write_text(task, encoding="utf-8")
        done = subprocess.run(
            cloud.command(file, spot=spot, kept=store is not None, token=token), check=False
        )
    raise typer.Exit(done.returncode)


def _check_folder() -> None:
    missing = [name for name in ("pyproject.toml", "constraints.txt") if not Path(name).is_file()]
    if missing:
        raise UserError(
            f"{Path.cwd()} has no {missing[0]}; the machine gets this folder and installs jaxsteer "
            "from it, so run launch in its repository"
        )


def _check_sent(file: str) -> None:
    """Refuse a file that the machine does not get, or not under this name."""
    if Path(file).is_absolute():
        raise UserError(f"the machine has no {file}; name it from {Path.cwd()}, which it gets")
    inside = Path(file).resolve().is_relative_to(Path.cwd())
    if os.path.normpath(file).startswith("..") or not inside:
        raise UserError(f"{file} is not below {Path.cwd()}, which is what the machine gets")
    # SkyPilot leaves out what git ignores. Without git, or outside of a repository, nothing is.
    with contextlib.suppress(FileNotFoundError):
        asked = ["git", "check-ignore", "--quiet", file]
        if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
            raise UserError(f"git ignores {file}, so the machine does not get it; put it elsewhere")


def _check_model(model: str) -> None:
    hub, there = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model), re.fullmatch(r"(/\w[\w.-]*)+", model)
    if model != DEMO_MODEL.name and not hub and not there:
        raise UserError(
            f"model {model!r} is neither a hub id (ORG/NAME), nor the absolute path of a "
            f"checkpoint on the machine, nor {DEMO_MODEL.name}"
        )
    if hub and (Path(model) / "manifest.json").is_file():
        raise UserError(
            f"{model} is a checkpoint here, which the machine does not get; give its hub id, or an "
            "absolute path there"
        )
