"""Charts of the layer-window notebook; their tables come from `evidence.layer_windows`."""

from __future__ import annotations

from collections.abc import Callable

import altair as alt
import polars as pl

from jaxsteer.evidence.charts import marks
from jaxsteer.evidence.layer_windows import NONE, Map
from jaxsteer.words import counted, extent, p_equals, percent, points, signed, span

HIGH, STRIPS = 46, 6  # pixels of a cell; strips of its hatching
BROKEN = 0.1  # cells with more degenerate replies are marked
AXES: dict[Map, tuple[str, str]] = {
    "knockout": ("layers the direction is projected out of (resid_post)", "norms added"),
    "refusal": ("layer refusal is added at (resid_post)", "norms added"),
}
COLUMNS: dict[Map, str] = {"knockout": "not removed", "refusal": "not added"}
# How each condition's line is drawn along depth, in order.
LINES: list[tuple[marks.Role, list[int]]] = [
    ("persona", [1, 0]),
    ("refusal", [6, 3]),
    ("axis", [2, 3]),
    ("degenerate", [9, 3, 2, 3]),
    ("random", [4, 6]),
]


def map_finding(maps: pl.DataFrame, which: Map) -> str:
    """What a map shows at its largest strength, computed from its cells."""
    mine = maps.filter(pl.col("map") == which)
    placed = mine.filter((pl.col("column") != NONE) & ~pl.col("cancels"))
    if not placed.height:
        return "Every cell of this map cancels by algebra: it shows nothing"
    top = placed.filter(pl.col("strength") == placed["strength"].max())
    best = top.sort("rate", "order", descending=[True, False]).row(0, named=True)
    ties = top.filter(pl.col("rate") == best["rate"]).height - 1
    much = "1 norm" if best["norms"] == "1" else f"{best['norms']} norms"
    verb = "Removed" if which == "knockout" else f"{much} of refusal added"
    there = f"{verb} at {best['column']}, refusal is {percent(best['rate'])}"
    there += f" ({span(best['low'], best['high'])})"
    if top.height > 1:
        there += f", the highest of {top.height} places"
        there += f" with {counted(ties, 'other')}" if ties else ""
    control = maps.filter(pl.col("condition") == best["control"]).head(1)
    if not control.height:
        return f"{there}; there is no control to compare with"
    name = "untouched" if control["strength"].item() == 0 else "with steering alone"
    alone = f"{name} {percent(control['rate'].item())}"
    if best["rate"] > control["rate"].item():
        return f"{there}; {alone}"
    return f"Nowhere does refusal exceed its control. {there}; {alone}"


def map_chart(maps: pl.DataFrame, which: Map) -> alt.LayerChart:
    """One map: refusal by place and strength, its interval in the cell, hatched where it cancels.

    Brush `cells` to choose. The interval, n and the broken replies also show on hover.

    Args:
      maps: from `windows.table`.
      which: the map to draw; it has at least one cell.
    """
    mine = _written(maps.filter(pl.col("map") == which), "rate", percent, span)
    # The frame must show on top of filled cells, light and dark.
    frame = alt.BrushConfig(fill=marks.INK, fillOpacity=0.05, stroke=marks.INK, strokeWidth=2)
    brush = alt.selection_interval(name="cells", encodings=["x", "y"], mark=frame)
    blue = marks.PALETTE["refusal"]
    scale = alt.Scale(domain=[0, 1], range=[blue + "08", blue + "b0"])
    legend = alt.Legend(title="refused", format=marks.PERCENT, values=[0, 0.5, 1])
    called = {
        "rate": "refused",
        "low": "95 % from",
        "high": "95 % to",
        "n": "prompts",
        "degenerate": "broken replies",
        "cancels": "cancels by algebra",
    }
    tips = marks.tooltip("condition n cancels", percent="rate low high degenerate", titles=called)
    colour = alt.Color("rate:Q", scale=scale, legend=legend)
    rect, *rest = _grid(mine, which, colour, tips)
    n = extent(mine["n"], "harmful prompt")
    detail = f"n = {n} a cell; small: Wilson 95 % interval{_marks_detail(mine)}"
    detail += ". Drag over cells to choose them"
    height = HIGH * mine["norms"].n_unique()
    return marks.wide([rect.add_params(brush), *rest], map_finding(maps, which), detail, height)


def difference_chart(table: pl.DataFrame) -> alt.LayerChart:
    """The third map: refusal in a cell minus that of the same knockout without steering.

    Args:
      table: from `layer_windows.over_unsteered`; at least one line.
    """
    # More refusals are blue, as in the other maps; the scale is the same for all studies.
    legend = alt.Legend(title="refused, difference", format="+.0%", values=[-1, 0, 1])
    scale = marks.around_zero(1.25)
    scale["range"] = scale["range"][::-1]
    colour = alt.Color("difference:Q", scale=scale, legend=legend)
    named = marks.tooltip("condition control n", percent="difference low high")
    detail = (
        f"points of 100 prompts, paired, n = {extent(table['n'])}; small: bootstrap 95 %; +0: with "
        "steering as without" + _marks_detail(table)
    )
    shown = _written(
        table, "difference", points, lambda low, high: f"{points(low)} to {points(high)}"
    )
    layers = _grid(shown, "knockout", colour, named)
    return marks.wide(layers, difference_finding(table), detail, HIGH * shown["norms"].n_unique())


