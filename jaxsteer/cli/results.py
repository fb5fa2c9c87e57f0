"""Commands on a study's results: judge, audit, receipt and geometry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from jaxsteer.cli.common import (
    DEMO_MODEL,
    STYLES,
    MeshOption,
    ModelOption,
    app,
    check_device,
    claims_table,
    console,
    open_model,
    safe,
    table,
    use_compile_cache,
)
from jaxsteer.words import percent, plain, points, signed

if TYPE_CHECKING:
    from jaxsteer.evidence.reliability import Measurements
    from jaxsteer.judges import run as judging
    from jaxsteer.receipt.compare import Comparison, Gate, Line
    from jaxsteer.receipt.verify import Check

audit = typer.Typer(
    help="Label a sample by hand: export it as CSV, import it as the judge `human`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(audit, name="audit")
# The metric of gates and tables that is no share.
IN_NATS = "benign-kl"
ResultsArgument = Annotated[Path, typer.Argument(help="A results folder.")]
JudgesOption = Annotated[
    list[str],
    typer.Option(
        "--judge",
        help="keyword, degenerate; over HTTP: strongreject-rubric, coherence, leakage; models run "
        "here: llama-guard, strongreject-finetuned, harmbench-mistral, wildguard, or a .toml file; "
        "may be repeated.",
    ),
]


@app.command()
def judge(
    results: ResultsArgument,
    judges: JudgesOption,
    base_url: Annotated[str, typer.Option(help="API, such as http://127.0.0.1:8000/v1.")] = "",
    judge_model: Annotated[str, typer.Option(help="The judge model's name at that API.")] = "",
    key_variable: Annotated[
        str, typer.Option(help="Environment variable with the API key, if one is needed.")
    ] = "JAXSTEER_JUDGE_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Calls at the same time.")] = 8,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Calls per minute.")] = None,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds to wait for one call.")] = 60.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Token limit of a judge's reply.")] = 768,
    max_completion_tokens: Annotated[int, typer.Option(help="The same under this name.")] = 0,
    omit: Annotated[
        list[str] | None,
        typer.Option(help="Parameter to omit: temperature, seed or max_tokens."),
    ] = None,
    api_version: Annotated[str, typer.Option(help="Azure's version, such as 2024-10-21.")] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="Model of a judge run here.")] = None,
    template: Annotated[Path | None, typer.Option(help="Its template, as text or .jinja.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows in one batch of that judge.")] = 8,
    rubric: Annotated[
        Path | None, typer.Option(help="Folder with rubric_system.txt and rubric_user.txt.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows per judge in this run.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace earlier verdicts.")] = False,
    mesh: MeshOption = None,
) -> None:
    """Judge the replies of a finished study; earlier verdicts are kept.

    Example: jaxsteer judge results/smollm2-demo-smollm2-135m --judge keyword --judge degenerate
    """
    from jaxsteer.errors import UserError
    from jaxsteer.files import locked
    from jaxsteer.judges import run as judging
    from jaxsteer.judges.client import Endpoint
    from jaxsteer.study import results as studies

    if bool(base_url) != bool(judge_model):
        raise UserError("--base-url and --judge-model go together; give both")
    use_compile_cache()
    endpoint = Endpoint(
        base_url=base_url,
        model=judge_model,
        concurrency=concurrency,
        rate=rate,
        timeout=timeout,
        max_tokens=max_completion_tokens or max_tokens,
        limit_name="max_completion_tokens" if max_completion_tokens else "max_tokens",
        api_version=api_version,
        omit=tuple(omit or ()),
        key_variable=key_variable,
    )
    found = studies.load(results)
    options = judging.Options(
        endpoint=endpoint if base_url else None,
        checkpoint=checkpoint,
        template=template,
        policy=found.run.policy.text,
        batch=batch,
        mesh=mesh,
        rubric=rubric,
        limit=limit,
        fresh=fresh,
    )
    with locked(results):
        try:
            outcomes = judging.judge(found.rows, results, judges, options)
        finally:
            # Verdicts from before an error or a stop signal are kept, so they count.
            studies.refresh_summary(results)
    for outcome in outcomes:
        typer.echo(said(outcome))


# A judge that gives at least so many replies, and this share of them, one verdict says little.
ENOUGH, ONE_SIDED = 20, 0.95


def said(outcome: judging.Outcome) -> str:
    """One judge's verdicts in a few lines, made safe to print, since a reason may quote a reply."""
    counts = ", ".join(f"{n} {verdict}" for verdict, n in outcome.verdicts.items())
    line = f"{outcome.judge}: {outcome.asked} rows: {counts or 'none scored'}"
    if outcome.unscored:
        line += f", {sum(outcome.unscored.values())} unscored"
    if outcome.missing:
        line += f", {outcome.missing} not judged yet"
    most, n = max(outcome.verdicts.values(), default=0), sum(outcome.verdicts.values())
    # Of replies, most are whole: that the judges of broken ones say so is no sign of a fault.
    if n >= ENOUGH and most >= ONE_SIDED * n and not outcome.judge.startswith(("coh", "deg")):
        line += f"; {percent(most / n)} got one verdict, so it tells conditions hardly apart"
    reasons = [f"  unscored {n}: {reason}" for reason, n in list(outcome.unscored.items())[:3]]
    if len(outcome.unscored) > 3:
        reasons.append(f"  and {len(outcome.unscored) - 3} other reasons")
    return plain("\n".join([line, *reasons]))


