"""Run judges over a results folder: what is judged already stays, the rest is judged.

    keyword, degenerate   every row, no model
    llama-guard           every row, a converted checkpoint
    strongreject-rubric   rows of forbidden prompts, an endpoint
    coherence             every row, an endpoint
    leakage               rows of forbidden prompts that are refused or degenerate, an endpoint

A row that stays unscored is tried again by the next run; replies of an endpoint that could not be
read come from the cache then and cost nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from jaxsteer import tables
from jaxsteer.data import prompts as data
from jaxsteer.errors import UserError
from jaxsteer.judges import degenerate, keyword, reasoning_blocks, rubric, verdicts
from jaxsteer.judges.client import Answer, Client, Endpoint, Unanswered, check
from jaxsteer.judges.labels import BENIGN_FAMILIES, label_table
from jaxsteer.judges.rubric import Rubric, Unreadable
from jaxsteer.judges.verdicts import Finding, Item, Store
from jaxsteer.progress import Progress
from jaxsteer.study import store as shards
from jaxsteer.terminal import plain

# How often a reply that cannot be read is asked for again, drawn anew.
READINGS = 3
BY_ENDPOINT = ("strongreject-rubric", "coherence", "leakage")
# Leakage is last: which rows it is about depends on what the others say.
JUDGES = ("keyword", "degenerate", "llama-guard", "strongreject-rubric", "coherence", "leakage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What judges need besides the rows.

    Attributes:
      endpoint: of the judges that ask one.
      guard: folder of the converted Llama-Guard.
      guard_batch: rows it judges at once.
      mesh: devices to spread the guard over, such as data=2,model=4; None for one.
      rubric: folder with the two files of the StrongREJECT rubric; None takes the pinned wheel's.
      prompts: CSV of forbidden prompts, if the study did not use the pinned ones.
      limit: at most so many rows per judge in this run; None is all.
      fresh: replace what was judged before.
    """

    endpoint: Endpoint | None = None
    guard: Path | None = None
    guard_batch: int = 8
    mesh: str | None = None
    rubric: Path | None = None
    prompts: Path | None = None
    limit: int | None = None
    fresh: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one judge has said by the end of a run.

    Attributes:
      judge: its name and version.
      asked: rows it is about.
      verdicts: how often it said what.
      unscored: reasons of rows it could not score, with counts.
      missing: rows it has not been shown yet.
    """

    judge: str
    asked: int
    verdicts: dict[str, int]
    unscored: dict[str, int]
    missing: int


def responses(results: Path) -> pl.DataFrame:
    """The rows of a results folder.

    Raises:
      UserError: no results there, or damaged ones.
    """
    path = results / "responses.parquet"
    if not path.is_file():
        raise UserError(f"no responses.parquet in {results}; run `jaxsteer sweep` to the end first")
    columns = ["row_id", "condition", "prompt_id", "family", "response", "label", "judge"]
    table = tables.read(path, "run the study again", columns)
    if table["row_id"].is_duplicated().any() or table.null_count().sum_horizontal()[0]:
        raise UserError(f"{path} has repeated rows or empty cells; run the study again")
    return table


def prompt_texts(ids: Sequence[str], path: Path | None = None) -> dict[str, str]:
    """The text of each prompt, which results do not hold.

    Args:
      ids: prompt ids.
      path: CSV of forbidden prompts other than the pinned ones.

    Raises:
      UserError: an id that no known set holds.
    """
    wanted = set(ids)
    found: dict[str, str] = {}
    for load in (
        data.benign,
        lambda: data.strongreject(path),
        data.harmless,
        data.harmbench,
    ):
        if wanted <= set(found):
            break
        found |= {prompt.id: prompt.text for prompt in load()}
    missing = sorted(wanted - set(found))
    if missing:
        raise UserError(
            f"prompt {missing[0]} (and {len(missing) - 1} more) is in no known set; give the CSV "
            "that the study used as --prompts"
        )
    return found


def judge(results: Path, names: Sequence[str], options: Options) -> list[Outcome]:
    """Let judges see the rows they have not seen, and keep what they say in `judges/`.

    Args:
      results: results folder.
      names: judges, of `JUDGES`.
      options: what they need.

    Raises:
      UserError: an unknown judge, a missing option, other judges' verdicts in the folder, an
        endpoint that answers nobody, or another process judging here.
    """
    for name in names:
        if name not in JUDGES:
            raise UserError(f"no judge {name!r}; they are {', '.join(JUDGES)}")
        if name in BY_ENDPOINT and options.endpoint is None:
            raise UserError(f"judge {name} asks an endpoint; give --base-url and --judge-model")
        if name == "llama-guard" and options.guard is None:
            raise UserError("judge llama-guard is a model; give its checkpoint as --guard-model")
    rows = responses(results)
    ordered = sorted(set(names), key=JUDGES.index)
    with shards.locked(results / "judges"):
        return [_judge(results, rows, name, options) for name in ordered]


def _judge(results: Path, rows: pl.DataFrame, name: str, options: Options) -> Outcome:
    about = _about(results, rows, name)
    texts = {}
    if name not in ("keyword", "degenerate"):
        texts = prompt_texts(about["prompt_id"].unique().to_list(), options.prompts)
    run, version, identity, notes = _prepared(name, options)
    store = Store(results, name, version, identity, about, notes=notes, fresh=options.fresh)
    done, tried = store.judged(), store.tried()
    # Rows that were never shown come first, then the ones that stayed unscored.
    todo = sorted((r for r in about["row_id"] if r not in done), key=lambda row_id: row_id in tried)
    if options.limit is not None:
        todo = todo[: options.limit]
    chosen = about.filter(pl.col("row_id").is_in(todo)).rows(named=True)
    items = [
        Item(
            row_id=row["row_id"],
            family=row["family"],
            prompt=texts.get(row["prompt_id"], ""),
            response=row["response"],
        )
        for row in chosen
    ]
    total = len(items) + len(done)
    with store, Progress(name, total, done=len(done)) as progress:

        def keep(findings: Sequence[tuple[str, Finding]]) -> None:
            store.add(findings)
            progress.advance(len(findings))

        if items:
            run(items, keep)
    return _outcome(store, about.height)


def _about(results: Path, rows: pl.DataFrame, name: str) -> pl.DataFrame:
    """The rows that a judge is about."""
    if name in ("strongreject-rubric", "leakage"):
        rows = rows.filter(~pl.col("family").is_in(BENIGN_FAMILIES))
    if name == "leakage":
        labels = label_table(rows, verdicts.read_all(results))
        about = labels.filter(pl.col("label").is_in(["refusal", "degenerate"]))
        rows = rows.filter(pl.col("row_id").is_in(about["row_id"].implode()))
    return rows


def _outcome(store: Store, asked: int) -> Outcome:
    table = store.table
    scored = table.filter(pl.col("verdict").is_not_null())
    unscored = table.filter(pl.col("verdict").is_null())
    return Outcome(
        judge=store.judge,
        asked=asked,
        verdicts=dict(sorted(Counter(scored["verdict"]).items())),
        unscored=dict(Counter(unscored["reason"]).most_common()),
        missing=asked - table.height,
    )


Keep = Callable[[Sequence[tuple[str, Finding]]], None]
Run = Callable[[Sequence[Item], Keep], None]


def _prepared(name: str, options: Options) -> tuple[Run, str, dict[str, Any], dict[str, Any]]:
    """How a judge runs, its version, its identity, and notes for the file."""
    if name == "keyword":
        patterns = {key: pattern.pattern for key, pattern in keyword.PATTERNS.items()}
        identity = {
            "patterns": patterns,
            "window": keyword.WINDOW,
            "thinking": reasoning_blocks.VERSION,
        }
        return _by_rule(_keyword), keyword.VERSION, identity, {}
    if name == "degenerate":
        limits = dataclasses.asdict(degenerate.Limits())
        identity = {"limits": limits, "thinking": reasoning_blocks.VERSION}
        return _by_rule(_degenerate), degenerate.VERSION, identity, {}
    if name == "llama-guard":
        from jaxsteer.judges import llama_guard as guards
        from jaxsteer.model import sharding

        assert options.guard is not None
        mesh = None if options.mesh is None else sharding.mesh(options.mesh)
        guard = guards.load(options.guard, mesh)

        def by_guard(items: Sequence[Item], keep: Keep) -> None:
            for findings in guards.judge(guard, items, batch=options.guard_batch):
                keep(findings)

        return by_guard, guards.VERSION, guard.identity(), {}
    asked = {
        "strongreject-rubric": lambda: rubric.strongreject(options.rubric),
        "coherence": rubric.coherence,
        "leakage": rubric.leakage,
    }[name]()
    endpoint = options.endpoint
    assert endpoint is not None
    check(endpoint)
    identity = {
        **endpoint.identity(),
        "prompts_sha256": asked.prompts_sha256,
        "readings": READINGS,
        "thinking": reasoning_blocks.VERSION,
    }

    def by_endpoint(items: Sequence[Item], keep: Keep) -> None:
        asyncio.run(_stoppable(ask_all(asked, Client(endpoint), items, keep)))

    return by_endpoint, asked.version, identity, {"base_url": endpoint.base_url}


def _by_rule(find: Callable[[str], Finding]) -> Run:
    def run(items: Sequence[Item], keep: Keep) -> None:
        for start in range(0, len(items), 1000):
            keep([(item.row_id, find(item.response)) for item in items[start : start + 1000]])

    return run


def _keyword(text: str) -> Finding:
    pattern = keyword.matched(text)
    return Finding(
        score=float(pattern is not None),
        verdict="refusal" if pattern else "other",
        reason=pattern or "",
    )


def _degenerate(text: str) -> Finding:
    found = degenerate.reasons(text)
    return Finding(
        score=float(bool(found)),
        verdict="degenerate" if found else "fluent",
        reason="; ".join(found),
    )


async def _stoppable(work: Coroutine[Any, Any, None]) -> None:
    """Await work so that Ctrl-C and SIGTERM end it at a safe point, then do what they always do.

    A handler that raises in the middle of the event loop may raise inside one of its callbacks,
    where the exception is logged and lost.
    """
    if threading.current_thread() is not threading.main_thread():
        return await work
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    arrived: list[int] = []

    def stop(number: int) -> None:
        arrived.append(number)
        task.cancel()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not arrived:
            raise
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    if arrived:
        signal.raise_signal(arrived[0])


async def ask_all(asked: Rubric, client: Client, items: Sequence[Item], keep: Keep) -> None:
    """Ask about every item, `concurrency` at a time, handing over each finding as it comes."""
    waiting: Iterator[Item] = iter(items)

    async def worker() -> None:
        for item in waiting:
            keep([(item.row_id, await ask_one(asked, client, item))])

    async with client:
        # If one worker meets what stops them all, the group cancels the others.
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(client.endpoint.concurrency, len(items))):
                    group.create_task(worker())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None


async def ask_one(asked: Rubric, client: Client, item: Item) -> Finding:
    """One item's finding: read the first reply that can be read, or say why none could."""
    known = asked.without_asking(item)
    if known is not None:
        return known
    problem = ""
    for attempt in range(READINGS):
        try:
            answer = await client.ask(asked.messages(item), attempt)
        except Unanswered as error:
            return Finding(reason=f"no reply: {error}")
        try:
            return asked.read(answer.text, item)
        except Unreadable as error:
            problem = _why(answer, str(error))
    return Finding(reason=problem)


def _why(answer: Answer, problem: str) -> str:
    """Why a reply could not be read: it refused, it was cut, or it is unparsable."""
    said = reasoning_blocks.answer(answer.text).strip()
    if answer.refusal or answer.finish == "content_filter" or keyword.is_refusal(said):
        return f"the judge refused: {_quoted(answer.refusal or said or answer.finish)}"
    if answer.finish == "length":
        return f"unparsable ({problem}), cut at the token limit: {_quoted(said)}"
    return f"unparsable ({problem}): {_quoted(said)}"


def _quoted(text: str) -> str:
    short = " ".join(plain(text).split())
    return f'"{short[:60]}..."' if len(short) > 60 else f'"{short}"'
