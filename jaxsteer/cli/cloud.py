"""Commands about machines elsewhere: launch."""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from jaxsteer.cli.common import app
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
        str, typer.Option(help="A hub id, or a checkpoint folder on the machine.")
    ] = "smollm2-135m",
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
    from jaxsteer import cloud, parallel, spec

    if full and limit:
        raise UserError("--full and --limit exclude each other; give one")
    asked = spec.load(study)
    if study.endswith(".toml") and not Path(study).resolve().is_relative_to(Path.cwd()):
        raise UserError(f"{study} is not below {Path.cwd()}, which is what the machine gets")
    if not re.fullmatch(r"[\w./-]+", model):
        raise UserError(f"model {model!r} is neither a hub id nor a path")
    options = [f"--limit {limit}"] if limit else ["--full"] if full else []
    machine = cloud.tpu(tpu)
    used = math.prod(parallel.parse(mesh).values()) if mesh is not None else 1
    if note := cloud.idle_chips(machine, used):
        typer.echo(f"note: {note}", err=True)
    if mesh is not None:
        options.append(f"--mesh {mesh}")
    suffix = "-full" if full else f"-limit-{limit}" if limit else ""
    task = cloud.text(
        cloud.task(
            os.path.relpath(study) if study.endswith(".toml") else study,
            name=f"{asked.name}{suffix}",
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
