"""Commands about studies: sweep, study new and study check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table

from jaxsteer.cli.common import (
    DEMO_MODEL,
    MeshOption,
    ModelOption,
    app,
    claims_table,
    console,
    open_model,
    safe,
    table,
)
from jaxsteer.errors import UserError
from jaxsteer.words import percent, signed, span

if TYPE_CHECKING:
    from jaxsteer.evidence.claims import Power
    from jaxsteer.evidence.outcomes import Impact
    from jaxsteer.receipt.statement import Predicate
    from jaxsteer.study.run import Plan


study_app = typer.Typer(help="Start a study of your own, and check it.", no_args_is_help=True)
app.add_typer(study_app, name="study")


@study_app.command("new")
def new(folder: Annotated[Path, typer.Argument(help="Folder to write; it is made.")]) -> None:
    """Write a commented study with a policy, prompts and a trait to edit; it runs as it is.

    Example: jaxsteer study new mine
    """
    from jaxsteer.study import spec

    path = spec.new(folder)
    typer.echo(f"wrote {path}; edit it, then: jaxsteer study check {path}")


@study_app.command("check")
def check(
    study: Annotated[str, typer.Argument(help="A shipped study's name, or a .toml file.")],
    model: ModelOption = DEMO_MODEL,
) -> None:
    """Say everything that is wrong with a study, and how to mend it; exit code 2 if anything is.

    The model's weights are not read, and nothing is run.

    Example: jaxsteer study check mine/study.toml --model smollm2-135m
    """
    from jaxsteer.model import chat_model
    from jaxsteer.study import run

    loaded = chat_model.ChatModel.load(chat_model.find(model), weights=False)
    found = run.check(study, loaded)
    for line in found:
        typer.echo(str(safe(line)), err=True)
    if found:
        raise typer.Exit(2)
    typer.echo(f"{study} can run on {loaded.name}")


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(help="A shipped study's name, or a .toml file.")],
    model: ModelOption = DEMO_MODEL,
    out: Annotated[
        Path | None, typer.Option(help="Results folder; default: results/STUDY-MODEL.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each harmful set.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All prompts of each harmful set.")] = False,
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
    from jaxsteer.evidence import claims, outcomes, reliability
    from jaxsteer.generation import distributed as sharing
    from jaxsteer.receipt import build, statement
    from jaxsteer.study import prepare, results, run, spec

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
    screen = console()
    if plan:
        planned = run.plan(asked, loaded, limit=harmful)
        screen.print(plan_table(planned, asked.name))
        powers = claims.powers(asked, planned.conditions, planned.prompts)
        screen.print(power_table(powers, asked.name))
        return
    suffix = "-full" if full else f"-limit-{limit}" if limit else ""
    folder = out or Path("results") / f"{asked.name}-{loaded.name}{suffix}"
    run.run_study(asked, loaded, folder, limit=harmful, fresh=fresh, hosts=joined)
    if not joined.first:
        joined.meet("receipt")
        return
    kept = folder / prepare.SAMPLES
    if kept.is_dir():
        reliability.measure(folder, loaded)
        shutil.rmtree(kept)
    receipt, _ = build.write(folder)
    made = statement.load(receipt)
    for family in made.predicate.prompts:
        screen.print(outcomes_table(made.predicate, family))
    if asked.modes:
        shifts = json.loads((folder / "modes.json").read_text(encoding="utf-8"))
        screen.print(modes_table(shifts, asked.name))
    costs = outcomes.impacts(results.load(folder))
    if costs:
        screen.print(impact_table(costs, asked.name))
    screen.print(claims_table(made))
    typer.echo(f"results, receipt.json and receipt.html are in {folder}")
    joined.meet("receipt")


def outcomes_table(p: Predicate, family: str) -> Table:
    """Outcomes on one family of prompts, one line a condition; seeds of one are joined."""
    from jaxsteer.receipt import page

    labels = {"degenerate": "broken", "bypass": "harmful", "unfinished": "unfinished"}
    bars = page.bars(p.conditions, family)
    columns = ["condition", "n", "refused", "95 %"]
    columns += [name for label, name in labels.items() if any(label in b.shares for b in bars)]
    rows = []
    for bar in bars:
        mode = f"{bar.condition.mode}: " if bar.condition.mode else ""
        mark = " †" if bar.condition.cancels_steering else ""
        shares = [percent(bar.shares.get(k, 0)) for k, name in labels.items() if name in columns]
        figures = [percent(bar.shares.get("refusal", 0)), span(bar.low, bar.high), *shares]
        rows.append([f"{mode}{bar.name}{mark}", f"{bar.n}", *figures])
    made = table(
        f"{p.study.name}: {page.family_words(p, family)} prompts", columns, rows, columns[1:]
    )
    notes = ["95 %: Wilson interval; over seeds, smallest to largest"]
    if any(bar.condition.cancels_steering for bar in bars):
        notes.append("† cancels steering: proves nothing")
    if any("complied-unscored" in bar.shares for bar in bars):
        notes.append("the rest was answered, not scored for harm")
    made.caption = "; ".join(notes)
    return made


def impact_table(costs: Mapping[str, Impact], title: str) -> Table:
    """What the conditions do on benign prompts, beside the untouched model."""
    from jaxsteer.evidence.outcomes import IMPACT_CAPTION, IMPACT_COLUMNS, cells

    rows = [cells(name, cost) for name, cost in costs.items()]
    made = table(f"{title}: benign impact", IMPACT_COLUMNS, rows, IMPACT_COLUMNS[1:])
    made.caption = IMPACT_CAPTION
    return made


def plan_table(plan: Plan, title: str) -> Table:
    """A study's cost, one figure per line."""
    memory = {**plan.memory, "memory in all, rough": sum(plan.memory.values())}
    figures = [
        ("conditions (controls included)", f"{len(plan.conditions)}"),
        ("rows", f"{plan.rows}"),
        ("replies for benign impact, at most", f"{plan.further}"),
        ("prompt tokens", f"{plan.prompt_tokens:,} ({plan.own_tokens:,} not in a shared prefix)"),
        ("new tokens, at most", f"{plan.new_tokens:,}"),
        *((name, f"{size / 2**20:,.0f} MiB") for name, size in memory.items()),
        ("time of the rows here, rough", f"{plan.seconds / 60:,.1f} min"),
        ("still to choose", ", ".join(plan.open_choices) or "nothing"),
    ]
    return table(title, ("", " "), figures)


