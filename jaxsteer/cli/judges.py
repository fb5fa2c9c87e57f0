"""Commands about judges: judge, and audit export and import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxsteer.cli.common import MeshOption, app, use_compile_cache

if TYPE_CHECKING:
    from jaxsteer.judges import run as judging

audit = typer.Typer(
    help="Let a person label a sample: out as CSV, back as the judge `human`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(audit, name="audit")
ResultsArgument = Annotated[Path, typer.Argument(help="A results folder.")]
PromptsOption = Annotated[
    Path | None, typer.Option(help="CSV of forbidden prompts, if not the pinned ones.")
]


@app.command()
def judge(
    results: ResultsArgument,
    judges: Annotated[
        list[str],
        typer.Option(
            "--judge",
            help="keyword, degenerate, llama-guard, strongreject-rubric, coherence, leakage; "
            "may be repeated.",
        ),
    ],
    base_url: Annotated[
        str, typer.Option(help="OpenAI-compatible API, such as http://127.0.0.1:8000/v1.")
    ] = "",
    judge_model: Annotated[str, typer.Option(help="The judge model's name there.")] = "",
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the API key, if one is needed.")
    ] = "JAXSTEER_JUDGE_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Calls in flight.")] = 8,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Calls a minute.")] = None,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds for one call.")] = 60.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest judge reply.")] = 768,
    omit: Annotated[
        list[str] | None,
        typer.Option(help="Request parameter not to send: temperature, seed or max_tokens."),
    ] = None,
    guard_model: Annotated[
        Path | None, typer.Option(help="Converted Llama-Guard-3 checkpoint.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows llama-guard judges at once.")] = 8,
    rubric: Annotated[
        Path | None,
        typer.Option(help="Folder with rubric_system.txt and rubric_user.txt, if not the pinned."),
    ] = None,
    prompts: PromptsOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows to judge now, per judge; run again to go on.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Replace what these judges said before.")
    ] = False,
    mesh: MeshOption = None,
) -> None:
    """Judge the replies of a finished study; what is judged already is kept.

    Example: jaxsteer judge results/smollm2-demo --judge keyword --judge degenerate
    """
    from jaxsteer.errors import UserError
    from jaxsteer.judges import run as judging
    from jaxsteer.judges.client import Endpoint
    from jaxsteer.study import results as studies

    if bool(base_url) != bool(judge_model):
        raise UserError("--base-url and --judge-model go together; give both")
    endpoint = None
    if base_url:
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
    use_compile_cache()
    options = judging.Options(
        endpoint=endpoint,
        guard=guard_model,
        guard_batch=batch,
        mesh=mesh,
        rubric=rubric,
        prompts=prompts,
        limit=limit,
        fresh=fresh,
    )
    try:
        for outcome in judging.judge(results, judges, options):
            typer.echo(said(outcome))
    finally:
        # What was judged before an error or Ctrl-C is kept, so the summary follows it.
        if (results / "summary.json").is_file():
            studies.refresh_summary(results)


def said(outcome: judging.Outcome) -> str:
    """What one judge said, in a line or a few; a reason may quote a reply."""
    from jaxsteer.terminal import plain

    counts = ", ".join(f"{n} {verdict}" for verdict, n in outcome.verdicts.items())
    unscored = sum(outcome.unscored.values())
    line = f"{outcome.judge}: {outcome.asked} rows: {counts or 'none scored'}"
    if unscored:
        line += f", {unscored} unscored"
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
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    prompts: PromptsOption = None,
) -> None:
    """Draw a sample of replies for a person to label, without condition or label.

    Example: jaxsteer audit export results/smollm2-demo results/smollm2-demo/audit.csv --n 50
    """
    from jaxsteer.judges import human as audits
    from jaxsteer.judges import run as judging
    from jaxsteer.judges import verdicts

    rows = judging.responses(results)
    drawn = audits.sample(rows, verdicts.read_all(results), n, seed)
    texts = judging.prompt_texts(drawn["prompt_id"].unique().to_list(), prompts)
    audits.export(drawn, texts, file)
    typer.echo(f"wrote {file}: {drawn.height} rows; fill in label with {', '.join(audits.LABELS)}")


@audit.command("import")
def import_sample(
    results: ResultsArgument,
    file: Annotated[Path, typer.Argument(help="The filled CSV.")],
) -> None:
    """Take a filled sample as the verdicts of the judge `human`, and show how judges agree.

    Example: jaxsteer audit import results/smollm2-demo results/smollm2-demo/audit.csv
    """
    from jaxsteer.judges import agreement, verdicts
    from jaxsteer.judges import human as audits
    from jaxsteer.judges import run as judging
    from jaxsteer.study import store

    rows = judging.responses(results)
    findings = audits.read(file, rows)
    with store.locked(results / "judges"):
        total = audits.keep(results, rows, findings)
    typer.echo(f"took {len(findings)} labels; {total} rows are labelled by a person now")
    for pair in agreement.agreements(rows, verdicts.read_all(results)):
        typer.echo(
            f"{pair.question}: {pair.first} and {pair.second} on {pair.n} rows: both yes "
            f"{pair.both_yes}, only {pair.first} {pair.only_first}, only {pair.second} "
            f"{pair.only_second}, both no {pair.both_no}, kappa {pair.kappa:.2f}"
        )
