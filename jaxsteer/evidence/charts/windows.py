"""Charts of the layer-window notebook; their tables come from `evidence.layer_windows`."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from jaxsteer.evidence.charts import theme
from jaxsteer.evidence.charts.marks import titled
from jaxsteer.evidence.layer_windows import NONE, Map
from jaxsteer.words import p_equals, percent, signed, span

WIDE, HIGH = 66, 46
BROKEN = 0.1  # cells with more degenerate replies are marked
AXES: dict[Map, tuple[str, str]] = {
    "knockout": ("layers the direction is projected out of (resid_post)", "steer, natural norms"),
    "refusal": ("layer refusal is added at (resid_post)", "refusal added, natural norms"),
}
COLUMNS: dict[Map, str] = {"knockout": "not removed", "refusal": "not added"}


def map_finding(maps: pl.DataFrame, which: Map) -> str:
    """What a map shows at its largest strength, computed from its cells."""
    mine = maps.filter(pl.col("map") == which)
    placed = mine.filter((pl.col("column") != NONE) & ~pl.col("cancels"))
    if not placed.height:
        return "Every cell of this map cancels by algebra: it shows nothing"
    top = placed.filter(pl.col("strength") == placed["strength"].max())
    best = top.sort("rate", "order", descending=[True, False]).row(0, named=True)
    much = "1 norm" if best["norms"] == "1" else f"{best['norms']} norms"
    verb = "Removed" if which == "knockout" else f"{much} of refusal added"
    there = f"{verb} at {best['column']}, refusal is {percent(best['rate'])}"
    there += f" ({span(best['low'], best['high'])})"
    control = maps.filter(pl.col("condition") == best["control"]).head(1)
    if not control.height:
        return f"{there}, the most of {top.height} places; there is no control to set beside it"
    rate = control["rate"].item()
    alone = f"with the steer alone {percent(rate)}"
    if best["rate"] > rate:
        return f"{there}, the most of {top.height} places; {alone}"
    return f"At none of {top.height} places is refusal above the steer's own: {there}; {alone}"


def map_chart(maps: pl.DataFrame, which: Map) -> alt.LayerChart:
    """One map: refusal by place and strength, its interval in the cell, hatched where it cancels.

    Brush `cells` to choose. The interval, n and the broken replies also show on hover.

    Args:
      maps: from `windows.table`.
      which: the map to draw; it has at least one cell.
    """
    mine = maps.filter(pl.col("map") == which).sort("order")
    columns = mine["column"].unique(maintain_order=True).to_list()
    norms = mine.sort("strength", descending=True)["norms"].unique(maintain_order=True).to_list()
    shown = mine.with_columns(
        ends=pl.format("{}–{}", *((pl.col(k) * 100).round(0).cast(pl.Int64) for k in _ENDS))
    )
    across, up = AXES[which]
    words = f"datum.value == '{NONE}' ? '{COLUMNS[which]}' : datum.value"
    axis = alt.Axis(labelAngle=0, labelExpr=words, orient="bottom", labelLimit=WIDE + 14)
    x = alt.X("column:N", sort=columns, title=across, axis=axis)
    y = alt.Y("norms:N", sort=norms, title=up)
    # The frame must show on top of filled cells, light and dark.
    frame = alt.BrushConfig(fill=theme.INK, fillOpacity=0.05, stroke=theme.INK, strokeWidth=2)
    brush = alt.selection_interval(name="cells", encodings=["x", "y"], mark=frame)
    blue = theme.PALETTE["refusal"]
    scale = alt.Scale(domain=[0, 1], range=[blue + "08", blue + "b0"])
    legend = alt.Legend(title="refused", format=theme.PERCENT, values=[0, 0.5, 1])
    base = alt.Chart(shown).encode(x=x, y=y)
    rect = base.mark_rect(stroke=theme.INK, strokeOpacity=0.18, cornerRadius=2)
    layers: list[Any] = [
        rect.encode(
            color=alt.Color("rate:Q", scale=scale, legend=legend), tooltip=_tooltip()
        ).add_params(brush)
    ]
    layers += _marked(shown, x, y)
    text = base.mark_text(dy=-6, fontWeight="bold", fontSize=13)
    layers.append(text.encode(text=alt.Text("rate:Q", format=theme.PERCENT)))
    layers.append(base.mark_text(dy=10, fontSize=10.5, opacity=0.85).encode(text="ends:N"))
    chart = alt.LayerChart(layer=layers).properties(
        width=WIDE * len(columns), height=HIGH * len(norms)
    )
    return titled(chart, map_finding(maps, which), _map_detail(mine), wrap=78)


_ENDS = ("low", "high")


def _tooltip() -> list[Any]:
    return [
        "condition:N",
        alt.Tooltip("rate:Q", title="refused", format=theme.PERCENT),
        alt.Tooltip("low:Q", title="95 % from", format=theme.PERCENT),
        alt.Tooltip("high:Q", title="95 % to", format=theme.PERCENT),
        alt.Tooltip("n:Q", title="prompts"),
        alt.Tooltip("degenerate:Q", title="broken replies", format=theme.PERCENT),
        alt.Tooltip("cancels:N", title="cancels by algebra"),
    ]


def _map_detail(mine: pl.DataFrame) -> str:
    parts = [f"{counted(mine)} harmful prompts a cell; small: Wilson 95 % interval, %"]
    if mine["cancels"].any():
        parts.append("hatched: the steer cancels by algebra")
    if mine.filter(_broken()).height:
        parts.append(f"red corner: broken replies above {percent(BROKEN)}")
    return "; ".join(parts) + ". Drag over cells to choose them"


def counted(table: pl.DataFrame) -> str:
    """The number behind each line of a table: `n = 40`, or its range."""
    n = sorted(table["n"].unique().to_list())
    return f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"


def _broken() -> pl.Expr:
    return pl.col("degenerate") > BROKEN


def _marked(shown: pl.DataFrame, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """Hatching and corners. A point of size 4 draws its path in pixels around the cell's middle."""
    marks: list[alt.Chart] = []
    cancelled = shown.filter("cancels")
    if cancelled.height:
        hatched = alt.Chart(cancelled).mark_point(
            shape=hatching(WIDE, HIGH),
            size=4,
            filled=False,
            stroke=theme.INK,
            strokeWidth=1,
            opacity=0.4,
        )
        marks.append(hatched.encode(x=x, y=y, tooltip=_tooltip()))
    broken = shown.filter(_broken())
    if broken.height:
        corner = f"M{WIDE / 2 - 12},{-HIGH / 2 + 1}L{WIDE / 2 - 1},{-HIGH / 2 + 1}"
        corner += f"L{WIDE / 2 - 1},{-HIGH / 2 + 12}Z"
        red = alt.Chart(broken).mark_point(
            shape=corner, size=4, filled=True, color=theme.PALETTE["degenerate"], opacity=1
        )
        marks.append(red.encode(x=x, y=y, tooltip=_tooltip()))
    return marks


