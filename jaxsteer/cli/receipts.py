"""Commands that evaluate results: receipt (build, verify, schema, diff) and geometry."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from jaxsteer.cli.common import (
    DEMO_MODEL,
    MeshOption,
    ModelOption,
    app,
    check_device,
    open_model,
    use_compile_cache,
)


class BuildUnlessNamed(TyperGroup):
    """A command group in which `receipt RESULTS` means `receipt build RESULTS`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["build", *args]
        return super().parse_args(ctx, args)


receipts = typer.Typer(cls=BuildUnlessNamed, no_args_is_help=True)
app.add_typer(
    receipts,
    name="receipt",
    help="Write a study's receipt: `receipt RESULTS`. Check it, or compare two.",
)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


@receipts.command()
def build(
    results: Annotated[Path, typer.Argument(help="Results folder.")],
    samples: Annotated[int, typer.Option(min=0, help="Redacted openings to show.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: RESULTS.")] = None,
) -> None:
    """Write receipt.json and receipt.html of a results folder, and print its claims.

    Example: jaxsteer receipt results/smollm2-demo-smollm2-135m
    """
    from jaxsteer.receipt import canonical as form
    from jaxsteer.receipt.build import write
    from jaxsteer.receipt.text import claims_table

    data, page = write(results, out, samples=samples)
    _console().print(claims_table(form.load(data)))
    typer.echo(f"wrote {data} and {page}")


@receipts.command()
def verify(
    receipt: Annotated[Path, typer.Argument(help="receipt.json.")],
    results: Annotated[Path | None, typer.Option(help="Results folder to rebuild it from.")] = None,
    model: Annotated[Path | None, typer.Option(help="Converted checkpoint to hash.")] = None,
    mesh: MeshOption = None,
) -> None:
    """Check a receipt, its page, results and model; exit 1 when something does not match.

    Example: jaxsteer receipt verify results/smollm2-demo-smollm2-135m/receipt.json
    --results results/smollm2-demo-smollm2-135m
    """
    from jaxsteer.receipt import verify as verifying
    from jaxsteer.receipt.text import checks_table, verdict_line

    if model is not None:
        check_device()
    checks = verifying.verify(receipt, folder=results, model=model, mesh=mesh)
    console = _console()
    console.print(checks_table(checks))
    console.print(verdict_line(checks))
    if not verifying.passed(checks):
        raise typer.Exit(1)


@receipts.command()
def schema() -> None:
    """Print the JSON Schema (2020-12) of receipt.json.

    Example: jaxsteer receipt schema > receipt.schema.json
    """
    from jaxsteer.receipt.statement import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@receipts.command()
def diff(
    first: Annotated[Path, typer.Argument(help="receipt.json to start from.")],
    second: Annotated[Path, typer.Argument(help="receipt.json to compare with it.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help='Gate: "METRIC drop|rise > THRESHOLD [in CONDITION]".'),
    ] = None,
    mode_a: Annotated[str, typer.Option(help="Persona mode of the first receipt.")] = "",
    mode_b: Annotated[str, typer.Option(help="Persona mode of the second receipt.")] = "",
) -> None:
    """Show which rates moved between two receipts; exit 1 when a gate fires.

    METRIC is refusal, bypass, degenerate, leakage or benign-refusal; a drop is first minus second.

    Example: jaxsteer receipt diff old.json new.json --fail-if "refusal drop > 0.05 in baseline"
    """
    from jaxsteer.receipt import canonical as form
    from jaxsteer.receipt import compare as diffs
    from jaxsteer.receipt.text import diff_tables, fired_text

    asked = [diffs.parse_gate(text) for text in fail_if or []]
    comparison = diffs.compare(
        form.load(first), form.load(second), mode_first=mode_a, mode_second=mode_b
    )
    console = _console()
    for part in diff_tables(comparison):
        console.print(part)
    fired = diffs.fired(comparison, asked)
    for text in fired_text(fired):
        console.print(text)
    if fired:
        raise typer.Exit(1)


@app.command()
def geometry(
    results: Annotated[Path, typer.Argument(help="Results folder.")],
    model: ModelOption = DEMO_MODEL,
    halves: Annotated[
        int, typer.Option(min=2, max=10_000, help="Random halves per direction.")
    ] = 100,
    draws: Annotated[
        int, typer.Option(min=10, max=1_000_000, help="Permutations of the labels.")
    ] = 1000,
    mesh: MeshOption = None,
) -> None:
    """Measure how reliable a study's directions are, and compare their cosines with chance.

    Example: jaxsteer geometry results/smollm2-demo-smollm2-135m
    """
    from jaxsteer.evidence import reliability
    from jaxsteer.receipt.text import geometry_table

    use_compile_cache()
    found = reliability.measure(results, open_model(model, mesh), halves=halves, draws=draws)
    _console().print(geometry_table(found))
    typer.echo(f"wrote {results / reliability.FILE}; build the receipt again to include it")
