"""Charts of the geometry notebook; their tables come from `evidence.cosines`."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from jaxsteer.evidence.charts import theme
from jaxsteer.evidence.charts.marks import labelled, titled
from jaxsteer.evidence.cosines import Components, Window
from jaxsteer.words import percent, signed

LAYER = "layer (resid_post)"
COSINE = "cosine"
BAND = theme.PALETTE["baseline"]
SIGNED = alt.Axis(format="+.1f", tickCount=5)


def span(window: Window) -> str:
    """A window in words.

    >>> span((3, 3)), span((0, 29))
    ('layer 3', 'layers 0 to 29')
    """
    first, last = window
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def shuffles(count: float) -> str:
    """How many ways there are to shuffle labels, in words.

    >>> shuffles(12870), shuffles(5.8e75)
    ('12,870', 'about 10^75')
    """
    return f"{count:,.0f}" if count < 1e6 else f"about 10^{math.floor(math.log10(count))}"


def _layers(first: int, last: int, ticks: int = 10) -> alt.X:
    scale = alt.Scale(domain=[first - 0.5, last + 0.5], nice=False)
    step = max(1, -(-(last - first) // ticks))
    axis = alt.Axis(values=list(range(first, last + 1, step)), format="d")
    return alt.X("layer:Q", title=LAYER, scale=scale, axis=axis)


def pair_finding(table: pl.DataFrame) -> str:
    """What one pair's cosines say, against chance where that was measured."""
    there = table.drop_nulls("cosine")
    if not there.height:
        return f"{table['pair'][0]}: no layer has a cosine"
    values = there["cosine"].to_list()
    words = f"{table['pair'][0]}: cosine {signed(min(values))} to {signed(max(values))}"
    null = there.drop_nulls("low")
    if not null.height:
        return f"{words}; chance was not measured"
    beyond = null.filter(~pl.col("cosine").is_between("low", "high")).height
    return f"{words}, beyond chance at {beyond} of {null.height} layers"


def pair_chart(
    table: pl.DataFrame, random: pl.DataFrame, paper: pl.DataFrame | None = None
) -> alt.LayerChart:
    """One pair over layers, with its permutation null and the random controls; brush `layers`.

    Args:
      table: one pair's lines of `cosines.pairs`.
      random: `cosines.random_cosines` of one of the two.
      paper: `cosines.paper`, drawn as marks beside the line.
    """
    x = _layers(int(table["layer"].min()), int(table["layer"].max()))  # type: ignore[arg-type]
    ends = [*table["cosine"], *table["low"], *table["high"], *random["low"], *random["high"]]
    ends += [] if paper is None else paper["cosine"].to_list()
    reach = max([abs(v) for v in ends if v is not None] + [0.1])
    domain = [-1.15 * reach, 1.15 * reach]
    y_scale = alt.Scale(domain=domain, nice=False)
    y = alt.Y("cosine:Q", title=COSINE, scale=y_scale, axis=SIGNED)
    colour = theme.colour(table["second"][0])
    zero = alt.Chart(pl.DataFrame({"cosine": [0.0]})).mark_rule(opacity=0.35).encode(y=y)
    layers: list[Any] = [zero]
    null = table.drop_nulls(["low", "high"])
    if null.height:
        layers.append(_band(null, x, y_scale, BAND, 0.22))
    if random.height:
        layers.append(_band(random, x, y_scale, theme.PALETTE["random"], 0.3))
    tooltip = [
        alt.Tooltip("layer:Q", title=LAYER),
        alt.Tooltip("cosine:Q", format=theme.SIGNED),
        alt.Tooltip("low:Q", title="null, 2.5 %", format=theme.SIGNED),
        alt.Tooltip("high:Q", title="null, 97.5 %", format=theme.SIGNED),
        alt.Tooltip("p:Q", title="p, this layer alone", format=theme.PLAIN),
    ]
    brush = alt.selection_interval(name="layers", encodings=["x"])
    point = alt.OverlayMarkDef(size=34, color=colour)
    line = alt.Chart(table).mark_line(color=colour, point=point)
    layers.append(line.encode(x=x, y=y, tooltip=tooltip).add_params(brush))
    if paper is not None:
        layers += _paper_marks(paper, x, y_scale, domain[1])
    chart = alt.LayerChart(layer=layers).properties(width=640, height=280)
    return titled(chart, pair_finding(table), _pair_detail(null, random), wrap=84)


