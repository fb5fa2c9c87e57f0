"""A results folder for reading on screen: opened when finished or not, its replies page by page.

`results.load` refuses an unfinished folder, because receipts and judges need all rows. A notebook
may show the rows so far, with a banner that says what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

from jaxsteer.data import prompts
from jaxsteer.data.prompts import Prompt
from jaxsteer.errors import UserError
from jaxsteer.judges.labels import BENIGN_FAMILIES
from jaxsteer.study import record, results
from jaxsteer.study.record import RunRecord
from jaxsteer.study.results import Results

ALL = "all"
UNKNOWN = "(this prompt's text is in none of the data sets on this machine)"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A results folder and what its reader must know first.

    Attributes:
      found: the results; of an unfinished run, the rows so far.
      banner: what is missing, one sentence each; nothing for a complete, judged study.
    """

    found: Results
    banner: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """One page of rows.

    Attributes:
      rows: the rows of this page, at most as many as asked for.
      number: which page, from 1; the last one when a later one was asked for.
      pages: how many there are, at least 1.
      total: rows that match the choice.
    """

    rows: pl.DataFrame
    number: int
    pages: int
    total: int


def open_results(folder: Path) -> Opened:
    """Open a results folder, finished or not.

    Raises:
      UserError: there are no rows yet, or the folder is damaged; says what to run.
    """
    run = record.read(folder)
    if run is None:
        raise UserError(
            f"There are no results in {folder}: run `make demo` once (or `jaxsteer sweep STUDY`), "
            "then open this page again."
        )
    finished = (folder / "responses.parquet").is_file()
    found = results.load(folder) if finished else _so_far(folder, run)
    if found.rows.is_empty():
        raise UserError(
            f"{folder} holds no rows yet: run the same `jaxsteer sweep` again to continue, then "
            "open this page again."
        )
    return Opened(found=found, banner=tuple(_banner(found)))


def _so_far(folder: Path, run: RunRecord) -> Results:
    done = results.read_shards(folder / "shards", run.key)
    nothing = pl.DataFrame(schema=results.SCHEMA)
    rows = pl.concat(done) if done else nothing
    # Shards are in the order of their hashes; a finished table is in that of its conditions.
    order = {c.name: i for i, c in enumerate(run.conditions)}
    rank = pl.col("condition").replace_strict(order, default=len(order), return_dtype=pl.Int64)
    return Results(folder=folder, run=run, rows=rows.sort(rank, "family"), verdicts={})


def _banner(found: Results) -> Iterator[str]:
    run = found.run
    wanted = {c.name: sum(run.size(c, family) for family in run.prompts) for c in run.conditions}
    there = dict(found.rows.group_by("condition").len().iter_rows())
    short = [name for name, n in wanted.items() if there.get(name, 0) < n]
    if short:
        yield (
            f"Partial results: {found.rows.height:,} of {sum(wanted.values()):,} rows, "
            f"{len(short)} of {len(wanted)} conditions incomplete. Claims on those are not tested; "
            "the same `jaxsteer sweep` again runs the rest."
        )
    unscored = int((found.rows["label"] == "complied-unscored").sum())
    if unscored:
        yield (
            f"No judge of harm has scored {unscored:,} replies that were neither refused nor "
            "broken. Whether they are a bypass is not known: `jaxsteer judge` asks one."
        )


def page(
    rows: pl.DataFrame, *, condition: str = "", family: str = "", label: str = "",
    number: int = 1, size: int = 6,
) -> Page:  # fmt: skip
    """One page of the rows that match; an empty choice means all."""
    chosen = rows
    for column, value in (("condition", condition), ("family", family), ("label", label)):
        if value:
            chosen = chosen.filter(pl.col(column) == value)
    pages = max(1, -(-chosen.height // size))
    at = min(max(number, 1), pages)
    return Page(
        rows=chosen.slice((at - 1) * size, size), number=at, pages=pages, total=chosen.height
    )


def choices(rows: pl.DataFrame, column: str) -> dict[str, str]:
    """Options for one column: all rows as "", then its values in the table's order."""
    return {ALL: ""} | {v: v for v in rows[column].unique(maintain_order=True).to_list()}


def may_harm(family: str) -> bool:
    """Whether prompts of a family, and replies to them, are blurred until the reader asks."""
    return family not in BENIGN_FAMILIES


def known_texts() -> tuple[dict[str, str], str]:
    """(texts of all prompts that this machine has, by id; what is missing and why, or "")."""
    sets: tuple[Callable[[], list[Prompt]], ...] = (
        prompts.benign,
        prompts.harmless,
        prompts.strongreject,
    )
    texts: dict[str, str] = {}
    problem = ""
    for load in sets:
        try:
            texts |= {prompt.id: prompt.text for prompt in load()}
        except UserError as error:
            problem = f"Some prompts cannot be shown: {error}"
    return texts, problem
