"""A results folder opened for reading on screen: finished, or as far as an interrupted run got.

`results.load` is the door for anything that signs its name to a number and refuses an unfinished
folder. A notebook may look at one, as long as it says so: that is the banner.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from jaxsteer.errors import UserError
from jaxsteer.study import prepare, results, store
from jaxsteer.study.results import Results
from jaxsteer.study.spec import StudySpec


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A results folder and what its reader must know first.

    Attributes:
      found: the results; of an unfinished run, the rows so far.
      banner: what is missing, one sentence each; nothing for a complete, judged study.
    """

    found: Results
    banner: tuple[str, ...]


def open_results(folder: Path) -> Opened:
    """Open a results folder, finished or not.

    Raises:
      UserError: there is nothing to see yet, or it is damaged; says what to run.
    """
    if not (folder / "run.json").is_file():
        raise UserError(
            f"There are no results in {folder}: run `make demo` once (or `jaxsteer sweep STUDY`), "
            "then open this page again."
        )
    finished = (folder / "responses.parquet").is_file()
    found = results.load(folder) if finished else _so_far(folder)
    if found.rows.is_empty():
        raise UserError(
            f"{folder} holds no rows yet: run the same `jaxsteer sweep` again to go on, then "
            "open this page again."
        )
    return Opened(found=found, banner=tuple(_banner(found)))


def expected(condition: dict[str, Any], run: dict[str, Any]) -> int:
    """How many rows a condition of run.json asks for."""
    prompts = run.get("prompts") or {}
    return sum(
        int(known.get("n", 0))
        for family, known in prompts.items()
        if family != "benign" or condition.get("benign")
    )


def _so_far(folder: Path) -> Results:
    run = prepare.read_record(folder / "run.json") or {}
    if run.get("format") != results.FORMAT:
        raise UserError(f"{folder}/run.json has format {run.get('format')!r}; run the study again")
    done = store.read(folder / "shards", str(run.get("key", "")))
    try:
        spec = msgspec.convert(run["study"], StudySpec)
    except (msgspec.ValidationError, KeyError) as error:
        raise UserError(f"{folder}/run.json: study: {error}; run the study again") from None
    rows = pl.concat(done) if done else pl.DataFrame(schema=dict.fromkeys(results.COLUMNS))
    # Shards lie in order of their hashes; the study's own order is that of its conditions.
    order = {c["name"]: i for i, c in enumerate(run.get("conditions") or [])}
    rank = pl.Series([order.get(name, len(order)) for name in rows["condition"]], dtype=pl.Int64)
    return Results(
        folder=folder,
        run=run,
        spec=spec,
        rows=rows.with_columns(rank.alias("_rank")).sort("_rank", "family").drop("_rank"),
        verdicts={},
    )


def _banner(found: Results) -> list[str]:
    conditions = found.run.get("conditions") or []
    wanted = {c["name"]: expected(c, found.run) for c in conditions}
    there = dict(found.rows.group_by("condition").len().iter_rows())
    short = [name for name, n in wanted.items() if there.get(name, 0) < n]
    said = []
    if short:
        said.append(
            f"Partial results: {found.rows.height:,} of {sum(wanted.values()):,} rows, "
            f"{len(short)} of {len(wanted)} conditions incomplete. Claims on those are not tested; "
            "the same `jaxsteer sweep` again runs the rest."
        )
    unscored = int((found.rows["label"] == "complied-unscored").sum())
    if unscored:
        said.append(
            f"No judge of harm has scored {unscored:,} replies that were neither refused nor "
            "broken. Whether they are a bypass is not known: `jaxsteer judge` asks one."
        )
    return said