def power_table(found: Sequence[Power], title: str) -> Table:
    """What each planned comparison could show, in words."""
    from jaxsteer.evidence.claims import could_show

    rows = [(p.claim, f"{p.treated} against {p.control}", could_show(p)) for p in found]
    heads = ("claim", "comparison", "could show")
    return table(f"what the claims of {title} could show", heads, rows)


def modes_table(shifts: Sequence[dict[str, Any]], title: str) -> RenderableType:
    """How far each persona mode moves the last prompt token along each direction."""
    if not shifts:
        return safe(f"{title}: no shift by mode; there is no direction, or no mode with a text")
    names = list(dict.fromkeys(shift["direction"] for shift in shifts))
    cells = {(shift["mode"], shift["direction"]): shift for shift in shifts}
    rows = [
        (mode, *(_shift(cells[mode, name]) for name in names))
        for mode in dict.fromkeys(shift["mode"] for shift in shifts)
    ]
    made = table(f"{title}: shift by mode at {shifts[0]['at']}", ("mode", *names), rows, names)
    made.caption = "in natural norms of the direction, against the policy alone, with 95 % interval"
    return made


def _shift(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{signed(found['shift'])} (one prompt)"
    return f"{signed(found['shift'])} ({signed(found['low'])} to {signed(found['high'])})"
