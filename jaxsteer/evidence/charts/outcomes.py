"""Charts and cards of the fifth notebook: outcomes as stacked bars, replies to read or label."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import polars as pl

from jaxsteer.evidence.browse import UNKNOWN, may_harm
from jaxsteer.evidence.charts import marks, theme
from jaxsteer.evidence.charts.controls import LABELS
from jaxsteer.evidence.charts.text import card, cards
from jaxsteer.evidence.outcomes import WORDS, whiskers
from jaxsteer.judges.human import Entry
from jaxsteer.words import percent


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
    x, y = marks.share_axis("start", f"share of {subject}"), marks.row_axis("row")
    colours = alt.Scale(
        domain=[WORDS[label] for label in there],
        range=[theme.PALETTE[LABELS[label]] for label in there],
    )
    colour = alt.Color("outcome:N", scale=colours, title=None, legend=alt.Legend(columns=3))
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
    counted = marks.tooltip("group outcome k n", percent="share low high")
    stack = bars.encode(x=x, x2="end:Q", y=y, color=colour, tooltip=counted)
    chart = alt.LayerChart(layer=[stack, *drawn])
    detail = (
        f"one bar a {unit}; n in brackets; thin lines: Wilson 95 % intervals, of refused from the "
        "left, of harmful and broken from the right"
    )
    return marks.titled(chart.properties(width=430, height=30 * len(rows)), finding, detail)


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


def entry_cards(entry: Entry, *, reveal: bool) -> str:
    """A reply to label, with its prompt; nothing tells the condition, or what judges said."""
    veiled = may_harm(entry.family) and not reveal
    show = masked if veiled else str
    asked = card(f"prompt · {entry.family}", show(entry.prompt), "baseline", veiled=veiled)
    replied = card("reply", show(entry.response), "baseline", veiled=veiled)
    return cards(asked, replied)
