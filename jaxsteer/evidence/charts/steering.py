"""Charts of the first notebook; their tables come from `evidence.lesson`."""

from __future__ import annotations

import altair as alt
import polars as pl

from jaxsteer.evidence.charts import theme
from jaxsteer.evidence.charts.marks import labelled, titled, token_text
from jaxsteer.evidence.lesson import Step
from jaxsteer.words import percent, signed

SIDES = ["baseline", "steered"]
SIDE_COLOURS = alt.Scale(domain=SIDES, range=[theme.PALETTE["baseline"], theme.PALETTE["persona"]])
SIDE_SHAPES = alt.Scale(domain=SIDES, range=[theme.SHAPES["baseline"], theme.SHAPES["persona"]])
LAYER = "layer (resid_post)"
UNIT = "natural norms"


def describe(kind: Step, name: str, layer: int, strength: float) -> str:
    """An operation in words: `+4 × persona at resid_post.21`."""
    at = f"at resid_post.{layer}"
    if kind == "add":
        # The sign is of the number: a hyphen in the name stays one.
        return f"{strength:+g}".replace("-", "−") + f" × {name} {at}"
    if kind == "project":
        return f"{name} projected out {at}"
    return f"{name} capped to ±{abs(strength):g} norms {at}"


def next_token_chart(table: pl.DataFrame, what: str) -> alt.LayerChart:
    """Probabilities of the likeliest next tokens before and after, one row a token.

    Args:
      table: from `lesson.next_tokens`.
      what: the operation in words.
    """
    before = table.sort("baseline", descending=True).row(0, named=True)
    after = table.sort("steered", descending=True).row(0, named=True)
    one, other = token_text(before["text"]), token_text(after["text"])
    if before["token"] == after["token"]:
        share = f"{percent(before['baseline'])} before, {percent(before['steered'])} after"
        finding = f"“{one}” stays the likeliest next token: {share}"
    else:
        finding = (
            f"The likeliest next token moves from “{one}” ({percent(before['baseline'])}) "
            f"to “{other}” ({percent(after['steered'])})"
        )
    shown = table.with_columns(
        label=pl.Series([token_text(text) for text in table["text"]], dtype=pl.String),
        rank=pl.int_range(pl.len()),
    ).with_columns(row=pl.format("{} {}", pl.col("rank").cast(pl.String).str.zfill(2), "label"))
    shown = shown.drop("text", "token", "rank")
    long = shown.unpivot(
        SIDES, index=["row", "label"], variable_name="side", value_name="probability"
    )
    # The rank keeps equal labels apart (two tokens may print alike); it is not part of the label.
    x = alt.X(
        "probability:Q",
        title="probability of the first reply token",
        axis=alt.Axis(format=theme.PERCENT, tickCount=6),
        scale=alt.Scale(domainMin=0, nice=True),
    )
    axis = alt.Axis(labelExpr="slice(datum.label, 3)", labelFont=theme.MONO, labelFontSize=12.5)
    y = alt.Y("row:N", title=None, sort=None, axis=axis)
    link = alt.Chart(shown).mark_rule(strokeWidth=2, opacity=0.35)
    dots = alt.Chart(long).mark_point(size=95)
    colour = alt.Color("side:N", scale=SIDE_COLOURS, title=None)
    shape = alt.Shape("side:N", scale=SIDE_SHAPES, title=None)
    tooltip = [
        *map(alt.Tooltip, ("label:N", "side:N")),
        alt.Tooltip("probability:Q", format=theme.SHARE),
    ]
    chart = alt.LayerChart(
        layer=[
            link.encode(y=y, x=alt.X("baseline:Q"), x2="steered:Q"),
            dots.encode(y=y, x=x, color=colour, shape=shape, tooltip=tooltip),
        ]
    )
    detail = f"{what}; one prompt, one forward pass, no sampling, so no interval"
    return titled(chart.properties(width=560, height=26 * len(table)), finding, detail)


