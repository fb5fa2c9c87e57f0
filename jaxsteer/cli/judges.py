"""Commands about judges: judge, and audit export and import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxsteer.cli.common import MeshOption, app, use_compile_cache

if TYPE_CHECKING:
    from jaxsteer.judges import run as judging

audit = typer.Typer(
    help="Label a sample by hand: export it as CSV, import it as the judge `human`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(audit, name="audit")
ResultsArgument = Annotated[Path, typer.Argument(help="A results folder.")]
JudgesOption = Annotated[
    list[str],
    typer.Option(
        "--judge",
        help="keyword, degenerate, llama-guard, strongreject-rubric, coherence or leakage; "
        "may be repeated.",
    ),
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="CSV of the study's forbidden prompts; default: the pinned set.")
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
    omit: Annotated[
        list[str] | None,
        typer.Option(help="Parameter to omit: temperature, seed or max_tokens."),
    ] = None,
    guard_model: Annotated[Path | None, typer.Option(help="Llama-Guard-3 checkpoint.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows in one batch of llama-guard.")] = 8,
    rubric: Annotated[
        Path | None, typer.Option(help="Folder with rubric_system.txt and rubric_user.txt.")
    ] = None,
    prompts: PromptsOption = None,
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
        max_tokens=max_tokens,
        omit=tuple(omit or ()),
        key_variable=key_variable,
    )
    options = judging.Options(
        endpoint=endpoint if base_url else None,
        guard=guard_model,
        guard_batch=batch,
        mesh=mesh,
        rubric=rubric,
        prompts=prompts,
        limit=limit,
        fresh=fresh,
    )
    rows = studies.load(results).rows
    with locked(results / "judges"):
        try:
            outcomes = judging.judge(rows, results, judges, options)
        finally:
            # Verdicts from before an error or a stop signal are kept, so they count.
            studies.refresh_summary(results)
    for outcome in outcomes:
        typer.echo(said(outcome))


def said(outcome: judging.Outcome) -> str:
    """One judge's verdicts in a few lines, made safe to print, since a reason may quote a reply."""
    from jaxsteer.terminal import plain

    counts = ", ".join(f"{n} {verdict}" for verdict, n in outcome.verdicts.items())
    line = f"{outcome.judge}: {outcome.asked} rows: {counts or 'none scored'}"
    if outcome.unscored:
        line += f", {sum(outcome.unscored.values())} unscored"
    if outcome.missing:
        line += f", {outcome.missing} not judged yet"
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
    prompts: PromptsOption = None,
) -> None:
    """Draw a sample of replies to label by hand.

    The file does not show condition or label.

    Example: jaxsteer audit export results/smollm2-demo-smollm2-135m results/audit.csv --n 50
    """
    from jaxsteer.judges import human
    from jaxsteer.judges.run import prompt_texts
    from jaxsteer.study import results as studies

    found = studies.load(results)
    drawn = human.sample(found.rows, found.verdicts, n, seed)
    human.export(drawn, prompt_texts(drawn["prompt_id"], prompts), file)
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
    from jaxsteer.judges import agreement, human, verdicts
    from jaxsteer.study import results as studies

    rows = studies.load(results).rows
    findings = human.read(file, rows)
    with locked(results / "judges"):
        total = human.keep(results, rows, findings)
    typer.echo(f"took {len(findings)} labels; a person has labelled {total} rows so far")
    for pair in agreement.agreements(rows, verdicts.read_all(results)):
        typer.echo(
            f"{pair.question}: {pair.first} and {pair.second} on {pair.n} rows: both yes "
            f"{pair.both_yes}, only {pair.first} {pair.only_first}, only {pair.second} "
            f"{pair.only_second}, both no {pair.both_no}, kappa {pair.kappa:.2f}"
        )
