"""Replies to look at, a page at a time, with the prompts that results do not hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import polars as pl

from jaxsteer.data import prompts
from jaxsteer.data.prompts import Prompt
from jaxsteer.errors import UserError
from jaxsteer.judges.labels import BENIGN_FAMILIES

UNKNOWN = "(this prompt's text is in none of the data sets on this machine)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """One page of rows.

    Attributes:
      rows: the rows of this page, at most as many as asked for.
      number: which page, from 1; the last one when more was asked for than there are.
      pages: how many there are, at least 1.
      total: rows that fit the choice.
    """

    rows: pl.DataFrame
    number: int
    pages: int
    total: int


def page(
    rows: pl.DataFrame, *, condition: str = "", family: str = "", label: str = "",
    number: int = 1, size: int = 6,
) -> Page:  # fmt: skip
    """The rows that fit, one page of them; an empty choice means all."""
    chosen = rows
    for column, value in (("condition", condition), ("family", family), ("label", label)):
        if value:
            chosen = chosen.filter(pl.col(column) == value)
    pages = max(1, -(-chosen.height // size))
    at = min(max(number, 1), pages)
    return Page(
        rows=chosen.slice((at - 1) * size, size), number=at, pages=pages, total=chosen.height
    )


ALL = "all"


def choices(rows: pl.DataFrame, column: str) -> dict[str, str]:
    """What can be chosen of a column: its values in the table's order, and all of them as ""."""
    return {ALL: ""} | {v: v for v in rows[column].unique(maintain_order=True).to_list()}


def may_harm(family: str) -> bool:
    """Whether prompts of a family, and replies to them, are veiled until asked for."""
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