def _paper_marks(paper: pl.DataFrame, x: alt.X, scale: alt.Scale, top: float) -> list[alt.Chart]:
    # The marks may lie on the line itself, so their words stand above on leaders of two heights.
    heights = [0.62 * top + 0.24 * top * (i % 2) for i in range(paper.height)]
    marked = alt.Chart(paper.with_columns(height=pl.Series(heights)))
    y = alt.Y("cosine:Q", title=COSINE, scale=scale, axis=SIGNED)
    above = alt.Y("height:Q", title=COSINE, scale=scale, axis=SIGNED)
    leader = marked.mark_rule(strokeDash=[2, 3], opacity=0.6).encode(x=x, y=y, y2="height:Q")
    point = marked.mark_point(shape="diamond", size=120, filled=False, stroke=theme.INK)
    words = labelled(
        marked.encode(x=x, y=above), "says", align="right", dx=6, dy=-8, fontWeight="normal"
    )
    return [leader, point.encode(x=x, y=y, tooltip=["says:N"]), words]


def _pair_detail(null: pl.DataFrame, random: pl.DataFrame) -> str:
    parts = ["one cosine a layer"]
    if null.height:
        ways = shuffles(float(null["relabellings"][0] or 0))
        parts.append(f"grey: 95 % of cosines after shuffling labels ({ways} ways)")
    if random.height:
        parts.append(f"mauve: range over {random['n'][0]} random directions")
    return "; ".join(parts) + ". Drag across layers to choose a window"


def _band(
    table: pl.DataFrame, x: alt.X, scale: alt.Scale, colour: str, opacity: float
) -> alt.Chart:
    y = alt.Y("low:Q", title=COSINE, scale=scale, axis=SIGNED)
    area = alt.Chart(table).mark_area(color=colour, opacity=opacity, interpolate="monotone")
    return area.encode(x=x, y=y, y2="high:Q")


def pairs_chart(table: pl.DataFrame, names: list[str], window: Window) -> alt.ConcatChart:
    """Small panels, one a pair, over the window, each with its null band.

    Args:
      table: from `cosines.pairs`.
      names: the pairs to draw, in order.
      window: layers to draw.
    """
    inside = table.filter(pl.col("layer").is_between(*window))
    shown = inside.filter(pl.col("pair").is_in(names))
    reach = shown.select(pl.max_horizontal(pl.col("cosine", "low", "high").abs().max())).item()
    scale = alt.Scale(domain=[-1.1 * (reach or 1), 1.1 * (reach or 1)], nice=False)
    panels = [
        _pair_panel(shown.filter(pl.col("pair") == name), window, scale, first=not i % 3)
        for i, name in enumerate(names)
    ]
    chart = alt.ConcatChart(concat=panels, columns=3, spacing=18)
    total = table["pair"].n_unique()
    counted = "all" if len(names) == total else f"{len(names)} of {total}"
    tested = shown.drop_nulls(["cosine", "low"])
    beyond = tested.filter(~pl.col("cosine").is_between("low", "high")).height
    finding = f"Over {span(window)}, {counted} pairs: "
    if tested.height:
        share = percent(beyond / tested.height)
        finding += (
            f"{beyond} of {tested.height} cosines ({share}) lie beyond chance; 5 % would by luck"
        )
    else:
        finding += "chance was not measured"
    detail = "cosine a layer; grey: 95 % of cosines after shuffling labels"
    return titled(chart, finding, detail, wrap=92)


