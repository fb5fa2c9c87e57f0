"""Receipts in the fifth notebook: what one states, its checks, and two of them compared."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from jaxsteer.evidence.charts import theme
from jaxsteer.evidence.charts.controls import markdown_table
from jaxsteer.evidence.charts.marks import reference, titled, with_interval
from jaxsteer.receipt.compare import Comparison, Line
from jaxsteer.receipt.statement import Predicate
from jaxsteer.receipt.verify import Check
from jaxsteer.words import points

SIGNS = {"ok": "✓", "mismatch": "✗", "unchecked": "–"}
MOST_LINES = 24


def checks_table(checks: Sequence[Check]) -> str:
    """Checks of a receipt, in Markdown."""
    lines = [(f"{SIGNS[c.status]} {c.status}", c.what, c.detail) for c in checks]
    return markdown_table(["", "what was checked", "detail"], lines)


def moved_first(lines: Sequence[Line]) -> list[Line]:
    """Lines in the order in which they are drawn: moved ones, then the largest differences."""
    return sorted(lines, key=lambda line: (not line.moved, -abs(line.difference)))[:MOST_LINES]


def diff_chart(found: Comparison) -> alt.LayerChart:
    """Two receipts compared: each metric's difference with its interval, moved ones in colour."""
    moved = [line for line in found.lines if line.moved]
    shown = moved_first(found.lines)
    table = pl.DataFrame(
        [
            {
                "row": f"{i:02d} {line.condition} · {line.metric}",
                "difference": line.difference,
                "low": line.low,
                "high": line.high,
                "kind": "moved" if line.moved else "not shown to have moved",
                "first": line.first,
                "second": line.second,
            }
            for i, line in enumerate(shown)
        ]
    )
    reach = 1.05 * max(0.2, *(abs(v) for line in shown for v in (line.low, line.high)))
    x = alt.X(
        "difference:Q",
        title="second receipt minus first, in points of 100 prompts",
        axis=alt.Axis(format="+.0%", tickCount=6, labelExpr="replace(datum.label, '%', '')"),
        scale=alt.Scale(domain=[-reach, reach], nice=False),
    )
    axis = alt.Axis(labelExpr="slice(datum.label, 3)", labelLimit=330)
    y = alt.Y("row:N", sort=None, title=None, axis=axis)
    kinds = ["moved", "not shown to have moved"]
    ink = [theme.PALETTE["persona"], theme.PALETTE["baseline"]]
    legend = alt.Legend(offset=22)
    scale = alt.Scale(domain=kinds, range=ink)
    colour = alt.Color("kind:N", title=None, scale=scale, legend=legend)
    shapes = alt.Scale(domain=kinds, range=["diamond", "circle"])
    tooltip = ["row:N", *(alt.Tooltip(f"{k}:Q", format=".1%") for k in ("first", "second"))]
    dots = alt.Chart(table).mark_point(size=80)
    dots = dots.encode(
        x=x,
        y=y,
        color=colour,
        shape=alt.Shape("kind:N", title=None, scale=shapes, legend=legend),
        tooltip=tooltip,
    )
    finding = f"{len(moved)} of {len(found.lines)} figures have moved"
    if moved:
        most = moved_first(moved)[0]
        finding += f", most {most.metric} under {most.condition} ({points(most.difference)} points)"
    sizes = sorted({n for line in found.lines for n in (line.n_first, line.n_second)})
    detail = (
        f"Newcombe 95 % interval of each, not corrected for their number; n = {sizes[0]} to "
        f"{sizes[-1]} prompts; {len(shown)} of {len(found.lines)} drawn"
    )
    layers = [reference(0.0, "x", "no difference"), with_interval(dots, "x", "low", "high")]
    chart = alt.LayerChart(layer=layers).properties(width=400, height=max(60, 22 * len(shown)))
    return titled(chart, finding, detail)


def facts_table(p: Predicate) -> str:
    """What a receipt is about, in Markdown."""
    facts = [
        ("study", f"{p.study.name}: {p.study.about}"),
        ("model", f"{p.model.name}, {p.model.dtype}"),
        ("weights sha256", p.model.weights_sha256),
        ("prompts", ", ".join(f"{known.n} {family}" for family, known in p.prompts.items())),
        ("policy", f"{p.policy.name} {p.policy.version}"),
        ("layers", ", ".join(f"{k} resid_post.{v}" for k, v in p.steering.layers.items())),
        ("dose", f"{p.steering.dose:g} natural norms"),
        ("run", f"{p.date}, {p.tool}"),
        ("digest", p.digest.sha256),
    ]
    return markdown_table(["", "as the receipt states it"], facts)


def changed_table(found: Comparison) -> str:
    """What else differs between two receipts, in Markdown."""
    lines = [
        ("what else changed", ", ".join(found.changed) or "nothing"),
        ("conditions of the first alone", ", ".join(found.only_first) or "none"),
        ("conditions of the second alone", ", ".join(found.only_second) or "none"),
    ]
    return markdown_table(["", ""], lines)