def hatching(width: float, height: float, step: float = 9) -> str:
    """An SVG path of diagonals that fill a box around the origin, cut at its edges.

    >>> hatching(4, 4, 4)
    'M-2,2L2,-2'
    """
    w, h = width / 2, height / 2
    lines = []
    # A diagonal is x + y = c; at the corners c is plus or minus w + h, where it has no length.
    c = -(w + h) + step
    while c < w + h - 1e-9:
        start, end = (max(-w, c - h), min(h, c + w)), (min(w, c + h), max(-h, c - w))
        lines.append(f"M{start[0]:g},{start[1]:g}L{end[0]:g},{end[1]:g}")
        c += step
    return "".join(lines)


def flips_chart(table: pl.DataFrame) -> alt.LayerChart:
    """Which way refusals flip, a line a cell: gained to the right, lost to the left.

    Args:
      table: from `windows.flip_table`; at least one line.
    """
    order = table["condition"].to_list()
    share = pl.col("raised") / pl.col("n"), -pl.col("lowered") / pl.col("n")
    shown = table.with_columns(
        gained=share[0],
        lost=share[1],
        right=pl.max_horizontal(share[0], "high"),
        words=pl.format("+{} −{} of {}", "raised", "lowered", "n")
        + pl.when("cancels").then(pl.lit(", by algebra")).otherwise(pl.lit("")),
    )
    ends = [pl.col(k).abs().max() for k in ("gained", "lost", "low", "high")]
    reach = max(0.1, shown.select(pl.max_horizontal(*ends)).item())
    scale = alt.Scale(domain=[-1.1 * reach, 1.45 * reach], nice=False)
    axis = alt.Axis(format="+.0%", tickCount=6)
    title = "prompts whose refusal is lost (left) or gained (right)"

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=title, scale=scale, axis=axis)

    y = alt.Y("condition:N", sort=order, title=None, axis=alt.Axis(labelLimit=330))
    base = alt.Chart(shown).encode(y=y)
    tooltip = ["condition:N", "control:N", "raised:Q", "lowered:Q", "n:Q"]
    tooltip += [alt.Tooltip(f"{k}:Q", format=theme.PLAIN) for k in ("p", "p_holm")]  # type: ignore[misc]
    zero = alt.datum(0)
    sides = [("gained", "refusal"), ("lost", "persona")]
    bars = [
        base.mark_bar(color=theme.PALETTE[role], opacity=0.75, height=15).encode(  # type: ignore[index]
            x=x(field), x2=zero, tooltip=tooltip
        )
        for field, role in sides
    ]
    whisker = base.mark_rule(strokeWidth=2, opacity=0.9).encode(x=x("low"), x2="high:Q")
    net = base.mark_point(shape="diamond", size=55, color=theme.INK).encode(x=x("difference"))
    words = base.mark_text(align="left", dx=7).encode(x=x("right"), text="words:N")
    chart = alt.LayerChart(layer=[*bars, whisker, net, words]).properties(
        width=470, height=28 * shown.height
    )
    detail = "diamond and line: net change, paired bootstrap 95 %; n is in every line"
    return titled(chart, flips_finding(table), detail, wrap=86)


