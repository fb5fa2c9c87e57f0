"""Commands about studies: sweep."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jaxsteer.cli.common import (
    DEMO_MODEL,
    MeshOption,
    ModelOption,
    app,
    open_model,
)
from jaxsteer.errors import UserError


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(help="A shipped study's name, or a .toml file.")],
    model: ModelOption = DEMO_MODEL,
    out: Annotated[
        Path | None, typer.Option(help="Results folder; default results/STUDY-MODEL.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="StrongREJECT prompts to run.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All 313 StrongREJECT prompts.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace what the folder holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print the cost and run nothing.")] = False,
    mesh: MeshOption = None,
    hosts: Annotated[
        str | None,
        typer.Option(help="Share the study: auto (TPU pod, Slurm, Open MPI), or HOST:PORT."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --hosts: how many processes share it.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(min=0, help="With --hosts: this one's number, from 0.")
    ] = None,
) -> None:
    """Run a study, or what is missing of it; print its table and its claims, write its receipt.

    Stop it whenever you like: the same command goes on where it was. Several hosts share a study
    when each runs the same command, --process apart, and all see the same --out and --model.

    Example: jaxsteer sweep smollm2-demo --limit 20

    Example: jaxsteer sweep smollm2-demo --hosts 10.0.0.1:1234 --processes 2 --process 0
    """
    from jaxsteer.generation import distributed as sharing
    from jaxsteer.receipt import build, canonical
    from jaxsteer.receipt.text import claims_table
    from jaxsteer.study import cost as planning
    from jaxsteer.study import run, spec
    from jaxsteer.terminal import modes_table, plan_table, summary_table

    if full and limit:
        raise UserError("--full and --limit exclude each other; give one")
    if hosts is None and (processes is not None or process is not None):
        raise UserError("--processes and --process go with --hosts; give --hosts too")
    asked = spec.load(study)
    joined = sharing.ALONE
    if hosts is not None and not plan:
        joined = sharing.join(hosts, processes, process)
    loaded = open_model(model, mesh)
    harmful = 0 if full else limit
    console = Console(width=None if sys.stdout.isatty() else 110)
    if plan:
        console.print(plan_table(planning.plan(asked, loaded, limit=harmful), asked.name))
        return
    suffix = "-full" if full else f"-limit-{limit}" if limit else ""
    folder = out or Path("results") / f"{asked.name}-{loaded.name}{suffix}"
    summary = run.run_study(asked, loaded, folder, limit=harmful, fresh=fresh, hosts=joined)
    if not joined.first:
        joined.meet("receipt")
        return
    console.print(summary_table(summary, asked.name))
    if asked.modes:
        shifts = json.loads((folder / "modes.json").read_text(encoding="utf-8"))
        console.print(modes_table(shifts, asked.name))
    receipt, _ = build.write(folder)
    console.print(claims_table(canonical.load(receipt)))
    typer.echo(f"results, receipt.json and receipt.html are in {folder}")
    joined.meet("receipt")
