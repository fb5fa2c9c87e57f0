"""Charts of the geometry notebook; their tables come from `evidence.cosines`."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from jaxsteer.evidence.charts import marks
from jaxsteer.evidence.cosines import Components, Window
from jaxsteer.words import count, counted, layer_list, percent, signed

CHANCE = marks.PALETTE["baseline"]
SIGNED = alt.Axis(format="+.1f", tickCount=5)
PERMUTED = "grey: 95 % of cosines after shuffling labels"
KINDS: dict[str, marks.Role] = {"named opposites": "persona", "other pairs": "baseline"}
DASHES = [[1, 0], [6, 4], [2, 3]]


def span(window: Window) -> str:
    """A window in words.

    >>> span((3, 3)), span((0, 29))
    ('layer 3', 'layers 0..29')
    """
    first, last = window
    return f"{'layer' if first == last else 'layers'} {layer_list(range(first, last + 1))}"


def pair_finding(table: pl.DataFrame) -> str:
    """What one pair's cosines say, against chance where that was measured."""
    there = table.drop_nulls("cosine")
    if not there.height:
        return f"{table['pair'][0]}: no layer has a cosine"
    ends = dict.fromkeys(signed(f(there["cosine"].to_list())) for f in (min, max))
    words = f"{table['pair'][0]}: cosine {' to '.join(ends)}"
    return f"{words}, {_beyond(there, 'layer')}"


def _beyond(table: pl.DataFrame, noun: str) -> str:
    """How many of a table's cosines are beyond chance."""
    tested = table.drop_nulls(["cosine", "low"])
    if not tested.height:
        return "chance not measured"
    n = tested.filter(~pl.col("cosine").is_between("low", "high")).height
    share = percent(n / tested.height)
    return f"beyond chance at {n} of {counted(tested.height, noun)} ({share}; chance gives 5 %)"


def pair_chart(
    table: pl.DataFrame,
    random: pl.DataFrame,
    paper: pl.DataFrame | None = None,
    window: Window | None = None,
) -> alt.LayerChart:
    """One pair over layers, with its permutation null and the random controls; brush `layers`.

    Args:
      table: one pair's lines of `cosines.pairs`.
      random: `cosines.random_cosines` of one of the two.
      paper: `cosines.paper`, drawn as marks beside the line.
      window: layers that are brushed from the beginning.
    """
    last = int(table["layer"].max())  # type: ignore[arg-type]
    x = marks.layer_axis(int(table["layer"].min()), last)  # type: ignore[arg-type]
    ends = [*table["cosine"], *table["low"], *table["high"], *random["low"], *random["high"]]
    ends += [] if paper is None else paper["cosine"].to_list()
    reach = 1.15 * max([abs(v) for v in ends if v is not None] + [0.1])
    y = alt.Y("cosine:Q", title="cosine", scale=marks.symmetric(reach), axis=SIGNED)
    layers = _pair_layers(table, x, y, random)
    brushed: dict[str, Any] = {}
    if window:
        brushed = {"value": {"x": [window[0] - 0.4, window[1] + 0.4]}}
    brush = alt.selection_interval(name="layers", encodings=["x"], **brushed)
    layers[-1] = layers[-1].add_params(brush)
    if paper is not None:
        layers += _paper_marks(paper, x, y, reach)
    parts = ["one cosine a layer"]
    null = table.drop_nulls(["low", "high"])
    if null.height:
        parts.append(f"{PERMUTED} ({count(null['relabellings'][0] or 0)} ways)")
    if random.height:
        parts.append(f"mauve: {counted(random['n'][0], 'random direction')}")
    detail = "; ".join(parts) + ". Drag across layers to choose a window"
    return marks.wide(layers, pair_finding(table), detail, 280)


def _pair_layers(
    table: pl.DataFrame, x: alt.X, y: alt.Y, random: pl.DataFrame | None = None
) -> list[alt.Chart]:
    """Zero, the bands of chance that were measured, and on top the line of the pair's cosines."""
    layers = [marks.zero("y")]
    null = table.drop_nulls(["low", "high"])
    if null.height:
        layers.append(marks.band(null, x, y, CHANCE))
    if random is not None and random.height:
        layers.append(marks.band(random, x, y, marks.PALETTE["random"]))
    chance = {"low": "null, 2.5 %", "high": "null, 97.5 %", "p": "p, this layer alone"}
    shown = marks.tooltip("pair layer", signed="cosine low high", plain="p", titles=chance)
    colour = marks.colour(table["second"][0])
    line = alt.Chart(table).mark_line(color=colour, point=alt.OverlayMarkDef(size=30, color=colour))
    return [*layers, line.encode(x=x, y=y, tooltip=shown)]