@audit.command("export")
def export_sample(
    results: ResultsArgument,
    file: Annotated[Path, typer.Argument(help="CSV to write.")],
    n: Annotated[int, typer.Option(min=1, help="Rows to draw.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Draw a sample of replies to label by hand.

    The file does not show condition or label.

    Example: jaxsteer audit export results/smollm2-demo-smollm2-135m results/audit.csv --n 50
    """
    from jaxsteer.data import prompts
    from jaxsteer.judges import human
    from jaxsteer.study import results as studies

    found = studies.load(results)
    drawn = human.sample(found.rows, found.verdicts, n, seed)
    human.export(drawn, prompts.texts(results, drawn["prompt_id"]), file)
    typer.echo(f"wrote {file}: {drawn.height} rows; fill in label with {', '.join(human.LABELS)}")


@audit.command("import")
def import_sample(
    results: ResultsArgument,
    file: Annotated[Path, typer.Argument(help="The filled CSV.")],
) -> None:
    """Store the labels of a filled sample, and show how far judges agree.

    The labels become the verdicts of the judge `human`.

    Example: jaxsteer audit import results/smollm2-demo-smollm2-135m results/audit.csv
    """
    from jaxsteer.files import locked
    from jaxsteer.judges import human, verdicts
    from jaxsteer.study import results as studies

    rows = studies.load(results).rows
    findings = human.read(file, rows)
    with locked(results):
        total = human.keep(results, rows, findings)
    typer.echo(f"took {len(findings)} labels; a person has labelled {total} rows so far")
    for pair in human.agreements(rows, verdicts.read_all(results)):
        typer.echo(
            f"{pair.question}: {pair.first} and {pair.second} on {pair.n} rows: both yes "
            f"{pair.both_yes}, only {pair.first} {pair.only_first}, only {pair.second} "
            f"{pair.only_second}, both no {pair.both_no}, kappa "
            + ("undefined" if pair.kappa is None else f"{pair.kappa:.2f}")
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


@receipts.command()
def build(
    results: ResultsArgument,
    samples: Annotated[int, typer.Option(min=0, help="Redacted openings to show.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: RESULTS.")] = None,
) -> None:
    """Write receipt.json and receipt.html of a results folder, and print its claims.

    Example: jaxsteer receipt results/smollm2-demo-smollm2-135m
    """
    from jaxsteer.receipt import statement as form
    from jaxsteer.receipt.build import write

    data, page = write(results, out, samples=samples)
    console().print(claims_table(form.load(data)))
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

    if model is not None:
        check_device()
    checks = verifying.verify(receipt, folder=results, model=model, mesh=mesh)
    screen = console()
    screen.print(checks_table(checks))
    ended = "" if verifying.passed(checks) else STYLES["mismatch"]
    screen.print(safe(verifying.verdict(checks), ended))
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

    METRIC is refusal, bypass, degenerate, leakage, benign-refusal, benign-accuracy or benign-kl; a
    drop is first minus second.

    Example: jaxsteer receipt diff old.json new.json --fail-if "refusal drop > 0.05 in baseline"
    """
    from jaxsteer.receipt import compare as diffs
    from jaxsteer.receipt import statement as form

    asked = [diffs.parse_gate(text) for text in fail_if or []]
    comparison = diffs.compare(
        form.load(first), form.load(second), mode_first=mode_a, mode_second=mode_b
    )
    screen = console()
    for part in diff_tables(comparison):
        screen.print(part)
    fired = diffs.fired(comparison, asked)
    for text in fired_text(fired):
        screen.print(text)
    if fired:
        raise typer.Exit(1)


@app.command()
def geometry(
    results: ResultsArgument,
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
    from jaxsteer.study import results as studies

    # Before the model, which takes long to load.
    studies.load(results)
    use_compile_cache()
    found = reliability.measure(results, open_model(model, mesh), halves=halves, draws=draws)
    console().print(geometry_table(found))
    typer.echo(f"wrote {results / reliability.FILE}; build the receipt again to include it")


# -- Their tables ----------------------------------------------------------------------------------


def checks_table(checks: Sequence[Check]) -> Table:
    """Each check and how it ended."""
    rows = [(safe(c.status, STYLES[c.status]), c.what, c.detail) for c in checks]
    return table("receipt", ("", "what", "detail"), rows)


def diff_tables(comparison: Comparison) -> Iterator[RenderableType]:
    """What else changed, the differences, and what could not be compared."""
    yield safe(f"other differences between the two: {', '.join(comparison.changed) or 'none'}")
    numbers = ("first", "second", "change", "95 %")
    lines = table(
        "from the first receipt to the second",
        ("condition", "metric", "prompts", *numbers, ""),
        [_difference(line) for line in comparison.lines],
        numbers,
    )
    lines.caption = (
        "changes in points, of benign-kl in nats a token; intervals of independent rates "
        "(Newcombe) or means; moved: the interval excludes 0"
    )
    yield lines
    for words, names in (
        ("only in the first receipt", comparison.only_first),
        ("only in the second receipt", comparison.only_second),
        ("no longer measured", [f"{metric} in {name}" for name, metric in comparison.gone]),
    ):
        if names:
            yield safe(f"{words}: {'; '.join(names)}")


def _difference(line: Line) -> tuple[str | Text, ...]:
    way = "moved up" if line.difference > 0 else "moved down"
    return (
        line.condition if line.other == line.condition else f"{line.condition} -> {line.other}",
        line.metric,
        line.prompts,
        _amount(line.metric, line.first),
        _amount(line.metric, line.second),
        _move(line.metric, line.difference),
        f"{_move(line.metric, line.low)} to {_move(line.metric, line.high)}",
        safe(way, "bold") if line.moved else "",
    )


def _amount(metric: str, value: float) -> str:
    return f"{value:.3f} nats" if metric == IN_NATS else percent(value, 1)


def _move(metric: str, value: float) -> str:
    return signed(value, 3) if metric == IN_NATS else points(value, 1)


def fired_text(fired: Sequence[tuple[Gate, Line]]) -> Iterator[Text]:
    """One line for each gate that fires and each condition beyond its threshold."""
    for gate, line in fired:
        unsure = "" if line.moved else ", although the interval includes 0"
        yield safe(
            f"gate fires: {gate.text}: {line.condition} went from "
            f"{_amount(gate.metric, line.first)} to {_amount(gate.metric, line.second)} "
            f"(n {line.n_first} and {line.n_second}{unsure})",
            "bold red",
        )


def geometry_table(found: Measurements) -> Table:
    """Reliability of each direction: the range over layers of the mean agreement of halves.

    `growth` is the mean over layers for halves of 1, 2, 4 and so on units a side.
    """
    rows = []
    for name, measured in found.directions.items():
        for unit, halves in measured.reliability.items():
            over_layers = f"{signed(min(halves.mean))} to {signed(max(halves.mean))}"
            means = ((n, sum(mean) / len(mean)) for n, mean in sorted(halves.growth.items()))
            growth = ", ".join(f"{n}: {signed(mean)}" for n, mean in means)
            rows.append((name, unit, str(halves.units), over_layers, growth))
        if measured.not_measured:
            rows.append((name, measured.not_measured, "", "", ""))
    numbers = ("units", "over layers")
    columns = ("direction", "halves by", *numbers, "growth with units a side in each half")
    return table("agreement of random halves", columns, rows, numbers)
