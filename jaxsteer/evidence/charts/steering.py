"""Charts of the first notebook, and its plane; the tables come from `evidence.lesson`.

In the plane a reader drags the state h and the direction d. It is drawn and computed in the browser
(plane.js), so it works in an exported page without a kernel; a browser test compares it with the
library's own `interventions.apply`. Tips move by mouse, by touch, and by the arrow keys.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import anywidget
import polars as pl
import traitlets

from jaxsteer.evidence import lesson
from jaxsteer.evidence.charts import marks
from jaxsteer.evidence.lesson import View
from jaxsteer.stats import wilson
from jaxsteer.words import percent, plain, signed, span

SIDES: dict[str, marks.Role] = {"baseline": "baseline", "steered": "persona"}
GROUPS: dict[str, marks.Role] = {"harmful": "refusal", "harmless": "persona"}
UNIT = "natural norms"
COLOURS = 4.0  # natural norms at which the colours of projections end


def describe(view: View) -> str:
    """An operation in words: `+4 × persona at resid_post.21`."""
    at = f"at resid_post.{view.layer}"
    added = f"{signed(view.strength, 0 if view.strength.is_integer() else 1)} × {view.name} {at}"
    out = "there" if not view.later else f"{view.later} layers later"
    return {
        "add": added,
        "project out": f"{view.name} projected out {at}",
        "cap": f"{view.name} capped to ±{abs(view.strength):g} norms {at}",
        "add, then project out": f"{added}, projected out {out}",
    }[view.kind]


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
    detail = f"{what}; one prompt, one forward pass, no sampling, so no interval"
    return marks.wide(layers, finding, detail, 22 * len(table))


def histogram(table: pl.DataFrame, name: str, layer: int) -> alt.LayerChart:
    """Projections of harmful and harmless prompts at a layer, and how well they are apart.

    Args:
      table: `group` (a key of `GROUPS`) and `projection`, in natural norms.
      name: the direction's.
      layer: where the states are from.
    """
    harmful, harmless = (table.filter(group=group)["projection"].to_numpy() for group in GROUPS)
    right, n = lesson.separation(harmful, harmless)
    finding = (
        f"{right} of {n} prompts are on their own side of the middle between the means: "
        f"{percent(right / n)} (95 % interval {span(*wilson(right, n))})"
    )
    detail = (
        f"projection on {name} at resid_post.{layer}, last prompt token; each prompt against the "
        "means of the others; half would be chance"
    )
    bars = alt.Chart(table).mark_bar(opacity=0.62)
    bars = bars.encode(
        x=alt.X("projection:Q", bin=alt.Bin(maxbins=30), title=f"u·h, {UNIT}"),
        y=alt.Y("count():Q", title="prompts", stack=None, axis=alt.Axis(tickMinStep=1)),
        color=marks.coloured("group", GROUPS),
        tooltip=["group:N", alt.Tooltip("count():Q", title="prompts")],
    )
    return marks.wide([bars], finding, detail, 230)


def refusal_map(table: pl.DataFrame, view: View) -> alt.Chart:
    """Probability of opening with a refusal by layer and strength; a click selects a cell.

    Args:
      table: from `lesson.grid`, of one direction.
      view: what the controls say: its cell is framed.
    """
    ordered = table.sort("opens", maintain_order=True)
    low, high = (
        f"{percent(opens)} ({f'{signed(strength, 0)} at layer {at}' if strength else 'unsteered'})"
        for opens, strength, at in ordered["opens", "strength", "layer"][[0, -1]].iter_rows()
    )
    finding = f"Refusal openings: {low} to {high}"
    if percent(ordered["opens"][0]) == percent(ordered["opens"][-1]):
        finding = f"No cell moves the refusal openings: {percent(ordered['opens'][0])} everywhere"
    here = f"datum.layer == {view.layer} && datum.strength == {view.strength:g}"
    blue = marks.PALETTE["refusal"]
    scale = alt.Scale(domain=[0, 1], range=[blue + "08", blue], clamp=True)
    legend = alt.Legend(title="refusal", format=marks.PERCENT, orient="right", direction="vertical")
    x = alt.X("strength:O", title=f"strength, {UNIT}", axis=_strengths())
    chart = alt.Chart(table).mark_rect(cursor="pointer", stroke="currentColor")
    chart = chart.encode(
        x=x,
        y=alt.Y("layer:O", sort="descending", title=marks.LAYER),
        color=alt.Color("opens:Q", scale=scale, legend=legend),
        strokeWidth=alt.condition(here, alt.value(3), alt.value(0.2)),
        tooltip=marks.tooltip("layer strength token", tiny="opens moved"),
    ).add_params(alt.selection_point(name="cell", fields=["layer", "strength"]))
    detail = f"{table['direction'][0]}; one prompt; click a cell to steer there"
    return marks.titled(chart.properties(width="container", height=190), finding, detail, wrap=42)


def _strengths() -> alt.Axis:
    words = "datum.value == 0 ? '0' : format(datum.value, '+d')"
    return alt.Axis(values=list(lesson.STRENGTHS), labelAngle=0, labelExpr=words)


def fan_chart(table: pl.DataFrame, view: View) -> alt.LayerChart:
    """The same measure along strength at one layer: a direction beside random ones of its length.

    Args:
      table: from `lesson.fan`.
      view: what the controls say.
    """
    most = table.filter(direction=view.name).sort("moved", descending=True).row(0, named=True)
    same = table.filter(pl.col("direction") != view.name, strength=most["strength"])
    below = int((same["moved"] < most["moved"]).sum())
    finding = (
        f"At {signed(most['strength'], 0)}, {view.name} moves {percent(most['moved'])} of the "
        f"probability: more than {below} of {len(same)} random directions"
    )
    x = alt.X("strength:Q", title=f"strength at layer {view.layer}, {UNIT}", axis=_strengths())
    share = alt.Axis(format=marks.PERCENT)
    y = alt.Y("opens:Q", title="opens with a refusal", axis=share, scale=alt.Scale(domain=[0, 1]))
    tips = marks.tooltip("direction strength", tiny="opens moved")
    layers = _with_fan(table, [view.name], x, y, tips, view.strength)
    return marks.wide(layers, finding, "grey: random directions of its length", 190)


def depth_chart(table: pl.DataFrame, names: Sequence[str], view: View) -> alt.LayerChart:
    """How the last prompt token's projections changed along depth, random directions in grey.

    Args:
      table: from `lesson.depth`.
      names: of the directions that are named; all others are random.
      view: what is done, and where.
    """
    deep = int(table["layer"].max())  # type: ignore[arg-type]
    last = table.filter(pl.col("layer") == deep, pl.col("direction").is_in(names))
    changes = [f"{row['direction']} {signed(row['change'])}" for row in last.iter_rows(named=True)]
    finding = f"At the last layer the steer has moved {' and '.join(changes)}"
    # In its own short norms, a direction of the first layers would flatten all the rest.
    seen = table.filter(pl.col("layer") >= min(view.layer, deep * 3 // 4))["change"]
    low, high = min(0.0, *seen), max(0.0, *seen)
    room = 0.12 * (high - low) or 1.0
    scale = alt.Scale(domain=[low - room, high + room], nice=False)
    y = alt.Y("change:Q", title=f"change of u·h, {UNIT}", scale=scale)
    tips = marks.tooltip("direction layer", signed="change")
    layers = _with_fan(table, names, marks.layer_axis(0, deep), y, tips, view.layer)
    detail = f"{describe(view)}; last prompt token; grey: random directions"
    return marks.wide(layers, finding, detail, 230)


def _with_fan(
    table: pl.DataFrame,
    names: Sequence[str],
    x: alt.X,
    y: alt.Y,
    tips: list[alt.Tooltip],
    at: float,
) -> list[alt.Chart]:
    """Lines of named directions over thin grey ones of all others, and a rule at a value of x."""
    named = pl.col("direction").is_in(names)
    colour = marks.coloured("direction", marks.roles(names))
    grey = alt.Chart(table.filter(~named)).mark_line(
        color=marks.PALETTE["baseline"], opacity=0.4, strokeWidth=1.2, clip=True
    )
    own = alt.Chart(table.filter(named)).mark_line(point=alt.OverlayMarkDef(size=26), clip=True)
    rule = alt.Chart(pl.DataFrame({"at": [at]})).mark_rule(strokeDash=[4, 4], opacity=0.6)
    return [
        rule.encode(x=marks.on_axis(x, "at")),
        grey.encode(x=x, y=y, detail="direction:N", tooltip=tips),
        own.encode(x=x, y=y, color=colour, tooltip=tips),
    ]


def token_strip(texts: Sequence[str], values: Sequence[float]) -> str:
    """Tokens in line as HTML, each on the colour of its value: blue below zero, orange above.

    Args:
      texts: of the tokens; hostile text is shown as it is written.
      values: in natural norms; the colours end at ±`COLOURS`.
    """
    spans = []
    for text, value in zip(texts, values, strict=True):
        colour = marks.PALETTE["persona" if value > 0 else "refusal"]
        share = 70 * min(abs(value) / COLOURS, 1)
        ground = f"color-mix(in srgb, {colour} {share:.0f}%, transparent)"
        shown = html.escape(plain(text))
        spans.append(f'<span title="{signed(value)}" style="background: {ground}">{shown}</span>')
    return "".join(spans)


def reply_cards(view: View, baseline: str, steered: str, *, veiled: bool) -> str:
    """Both strips as cards side by side, with a line that says what the colours are."""
    plain_card = marks.card("baseline", "", "baseline", veiled=veiled, marked=baseline)
    steered_card = marks.card(describe(view), "", "persona", veiled=veiled, marked=steered)
    note = (
        f"The end of the prompt, then the reply: greedy, at most {lesson.ROOM} tokens. Colour: "
        f"projection on {view.name}, blue and orange end at ∓{COLOURS:g} {UNIT} from the median "
        "token of the unsteered prompt. One early word can change all of a reply: the "
        "probabilities are the more stable measure."
    )
    return marks.cards(plain_card, steered_card, note=note)


def opens_with(tokens: Sequence[str]) -> str:
    """What "opens with a refusal" is, as Markdown."""
    shown, texts = (marks.escaped(", ".join(map(repr, some))) for some in (tokens, lesson.OPENINGS))
    return (
        f"**Opens with a refusal**: the probability that the reply's first token is {shown}, the "
        f"first tokens of {texts}. A helpful reply may begin so too: read the changes."
    )


def verdict(guess: str | None, table: pl.DataFrame | None) -> str:
    """What an exercise's check says, as Markdown; nothing before a guess.

    Args:
      guess: the chosen option.
      table: from `lesson.shares`. Options within half a point of the first are as good as it.
    """
    if guess is None or table is None:
        return ""
    best = table.filter(pl.col("moved") >= table["moved"][0] - 0.005)["option"].to_list()
    found = [f"{marks.escaped(name)} {percent(share, 1)}" for name, share in table.iter_rows()]
    word = "Yes." if guess in best else "Not on this prompt."
    return f"**{word}** Next-token probability that moves: {', '.join(found)}."


def explorer(table: pl.DataFrame) -> alt.LayerChart:
    """The likeliest next tokens with menus for direction, layer and strength, in the chart itself.

    It needs no kernel, so it works in an exported page.

    Args:
      table: from `lesson.grid`, with several directions and tokens.
    """
    bound = []
    for field in ("direction", "layer", "strength"):
        values = table[field].unique(maintain_order=True).to_list()
        menu = alt.binding_select(options=values, name=f"{field} ")
        first = values[0 if field == "direction" else len(values) // 2 + 1]
        bound.append(alt.param(name=f"chosen_{field}", value=first, bind=menu))
    chosen = " && ".join(f"datum.{p.name.removeprefix('chosen_')} == {p.name}" for p in bound)
    labels = marks.numbered([marks.token_text(text) for text in table["token"]])
    base = alt.Chart(table.with_columns(row=pl.Series(labels))).transform_filter(chosen)
    bars = base.mark_bar(color=marks.PALETTE["persona"]).encode(
        x=marks.share_axis("probability", "probability of the first reply token"),
        y=marks.row_axis("row", numbers=True, labelFont=marks.MONO, labelFontSize=12.5),
        tooltip=marks.tooltip("token", tiny="probability"),
    )
    words = "'opens with a refusal: ' + format(datum.opens, '.0%')"
    first = base.transform_filter("datum.rank == 0").transform_calculate(words=words)
    note = first.mark_text(align="left", fontWeight="bold")
    note = note.encode(x=alt.value(0), y=alt.value(-10), text="words:N")
    height = 24 * table["rank"].n_unique()
    chart = alt.LayerChart(layer=[bars, note]).add_params(*bound)
    return chart.properties(width="container", height=height)


HERE = Path(__file__).parent


class Plane(anywidget.AnyWidget):
    """Drag the tips of h and d; the steps are applied to h in the order given.

    Attributes:
      h: the state, [x, y] within -4 to 4.
      d: the direction, [x, y]; its length is its natural norm.
      strength: multiples of d that `add` adds.
      high: upper bound of the projection that `cap` keeps; the lower bound is -high.
      steps: which of add, project and cap are applied, in this order.
      cloud: points around the origin; with them h and d are the means of two clouds of this shape,
        and their difference is drawn instead of the steps.
      colours: hex colours of d and of the result.
    """

    _esm = HERE / "plane.js"
    _css = HERE / "plane.css"
    h = traitlets.List(traitlets.Float()).tag(sync=True)
    d = traitlets.List(traitlets.Float()).tag(sync=True)
    strength = traitlets.Float(1.0).tag(sync=True)
    high = traitlets.Float(1.0).tag(sync=True)
    steps = traitlets.List(traitlets.Unicode()).tag(sync=True)
    cloud = traitlets.List(traitlets.List()).tag(sync=True)
    colours = traitlets.Dict().tag(sync=True)


def plane(*steps: str, h: tuple[float, float], d: tuple[float, float], **fields: Any) -> Plane:
    """A plane to show with `mo.ui.anywidget`; see `Plane` for the arguments."""
    colours = {"d": marks.PALETTE["persona"], "result": marks.PALETTE["axis"]}
    if fields.get("cloud"):
        colours["result"] = marks.PALETTE["refusal"]
    return Plane(h=list(h), d=list(d), steps=list(steps), colours=colours, **fields)