def _paper_marks(paper: pl.DataFrame, x: alt.X, y: alt.Y, top: float) -> list[alt.Chart]:
    # The marks may be on the line itself, so their words are above, at two heights.
    heights = [(0.62 + 0.24 * (i % 2)) * top for i in range(paper.height)]
    marked = alt.Chart(paper.with_columns(height=pl.Series(heights))).encode(x=x)
    leader = marked.mark_rule(strokeDash=[2, 3], opacity=0.6).encode(y=y, y2="height:Q")
    point = marked.mark_point(shape="diamond", size=120, filled=False, stroke=marks.INK)
    above = marked.encode(y=marks.on_axis(y, "height"))
    words = marks.labelled(above, "says", align="right", dx=6, dy=-8, fontWeight="normal")
    return [leader, point.encode(y=y, tooltip=marks.tooltip("says")), words]


def pairs_chart(table: pl.DataFrame, names: list[str], window: Window) -> marks.Panels:
    """Small panels, one a pair, over the window, each with its null band.

    Args:
      table: from `cosines.pairs`.
      names: the pairs to draw, in order.
      window: layers to draw.
    """
    inside = table.filter(pl.col("layer").is_between(*window))
    shown = inside.filter(pl.col("pair").is_in(names))
    reach = shown.select(pl.max_horizontal(pl.col("cosine", "low", "high").abs().max())).item()
    x = marks.layer_axis(*window, ticks=6)
    y = alt.Y("cosine:Q", title="cosine", scale=marks.symmetric(1.1 * (reach or 1)), axis=SIGNED)
    some = _some(len(names), table["pair"].n_unique(), "pair")
    null = shown["low"].count() > 0
    return marks.Panels(
        finding=f"{span(window).capitalize()}, {some}: {_beyond(shown, 'cosine')}",
        detail="one cosine a layer" + (f"; {PERMUTED}" if null else ""),
        charts=[
            marks.panel(_pair_layers(shown.filter(pl.col("pair") == name), x, y), name)
            for name in names
        ],
    )


def _some(shown: int, total: int, noun: str) -> str:
    """How many of all are shown, in words."""
    if shown < total:
        return f"{shown} of {counted(total, noun)}"
    return f"the only {noun}" if total == 1 else f"all {counted(total, noun)}"


