"""Receipts in the fifth notebook: what one states, its checks, and two of them compared."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from jaxsteer.evidence.charts import marks
from jaxsteer.evidence.charts.marks import markdown_table
from jaxsteer.receipt.compare import Comparison, Line
from jaxsteer.receipt.verify import Check
from jaxsteer.words import counted, extent, points

SIGNS = {"ok": "✓", "mismatch": "✗", "unchecked": "–"}
MOST_LINES = 24
KINDS: dict[str, marks.Role] = {"moved": "persona", "not shown to have moved": "baseline"}


def checks_table(checks: Sequence[Check]) -> str:
    """Checks of a receipt, in Markdown."""
    lines = [(f"{SIGNS[c.status]} {c.status}", c.what, c.detail) for c in checks]
    return markdown_table(["", "what was checked", "detail"], lines)


def moved_first(lines: Sequence[Line]) -> list[Line]:
    """Lines in the order in which they are drawn: moved ones, then the largest differences."""
    return sorted(lines, key=lambda line: (not line.moved, -abs(line.difference)))[:MOST_LINES]


def diff_chart(found: Comparison) -> alt.LayerChart:
    """Two receipts compared: each metric's difference with its interval, moved ones in colour."""
    drawn = moved_first(found.lines)
    names = marks.numbered(f"{line.condition} · {line.metric} · {line.prompts}" for line in drawn)
    moved, unmoved = KINDS
    kinds = [moved if line.moved else unmoved for line in drawn]
    named = pl.DataFrame(drawn).with_columns(row=pl.Series(names), kind=pl.Series(kinds))
    table = named.select(
        "row", "difference", "low", "high", "kind", "condition", "metric", "first", "second"
    )
    ends = [end for line in drawn for end in (line.low, line.high)]
    title = "second receipt minus first, in points of 100 prompts"
    dots = marks.dots(
        table,
        marks.points_axis("difference", title, ends),
        marks.row_axis("row", numbers=True, above=marks.ROW),
        tooltip=marks.tooltip("condition metric", percent="first second low high"),
        **marks.by_role("kind", KINDS, legend=alt.Legend(offset=22)),
    )
    count = sum(line.moved for line in found.lines)
    finding = f"Moved: {count or 'none'} of {counted(len(found.lines), 'figure')}"
    if count:
        most = drawn[0]
        finding += f", most {most.metric} under {most.condition} ({points(most.difference)} points)"
    sizes = extent((n for line in found.lines for n in (line.n_first, line.n_second)), "prompt")
    detail = f"Newcombe 95 % interval of each, not corrected for their number; n = {sizes}"
    if len(drawn) < len(found.lines):
        detail += f"; {len(drawn)} of {len(found.lines)} drawn"
    layers = [marks.reference(0.0, "no difference"), dots]
    return marks.wide(layers, finding, detail, marks.ROW * len(drawn))


def changed_table(found: Comparison) -> str:
    """What else differs between two receipts, in Markdown."""
    lines = [
        ("what else changed", ", ".join(found.changed) or "nothing"),
        ("conditions of the first alone", ", ".join(found.only_first) or "none"),
        ("conditions of the second alone", ", ".join(found.only_second) or "none"),
    ]
    return markdown_table(["", ""], lines)