def flips_finding(table: pl.DataFrame) -> str:
    """The chosen cells in one sentence."""
    tested = table.filter(~pl.col("cancels"))
    if not tested.height:
        return "Only cells that cancel by algebra are chosen: their flips are no evidence"
    best = tested.sort("p_holm", "p").row(0, named=True)
    clear = tested.filter(pl.col("p_holm") <= 0.05).height
    holm = f"{clear} of {tested.height} chosen cells flip more one way than luck would"
    small = f"smallest {p_equals(best['p_holm'])}, Holm over the cells shown"
    return f"{holm} ({small})"


def depth_chart(table: pl.DataFrame, name: str, phase: str) -> alt.LayerChart:
    """Projections along depth beside the baseline's, a line and band a condition.

    Args:
      table: from `windows.along_depth`; at least one line, few conditions.
      name: the direction projected on.
      phase: `prompt` or `response`.
    """
    names = table["condition"].unique(maintain_order=True).to_list()
    layers = table["layer"].to_list()
    x = alt.X(
        "layer:Q",
        title="layer (resid_post)",
        axis=alt.Axis(tickMinStep=1, format="d"),
        scale=alt.Scale(domain=[min(layers) - 0.5, max(layers) + 0.5], nice=False),
    )
    unit = "moved against the baseline, natural norms"
    y = alt.Y("mean:Q", title=unit)
    palette = [theme.PALETTE[r] for r in ("persona", "refusal", "axis", "degenerate", "random")]
    colours = [palette[i % len(palette)] for i in range(len(names))]
    dashes = [[1, 0], [6, 3], [2, 3], [9, 3, 2, 3], [4, 6]]
    colour = alt.Color("condition:N", scale=alt.Scale(domain=names, range=colours))
    colour = colour.legend(
        title=None, orient="bottom", direction="vertical", labelLimit=500, symbolOpacity=1
    )
    dash = alt.StrokeDash(
        "condition:N",
        scale=alt.Scale(domain=names, range=[dashes[i % 5] for i in range(len(names))]),
    )
    band = alt.Chart(table).mark_area(opacity=0.18).encode(
        x=x, y=alt.Y("low:Q", title=unit), y2="high:Q", color=colour
    )  # fmt: skip
    tooltip = ["condition:N", "layer:Q", "n:Q"]
    tooltip += [alt.Tooltip(f"{k}:Q", format=theme.SIGNED) for k in ("mean", "low", "high")]  # type: ignore[misc]
    line = alt.Chart(table).mark_line().encode(
        x=x, y=y, color=colour, strokeDash=dash, tooltip=tooltip
    )  # fmt: skip
    zero = alt.Chart(pl.DataFrame({"mean": [0.0]})).mark_rule(opacity=0.4).encode(y=y)
    chart = alt.LayerChart(layer=[zero, band, line]).properties(width=640, height=280)
    most = table.sort(pl.col("mean").abs(), descending=True).row(0, named=True)
    finding = (
        f"{most['condition']} moves the projection on {name} furthest: {signed(most['mean'])} "
        f"natural norms at layer {most['layer']}"
    )
    tokens = "prompt tokens" if phase == "prompt" else "reply tokens"
    detail = f"mean over {tokens}, {counted(table)} prompts, paired; band: mean ± 1.96 s.e."
    return titled(chart, finding, detail, wrap=86)


def mcnemar_table(table: pl.DataFrame) -> pl.DataFrame:
    """The flips as a table to read: counts, net change with its interval, p, and the twin's check.

    `unlike twin` counts prompts whose label differs from the same knockout without steering; where
    the steer cancels by algebra it must be 0.
    """
    percents = [(pl.col(k) * 100).round(0) for k in ("difference", "low", "high")]
    return table.select(
        pl.col("condition"),
        pl.col("control").alias("paired with"),
        pl.col("n"),
        pl.col("raised").alias("refusals gained"),
        pl.col("lowered").alias("lost"),
        percents[0].alias("net, points"),
        pl.format("{} to {}", *(p.cast(pl.Int64) for p in percents[1:])).alias("95 %"),
        pl.col("p").round(4).alias("McNemar p"),
        pl.col("p_holm").round(4).alias("p, Holm"),
        pl.col("unlike").alias("unlike twin"),
        pl.when("cancels")
        .then(pl.lit("true by algebra, no evidence"))
        .otherwise(pl.lit(""))
        .alias("note"),
    )