def matrix_chart(
    cells: pl.DataFrame, order: list[str], window: Window, total: int | None = None
) -> alt.LayerChart:
    """The square of mean cosines in hierarchical order; rings mark cells within chance.

    Args:
      cells: from `cosines.matrix_table`.
      order: names, similar ones beside each other.
      window: the layers averaged.
      total: how many directions there are, if more than are drawn.
    """
    size = max(16, min(64, 560 // max(len(order), 1)))
    x = alt.X("column:N", sort=order, title=None, axis=alt.Axis(labelAngle=-40, orient="bottom"))
    y = alt.Y("row:N", sort=order, title=None)
    limit = float(cells["cosine"].abs().max() or 1)  # type: ignore[arg-type]
    legend = alt.Legend(title="mean cosine", format="+.2~g", values=[-limit, 0, limit])
    chance = {"low": "null, low", "high": "null, high"}
    shown = marks.tooltip("row column chance", signed="cosine low high", titles=chance)
    base = alt.Chart(cells).encode(x=x, y=y)
    colour = alt.Color("cosine:Q", scale=marks.around_zero(limit), legend=legend)
    rect = base.mark_rect(stroke=marks.INK, strokeOpacity=0.12)
    layers = [rect.encode(color=colour, tooltip=shown)]
    within = cells.filter(pl.col("chance") == "within chance")
    if within.height:
        ring = alt.Chart(within).encode(x=x, y=y)
        mark: dict[str, Any] = {"size": 0.55 * size * size, "filled": False, "strokeDash": [2, 3]}
        layers.append(ring.mark_point(stroke=marks.INK, opacity=0.6, **mark))
    if size >= 32:
        layers.append(base.mark_text(fontSize=11).encode(text=alt.Text("cosine:Q", format="+.2f")))
    most = cells.sort(pl.col("cosine").abs(), descending=True, nulls_last=True).row(0, named=True)
    strongest = f"the strongest of {cells.height // 2} mean cosines"
    finding = (
        f"{span(window).capitalize()}: {strongest if cells.height > 2 else 'the mean cosine'} is "
        f"{most['row']} · {most['column']}, {signed(most['cosine'])}"
    )
    detail = _some(len(order), total or len(order), "direction")
    if within.height:
        detail += "; dashed ring: within the mean 95 % null range of the pair"
    return marks.wide(layers, finding, detail, size * len(order))


def extremes_chart(table: pl.DataFrame, total: int, window: Window) -> alt.LayerChart:
    """Pairs from most opposed to most aligned: mean, range over the window, and null range.

    Args:
      table: from `cosines.extremes`.
      total: how many pairs there are in all.
      window: the layers averaged.
    """
    opposite, other = map(pl.lit, KINDS)
    shown = table.with_columns(kind=pl.when("opposite").then(opposite).otherwise(other))
    x = alt.X("cosine:Q", title="mean cosine over the window", axis=SIGNED)
    y = marks.row_axis("pair", above=marks.ROW)
    roles = marks.by_role("kind", KINDS, legend=alt.Legend() if shown["opposite"].any() else None)
    tips = marks.tooltip("pair kind layers", signed="cosine least most")
    dots = marks.dots(shown, x, y, low="least", high="most", tooltip=tips, **roles)
    layers: list[Any] = [marks.zero("x"), dots]
    null = shown.drop_nulls("low")
    if null.height:
        layers.insert(0, marks.range_bar(null, x, y, CHANCE))
    first = shown.row(0, named=True)
    most = "Most opposed" if first["cosine"] < 0 else "No pair is opposed; the least aligned is"
    finding = f"{most} {first['pair']}, mean cosine {signed(first['cosine'])} over {span(window)}"
    some = _some(shown.height, total, "pair")
    detail = f"{some}; line: smallest to largest over the layers"
    detail += "; grey: mean 95 % null range" if null.height else ""
    return marks.wide(layers, finding, detail, marks.ROW * shown.height)


def components_chart(found: Components, window: Window) -> alt.LayerChart:
    """The directions on their first two principal components, labelled."""
    n, shares = found.table.height, found.shares
    reach = float(np.abs(found.table.select("x", "y").to_numpy()).max(initial=0)) or 1.0
    first, second = (percent(float(share)) for share in [*shares[:2], 0.0][:2])
    axis: dict[str, Any] = {"scale": marks.symmetric(1.35 * reach), "axis": SIGNED}
    encodings = marks.by_role("name", marks.roles(found.table["name"]), legend=None)
    base = alt.Chart(found.table).encode(
        x=alt.X("x:Q", title=f"component 1 ({first} of variance)", **axis),
        y=alt.Y("y:Q", title=f"component 2 ({second} of variance)", **axis),
        color=encodings["color"],
        tooltip=marks.tooltip("name", signed="x y"),
    )
    arrow = base.mark_rule(strokeWidth=1.5, opacity=0.5).encode(x2=alt.datum(0), y2=alt.datum(0))
    points = base.mark_point(size=90).encode(shape=encodings["shape"])
    layers = [marks.zero("x"), marks.zero("y"), arrow, points, marks.labelled(base, "name")]
    finding = f"Two components hold {percent(min(1.0, float(shares[:2].sum())))} of the variance"
    finding += f" of {n} directions, {span(window)}"
    finding += ", as of any three: they lie in a plane" if n == 3 else ""
    detail = f"centred; {n} perpendicular directions would give each component "
    detail += f"{percent(1 / max(n - 1, 1))}. The points are the data: no interval"
    return marks.wide(layers, finding, detail, 400)


def reliability_chart(table: pl.DataFrame, window: Window) -> marks.Panels:
    """Split-half reliability over the window, a panel a direction, a line a unit, with intervals.

    Args:
      table: from `cosines.reliability`; at least one line.
      window: layers to draw.
    """
    x = marks.layer_axis(*window, ticks=6)
    worst = table.group_by("direction", "unit").agg(pl.col("mean").mean()).sort("mean")
    least = worst.row(0, named=True)
    return marks.Panels(
        finding=f"Least reliable over {span(window)}: {least['direction']} halved by "
        f"{least['unit']}, mean cosine {signed(least['mean'])}",
        detail="cosine of the directions of two random halves; band: 95 % of the halvings",
        charts=_agreements(table, x, "split-half cosine"),
    )


def _agreements(table: pl.DataFrame, x: alt.X, title: str) -> list[alt.LayerChart]:
    """A panel a direction: how far halves agree, a line a unit, each in its band."""
    low = min(0.0, float(table["low"].min()))  # type: ignore[arg-type]
    y = alt.Y("mean:Q", title=title, scale=alt.Scale(domain=[low, 1], nice=False))
    made, hover = [], [c for c in ("direction", "unit", "units", "layer") if c in table.columns]
    colours = marks.roles(table["direction"].unique(maintain_order=True))
    for (name,), part in table.partition_by("direction", as_dict=True, maintain_order=True).items():
        colour = marks.PALETTE[colours[str(name)]]
        units = part["unit"].unique(maintain_order=True).to_list()
        dashes = alt.Scale(domain=units, range=DASHES[: len(units)])
        line = alt.Chart(part).mark_line(
            color=colour, point=alt.OverlayMarkDef(size=20, color=colour)
        )
        line = line.encode(
            x=x,
            y=y,
            strokeDash=alt.StrokeDash("unit:N", scale=dashes, legend=None),
            tooltip=marks.tooltip(" ".join(hover), signed="mean low high"),
        )
        many = dict(part.select("unit", "units").iter_rows()) if "layer" in hover else {}
        words = ", ".join(
            f"{'– –' if i else '—'} {unit}" + (f" (n = {many[unit]})" if many else "")
            for i, unit in enumerate(units)
        )
        layers = [marks.band(part, x, y, colour, detail="unit:N"), line]
        made.append(marks.panel(layers, str(name), subtitle=words, subtitleFontSize=11.5))
    return made


def growth_chart(table: pl.DataFrame, unit: str, window: Window) -> marks.Panels:
    """How far halves agree by the number of units in each, a panel a direction.

    Args:
      table: from `cosines.growth`; at least one line of the unit.
      unit: what is counted.
      window: the layers averaged.
    """
    shown = table.filter(pl.col("unit") == unit)
    x = alt.X(
        "units:Q",
        title=f"{unit}s a side in each half",
        scale=alt.Scale(type="log", base=2, nice=False),
        axis=alt.Axis(values=sorted(set(shown["units"])), format="d"),
    )
    least = shown.sort("units", "mean", descending=[True, False]).row(0, named=True)
    return marks.Panels(
        finding=f"With {counted(least['units'], unit)} a side in each half, {least['direction']} "
        f"agrees with itself by {signed(least['mean'])} over {span(window)}",
        detail="mean over halvings and layers; band: range over layers",
        charts=_agreements(shown, x, "cosine of the halves"),
    )


def norm_chart(table: pl.DataFrame, window: Window) -> alt.LayerChart:
    """Norms over the window on a logarithmic axis, beside the norm of the stream itself.

    Args:
      table: from `cosines.norms`.
      window: layers to draw.
    """
    stream = table.drop_nulls("residual").unique("layer", keep="first").sort("layer")
    long = pl.concat(
        [
            table.select("direction", "layer", "norm"),
            stream.select(pl.lit("residual stream").alias("direction"), "layer", norm="residual"),
        ]
    ).filter(pl.col("norm") > 0)
    names = long["direction"].unique(maintain_order=True).to_list()
    found = marks.roles(names) | {"residual stream": "baseline"}
    x = marks.layer_axis(*window, room=0.3)
    y = alt.Y(
        "norm:Q",
        title="norm (logarithmic)",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(values=[10.0**k for k in range(-6, 9)], format="~g"),
    )
    colour = marks.coloured("direction", found, legend=None)
    base = alt.Chart(long).encode(x=x, y=y, color=colour)
    line = base.mark_line(point=alt.OverlayMarkDef(size=24))
    layers = [line.encode(tooltip=marks.tooltip("direction layer", plain="norm"))]
    if len(names) <= 12:
        ends = alt.Chart(_apart(long, 260)).encode(x=x, y=marks.on_axis(y, "at"), color=colour)
        layers.append(marks.labelled(ends, "direction", fontSize=12))
    shares = table.drop_nulls("share")
    if shares.height:
        top = shares.sort("share", descending=True).row(0, named=True)
        finding = (
            f"Over {span(window)} a natural norm is at most {percent(top['share'])} of the "
            f"stream's ({top['direction']}, layer {top['layer']})"
        )
    else:
        finding = "The norm of the stream was not recorded with these directions"
    return marks.wide(
        layers, finding, "one norm a layer, in the model's own units: no interval", 260
    )


def _apart(long: pl.DataFrame, height: int) -> pl.DataFrame:
    """The lines' ends, with `at`: heights on the logarithmic axis moved until no words touch."""
    ends = long.filter(pl.col("layer") == pl.col("layer").max()).sort("norm")
    logs = [math.log(norm) for norm in long["norm"]]
    gap = 15 * (max(logs) - min(logs) or 1.0) / height
    at: list[float] = []
    for norm in ends["norm"]:
        at.append(max(math.log(norm), at[-1] + gap if at else -math.inf))
    return ends.with_columns(at=pl.Series([math.exp(value) for value in at], dtype=pl.Float64))