def _pair_panel(
    table: pl.DataFrame, window: Window, scale: alt.Scale, *, first: bool
) -> alt.LayerChart:
    x = _layers(*window, ticks=6)
    y = alt.Y("cosine:Q", title=COSINE if first else None, scale=scale, axis=SIGNED)
    colour = theme.colour(table["second"][0])
    line = alt.Chart(table).mark_line(color=colour, point=alt.OverlayMarkDef(size=24, color=colour))
    tooltip = ["pair:N", "layer:Q", alt.Tooltip("cosine:Q", format=theme.SIGNED)]
    zero = alt.Chart(pl.DataFrame({"cosine": [0.0]})).mark_rule(opacity=0.35).encode(y=y)
    null = table.drop_nulls(["low", "high"])
    band = [_band(null, x, scale, BAND, 0.22)] if null.height else []
    layers = [zero, *band, line.encode(x=x, y=y, tooltip=tooltip)]
    title = alt.TitleParams(table["pair"][0], fontSize=13, offset=6)
    return alt.LayerChart(layer=layers).properties(width=195, height=130, title=title)


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
    tooltip = [
        "row:N",
        "column:N",
        alt.Tooltip("cosine:Q", format=theme.SIGNED),
        alt.Tooltip("low:Q", title="null, low", format=theme.SIGNED),
        alt.Tooltip("high:Q", title="null, high", format=theme.SIGNED),
        "chance:N",
    ]
    base = alt.Chart(cells).encode(x=x, y=y)
    colour = alt.Color("cosine:Q", scale=theme.around_zero(limit), legend=legend)
    layers: list[Any] = [base.mark_rect(stroke=theme.INK, strokeOpacity=0.12).encode(
        color=colour, tooltip=tooltip
    )]  # fmt: skip
    within = cells.filter(pl.col("chance") == "within chance")
    if within.height:
        ring = alt.Chart(within).encode(x=x, y=y)
        mark: dict[str, Any] = {"size": 0.55 * size * size, "filled": False, "strokeDash": [2, 3]}
        layers.append(ring.mark_point(stroke=theme.INK, opacity=0.6, **mark))
    if size >= 32:
        layers.append(base.mark_text().encode(text=alt.Text("cosine:Q", format="+.2f")))
    chart = alt.LayerChart(layer=layers).properties(
        width=size * len(order), height=size * len(order)
    )
    most = cells.sort(pl.col("cosine").abs(), descending=True, nulls_last=True).row(0, named=True)
    finding = (
        f"{span(window).capitalize()}: the strongest of {cells.height // 2} mean cosines is "
        f"{most['row']} · {most['column']}, {signed(most['cosine'])}"
    )
    counted = f"{len(order)} of {total}" if total and total > len(order) else f"all {len(order)}"
    detail = f"{counted} directions; dashed ring: within the mean 95 % null range of the pair"
    return titled(chart, finding, detail)


def extremes_chart(table: pl.DataFrame, total: int, window: Window) -> alt.LayerChart:
    """Pairs from most opposed to most aligned: mean, range over the window, and null range.

    Args:
      table: from `cosines.extremes`.
      total: how many pairs there are in all.
      window: the layers averaged.
    """
    kinds = ["named opposites", "other pairs"]
    kind = pl.when("opposite").then(pl.lit(kinds[0])).otherwise(pl.lit(kinds[1]))
    shown = table.with_columns(kind=kind)
    x = alt.X("cosine:Q", title="mean cosine over the window", axis=SIGNED)
    y = alt.Y("pair:N", sort=shown["pair"].to_list(), title=None, axis=alt.Axis(labelLimit=260))
    pair = [theme.PALETTE["persona"], theme.PALETTE["baseline"]]
    legend = alt.Legend(title=None) if shown["opposite"].any() else None
    colour = alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=pair), legend=legend)
    shapes = alt.Scale(domain=kinds, range=["diamond", "circle"])
    shape = alt.Shape("kind:N", scale=shapes, legend=legend)
    tooltip = [
        "pair:N",
        "kind:N",
        *(alt.Tooltip(f"{k}:Q", format=theme.SIGNED) for k in ("cosine", "least", "most")),
        "layers:Q",
    ]
    layers: list[Any] = []
    null = shown.drop_nulls("low")
    if null.height:
        bar = alt.Chart(null).mark_bar(color=BAND, opacity=0.22, height=13, cornerRadius=2)
        layers.append(bar.encode(x=alt.X("low:Q", title=x["title"], axis=SIGNED), x2="high:Q", y=y))
    whisker = alt.Chart(shown).mark_rule(strokeWidth=2.5, opacity=0.6, strokeCap="round")
    layers.append(whisker.encode(x=alt.X("least:Q"), x2="most:Q", y=y, color=colour))
    zero = alt.Chart(pl.DataFrame({"cosine": [0.0]})).mark_rule(strokeDash=[4, 4], opacity=0.5)
    layers.append(zero.encode(x=x))
    layers.append(
        alt.Chart(shown).mark_point(size=90).encode(
            x=x, y=y, color=colour, shape=shape, tooltip=tooltip
        )
    )  # fmt: skip
    chart = alt.LayerChart(layer=layers).properties(width=430, height=24 * shown.height)
    first = shown.row(0, named=True)
    most = "Most opposed" if first["cosine"] < 0 else "No pair is opposed; the least aligned is"
    finding = f"{most} {first['pair']}, mean cosine {signed(first['cosine'])} over {span(window)}"
    counted = f"{shown.height} of {total} pairs" if shown.height < total else f"all {total} pairs"
    detail = f"{counted}; line: smallest to largest over the layers; grey: mean 95 % null range"
    return titled(chart, finding, detail)