def difference_finding(table: pl.DataFrame) -> str:
    """Where the largest addition matters least, computed from the cells of the third map."""
    top = table.filter(pl.col("strength") == pl.col("strength").max())
    placed = top.filter((pl.col("column") != NONE) & ~pl.col("cancels"))
    if not placed.height:
        return "Every cell of this map cancels by algebra: it shows nothing"
    best = placed.sort(pl.col("difference").abs(), "order").row(0, named=True)
    there = f"removed at {best['column']}, by {points(best['difference'])}"
    there += f" ({points(best['low'])} to {points(best['high'])})"
    there += f", the least of {placed.height} places" if placed.height > 1 else ""
    alone = top.filter(pl.col("column") == NONE)["difference"].to_list()
    start = f"Added x{best['norms']}, the direction moves refusal"
    return f"{start} by {points(alone[0])} points; {there}" if alone else f"{start}, {there}"


def _written(
    table: pl.DataFrame,
    value: str,
    figure: Callable[[float], str],
    ends: Callable[[float, float], str],
) -> pl.DataFrame:
    """The cells by depth, with what is written into them: a value, and the ends of its interval."""
    shown = table.sort("order")
    figures = shown.select(value, "low", "high").rows()
    return shown.with_columns(
        figure=pl.Series([figure(one) for one, _, _ in figures], dtype=pl.String),
        ends=pl.Series([ends(low, high) for _, low, high in figures], dtype=pl.String),
    )


def _grid(
    shown: pl.DataFrame, which: Map, colour: alt.Color, named: list[alt.Tooltip]
) -> list[alt.Chart]:
    """The layers of a map; the table is from `_written`."""
    columns = shown["column"].unique(maintain_order=True).to_list()
    norms = shown.sort("strength", descending=True)["norms"].unique(maintain_order=True).to_list()
    across, up = AXES[which]
    words = f"datum.value == '{NONE}' ? '{COLUMNS[which]}' : datum.value"
    axis = alt.Axis(labelAngle=0, labelExpr=words, orient="bottom", labelLimit=80)
    x = alt.X("column:N", sort=columns, title=across, axis=axis)
    y = alt.Y("norms:N", sort=norms, title=up)
    base = alt.Chart(shown).encode(x=x, y=y)
    cell = base.mark_rect(stroke=marks.INK, strokeOpacity=0.18, cornerRadius=2)
    frame = alt.Chart(shown.filter("chosen")).encode(x=x, y=y)
    return [
        cell.encode(color=colour, tooltip=named),
        *_marked(shown, x, y, named),
        frame.mark_rect(filled=False, stroke=marks.INK, strokeWidth=2.5, cornerRadius=2),
        base.mark_text(dy=-6, fontWeight="bold", fontSize=13).encode(text="figure:N"),
        base.mark_text(dy=10, fontSize=10.5, opacity=0.85).encode(text="ends:N"),
    ]


def _marks_detail(shown: pl.DataFrame) -> str:
    drawn = {
        "hatched: steering cancels by algebra": shown["cancels"].any(),
        f"red corner: broken replies above {percent(BROKEN)}": shown.filter(_broken()).height,
        "bold frame: what the study chose on other prompts": shown["chosen"].any(),
    }
    return "".join(f"; {words}" for words, there in drawn.items() if there)


def _broken() -> pl.Expr:
    return pl.col("degenerate") > BROKEN


def _marked(shown: pl.DataFrame, x: alt.X, y: alt.Y, named: list[alt.Tooltip]) -> list[alt.Chart]:
    """Hatching, a line from the bottom to the top of each strip of a cell, and corners."""

    def at(axis: marks.Axis, place: float) -> marks.Axis:
        moved = axis.copy()
        moved["bandPosition"] = place
        return moved

    cancels = alt.Chart(shown.filter("cancels")).mark_rule(strokeWidth=1, opacity=0.4)
    hatched = [
        cancels.encode(
            x=at(x, i / STRIPS),
            x2=alt.X2("column:N", bandPosition=(i + 1) / STRIPS),
            y=at(y, 1),
            y2=alt.Y2("norms:N", bandPosition=0),
        )
        for i in range(STRIPS)
    ]
    red = marks.PALETTE["degenerate"]
    corner = alt.Chart(shown.filter(_broken()))
    # A point of size 4 draws its path in pixels around its place.
    corner = corner.mark_point(size=4, shape="M-12,1L-1,1L-1,12Z", color=red)
    return [*hatched, corner.encode(x=at(x, 1), y=at(y, 0), tooltip=named)]


