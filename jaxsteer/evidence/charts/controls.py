"""Charts of the fourth notebook; their numbers come from `evidence.findings`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import altair as alt
import polars as pl

from jaxsteer.evidence import paired as flips
from jaxsteer.evidence.charts import theme
from jaxsteer.evidence.charts.marks import reference, titled, with_interval
from jaxsteer.evidence.charts.text import escaped
from jaxsteer.evidence.claims import Claim
from jaxsteer.evidence.findings import KINDS, Finding, headline
from jaxsteer.stats import wilson
from jaxsteer.words import p_equals, p_value, points

OUTCOMES = {"refusal": "refusals", "bypass": "bypasses", "degenerate": "degenerate replies"}
PROMPTS = {"strongreject": "harmful prompts", "benign": "benign prompts"}
MOST_PAIRS = 160  # dots side by side that can still be told apart
STATUS: dict[str, theme.Role] = {
    "stands": "axis",
    "undecided": "baseline",
    "breaks": "degenerate",
}
LABELS: dict[str, theme.Role] = {
    "refusal": "refusal",
    "benign-answer": "axis",
    "complied-unscored": "baseline",
    "bypass": "persona",
    "degenerate": "degenerate",
}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose cells are plain text, whatever they hold.

    >>> print(markdown_table(["a"], [["<b>|"]]))
    | a |
    | :--- |
    | &lt;b&gt;&#124; |
    """
    lines = [f"| {' | '.join(head)} |", f"|{' :--- |' * len(head)}"]
    for row in rows:
        cells = [escaped(str(cell).replace("\n", " ")) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def findings_chart(made: Sequence[Finding]) -> alt.LayerChart:
    """Every control as a difference with its interval, one row each, status as colour and word.

    Random directions are drawn as the treated rate minus theirs; their bar is the range of seeds.
    """
    lines = [
        {
            "row": f"{i:02d} {f.claim} · {KINDS[f.kind]}"
            + (f", {f.outcome}" if f.kind == "benign" else ""),
            "difference": f.difference,
            "low": f.low,
            "high": f.high,
            "end": max(f.high, 0.0),
            "status": f.status,
            "words": f"{f.status}: {f.why}",
            "compared": compared(f),
            "counted": f"{OUTCOMES[f.outcome]}, {PROMPTS.get(f.family, f.family)}",
            "n": f"{f.n} {'seeds' if f.kind == 'random' else 'prompts'}",
        }
        for i, f in enumerate(made)
    ]
    table = pl.DataFrame(lines)
    axis = alt.Axis(labelExpr="slice(datum.label, 3)", labelLimit=330)
    y = alt.Y("row:N", sort=None, title=None, axis=axis)
    reach = max(0.3, *(abs(v) for f in made for v in (f.low, f.high, f.difference)))
    x = alt.X(
        "difference:Q",
        title="difference of rates, in points of 100 prompts",
        axis=alt.Axis(format="+.0%", tickCount=6, labelExpr="replace(datum.label, '%', '')"),
        scale=alt.Scale(domain=[-1.05 * reach, 1.05 * reach], nice=False),
    )
    names = list(STATUS)
    roles = [STATUS[name] for name in names]
    scale = alt.Scale(domain=names, range=[theme.PALETTE[r] for r in roles])
    shapes = alt.Scale(domain=names, range=["circle", "diamond", "triangle-down"])
    colour = alt.Color("status:N", scale=scale, legend=None)
    tooltip = [f"{name}:N" for name in ("compared", "counted", "n", "words")]
    dots = (
        alt.Chart(table)
        .mark_point(size=95)
        .encode(
            x=x,
            y=y,
            color=colour,
            shape=alt.Shape("status:N", scale=shapes, legend=None),
            tooltip=tooltip,
        )
    )
    words = alt.Chart(table).mark_text(align="left", dx=12, fontWeight="bold")
    said = words.encode(x=alt.value(342), y=y, color=colour, text="status:N")
    zero = reference(0.0, "x", "no difference")
    chart = alt.LayerChart(layer=[zero, with_interval(dots, "x", "low", "high"), said])
    detail = (
        "first minus second, paired on prompts, bootstrap 95 % interval; random directions: "
        f"treated minus their mean, bar = range of seeds; {_sizes(made)}"
    )
    return titled(
        chart.properties(width=330, height=max(60, 30 * len(made))), headline(made), detail
    )


def _sizes(made: Sequence[Finding]) -> str:
    parts = []
    for unit in ("prompts", "seeds"):
        known = [f.n for f in made if (f.kind == "random") == (unit == "seeds")]
        if known:
            parts.append(f"n = {_span(known)} {unit}")
    return ", ".join(parts)


def _span(numbers: Iterable[int]) -> str:
    known = sorted(numbers)
    return f"{known[0]}" if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


def envelope_table(rows: pl.DataFrame, made: Sequence[Finding]) -> pl.DataFrame:
    """Rates behind the random controls of some findings: one line per seed and treated condition.

    A row is named by its treated condition, and by outcome and prompts where the rows differ in it.

    Returns:
      Columns row (what is compared), outcome, kind (`treated` or `random`), name, slot (place in
      the row), n, rate, low, high.
    """
    lines = []
    compared: dict[tuple[str, str, str], Finding] = {}
    for f in (f for f in made if f.kind == "random"):
        compared.setdefault((f.treated, f.family, f.outcome), f)
    outcomes = {f.outcome for f in compared.values()}
    families = {f.family for f in compared.values()}
    for f in compared.values():
        row = f.treated
        row += f" · {f.outcome}" if len(outcomes) > 1 else ""
        row += f" · {PROMPTS.get(f.family, f.family)}" if len(families) > 1 else ""
        of = pl.col("family") == f.family
        one = rows.filter(of & (pl.col("condition") == f.treated))
        many = rows.filter(of & (pl.col("base") == f.first))
        if not one.is_empty():
            many = many.filter(
                (pl.col("mode") == one["mode"][0])
                & pl.col("scale").eq_missing(pl.lit(one["scale"][0], pl.Float64))
            )
        slot = 0
        for kind, part in (("treated", one), ("random", many)):
            for (name,), group in part.group_by("condition", maintain_order=True):
                slot += 1
                k, n = int((group["label"] == f.outcome).sum()), group.height
                low, high = wilson(k, n)
                line = {"row": row, "outcome": f.outcome, "kind": kind, "name": str(name)}
                shares = {"rate": k / n, "low": low, "high": high}
                lines.append({**line, "slot": slot, "n": n, **shares})
    return pl.DataFrame(
        lines,
        schema={
            "row": pl.String, "outcome": pl.String, "kind": pl.String, "name": pl.String,
            "slot": pl.Int64, "n": pl.Int64,
            "rate": pl.Float64, "low": pl.Float64, "high": pl.Float64,
        },
    )  # fmt: skip


def envelope_chart(table: pl.DataFrame) -> alt.LayerChart:
    """Random directions as a cloud of seeds, and the treated condition against it.

    Args:
      table: from `envelope_table`, not empty.
    """
    outcomes = table["outcome"].unique(maintain_order=True).to_list()
    rate = f"{' or '.join(outcomes)} rate"
    outside, count = 0, 0
    spans = []
    for (row,), group in table.group_by("row", maintain_order=True):
        seeds = group.filter(pl.col("kind") == "random")["rate"]
        value = group.filter(pl.col("kind") == "treated")["rate"][0]
        low, high = float(seeds.min()), float(seeds.max())  # type: ignore[arg-type]
        spans.append({"row": row, "low": low, "high": high})
        outside += not low <= value <= high
        count += 1
    x = alt.X(
        "rate:Q",
        title=rate,
        axis=alt.Axis(format=theme.PERCENT, tickCount=6),
        scale=alt.Scale(domain=[0, 1]),
    )
    y = alt.Y("row:N", sort=None, title=None, axis=alt.Axis(labelLimit=330))
    kinds = ["treated", "random"]
    colour = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=kinds, range=[theme.PALETTE["persona"], theme.PALETTE["random"]]),
    )
    shape = alt.Shape(
        "kind:N", title=None, scale=alt.Scale(domain=kinds, range=["triangle-up", "cross"])
    )
    offset = alt.YOffset("slot:O")
    tooltip = [*map(alt.Tooltip, ("name:N", "n:Q"))]
    tooltip += [alt.Tooltip(f"{k}:Q", format=".1%") for k in ("rate", "low", "high")]
    dots = (
        alt.Chart(table)
        .mark_point(size=80)
        .encode(x=x, y=y, yOffset=offset, color=colour, shape=shape, tooltip=tooltip)
    )
    band = (
        alt.Chart(pl.DataFrame(spans))
        .mark_bar(color=theme.PALETTE["random"], opacity=0.16, cornerRadius=3)
        .encode(x=alt.X("low:Q", title=rate), x2="high:Q", y=y)
    )
    seeds_n = table.filter(pl.col("kind") == "random").group_by("row").len()["len"].to_list()
    what = "treated conditions" if len(outcomes) == 1 else "rates of treated conditions"
    finding = f"Outside the range of their random directions: {outside} of {count} {what}"
    detail = (
        f"share of prompts, n = {_span(table['n'].to_list())} each, Wilson 95 % intervals; shaded: "
        f"range over {_span(seeds_n)} seeds"
    )
    step = 9 * max(2, *(n + 1 for n in seeds_n))
    chart = alt.LayerChart(layer=[band, with_interval(dots, "x", "low", "high")])
    return titled(chart.properties(width=430, height=max(40, step) * count), finding, detail)