def components_chart(found: Components, window: Window) -> alt.LayerChart:
    """The directions on their first two principal components, labelled."""
    n, shares = found.table.height, found.shares
    reach = float(np.abs(found.table.select("x", "y").to_numpy()).max(initial=0)) or 1.0
    scale = alt.Scale(domain=[-1.35 * reach, 1.35 * reach], nice=False)
    names = found.table["name"].to_list()
    words = [percent(float(share)) for share in [*shares[:2], 0.0][:2]]
    x = alt.X("x:Q", title=f"component 1 ({words[0]} of variance)", scale=scale, axis=SIGNED)
    y = alt.Y("y:Q", title=f"component 2 ({words[1]} of variance)", scale=scale, axis=SIGNED)
    colour = alt.Color("name:N", scale=theme.colours(names), legend=None)
    base = alt.Chart(found.table).encode(x=x, y=y, color=colour, tooltip=["name:N", "x:Q", "y:Q"])
    zero = pl.DataFrame({"at": [0.0]})
    rules = [
        alt.Chart(zero).mark_rule(opacity=0.3).encode(**{channel: alt.datum(0.0)})
        for channel in ("x", "y")
    ]
    arrow = base.mark_rule(strokeWidth=1.5, opacity=0.5).encode(x2=alt.datum(0), y2=alt.datum(0))
    shape = alt.Shape("name:N", scale=_shapes(names), legend=None)
    layers = [*rules, arrow, base.mark_point(size=90).encode(shape=shape), labelled(base, "name")]
    chart = alt.LayerChart(layer=layers).properties(width=400, height=400)
    flat = 1 / max(n - 1, 1)
    finding = f"Two components hold {percent(min(1.0, float(shares[:2].sum())))} of the variance"
    finding += f" of {n} directions, {span(window)}"
    detail = f"centred; {n} perpendicular directions would give each component {percent(flat)}"
    return titled(chart, finding, detail + ". The points are the data: no interval")


def _shapes(names: list[str]) -> alt.Scale:
    shapes = [theme.SHAPES.get(name, "diamond") for name in names]  # type: ignore[call-overload]
    return alt.Scale(domain=names, range=shapes)


def reliability_chart(table: pl.DataFrame, window: Window) -> alt.ConcatChart:
    """Split-half reliability over the window, a panel a direction, a line a unit, with intervals.

    Args:
      table: from `cosines.reliability`; at least one line.
      window: layers to draw.
    """
    low = min(0.0, float(table["low"].min()))  # type: ignore[arg-type]
    y_scale = alt.Scale(domain=[low, 1], nice=False)
    names = table["direction"].unique(maintain_order=True).to_list()
    panels = [
        _reliability_panel(table.filter(pl.col("direction") == name), window, y_scale, not i % 3)
        for i, name in enumerate(names)
    ]
    worst = table.group_by("direction", "unit").agg(pl.col("mean").mean()).sort("mean")
    least = worst.row(0, named=True)
    finding = (
        f"Least reliable over {span(window)}: {least['direction']} halved by {least['unit']}, "
        f"mean cosine {signed(least['mean'])}"
    )
    detail = "cosine of the directions of two random halves; band: 95 % of the halvings"
    chart = alt.ConcatChart(concat=panels, columns=3, spacing=18)
    return titled(chart, finding, detail, wrap=92)


