"""A results folder opened for reading on screen: finished, or as far as an interrupted run got.

`results.load` is the door for anything that signs its name to a number and refuses an unfinished
folder. A notebook may look at one, as long as it says so: that is the banner.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl

from jaxsteer.errors import UserError
from jaxsteer.study import record, results, store
from jaxsteer.study.record import Condition, RunRecord
from jaxsteer.study.results import Results


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


def expected(condition: Condition, run: RunRecord) -> int:
    """How many rows a condition of a run asks for."""
    return sum(
        known.n for family, known in run.prompts.items() if family != "benign" or condition.benign
    )


def _so_far(folder: Path) -> Results:
    run = record.read(folder)
    if run is None:
        raise UserError(f"{folder} holds no run.json; run `jaxsteer sweep` first")
    done = store.read(folder / "shards", run.key)
    rows = pl.concat(done) if done else pl.DataFrame(schema=dict.fromkeys(results.COLUMNS))
    # Shards lie in order of their hashes; the study's own order is that of its conditions.
    order = {c.name: i for i, c in enumerate(run.conditions)}
    rank = pl.Series([order.get(name, len(order)) for name in rows["condition"]], dtype=pl.Int64)
    return Results(
        folder=folder,
        run=run,
        rows=rows.with_columns(rank.alias("_rank")).sort("_rank", "family").drop("_rank"),
        verdicts={},
    )


def _banner(found: Results) -> list[str]:
    wanted = {c.name: expected(c, found.run) for c in found.run.conditions}
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
