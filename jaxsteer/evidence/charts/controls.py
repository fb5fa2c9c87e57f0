"""Charts of the fourth and fifth notebooks: controls, flips, outcomes, and replies to read.

Their numbers come from `evidence.findings` and `evidence.outcomes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import polars as pl

from jaxsteer.evidence.charts import marks
from jaxsteer.evidence.charts.marks import card, cards, escaped, markdown_table
from jaxsteer.evidence.charts.opening import UNKNOWN, may_harm
from jaxsteer.evidence.claims import Claim, in_order
from jaxsteer.evidence.findings import KINDS, QUESTIONS, Finding, headline, once
from jaxsteer.evidence.outcomes import (
    IMPACT_COLUMNS,
    WORDS,
    Flips,
    cells,
    flip_table,
    flips,
    impacts,
    summary,
)
from jaxsteer.judges.human import Entry
from jaxsteer.study.results import Results
from jaxsteer.words import count, counted, extent, p_equals, p_value, percent, points

OUTCOMES = {"refusal": "refusals", "bypass": "bypasses", "degenerate": "degenerate replies"}
MOST_PAIRS = 160  # dots side by side that can still be told apart
STATUS: dict[str, marks.Role] = {
    "holds": "axis",
    "undecided": "baseline",
    "fails": "degenerate",
}
ENVELOPE: dict[str, marks.Role] = {"treated": "persona", "random": "random"}
LABELS: dict[str, marks.Role] = {
    "refusal": "refusal",
    "benign-answer": "axis",
    "complied-unscored": "baseline",
    "unfinished": "random",
    "bypass": "persona",
    "degenerate": "degenerate",
}


def findings_chart(made: Sequence[Finding]) -> alt.LayerChart:
    """Every control as a difference with its interval, one row each, status as colour and word.

    Random directions are drawn as the treated rate minus theirs; their bar is the range of seeds.
    """
    drawn = once(made)
    names = [
        f"{', '.join(claims)} · {KINDS[f.kind]}" + (f", {f.outcome}" if f.kind == "benign" else "")
        for f, claims in drawn
    ]
    ends = [v for f in made for v in (f.low, f.high, f.difference)]
    x = marks.points_axis("difference", "difference of rates, in points of 100 prompts", ends)
    table = pl.DataFrame(
        [
            {
                "row": name,
                "difference": f.difference,
                "low": f.low,
                "high": f.high,
                "status": f.status,
                "words": f"{f.status}: {f.why}",
                "compared": compared(f),
                "counted": f"{OUTCOMES[f.outcome]}, {f.family} prompts",
                "n": sample(f),
            }
            for name, (f, _) in zip(marks.numbered(names), drawn, strict=True)
        ]
    )
    y = marks.row_axis("row", numbers=True, above=marks.ROW)
    roles = marks.by_role("status", STATUS, legend=None)
    dots = marks.dots(table, x, y, tooltip=marks.tooltip("compared counted n words"), **roles)
    said = alt.Chart(table).mark_text(align="right", dy=12, fontSize=11, fontWeight="bold")
    said = said.encode(x=alt.value("width"), y=y, color=roles["color"], text="status:N")
    layers = [marks.reference(0.0, "no difference"), dots, said]
    sizes = {
        unit: [f.n for f in made if (f.kind == "random") == (unit == "seed")]
        for unit in ("prompt", "seed")
    }
    parts = {
        "prompt": "first minus second, paired on prompts, bootstrap 95 % interval",
        "seed": "random directions: treated minus their mean, bar = range of seeds",
    }
    detail = "; ".join(f"{parts[unit]}, n = {extent(ns, unit)}" for unit, ns in sizes.items() if ns)
    return marks.wide(layers, headline(made), detail, marks.ROW * len(drawn))


def envelope_chart(table: pl.DataFrame) -> alt.LayerChart:
    """Random directions as a cloud of seeds, and the treated condition against it.

    Args:
      table: from `findings.envelope_table`, not empty.
    """
    outcomes = table["outcome"].unique(maintain_order=True).to_list()
    rate, kind = pl.col("rate"), pl.col("kind")
    spans = table.group_by("row", maintain_order=True).agg(
        value=rate.filter(kind == "treated").first(),
        low=rate.filter(kind == "random").min(),
        high=rate.filter(kind == "random").max(),
        seeds=(kind == "random").sum(),
    )
    step = marks.ROW + 8 * (max(spans["seeds"]) + 1)
    x = marks.share_axis("rate", f"{' or '.join(outcomes)} rate")
    y = marks.row_axis("row", above=step)
    dots = marks.dots(
        table,
        x,
        y,
        yOffset=alt.YOffset("slot:O"),
        tooltip=marks.tooltip("name n", percent="rate low high"),
        **marks.by_role("kind", ENVELOPE),
    )
    seeds = marks.range_bar(spans, x, y, marks.PALETTE["random"])
    outside = spans.filter(~pl.col("value").is_between("low", "high")).height
    what = "treated condition" if len(outcomes) == 1 else "rate"
    finding = "Outside the range of the random directions: "
    finding += f"{outside} of {counted(spans.height, what)}"
    detail = f"share of prompts, n = {extent(table['n'])} each, Wilson 95 % intervals; "
    several = max(spans["seeds"]) > 1
    detail += f"shaded: range over {extent(spans['seeds'], 'seed')}" if several else "1 random seed"
    return marks.wide([seeds, dots], finding, detail, step * spans.height)


def flip_chart(pairs: pl.DataFrame, outcome: str, treated: str, control: str) -> alt.LayerChart:
    """One column a prompt, control above and treated below; a line joins what flipped.

    Args:
      pairs: from `Labels.pair`, not empty.
      outcome: the label that flips.
      treated, control: names of the conditions.
    """
    shown = flip_table(pairs, outcome, MOST_PAIRS).with_row_index("column")
    names = {"control": control, "treated": treated}
    long = shown.unpivot(
        list(names), index=["column", "prompt_id", "category", "flip"],
        variable_name="side", value_name="label",
    ).with_columns(
        side=pl.col("side").replace_strict(names, return_dtype=pl.String),
        flipped=pl.col("flip").is_in(["lost", "gained"]),
    )  # fmt: skip
    many = 2 * shown.height > MOST_PAIRS
    x = alt.X(
        "column:O",
        title=f"prompts, one column each (n = {shown.height})",
        axis=alt.Axis(labels=False, ticks=False),
    )
    y = marks.row_axis("side", above=55)
    labels = set(long["label"])
    roles = {label: role for label, role in LABELS.items() if label in labels}
    dots = (
        alt.Chart(long)
        .mark_point(size=26 if many else 70)
        .encode(
            x=x,
            y=y,
            opacity=alt.condition("datum.flipped", alt.value(1.0), alt.value(0.45)),
            tooltip=marks.tooltip("prompt_id category side label flip"),
            **marks.by_role("label", roles),
        )
    )
    joined = alt.Chart(long).transform_filter("datum.flipped")
    line = joined.mark_line(strokeWidth=1.5, opacity=0.45, color=marks.PALETTE["baseline"])
    layers = [line.encode(x=x, y=y, detail="column:O"), dots]
    found = flips(pairs, outcome)
    detail = (
        f"{treated} minus {control}: {points(found.difference)} points, paired bootstrap 95 % "
        f"interval {points(found.low)} to {points(found.high)}; n = {counted(found.n, 'prompt')}"
    )
    if shown.height < pairs.height:
        flipped = count(found.raised + found.lowered)
        detail += f"; drawn: {shown.height} of the {flipped} that flip"
    return marks.wide(layers, summary(found, outcome), detail, 110)


def mcnemar_table(found: Flips, outcome: str, treated: str, control: str) -> str:
    """The two-by-two table of a paired comparison, in Markdown."""
    lost, gained = found.lowered, found.raised
    head = ["", f"{escaped(treated)}: {outcome}", f"{escaped(treated)}: not"]
    rows = [
        [f"{control}: {outcome}", found.both, f"{lost} lost"],
        [f"{control}: not", f"{gained} gained", found.neither],
    ]
    words = (
        f"Only what is off the diagonal counts: {counted(lost + gained, 'prompt')}. If each were "
        f"as likely lost as gained, a split at least as uneven as {lost} to {gained} would have "
        f"{p_equals(found.p)} (exact McNemar, two-sided, not corrected)."
    )
    return f"{markdown_table(head, rows)}\n\n{words}"


def claims_table(judged: Sequence[Claim]) -> str:
    """The claims with their verdicts, in Markdown: confirmed ones first."""
    lines = [(c.name, c.says, c.verdict, c.reason) for c in in_order(judged)]
    return markdown_table(["claim", "what it says", "verdict", "why"], lines)


def verdicts_table(planned: Sequence[Claim], yours: Sequence[Claim]) -> str:
    """Verdicts as planned and under the reader's rules, in Markdown; an arrow where they differ."""
    lines = [
        (a.name, a.verdict, b.verdict + (" ←" if a.verdict != b.verdict else ""), b.reason)
        for a, b in zip(planned, yours, strict=True)
    ]
    return markdown_table(["claim", "as planned", "by your rules", "why"], lines)


