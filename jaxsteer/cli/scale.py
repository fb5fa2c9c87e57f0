"""Commands about machines larger than this one: tpu-check."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jaxsteer.cli.common import app

if TYPE_CHECKING:
    from rich.table import Table

    from jaxsteer.topology import Check


@app.command("tpu-check")
def tpu_check(
    model: Annotated[
        list[str] | None, typer.Option(help="llama-3.1-8b or qwen2.5-7b; may be repeated.")
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(help="Chip and slice: v5e:2x4, v6e:2x4, v4:2x2x1; may be repeated."),
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(help="Such as data=2,model=4; default: up to 4 share a model.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows that decode together.")] = 256,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="Look for the largest batch that fits.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compile a sweep of a full-size model for TPUs that are not there; say what fits, how fast.

    Needs no TPU and no weights. Fails if something does not fit. Default: all models and slices.

    Example: jaxsteer tpu-check --model llama-3.1-8b --topology v5e:2x4 --batch 512
    """
    # The TPU compiler is called by name; JAX itself stays on the CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxsteer import chips, published
    from jaxsteer import topology as topologies
    from jaxsteer.terminal import plain

    failed = []
    done = []
    asked = list(itertools.product(topology or chips.TOPOLOGIES, model or published.MODELS))
    # Before minutes are spent on the first.
    for slice_, name in asked:
        topologies.mesh_on(name, slice_, mesh, batch)
    for slice_, name in asked:
        typer.echo(f"compiling {name} for {slice_}", err=True)
        try:
            made = topologies.check(name, slice_, mesh=mesh, batch=batch, search=search)
        except topologies.DoesNotFitError as error:
            failed.append(str(error))
            continue
        done.append(made)
        if not made.fits:
            failed.append(
                f"{name} does not fit {slice_} with {batch} rows: "
                f"{-made.left / chips.GIB:.1f} GiB too much; choose a smaller --batch"
            )
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(check) for check in done], indent=1))
    elif done:
        Console(width=None if sys.stdout.isatty() else 110).print(_table(done))
    for line in failed:
        typer.echo(f"jaxsteer: {plain(line)}", err=True)
    if failed:
        raise typer.Exit(1)


def _largest(check: Check) -> str:
    if check.largest_batch is None:
        return ""
    return f"{check.largest_batch}, all rows" if check.holds_table else str(check.largest_batch)


def _table(checks: Sequence[Check]) -> Table:
    """What compiling for TPUs says: a column per model and slice, memory per chip."""
    from rich.table import Table as RichTable

    from jaxsteer import chips

    table = RichTable(title="compiled, not measured", title_justify="left", caption_justify="left")
    table.caption = (
        "GiB per chip. Step: the compiler's cycles and what the links need; bound: weights and "
        "cache read once. Table: 313 prompts x 11 conditions x 150 tokens, nothing shared but the "
        "system prompt, no reply shorter."
    )
    table.add_column("")
    for check in checks:
        table.add_column(f"{check.model}\n{check.topology}", justify="right")

    def line(name: str, value: Callable[[Check], str]) -> None:
        table.add_row(name, *map(value, checks))

    line("mesh", lambda c: f"{c.mesh['data']} x {c.mesh['model']}")
    line("rows at once", lambda c: str(c.batch))
    line("weights", lambda c: f"{c.weights / chips.GIB:.2f}")
    line("cache", lambda c: f"{c.cache / chips.GIB:.2f}")
    line("other state", lambda c: f"{c.other / chips.GIB:.2f}")
    line("temporaries", lambda c: f"{c.temporaries / chips.GIB:.2f}")
    line("HBM left", lambda c: f"{c.left / chips.GIB:.2f}")
    line("largest batch", _largest)
    line("step, ms", lambda c: f"{1e3 * c.step_seconds:.1f}")
    line("of it links, ms", lambda c: f"{1e3 * c.exchange_seconds:.2f}")
    line("bound, ms", lambda c: f"{1e3 * c.bound_seconds:.1f}")
    line("bound / step", lambda c: f"{c.bound_seconds / c.step_seconds:.0%}")
    line("exchanged a step, MB", lambda c: f"{c.exchanged_bytes / 1e6:.1f}")
    line("once a chunk, ms", lambda c: f"{1e3 * c.chunk_seconds:.1f}")
    line("16 lanes read, ms", lambda c: f"{1e3 * c.prefill_seconds:.1f}")
    line("16 rows put together, ms", lambda c: f"{1e3 * c.together_seconds:.1f}")
    line("table, s (compiled estimate)", lambda c: f"{c.table_seconds:.0f}")
    for note in dict.fromkeys(note for check in checks for note in check.notes):
        table.caption += f" {note}."
    return table