def flip_table(paired: pl.DataFrame, outcome: str) -> pl.DataFrame:
    """Pairs in the order in which they are drawn, with `flip`: lost, gained, kept or without.

    With more than `MOST_PAIRS` pairs, only those that flip, and of them so many.
    """
    before, after = pl.col("control") == outcome, pl.col("treated") == outcome
    kinds = (
        pl.when(before & ~after)
        .then(pl.lit("lost"))
        .when(after & ~before)
        .then(pl.lit("gained"))
        .when(before & after)
        .then(pl.lit("kept"))
        .otherwise(pl.lit("without"))
    )
    rank = pl.col("flip").replace_strict({"lost": 0, "gained": 1, "kept": 2, "without": 3})
    shown = paired.with_columns(kinds.alias("flip"))
    if shown.height > MOST_PAIRS:
        shown = shown.filter(pl.col("flip").is_in(["lost", "gained"]))
    return shown.sort(rank, "control", "treated", "prompt_id").head(MOST_PAIRS)


def flip_chart(paired: pl.DataFrame, outcome: str, treated: str, control: str) -> alt.LayerChart:
    """One column a prompt, control above and treated below; a line joins what flipped.

    Args:
      paired: from `Labels.pair`, not empty.
      outcome: the label that flips.
      treated, control: names of the conditions.
    """
    shown = flip_table(paired, outcome).with_row_index("column")
    names = {"control": control, "treated": treated}
    long = shown.unpivot(
        ["control", "treated"], index=["column", "prompt_id", "category", "flip"],
        variable_name="side", value_name="label",
    )  # fmt: skip
    long = long.with_columns(
        side=pl.col("side").replace_strict(names, return_dtype=pl.String),
        flipped=pl.col("flip").is_in(["lost", "gained"]),
    )
    wide = 2 * shown.height > MOST_PAIRS
    step = 6 if wide else 660 / max(shown.height, 12)
    x = alt.X(
        "column:O",
        title=f"prompts, one column each (n = {shown.height})",
        axis=alt.Axis(labels=False, ticks=False),
    )
    y = alt.Y("side:N", sort=[control, treated], title=None, axis=alt.Axis(labelLimit=200))
    there = [label for label in LABELS if label in set(long["label"])] or ["refusal"]
    roles = [LABELS[label] for label in there]
    colour = alt.Color(
        "label:N",
        title=None,
        scale=alt.Scale(domain=there, range=[theme.PALETTE[r] for r in roles]),
    )
    shape = alt.Shape(
        "label:N",
        title=None,
        scale=alt.Scale(domain=there, range=[theme.SHAPES[r] for r in roles]),
    )
    tooltip = [f"{k}:N" for k in ("prompt_id", "category", "side", "label", "flip")]
    dots = alt.Chart(long).mark_point(size=26 if wide else min(90, 5 * step))
    fade = alt.condition("datum.flipped", alt.value(1.0), alt.value(0.45))
    dots = dots.encode(x=x, y=y, color=colour, shape=shape, opacity=fade, tooltip=tooltip)
    joined = alt.Chart(long).transform_filter("datum.flipped")
    line = joined.mark_line(strokeWidth=1.5, opacity=0.45, color=theme.PALETTE["baseline"])
    chart = alt.LayerChart(layer=[line.encode(x=x, y=y, detail="column:O"), dots])
    found = flips.flips(paired, outcome)
    detail = (
        f"{treated} minus {control}: {points(found.difference)} points, paired bootstrap 95 % "
        f"interval {points(found.low)} to {points(found.high)}; n = {found.n:,} prompts"
    )
    if shown.height < paired.height:
        detail += f"; drawn: {shown.height} of the {found.raised + found.lowered:,} that flip"
    width = step * max(shown.height, 12)
    chart = chart.properties(width=width, height=110)
    return titled(chart, flips.summary(found, outcome), detail)