def flips_chart(table: pl.DataFrame) -> alt.LayerChart:
    """Which way refusals flip, a line a cell: gained to the right, lost to the left.

    Args:
      table: from `windows.flip_table`; at least one line.
    """
    gained, lost = pl.col("raised") / pl.col("n"), -pl.col("lowered") / pl.col("n")
    shown = table.with_columns(
        gained=gained,
        lost=lost,
        right=pl.max_horizontal(gained, "high"),
        words=pl.format("+{} −{} of {}", "raised", "lowered", "n")
        + pl.when("cancels").then(pl.lit(", by algebra")).otherwise(pl.lit("")),
    )
    ends = [pl.col(k).abs().max() for k in ("gained", "lost", "low", "high")]
    reach = max(0.1, shown.select(pl.max_horizontal(*ends)).item())
    x = alt.X(
        "difference:Q",
        title="prompts whose refusal is lost (left) or gained (right)",
        scale=alt.Scale(domain=[-1.1 * reach, 1.45 * reach], nice=False),
        axis=alt.Axis(format="+.0%", tickCount=6),
    )
    base = alt.Chart(shown).encode(y=marks.row_axis("condition", above=marks.ROW))
    bars = [
        base.mark_bar(color=marks.colour(role), opacity=0.75, height=15).encode(
            x=marks.on_axis(x, field),
            x2=alt.datum(0),
            tooltip=marks.tooltip("condition control raised lowered n", plain="p p_holm"),
        )
        for field, role in (("gained", "refusal"), ("lost", "persona"))
    ]
    whisker = base.mark_rule(strokeWidth=2, opacity=0.9)
    whisker = whisker.encode(x=marks.on_axis(x, "low"), x2="high:Q")
    net = base.mark_point(shape="diamond", size=55, color=marks.INK).encode(x=x)
    words = base.mark_text(align="left", dx=7).encode(x=marks.on_axis(x, "right"), text="words:N")
    detail = "diamond and line: net change, paired bootstrap 95 %; n is in every line"
    layers = [*bars, whisker, net, words]
    return marks.wide(layers, flips_finding(table), detail, marks.ROW * shown.height)


def flips_finding(table: pl.DataFrame) -> str:
    """The chosen cells in one sentence."""
    tested = table.filter(~pl.col("cancels"))
    if not tested.height:
        return "Only cells that cancel by algebra are chosen: their flips are no evidence"
    best = tested.sort("p_holm", "p").row(0, named=True)
    clear = tested.filter(pl.col("p_holm") <= 0.05).height
    return (
        f"Unlike their control beyond chance: {clear} of {counted(tested.height, 'chosen cell')} "
        f"(smallest {p_equals(best['p_holm'])}, Holm over the cells shown)"
    )


def depth_chart(table: pl.DataFrame, name: str, phase: str) -> alt.LayerChart:
    """Projections along depth beside the baseline's, a line and band a condition.

    Args:
      table: from `windows.along_depth`; at least one line, few conditions.
      name: the direction projected on.
      phase: `prompt` or `response`.
    """
    names = table["condition"].unique(maintain_order=True).to_list()
    drawn = [LINES[i % len(LINES)] for i in range(len(names))]
    legend = alt.Legend(orient="bottom", direction="vertical", labelLimit=500, symbolOpacity=1)
    roles = {name: role for name, (role, _) in zip(names, drawn, strict=True)}
    colour = marks.coloured("condition", roles, legend=legend)
    dashes = alt.Scale(domain=names, range=[dash for _, dash in drawn])
    x = marks.layer_axis(int(table["layer"].min()), int(table["layer"].max()))  # type: ignore[arg-type]
    y = alt.Y("mean:Q", title="moved against the baseline, natural norms")
    hover = marks.tooltip("condition after layer n", signed="mean low high")
    dash = alt.StrokeDash("condition:N", scale=dashes)
    line = alt.Chart(table).mark_line()
    line = line.encode(x=x, y=y, color=colour, strokeDash=dash, tooltip=hover)
    tokens = "prompt tokens" if phase == "prompt" else "reply tokens"
    detail = (
        f"mean over {tokens}, n = {extent(table['n'], 'prompt')}, paired; band: mean ± 1.96 s.e."
    )
    layers = [marks.zero("y"), marks.band(table, x, y, colour), line]
    return marks.wide(layers, depth_finding(table, name), detail, 280)


def depth_finding(table: pl.DataFrame, name: str) -> str:
    """The largest change of a projection, and the operations that had acted by then."""
    acted = table.filter(pl.col("after") != "")
    most = acted.sort(pl.col("mean").abs(), descending=True).head(1)
    if not most.height or signed(most["mean"].item()) == signed(0):
        return f"No operation moves the projection on {name}"
    after, layer, moved = most.select("after", "layer", "mean").row(0)
    return (
        f"The projection on {name} moves furthest at layer {layer}: {signed(moved)} natural norms, "
        f"after {after}"
    )
