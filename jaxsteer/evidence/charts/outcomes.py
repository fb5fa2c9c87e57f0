"""Charts and cards of the fifth notebook: outcomes as stacked bars, receipts compared, replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import polars as pl

from jaxsteer.evidence.browse import UNKNOWN, may_harm
from jaxsteer.evidence.charts import theme
from jaxsteer.evidence.charts.controls import LABELS, markdown_table
from jaxsteer.evidence.charts.marks import reference, titled, with_interval
from jaxsteer.evidence.charts.text import card, cards
from jaxsteer.evidence.outcomes import WORDS, whiskers
from jaxsteer.judges.labelling import Entry
from jaxsteer.receipt.compare import Comparison, Line
from jaxsteer.receipt.statement import Predicate
from jaxsteer.receipt.verify import Check
from jaxsteer.words import percent, points

SIGNS = {"ok": "✓", "mismatch": "✗", "unchecked": "–"}
MOST_LINES = 24


def stacked_chart(table: pl.DataFrame, unit: str, subject: str) -> alt.LayerChart:
    """Outcomes stacked to 100 %, one bar a group, each outcome with its interval at its edge.

    Args:
      table: from `outcomes.shares`, not empty.
      unit: what a bar is: `condition` or `category`.
      subject: which prompts, in words.
    """
    there = [label for label in WORDS if label in set(table["label"])]
    shown = table.with_columns(
        outcome=pl.col("label").replace_strict(WORDS, return_dtype=pl.String),
        row=pl.format("{}  (n = {})", "group", "n"),
    )
    rows = shown["row"].unique(maintain_order=True).to_list()
    x = alt.X(
        "start:Q",
        title=f"share of {subject}",
        axis=alt.Axis(format=theme.PERCENT, tickCount=6),
        scale=alt.Scale(domain=[0, 1]),
    )
    y = alt.Y("row:N", sort=rows, title=None, axis=alt.Axis(labelLimit=360))
    colours = alt.Scale(
        domain=[WORDS[label] for label in there],
        range=[theme.PALETTE[LABELS[label]] for label in there],
    )
    colour = alt.Color("outcome:N", scale=colours, title=None, legend=alt.Legend(columns=3))
    tooltip = [*map(alt.Tooltip, ("group:N", "outcome:N", "k:Q", "n:Q"))]
    tooltip += [alt.Tooltip(f"{k}:Q", format=".1%") for k in ("share", "low", "high")]
    bars = alt.Chart(shown).mark_bar(opacity=0.8, cornerRadius=0, height={"band": 0.72})
    ends = whiskers(table).join(shown.select("group", "row").unique(), on="group", how="left")
    # Each outcome's interval has its own height within the bar, so that they do not run together.
    heights = {"refusal": -4, "bypass": 0, "degenerate": 4}
    drawn = [
        alt.Chart(ends.filter(pl.col("label") == label))
        .mark_rule(strokeWidth=width, color=ink, opacity=1, yOffset=height)
        .encode(x=alt.X("from:Q"), x2="to:Q", y=y)
        for label, height in heights.items()
        if label in there
        for width, ink in ((4.5, theme.PAPER), (1.75, theme.NIGHT))
    ]
    refused = shown.filter(pl.col("label") == "refusal")
    word = "in" if unit == "category" else "under"
    finding = f"No {unit} has a refusal among {subject}"
    if refused["k"].sum():
        top, least = (
            refused.row(int(at or 0), named=True)
            for at in (refused["share"].arg_max(), refused["share"].arg_min())
        )
        finding = f"Refusal is highest {word} {top['group']} ({percent(top['share'])})"
        if len(rows) > 1:
            finding += f", lowest {word} {least['group']} ({percent(least['share'])})"
    stack = bars.encode(x=x, x2="end:Q", y=y, color=colour, tooltip=tooltip)
    chart = alt.LayerChart(layer=[stack, *drawn])
    detail = (
        f"one bar a {unit}; n in brackets; thin lines: Wilson 95 % intervals, of refused from the "
        "left, of harmful and broken from the right"
    )
    return titled(chart.properties(width=430, height=30 * len(rows)), finding, detail)


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


def masked(text: str) -> str:
    """The shape of a text without its letters: what stands behind a veil.

    >>> masked("Hello, you")
    '██████ ███'
    """
    return "".join(c if c in " \n" else "█" for c in text)


def reply_cards(rows: pl.DataFrame, texts: Mapping[str, str], *, reveal: bool) -> str:
    """Prompt and reply side by side, one pair a row; what may harm is veiled unless revealed.

    A veil is drawn over a mask, so that what may harm is not in the page before it is asked for.

    Args:
      rows: prompt_id, family, condition, label, judge, response.
      texts: prompts by id.
      reveal: lift the veils.
    """
    made = []
    for row in rows.iter_rows(named=True):
        veiled = may_harm(row["family"]) and not reveal
        show = masked if veiled else str
        head = f"{row['prompt_id']} · {row['family']}"
        prompt = texts.get(row["prompt_id"], UNKNOWN)
        asked = card(head, show(prompt), "baseline", veiled=veiled)
        said = row["label"] + (f" ({row['judge']})" if row["judge"] else "")
        role = LABELS.get(row["label"], "baseline")
        replied = card(f"{row['condition']} · {said}", show(row["response"]), role, veiled=veiled)
        made.append(cards(asked, replied))
    return '<div style="display: grid; gap: 22px">' + "".join(made) + "</div>"


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


def entry_cards(entry: Entry, *, reveal: bool) -> str:
    """A reply to label, with its prompt; nothing tells the condition, or what judges said."""
    veiled = may_harm(entry.family) and not reveal
    show = masked if veiled else str
    asked = card(f"prompt · {entry.family}", show(entry.prompt), "baseline", veiled=veiled)
    replied = card("reply", show(entry.response), "baseline", veiled=veiled)
    return cards(asked, replied)
