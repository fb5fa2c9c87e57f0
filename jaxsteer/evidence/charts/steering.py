"""Charts of the first notebook, and its plane; the tables come from `evidence.lesson`.

In the plane a reader drags the state h and the direction d. It is drawn in the browser (plane.js),
so it moves with the pointer and still works in an exported page without a kernel. The tips come
back to Python as traits; `lesson.steer_2d` computes the same step with the library's own
`interventions.apply`, and a browser test compares the two. Tips move by mouse, by touch, and by the
arrow keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import altair as alt
import anywidget
import polars as pl
import traitlets

from jaxsteer.evidence.charts import marks
from jaxsteer.evidence.lesson import Step
from jaxsteer.words import percent, signed

SIDES: dict[str, marks.Role] = {"baseline": "baseline", "steered": "persona"}
UNIT = "natural norms"


def describe(kind: Step, name: str, layer: int, strength: float) -> str:
    """An operation in words: `+4 × persona at resid_post.21`."""
    at = f"at resid_post.{layer}"
    if kind == "add":
        return f"{signed(strength, 0 if strength == round(strength) else 1)} × {name} {at}"
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
    one, other = marks.token_text(before["text"]), marks.token_text(after["text"])
    if before["token"] == after["token"]:
        share = f"{percent(before['baseline'])} before, {percent(before['steered'])} after"
        finding = f"“{one}” stays the likeliest next token: {share}"
    else:
        finding = (
            f"The likeliest next token moves from “{one}” ({percent(before['baseline'])}) "
            f"to “{other}” ({percent(after['steered'])})"
        )
    # Two tokens may print alike.
    labels = [marks.token_text(text) for text in table["text"]]
    shown = table.select(
        *SIDES,
        label=pl.Series(labels, dtype=pl.String),
        row=pl.Series(marks.numbered(labels), dtype=pl.String),
    )
    long = shown.unpivot(
        list(SIDES), index=["row", "label"], variable_name="side", value_name="probability"
    )
    y = marks.row_axis("row", numbers=True, labelFont=marks.MONO, labelFontSize=12.5)
    title = "probability of the first reply token"
    x = marks.share_axis("probability", title, domainMin=0, nice=True)
    link = alt.Chart(shown).mark_rule(strokeWidth=2, opacity=0.35)
    dots = alt.Chart(long).mark_point(size=95)
    dots = dots.encode(
        x=x,
        y=y,
        tooltip=marks.tooltip("label side", tiny="probability"),
        **marks.by_role("side", SIDES),
    )
    layers = [link.encode(y=y, x="baseline:Q", x2="steered:Q"), dots]
    chart = alt.LayerChart(layer=layers).properties(width=560, height=26 * len(table))
    detail = f"{what}; one prompt, one forward pass, no sampling, so no interval"
    return marks.titled(chart, finding, detail)


def depth_chart(table: pl.DataFrame, layer: int, what: str) -> alt.HConcatChart:
    """The last prompt token's projections along depth, before and after, one panel a direction.

    Args:
      table: from `lesson.projections`.
      layer: where the operation is applied, marked.
      what: the operation in words.
    """
    last = table.filter(pl.col("position") == pl.col("position").max())
    title = f"projection, {UNIT}"
    panels = [
        _depth_panel(part, layer, None if i else title)
        for i, part in enumerate(last.partition_by("direction", maintain_order=True))
    ]
    end = last.filter(pl.col("layer") == pl.col("layer").max())
    changes = [f"{row['direction']} {signed(row['change'])}" for row in end.iter_rows(named=True)]
    finding = f"At the last layer the steer has moved {' and '.join(changes)}"
    detail = f"{what}; last prompt token, n = 1 prompt; the first layers may leave the frame"
    return marks.titled(alt.HConcatChart(hconcat=panels, spacing=34), finding, detail, wrap=96)


def _frame(table: pl.DataFrame) -> list[float]:
    """A range that fits the later three quarters of depth.

    Directions are very short at the first layers, so in their own norms projections are huge there
    and would flatten all the rest.
    """
    later = table.filter(pl.col("layer") >= pl.col("layer").max() / 4)
    values = [*later["baseline"], *later["steered"], 0.0]
    room = 0.15 * (max(values) - min(values)) or 1.0
    return [min(values) - room, max(values) + room]


def _depth_panel(table: pl.DataFrame, layer: int, title: str | None) -> alt.LayerChart:
    long = table.unpivot(
        list(SIDES), index=["layer"], variable_name="side", value_name="projection"
    )
    last = int(table["layer"].max())  # type: ignore[arg-type]
    axes = {
        "x": marks.layer_axis(0, last),
        "y": alt.Y("projection:Q", title=title, scale=alt.Scale(domain=_frame(table), nice=False)),
        "color": marks.by_role("side", SIDES, legend=None)["color"],
    }
    lines = alt.Chart(long).mark_line(point=alt.OverlayMarkDef(size=28), clip=True)
    lines = lines.encode(tooltip=marks.tooltip("side layer", signed="projection"), **axes)
    # The higher line's name is above its end and the lower one's below, so they never meet.
    ends = long.filter(pl.col("layer") == last).sort("projection")
    words = [
        marks.labelled(alt.Chart(ends[i : i + 1]).mark_text().encode(**axes), "side", dy=dy)
        for i, dy in enumerate((7, -7))
    ]
    at = alt.Chart(pl.DataFrame({"layer": [layer]})).mark_rule(strokeDash=[4, 4], opacity=0.6)
    name = table["direction"][0]
    layers = [at.encode(x="layer:Q"), lines, *words]
    return marks.panel(layers, name, 290, 220, color=marks.colour(name))


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
            pl.col("text").map_elements(marks.token_text, return_dtype=pl.String),
        )
    )
    # The first tokens of a prompt hold far larger values than the rest (attention sinks): the
    # colour range is that of the bulk, and its ends are open.
    limit = float(shown[value].abs().quantile(0.98) or 0) or 1.0
    legend = alt.Legend(title=UNIT, orient="right", direction="vertical", format="+.2~g")
    colour = alt.Color(f"{value}:Q", scale=marks.around_zero(limit), legend=legend)
    maps = [
        _map(part.drop("text"), colour, None if i else marks.LAYER)
        for i, part in enumerate(shown.partition_by("direction", maintain_order=True))
    ]
    last_layer = shown.filter(pl.col("layer") == pl.col("layer").max())
    most = last_layer.sort(pl.col(value).abs(), descending=True).row(0, named=True)
    kind = "change" if value == "change" else "projection"
    finding = (
        f"The last layer's largest {kind} is {most['direction']} {signed(most[value])}, "
        f"on “{marks.token_text(most['text'])}”"
    )
    if value == "change" and not shown["change"].abs().max():
        finding = "Nothing is changed at any layer or token"
    part = f"{count - first} of {count} prompt tokens"
    detail = f"{what}; {UNIT}; {part}; colour ends at ±{limit:.2g}"
    return marks.titled(alt.HConcatChart(hconcat=maps, spacing=26), finding, detail)


def _map(table: pl.DataFrame, colour: alt.Color, title: str | None) -> alt.LayerChart:
    marked = [layer for layer in table["layer"].unique().sort() if layer % 5 == 0]
    layers = alt.Axis(values=marked, labels=title is not None)
    words = alt.Axis(
        labelExpr="slice(datum.label, 5)", labelAngle=-90, labelFont=marks.MONO, labelFontSize=10
    )
    chart = (
        alt.Chart(table)
        .mark_rect()
        .encode(
            x=alt.X("label:N", sort=None, title=None, axis=words),
            y=alt.Y("layer:O", sort="descending", title=title, axis=layers),
            color=colour,
            tooltip=marks.tooltip(
                "label layer", signed="baseline steered change", titles={"label": "token"}
            ),
        )
    )
    name, tokens = table["direction"][0], table["label"].n_unique()
    width = max(130, min(620, 12 * tokens))
    return marks.panel([chart], name, width, 270, color=marks.colour(name))


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
    ticks = alt.Axis(values=table["later"].to_list(), format="d")
    x = alt.X("later:Q", title="layers between adding and projecting out", axis=ticks)
    y = alt.Y(
        "moved:Q",
        title="next-token probability moved",
        axis=alt.Axis(format=marks.PERCENT),
        scale=alt.Scale(domain=[0, 1.15 * max(alone, 0.05, *table["moved"].to_list())]),
    )
    colour = marks.colour("persona")
    base = alt.Chart(table).encode(x=x, y=y, tooltip=marks.tooltip("later layer", tiny="moved"))
    line = base.mark_line(color=colour, point=alt.OverlayMarkDef(size=60, color=colour))
    cancels = base.transform_filter("datum.later == 0").mark_text(
        align="left", dx=9, dy=-12, fontWeight="bold", color=colour
    )
    whole = alt.Chart(table.head(1)).encode(y="alone:Q")
    rule = whole.mark_rule(strokeDash=[4, 4], opacity=0.6)
    label = whole.mark_text(align="left", dy=-8, opacity=0.85).encode(
        x=alt.value(8), text=alt.value("added, never projected out")
    )
    layers = [rule, label, line, cancels.encode(text=alt.value("cancels, by algebra"))]
    chart = alt.LayerChart(layer=layers).properties(width=560, height=220)
    detail = f"{what}; total variation distance, one prompt; unit: share of probability"
    return marks.titled(chart, words, detail)


HERE = Path(__file__).parent


class Plane(anywidget.AnyWidget):
    """Drag the tips of h and d; the steps are applied to h in the order given.

    Attributes:
      h: the state, [x, y] within -4 to 4.
      d: the direction, [x, y]; its length is its natural norm.
      strength: multiples of d that `add` adds.
      high: upper bound of the projection that `cap` keeps; the lower bound is -high.
      steps: which of add, project and cap are applied, in this order.
      colours: hex colours of d and of the result.
    """

    _esm = HERE / "plane.js"
    _css = HERE / "plane.css"
    h = traitlets.List(traitlets.Float()).tag(sync=True)
    d = traitlets.List(traitlets.Float()).tag(sync=True)
    strength = traitlets.Float(1.0).tag(sync=True)
    high = traitlets.Float(1.0).tag(sync=True)
    steps = traitlets.List(traitlets.Unicode()).tag(sync=True)
    colours = traitlets.Dict().tag(sync=True)


def plane(
    steps: Sequence[Step],
    *,
    h: tuple[float, float] = (1.0, 2.0),
    d: tuple[float, float] = (1.5, 0.5),
    strength: float = 1.0,
    high: float = 1.0,
) -> Plane:
    """A plane to show with `mo.ui.anywidget`; see `Plane` for the arguments."""
    return Plane(
        h=list(h),
        d=list(d),
        strength=strength,
        high=high,
        steps=list(steps),
        colours={"d": marks.PALETTE["persona"], "result": marks.PALETTE["axis"]},
    )