def _reliability_panel(
    table: pl.DataFrame, window: Window, scale: alt.Scale, first: bool
) -> alt.LayerChart:
    x = _layers(*window, ticks=6)
    y = alt.Y("mean:Q", title="split-half cosine" if first else None, scale=scale)
    ends = alt.Y("low:Q", title="split-half cosine" if first else None, scale=scale)
    name = table["direction"][0]
    colour = theme.colour(name)
    units = table["unit"].unique(maintain_order=True).to_list()
    dash = alt.StrokeDash("unit:N", scale=alt.Scale(domain=units, range=_DASHES[: len(units)]))
    dash = dash.legend(None)
    band = alt.Chart(table).mark_area(color=colour, opacity=0.18).encode(
        x=x, y=ends, y2="high:Q", detail="unit:N"
    )  # fmt: skip
    tooltip: list[Any] = ["direction:N", "unit:N", "units:Q", "layer:Q"]
    tooltip += [alt.Tooltip(f"{k}:Q", format=theme.SIGNED) for k in ("mean", "low", "high")]
    line = alt.Chart(table).mark_line(color=colour).encode(
        x=x, y=y, strokeDash=dash, tooltip=tooltip
    )  # fmt: skip
    counts = ", ".join(
        f"{'– –' if i else '—'} {unit} (n = {table.filter(pl.col('unit') == unit)['units'][0]})"
        for i, unit in enumerate(units)
    )
    title = alt.TitleParams(name, subtitle=counts, fontSize=13, subtitleFontSize=11.5, offset=6)
    return alt.LayerChart(layer=[band, line]).properties(width=195, height=130, title=title)


_DASHES = [[1, 0], [6, 4], [2, 3]]


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
    colours = [BAND if name == "residual stream" else theme.colour(name) for name in names]
    x = _layers(*window)
    powers = [10.0**k for k in range(-6, 9)]
    scale = alt.Scale(type="log", nice=False)
    axis = alt.Axis(values=powers, format="~g")
    y = alt.Y("norm:Q", title="norm (logarithmic)", scale=scale, axis=axis)
    colour = alt.Color("direction:N", scale=alt.Scale(domain=names, range=colours), legend=None)
    base = alt.Chart(long).encode(x=x, y=y, color=colour)
    tooltip = ["direction:N", "layer:Q", alt.Tooltip("norm:Q", format=theme.PLAIN)]
    layers: list[Any] = [base.mark_line(point=alt.OverlayMarkDef(size=24)).encode(tooltip=tooltip)]
    if len(names) <= 12:
        ends = alt.Chart(_apart(long, 260)).encode(x=x, color=colour)
        layers.append(labelled(ends.encode(y=alt.Y("at:Q", scale=scale, axis=axis)), "direction"))
    chart = alt.LayerChart(layer=layers).properties(width=520, height=260)
    shares = table.drop_nulls("share")
    if shares.height:
        top = shares.sort("share", descending=True).row(0, named=True)
        finding = (
            f"Over {span(window)} a natural norm is at most {percent(top['share'])} of the "
            f"stream's ({top['direction']}, layer {top['layer']})"
        )
    else:
        finding = "The norm of the stream was not recorded with these directions"
    return titled(chart, finding, "one norm a layer, in the model's own units: no interval")


def _apart(long: pl.DataFrame, height: int) -> pl.DataFrame:
    """The lines' ends, with `at`: heights on the logarithmic axis moved until no words touch."""
    ends = long.filter(pl.col("layer") == pl.col("layer").max()).sort("norm")
    logs = [math.log(norm) for norm in long["norm"]]
    gap = 15 * (max(logs) - min(logs) or 1.0) / height
    at: list[float] = []
    for norm in ends["norm"]:
        at.append(max(math.log(norm), at[-1] + gap if at else -math.inf))
    return ends.with_columns(at=pl.Series([math.exp(value) for value in at], dtype=pl.Float64))
