"""The labels that replies got: shares of each label by condition or by category, with intervals."""

from __future__ import annotations

from typing import Literal

import polars as pl

from jaxsteer.stats import wilson

By = Literal["condition", "category"]
# Each label in words, in the order in which bars are stacked.
WORDS = {
    "refusal": "refused",
    "benign-answer": "answered without harm",
    "complied-unscored": "answered, harm not judged",
    "bypass": "harmful answer (bypass)",
    "degenerate": "broken text (degenerate)",
}


def shares(rows: pl.DataFrame, by: By, *, most: int = 40) -> pl.DataFrame:
    """Shares of every label per group, stacked from 0 to 1.

    Args:
      rows: of one prompt family; for `category`, of one condition.
      by: the column that makes the groups.
      most: number of groups; the first in the table's order are kept.

    Returns:
      One line per group and label that occurs in the table, with columns group, label, k, n,
      share, low, high (Wilson 95 %), start and end (of the stacked segment).
    """
    groups = rows[by].unique(maintain_order=True).head(most).to_list()
    there = [label for label in WORDS if label in set(rows["label"].unique())]
    counts = {
        (group, label): k
        for group, label, k in rows.group_by(by, "label").len().select(by, "label", "len").rows()
    }
    lines = []
    for group in groups:
        n = sum(counts.get((group, label), 0) for label in there)
        before = 0
        for label in there:
            k = counts.get((group, label), 0)
            low, high = wilson(k, n)
            line = {"group": group, "label": label, "k": k, "n": n, "share": k / n}
            ends = {"low": low, "high": high, "start": before / n, "end": (before + k) / n}
            lines.append({**line, **ends})
            before += k
    schema = {"group": pl.String, "label": pl.String, "k": pl.Int64, "n": pl.Int64}
    floats = dict.fromkeys(("share", "low", "high", "start", "end"), pl.Float64)
    return pl.DataFrame(lines, schema={**schema, **floats})


def whiskers(table: pl.DataFrame) -> pl.DataFrame:
    """Intervals placed on the stacked bars of `shares`: columns group, label, from, to.

    Refusals are stacked first, so their interval is drawn from the bar's start. Bypasses and
    degenerate replies are stacked last, so theirs are drawn backwards from the end of their
    segment. The other labels get no interval.
    """
    label, end = pl.col("label"), pl.col("end")
    return table.filter(label.is_in(["refusal", "bypass", "degenerate"])).select(
        "group",
        "label",
        pl.when(label == "refusal").then(pl.col("low")).otherwise(end - pl.col("high")).clip(0, 1)
        .alias("from"),
        pl.when(label == "refusal").then(pl.col("high")).otherwise(end - pl.col("low")).clip(0, 1)
        .alias("to"),
    )  # fmt: skip
