"""Commands about studies: sweep."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from jaxsteer.cli.common import (
    DEMO_MODEL,
    MeshOption,
    ModelOption,
    app,
    claims_table,
    open_model,
)
from jaxsteer.errors import UserError
from jaxsteer.words import percent, plain, signed, span

if TYPE_CHECKING:
    from jaxsteer.evidence.impact import Impact
    from jaxsteer.evidence.power import Power
    from jaxsteer.study.validate import Plan


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(help="A shipped study's name, or a .toml file.")],
    model: ModelOption = DEMO_MODEL,
    out: Annotated[
        Path | None, typer.Option(help="Results folder; default: results/STUDY-MODEL.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="StrongREJECT prompts to run.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All 313 StrongREJECT prompts.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace earlier results.")] = False,
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
        int | None, typer.Option(min=0, help="With --hosts: number of this process, from 0.")
    ] = None,
) -> None:
    """Start or continue a study; print its table and its claims, write its receipt.

    You can stop it at any time: the same command continues it. Several hosts share a study if each
    runs the same command with its own --process, and all can read the same --out and --model.

    Example: jaxsteer sweep smollm2-demo --limit 20

    Example: jaxsteer sweep smollm2-demo --hosts 10.0.0.1:1234 --processes 2 --process 0
    """
    from jaxsteer.evidence import impact, power
    from jaxsteer.generation import distributed as sharing
    from jaxsteer.receipt import build, statement
    from jaxsteer.study import results, run, spec, validate

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
        planned = validate.plan(asked, loaded, limit=harmful)
        console.print(plan_table(planned, asked.name))
        shown = power.powers(asked, planned.conditions, planned.prompts)
        console.print(power_table([(found, power.words(found)) for found in shown], asked.name))
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
    costs = impact.impacts(results.load(folder))
    if costs:
        console.print(impact_table(costs, asked.name))
    console.print(claims_table(statement.load(receipt)))
    typer.echo(f"results, receipt.json and receipt.html are in {folder}")
    joined.meet("receipt")


def summary_table(summary: Sequence[dict[str, Any]], title: str) -> Table:
    """The study's table: one line per condition and prompt family."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    unfinished = any(row["unfinished"] for row in summary)
    caption = "refused with Wilson 95 % interval; complied = neither, not scored for harm"
    table.caption = caption + ("; unfinished = thinking without an end" if unfinished else "")
    for name in ("condition", "prompts"):
        table.add_column(name)
    for name in ("n", "refused", "95 %", "degenerate", "complied"):
        table.add_column(name, justify="right")
    if unfinished:
        table.add_column("unfinished", justify="right")
    for row in summary:
        mark = " (cancels steering)" if row["cancels_steering"] else ""
        table.add_row(
            Text(plain(row["condition"]) + mark),
            row["family"],
            str(row["n"]),
            percent(row["refusal"]),
            span(row["refusal_low"], row["refusal_high"]),
            percent(row["degenerate"]),
            percent(row["complied"]),
            *([percent(row["unfinished"])] if unfinished else []),
        )
    return table


def impact_table(costs: Mapping[str, Impact], title: str) -> Table:
    """What the conditions do on benign prompts, beside the untouched model."""
    from jaxsteer.evidence import impact

    table = Table(title=f"{title}: benign impact", title_justify="left", caption_justify="left")
    table.caption = impact.CAPTION
    for name in impact.COLUMNS:
        table.add_column(name, justify="left" if name == "condition" else "right")
    for name, cost in costs.items():
        table.add_row(*(Text(plain(cell)) for cell in impact.cells(name, cost)))
    return table


def plan_table(plan: Plan, title: str) -> Table:
    """A study's cost, one figure per line."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    megabytes = 1 / 2**20
    for name, value in (
        ("conditions (controls included)", f"{len(plan.conditions)}"),
        ("rows", f"{plan.rows}"),
        ("replies for benign impact, at most", f"{plan.further}"),
        ("prompt tokens", f"{plan.prompt_tokens:,} ({plan.own_tokens:,} not in a shared prefix)"),
        ("new tokens, at most", f"{plan.new_tokens:,}"),
        ("weights", f"{plan.weights_bytes * megabytes:,.0f} MiB"),
        ("cache of a batch", f"{plan.cache_bytes * megabytes:,.0f} MiB"),
        ("time of the rows here, rough", f"{plan.seconds / 60:,.1f} min"),
        ("still to choose", ", ".join(plan.open_choices) or "nothing"),
    ):
        table.add_row(name, value)
    return table


def power_table(found: Sequence[tuple[Power, str]], title: str) -> Table:
    """What each planned comparison could show, in words."""
    table = Table(title=f"what the claims of {title} could show", title_justify="left")
    for name in ("claim", "comparison", "could show"):
        table.add_column(name)
    for test, said in found:
        names = f"{plain(test.treated)} against {plain(test.control)}"
        table.add_row(Text(plain(test.claim)), Text(names), said)
    return table


def modes_table(shifts: Sequence[dict[str, Any]], title: str) -> RenderableType:
    """How far each persona mode moves the last prompt token along each direction."""
    if not shifts:
        return Text(f"{title}: no shift by mode; there is no direction, or no mode with a text")
    table = Table(title=f"{title}: shift by mode at {shifts[0]['at']}", title_justify="left")
    table.caption = (
        "in natural norms of the direction, against the policy alone, with 95 % interval"
    )
    names = list(dict.fromkeys(shift["direction"] for shift in shifts))
    table.add_column("mode")
    for name in names:
        table.add_column(name, justify="right")
    cells = {(shift["mode"], shift["direction"]): shift for shift in shifts}
    for mode in dict.fromkeys(shift["mode"] for shift in shifts):
        table.add_row(Text(plain(mode)), *(_shift(cells[mode, name]) for name in names))
    return table


def _shift(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{signed(found['shift'])} (one prompt)"
    return f"{signed(found['shift'])} ({signed(found['low'])} to {signed(found['high'])})"