def depth_chart(table: pl.DataFrame, layer: int, what: str) -> alt.HConcatChart:
    """The last prompt token's projections along depth, before and after, one panel a direction.

    Args:
      table: from `lesson.projections`.
      layer: where the operation is applied, marked.
      what: the operation in words.
    """
    last = table.filter(pl.col("position") == pl.col("position").max())
    names = last["direction"].unique(maintain_order=True).to_list()
    panels = [
        _depth_panel(last.filter(pl.col("direction") == name), name, layer, first=not i)
        for i, name in enumerate(names)
    ]
    end = last.filter(pl.col("layer") == pl.col("layer").max())
    changes = [f"{row['direction']} {signed(row['change'])}" for row in end.iter_rows(named=True)]
    finding = f"At the last layer the steer has moved {' and '.join(changes)}"
    detail = f"{what}; last prompt token, n = 1 prompt; the first layers may leave the frame"
    return titled(alt.HConcatChart(hconcat=panels, spacing=34), finding, detail, wrap=96)


def _frame(table: pl.DataFrame) -> list[float]:
    """A range that fits the later three quarters of depth.

    Directions are very short at the first layers, so in their own norms projections are huge there
    and would flatten all the rest.
    """
    later = table.filter(pl.col("layer") >= pl.col("layer").max() / 4)
    values = [value for side in SIDES for value in later[side].to_list()] + [0.0]
    room = 0.15 * (max(values) - min(values)) or 1.0
    return [min(values) - room, max(values) + room]


def _depth_panel(table: pl.DataFrame, name: str, layer: int, *, first: bool) -> alt.LayerChart:
    long = table.unpivot(SIDES, index=["layer"], variable_name="side", value_name="projection")
    x = alt.X("layer:Q", title=LAYER, axis=alt.Axis(tickMinStep=1))
    y = alt.Y(
        "projection:Q",
        title=f"projection, {UNIT}" if first else None,
        scale=alt.Scale(domain=_frame(table), nice=False),
    )
    colour = alt.Color("side:N", scale=SIDE_COLOURS, legend=None)
    lines = alt.Chart(long).mark_line(point=alt.OverlayMarkDef(size=28), clip=True)
    tooltip = [*map(alt.Tooltip, ("side:N", "layer:Q")), alt.Tooltip("projection:Q", format="+.2f")]
    lines = lines.encode(x=x, y=y, color=colour, tooltip=tooltip)
    # The higher line's name goes above its end and the lower one's below, so they never meet.
    ends = long.filter(pl.col("layer") == pl.col("layer").max()).sort("projection")
    words = [
        labelled(
            alt.Chart(ends[i : i + 1]).mark_text().encode(x=x, y=y, color=colour), "side", dy=dy
        )
        for i, dy in enumerate((7, -7))
    ]
    at = alt.Chart(pl.DataFrame({"layer": [layer]})).mark_rule(strokeDash=[4, 4], opacity=0.6)
    chart = alt.LayerChart(layer=[at.encode(x="layer:Q"), lines, *words])
    title = alt.TitleParams(name, fontSize=13, color=theme.colour(name), offset=6)
    return chart.properties(width=290, height=220, title=title)


def token_map(
    table: pl.DataFrame, value: str, what: str, *, last: int | None = 24
) -> alt.HConcatChart:
    """Layer by layer and token by token: one map a direction.

    Args:
      table: from `lesson.projections`.
      value: the column drawn: `change`, `baseline` or `steered`.
      what: the operation in words.
      last: only so many tokens from the prompt's end; None for all.
    """
    count = int(table["position"].max()) + 1  # type: ignore[arg-type]
    first = max(0, count - last) if last else 0
    shown = table.filter(pl.col("position") >= first).with_columns(
        label=pl.format(
            "{} {}",
            pl.col("position").cast(pl.String).str.zfill(4),
            pl.col("text").map_elements(token_text, return_dtype=pl.String),
        )
    )
    # The first tokens of a prompt hold far larger values than the rest (attention sinks): the
    # colour range is that of the bulk, and its ends are open.
    limit = float(shown[value].abs().quantile(0.98) or 0) or 1.0
    names = shown["direction"].unique(maintain_order=True).to_list()
    maps = [
        _map(shown.filter(pl.col("direction") == name).drop("text"), name, value, limit)
        for name in names
    ]
    # One legend for all, to the right, so that the maps start on one line.
    maps[0] = maps[0].encode(y=_layer_axis(shown, title=LAYER))
    ends = alt.Legend(
        title=UNIT, orient="right", gradientLength=150, values=[-limit, 0, limit], format="+.2~g"
    )
    maps[-1] = maps[-1].encode(color=_heat(value, limit, ends))
    last_layer = shown.filter(pl.col("layer") == pl.col("layer").max())
    most = last_layer.sort(pl.col(value).abs(), descending=True).row(0, named=True)
    kind = "change" if value == "change" else "projection"
    finding = (
        f"The last layer's largest {kind} is {most['direction']} {signed(most[value])}, "
        f"on “{token_text(most['text'])}”"
    )
    if value == "change" and not shown["change"].abs().max():
        finding = "Nothing is changed at any layer or token"
    part = f"{count - first} of {count} prompt tokens"
    detail = f"{what}; {UNIT}; {part}; colour ends at ±{limit:.2g}"
    beside = alt.HConcatChart(hconcat=maps, spacing=26).resolve_scale(color="independent")
    return titled(beside, finding, detail)