def findings_table(made: Sequence[Finding]) -> str:
    """Controls with what each asks and what came out, in Markdown."""
    lines = [
        (
            KINDS[f.kind],
            QUESTIONS[f.kind],
            compared(f),
            sample(f),
            p_value(f.p),
            f"{f.status}: {f.why}",
        )
        for f in made
    ]
    return markdown_table(["control", "question", "compared", "n", "p", "outcome"], lines)


def compared(f: Finding) -> str:
    """Which conditions a control compares: `persona against baseline`."""
    return f"{f.first} against {f.second}" if f.second else f"{f.treated} against {f.first}"


def sample(f: Finding) -> str:
    """What a control counts, and how many: `48 prompts`."""
    return counted(f.n, "seed" if f.kind == "random" else "prompt")


def stacked_chart(table: pl.DataFrame, unit: str, subject: str) -> alt.LayerChart:
    """Outcomes stacked to 100 %, one bar a group, each outcome with its interval at its edge.

    Args:
      table: from `outcomes.shares`, not empty.
      unit: what a bar is: `condition` or `category`.
      subject: which prompts, in words.
    """
    there = [label for label in WORDS if label in set(table["label"])]
    rates = {
        g: percent(s)
        for g, k, s in table.select("group", "label", "share").iter_rows()
        if k == "refusal"
    }
    rows = [f"{rates.get(g, '0 %')} of {n}: {g}" for g, n in table.select("group", "n").iter_rows()]
    shown = table.with_columns(
        outcome=pl.col("label").replace_strict(WORDS, return_dtype=pl.String),
        row=pl.Series(rows, dtype=pl.String),
    )
    x, y = marks.share_axis("start", f"share of {subject}"), marks.row_axis("row", above=marks.ROW)
    legend = alt.Legend(columns=alt.expr("width < 480 ? 1 : 3"))
    drawn_as = {WORDS[label]: LABELS[label] for label in there}
    colour = marks.coloured("outcome", drawn_as, legend=legend)
    bars = alt.Chart(shown).mark_bar(opacity=0.8, cornerRadius=0, height=14)
    # Each outcome's interval has its own height within the bar, so that they do not run together.
    heights = {"refusal": -4, "bypass": 0, "degenerate": 4}
    drawn = [
        alt.Chart(shown.filter(pl.col("label") == label))
        .mark_rule(strokeWidth=width, color=ink, opacity=1, yOffset=height)
        .encode(x=alt.X("from:Q"), x2="to:Q", y=y)
        for label, height in heights.items()
        if label in there
        for width, ink in ((4.5, marks.PAPER), (1.75, marks.NIGHT))
    ]
    hover = marks.tooltip("group outcome k n", percent="share low high")
    stack = bars.encode(x=x, x2="end:Q", y=y, color=colour, tooltip=hover)
    detail = f"one bar a {unit}, most refusals first; above it: refused, of n"
    if drawn:
        detail += (
            "; thin lines: Wilson 95 % intervals, of refused from the left, of harmful and broken "
            "from the right"
        )
    height = marks.ROW * table["group"].n_unique()
    return marks.wide([stack, *drawn], outcomes(table, unit, subject), detail, height)