def mcnemar_table(found: flips.Flips, outcome: str, treated: str, control: str) -> str:
    """The two-by-two table of a paired comparison, in Markdown."""
    lost, gained = found.lowered, found.raised
    head = ["", f"{escaped(treated)}: {outcome}", f"{escaped(treated)}: not"]
    rows = [
        [f"{control}: {outcome}", found.both, f"{lost} lost"],
        [f"{control}: not", f"{gained} gained", found.neither],
    ]
    words = (
        f"Only the {lost + gained} prompts off the diagonal count: if nothing but chance decided "
        f"which way they fall, a split at least as lopsided as {lost} to {gained} would come up "
        f"with {p_equals(found.p)} (exact McNemar, two-sided, not corrected)."
    )
    return f"{markdown_table(head, rows)}\n\n{words}"


def claims_table(judged: Sequence[Claim]) -> str:
    """The claims with their verdicts, in Markdown."""
    lines = [(c.name, c.says, c.verdict, c.reason) for c in judged]
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
            f.question,
            compared(f),
            f"{f.n} {'seeds' if f.kind == 'random' else 'prompts'}",
            p_value(f.p),
            f"{f.status}: {f.why}",
        )
        for f in made
    ]
    return markdown_table(["control", "question", "compared", "n", "p", "outcome"], lines)


def compared(f: Finding) -> str:
    """Which conditions a control compares: `persona against baseline`."""
    return f"{f.first} against {f.second}" if f.second else f"{f.treated} against {f.first}"