def _heat(value: str, limit: float, legend: alt.Legend | None) -> alt.Color:
    return alt.Color(f"{value}:Q", scale=theme.around_zero(limit), legend=legend)


def _layer_axis(table: pl.DataFrame, title: str | None) -> alt.Y:
    marked = [layer for layer in table["layer"].unique().sort() if layer % 5 == 0]
    axis = alt.Axis(values=marked, labels=title is not None)
    return alt.Y("layer:O", sort="descending", title=title, axis=axis)


def _map(table: pl.DataFrame, name: str, value: str, limit: float) -> alt.Chart:
    tokens = table["label"].n_unique()
    words = alt.Axis(
        labelExpr="slice(datum.label, 5)", labelAngle=-90, labelFont=theme.MONO, labelFontSize=10
    )
    tooltip = [
        alt.Tooltip("label:N", title="token"),
        alt.Tooltip("layer:O"),
        *(alt.Tooltip(f"{k}:Q", format=theme.SIGNED) for k in ("baseline", "steered", "change")),
    ]
    chart = (
        alt.Chart(table)
        .mark_rect()
        .encode(
            x=alt.X("label:N", sort=None, title=None, axis=words),
            y=_layer_axis(table, title=None),
            color=_heat(value, limit, None),
            tooltip=tooltip,
        )
    )
    title = alt.TitleParams(name, fontSize=13, color=theme.colour(name), offset=6)
    return chart.properties(width=max(130, min(620, 12 * tokens)), height=270, title=title)


def survival_chart(table: pl.DataFrame, what: str) -> alt.LayerChart:
    """How much an addition still moves when its direction is projected out k layers later.

    Args:
      table: from `lesson.survival`.
      what: the addition in words.
    """
    alone = float(table["alone"][0])
    moved = dict(zip(table["later"], table["moved"], strict=True))
    words = (
        f"Projected out where it was added, the steer moves {percent(moved[0])} of the probability"
    )
    if 1 in moved:
        words += f"; one layer later, {percent(moved[1])}"
    words += f"; never, {percent(alone)}"
    x = alt.X(
        "later:Q", title="layers between adding and projecting out", axis=alt.Axis(tickMinStep=1)
    )
    y = alt.Y(
        "moved:Q",
        title="next-token probability moved",
        axis=alt.Axis(format=theme.PERCENT),
        scale=alt.Scale(domain=[0, 1.15 * max(alone, 0.05, *table["moved"].to_list())]),
    )
    tooltip = [
        *map(alt.Tooltip, ("later:Q", "layer:Q")),
        alt.Tooltip("moved:Q", format=theme.SHARE),
    ]
    colour = theme.PALETTE["persona"]
    base = alt.Chart(table).encode(x=x, y=y, tooltip=tooltip)
    line = base.mark_line(color=colour, point=alt.OverlayMarkDef(size=60, color=colour))
    zero = base.transform_filter("datum.later == 0").mark_text(
        align="left", dx=9, dy=-12, fontWeight="bold", color=colour
    )
    whole = alt.Chart(table.head(1)).encode(y="alone:Q")
    rule = whole.mark_rule(strokeDash=[4, 4], opacity=0.6)
    label = whole.mark_text(align="left", dy=-8, opacity=0.85).encode(
        x=alt.value(8), text=alt.value("added, never projected out")
    )
    cancel = zero.encode(text=alt.value("cancels, by algebra"))
    chart = alt.LayerChart(layer=[rule, label, line, cancel]).properties(width=560, height=220)
    detail = f"{what}; total variation distance, one prompt; unit: share of probability"
    return titled(chart, words, detail)