def outcomes(table: pl.DataFrame, unit: str, subject: str) -> str:
    """Where refusal is highest and lowest, in one sentence; arguments as of `stacked_chart`."""
    word = "in" if unit == "category" else "under"
    refused = table.filter(pl.col("label") == "refusal")
    groups = counted(table["group"].n_unique(), unit)
    if not refused["k"].sum():
        most = table.group_by("label", maintain_order=True).agg(pl.col("k").sum()).sort("k")
        common = WORDS[str(most["label"][-1])]
        return f"No refusal {word} {groups}: among {subject} most common is “{common}”"

    def at(end: float) -> str:
        there = refused.filter(pl.col("share") == end)["group"].to_list()
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        return f"{word} {there[0]}{more} ({percent(end)})"

    low, high = float(refused["share"].min()), float(refused["share"].max())  # type: ignore[arg-type]
    if refused.height == 1:
        return f"Refusal is {percent(high)} {word} {refused['group'][0]}"
    if percent(low) == percent(high):
        return f"Refusal is {percent(high)} {word} each of {groups}"
    return f"Refusal is highest {at(high)}, lowest {at(low)}"


def impact_table(found: Results) -> str:
    """What the conditions cost on benign prompts, as Markdown; "" if it was not measured."""
    lines = [cells(name, cost) for name, cost in impacts(found).items()]
    return markdown_table(IMPACT_COLUMNS, lines) if lines else ""


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
      rows: prompt_id, family, kind, condition, label, judge, response.
      texts: prompts by id.
      reveal: lift the veils.
    """
    made = []
    for row in rows.iter_rows(named=True):
        veiled = may_harm(row["kind"]) and not reveal
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
    veiled = may_harm(entry.kind) and not reveal
    show = masked if veiled else str
    asked = card(f"{entry.kind} prompt", show(entry.prompt), "baseline", veiled=veiled)
    replied = card("reply", show(entry.response), "baseline", veiled=veiled)
    return cards(asked, replied)
