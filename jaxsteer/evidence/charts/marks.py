"""One look for all charts and cards: theme, marks, axes, and model text in a page.

Colours belong to roles, not to positions, so the persona is the same orange in every chart. They
are chosen so that any two stay apart under the three kinds of colour blindness, and so that each
has a contrast of at least 3:1 both on white and on marimo's dark page (test_marks_theme.py checks
both). Everything that is not data - text, axes, grid - is drawn in the page's own ink
(`currentColor`), which is why charts are SVG on a transparent ground: they follow the reader's
switch between light and dark without being drawn again.

Colour never carries meaning alone: label marks directly, or give them a shape (`SHAPES`).

Model output and prompts are hostile text. `escaped`, `card` and `markdown_table` are the only way a
notebook shows them: the result is HTML in which nothing of the text is markup, markdown or a
formula, control characters are visible, and text that may be harmful is blurred.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import altair as alt
import polars as pl

from jaxsteer.errors import UserError
from jaxsteer.judges.human import safe_cell
from jaxsteer.words import plain

PAPER = "#ffffff"
NIGHT = "#181c1a"  # marimo's dark page
INK = "currentColor"
FONT = "PT Sans, system-ui, sans-serif"  # marimo's own, which it ships
MONO = "Fira Mono, ui-monospace, monospace"

Role = Literal["baseline", "persona", "refusal", "axis", "random", "degenerate"]
PALETTE: dict[Role, str] = {
    "baseline": "#696978",  # slate: nothing was done
    "persona": "#e1782d",  # orange: the persona, and steering with it; a bypass
    "refusal": "#4b5ad2",  # blue: the refusal direction; a refusal
    "axis": "#3ca587",  # green: the assistant axis, and other named directions
    "random": "#a587b4",  # mauve: random controls
    "degenerate": "#c32d3c",  # red: broken replies
}
SHAPES: dict[Role, str] = {
    "baseline": "circle",
    "persona": "triangle-up",
    "refusal": "square",
    "axis": "diamond",
    "random": "cross",
    "degenerate": "triangle-down",
}

# What the menu of a chart saves; the data has a link of its own.
MENU = {"export": True, "source": False, "compiled": False, "editor": False}
PERCENT = ".0%"  # of rates on axes: 42%
# d3 formats of numbers in tooltips; browsers round as `words.rounded` does
FORMATS = {
    "percent": ".1%",  # rates: 42.5%
    "tiny": ".3~p",  # probabilities: 0.0123%
    "signed": "+.2f",  # cosines and changes: +0.18
    "plain": ".3~g",  # any other number
}


def roles(directions: Iterable[str]) -> dict[str, Role]:
    """The role of each direction, by its name.

    `random-3` and the like are random controls. Traits have no roles of their own: they take the
    assistant axis's and two others in turn, so that opposite traits side by side differ.
    """
    spare: list[Role] = ["axis", "degenerate", "baseline"]
    found: dict[str, Role] = {}
    for name in directions:
        known: Role = "random" if name.startswith("random") else name  # type: ignore[assignment]
        if known not in PALETTE:
            known = spare[sum(k not in PALETTE for k in found) % len(spare)]
        found[name] = known
    return found


def colour(direction: str) -> str:
    """The colour of a direction that is drawn alone."""
    return PALETTE[roles([direction])[direction]]


def around_zero(limit: float) -> alt.Scale:
    """A colour scale from blue at -limit to orange at limit; values beyond are drawn as the ends.

    Zero is transparent, so that it has the colour of the page in light and dark.
    """
    # Each transparent middle keeps its end's hue, because a blend without one passes through grey.
    blue, orange, tiny = PALETTE["refusal"], PALETTE["persona"], limit * 1e-6
    return alt.Scale(
        domain=[-limit, -tiny, tiny, limit],
        range=[blue, blue + "00", orange + "00", orange],
        clamp=True,
    )


def symmetric(reach: float) -> alt.Scale:
    """A scale from -reach to reach."""
    return alt.Scale(domain=[-reach, reach], nice=False)


@alt.theme.register("jaxsteer", enable=False)
def config() -> alt.theme.ThemeConfig:
    """The Altair theme: `use()` enables it."""
    return {
        # The page's ink reaches the chart only as SVG; marimo's default is a canvas.
        "usermeta": {"embedOptions": {"renderer": "svg", "actions": MENU}},
        "background": "transparent",
        "padding": 4,
        "config": {
            "font": FONT,
            "view": {"stroke": "transparent", "continuousWidth": 560, "continuousHeight": 260},
            "title": {
                "color": INK,
                "anchor": "start",
                "frame": "bounds",
                "fontSize": 15,
                "fontWeight": "bold",
                "offset": 14,
                "lineHeight": 19,
                "subtitleColor": INK,
                "subtitleFontSize": 12.5,
                "subtitlePadding": 5,
                "subtitleLineHeight": 16,
            },
            "axis": {
                "labelFontSize": 12,
                "labelColor": INK,
                "labelOpacity": 0.85,
                "labelPadding": 5,
                "titleFontSize": 12.5,
                "titleFontWeight": "normal",
                "titleColor": INK,
                "titlePadding": 10,
                "domain": False,
                "tickColor": INK,
                "tickOpacity": 0.25,
                "tickSize": 4,
                "gridColor": INK,
                "gridOpacity": 0.1,
            },
            "axisBand": {"grid": False, "ticks": False},
            "legend": {
                "labelFontSize": 12,
                "labelColor": INK,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
                "titleColor": INK,
                "orient": "top",
                "direction": "horizontal",
                "gradientThickness": 8,
                "symbolStrokeWidth": 2,
            },
            "text": {"fontSize": 12.5, "color": INK},
            "line": {"strokeWidth": 2.25, "strokeCap": "round", "strokeJoin": "round"},
            "point": {"filled": True, "size": 75, "opacity": 1},
            "rule": {"color": INK, "opacity": 0.3},
            "bar": {"cornerRadiusEnd": 2},
        },
    }


def use() -> None:
    """Make every chart that is shown from here on look like this module says."""
    alt.theme.enable("jaxsteer")


Chart = TypeVar("Chart", bound=alt.TopLevelMixin)
Axis = TypeVar("Axis", alt.X, alt.Y)
LAYER = "layer (resid_post)"


def titled(chart: Chart, finding: str, detail: str = "", *, wrap: int = 80) -> Chart:
    """Give a chart a title that says what it shows and a subtitle that says what was measured.

    Screen readers get both as one text.

    Args:
      chart: any Altair chart.
      finding: one sentence computed from the data, never a fixed claim.
      detail: unit, n, and how the interval was made.
      wrap: letters to a line of the title; about a ninth of the chart's width in pixels.
    """
    lines = textwrap.wrap(finding, wrap)
    title = alt.TitleParams(lines, subtitle=textwrap.wrap(detail, wrap * 6 // 5))
    return chart.properties(title=title, description=f"{finding}. {detail}")


# Letters to a line of a title, below so many pixels of the plot's width.
WRAPS = {380: 38, 520: 52, 720: 72, 980: 100, 9999: 130}


def _by_width(text: str, share: float) -> str:
    """An expression of Vega: the lines of a text, which its smaller letters let grow by a share.

    JSON is a literal there, so names from a study stay text.
    """
    cases = [
        f"width < {limit} ? {json.dumps(textwrap.wrap(text, int(letters * share)))}"
        for limit, letters in WRAPS.items()
    ]
    return " : ".join([*cases, "''"])


def wide(layers: Sequence[Any], finding: str, detail: str, height: float) -> alt.LayerChart:
    """Layers as one titled chart that takes the width of the page, and wraps its title to it."""
    chart = alt.LayerChart(layer=list(layers)).properties(width="container", height=height)
    chart = titled(chart, finding, detail, wrap=38)
    chart["title"]["text"] = alt.expr(_by_width(finding, 1))
    if detail:
        # Vega-Lite takes no expression as a subtitle, and Vega, to which it compiles, does.
        lines = {"signal": _by_width(detail, 1.2)}
        patch = [{"op": "replace", "path": "/title/subtitle", "value": lines}]
        chart = chart.properties(usermeta={"embedOptions": {"patch": patch}})
    return chart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panels:
    """Small charts of one finding, as many beside each other as the page has room for.

    Attributes:
      finding, detail: as of `titled`.
      charts: each with its own title.
    """

    finding: str
    detail: str
    charts: Sequence[alt.LayerChart]

    def html(self, as_html: Callable[[alt.LayerChart], Any]) -> str:
        """The panels as HTML, each made by `marimo.as_html`."""
        shown = [as_html(chart).text for chart in self.charts]
        drawn = "".join(f'<div style="min-width: 0">{text}</div>' for text in shown)
        return (
            f"<p><b>{html.escape(plain(self.finding))}</b><br>{html.escape(plain(self.detail))}</p>"
            '<div style="display: grid; gap: 12px; '
            f'grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr))">{drawn}</div>'
        )


def csv(chart: alt.Chart | alt.LayerChart | Panels) -> str:
    """A link that saves the data that a chart draws, as HTML: the largest of its tables."""
    charts = chart.charts if isinstance(chart, Panels) else [chart]
    tables = [max(_tables(one), key=lambda table: table.height) for one in charts]
    whole = pl.concat(tables, how="diagonal_relaxed")
    safe = pl.col(pl.String).map_elements(safe_cell, return_dtype=pl.String)
    text = whole.with_columns(safe).write_csv().encode()
    return (
        f'<a download="data.csv" style="font-size: 0.8rem" '
        f'href="data:text/csv;base64,{base64.b64encode(text).decode()}">save the data (CSV)</a>'
    )


def _tables(chart: alt.Chart | alt.LayerChart) -> list[pl.DataFrame]:
    below = [table for layer in getattr(chart, "layer", []) for table in _tables(layer)]
    return [chart.data, *below] if isinstance(chart.data, pl.DataFrame) else below


def tooltip(
    fields: str, *, titles: Mapping[str, str] | None = None, **formatted: str
) -> list[alt.Tooltip]:
    """What is shown when the pointer is on a mark.

    Args:
      fields: columns that are shown as they are, with spaces between them.
      titles: what a column is called, where its name does not say it.
      formatted: columns of numbers by their format, a key of `FORMATS`.
    """
    called = titles or {}
    shown = [alt.Tooltip(field, title=called.get(field, field)) for field in fields.split()]
    return shown + [
        alt.Tooltip(f"{field}:Q", title=called.get(field, field), format=FORMATS[form])
        for form, columns in formatted.items()
        for field in columns.split()
    ]


def coloured(field: str, roles: Mapping[str, Role], **options: Any) -> alt.Color:
    """The encoding `color` for a column whose values have roles; arguments as of `by_role`."""
    scale = alt.Scale(domain=list(roles), range=[PALETTE[r] for r in roles.values()])
    return alt.Color(f"{field}:N", title=None, scale=scale, **options)


def by_role(field: str, roles: Mapping[str, Role], **options: Any) -> dict[str, Any]:
    """The encodings `color` and `shape` for a column whose values have roles.

    Args:
      field: the column.
      roles: the role of each value, in the order of the legend.
      options: of both channels; `legend=None` leaves the legend out.
    """
    shapes = alt.Scale(domain=list(roles), range=[SHAPES[r] for r in roles.values()])
    shape = alt.Shape(f"{field}:N", title=None, scale=shapes, **options)
    return {"color": coloured(field, roles, **options), "shape": shape}


def on_axis(axis: Axis, field: str) -> Axis:
    """The same axis (title, scale, format) for another column."""
    other = axis.copy()
    other["shorthand"] = f"{field}:Q"
    return other


def share_axis(field: str, title: str, **scale: Any) -> alt.X:
    """An axis of shares, in percent; from 0 to 1 unless `scale` says otherwise."""
    return alt.X(
        f"{field}:Q",
        title=title,
        axis=alt.Axis(format=PERCENT, tickCount=6),
        scale=alt.Scale(**(scale or {"domain": [0, 1]})),
    )


def points_axis(field: str, title: str, values: Iterable[float]) -> alt.X:
    """An axis of differences of shares, in points, symmetric and wide enough for the values."""
    return alt.X(
        f"{field}:Q",
        title=title,
        axis=alt.Axis(format="+.0%", tickCount=6, labelExpr="replace(datum.label, '%', '')"),
        scale=symmetric(1.05 * max(0.2, *map(abs, values))),
    )


def layer_axis(first: int, last: int, *, ticks: int = 10, room: float = 0.0) -> alt.X:
    """An axis of layers with whole numbers at its ticks, and a share of `room` at its end."""
    step = max(1, -(-(last - first) // ticks))
    return alt.X(
        "layer:Q",
        title=LAYER,
        scale=alt.Scale(domain=[first - 0.5, last + 0.5 + room * (last - first + 1)], nice=False),
        axis=alt.Axis(values=list(range(first, last + 1, step)), format="d"),
    )


def numbered(labels: Iterable[str]) -> list[str]:
    """Labels with their place in front: two equal ones keep rows of their own.

    `row_axis(..., numbers=True)` does not draw the numbers.

    >>> numbered(["a", "a"])
    ['0000 a', '0001 a']
    """
    return [f"{place:04d} {label}" for place, label in enumerate(labels)]


ROW = 40  # pixels of a row whose label stands above its marks


def row_axis(field: str, *, numbers: bool = False, above: float = 0, **axis: Any) -> alt.Y:
    """A named row for each value of a column, in the order of the table.

    Args:
      field: the column.
      numbers: do not draw the numbers that `numbered` put before the labels.
      above: height of a row, to put labels above its marks, so that they take no width.
      axis: further properties of the axis.
    """
    if numbers:
        axis["labelExpr"] = "slice(datum.label, 5)"
    if above:
        axis |= {"labelAlign": "left", "labelBaseline": "top", "labelPadding": 0, "zindex": 1}
        axis |= {"labelOffset": 1 - above / 2, "tickSize": 0, "labelLimit": alt.expr("width")}
    axis = {"labelLimit": 360, **axis}
    return alt.Y(f"{field}:N", sort=None, title=None, axis=alt.Axis(**axis))


def dots(
    table: pl.DataFrame,
    x: alt.X,
    y: alt.Y,
    *,
    shape: alt.Shape,
    tooltip: list[alt.Tooltip],
    low: str = "low",
    high: str = "high",
    **shared: Any,
) -> alt.LayerChart:
    """Points with their horizontal intervals behind them, in the points' own colour.

    Args:
      table: a line each.
      x, y: axes of the points.
      shape, tooltip: of the points.
      low, high: columns of the intervals' ends, in the unit of `x`.
      shared: encodings of points and intervals.

    Raises:
      UserError: the table lacks an end, so that a value would have no interval.
    """
    if missing := {low, high} - set(table.columns):
        raise UserError(
            f"the chart's table has no column {', '.join(sorted(missing))}: compute the "
            "interval (jaxsteer.stats) before drawing the value"
        )
    base = alt.Chart(table).encode(y=y, **shared)
    whisker = base.mark_rule(strokeWidth=2.5, opacity=0.55, strokeCap="round")
    whisker = whisker.encode(x=on_axis(x, low), x2=high)
    points = base.mark_point(size=90).encode(x=x, shape=shape, tooltip=tooltip)
    return alt.LayerChart(layer=[whisker, points])


def band(
    table: pl.DataFrame, x: alt.X, y: alt.Y, colour: str | alt.Color, **encodings: Any
) -> alt.Chart:
    """The area between a table's columns `low` and `high`, on the axes of the line within it."""
    shade = alt.value(colour) if isinstance(colour, str) else colour
    area = alt.Chart(table).mark_area(opacity=0.27)
    return area.encode(x=x, y=on_axis(y, "low"), y2="high:Q", color=shade, **encodings)


def range_bar(table: pl.DataFrame, x: alt.X, y: alt.Y, colour: str) -> alt.Chart:
    """A pale bar from a table's column `low` to `high` in each row, behind the row's marks."""
    bar = alt.Chart(table).mark_bar(color=colour, opacity=0.27, cornerRadius=2)
    return bar.encode(x=on_axis(x, "low"), x2="high:Q", y=y)


def zero(channel: Literal["x", "y"]) -> alt.Chart:
    """A thin line at zero."""
    rule = alt.Chart(pl.DataFrame({"at": [0.0]})).mark_rule(opacity=0.35)
    return rule.encode(**{channel: alt.datum(0.0)})


def reference(value: float, words: str) -> alt.LayerChart:
    """A dashed vertical line at a value that matters, with words that say why."""
    base = alt.Chart(pl.DataFrame({"words": [words]})).encode(x=alt.datum(value))
    label = base.mark_text(align="left", dy=-6, dx=2, opacity=0.8)
    label = label.encode(text="words:N", y=alt.value(-4))
    return alt.LayerChart(layer=[base.mark_rule(strokeDash=[4, 4], opacity=0.6), label])


def labelled(chart: alt.Chart, text: str, **options: Any) -> alt.Chart:
    """Direct labels for a chart's marks, from a column of its table: better than a legend.

    `options` are those of a text mark; the default sets the words to the right of the mark.
    """
    defaults = {"align": "left", "baseline": "middle", "dx": 8, "fontWeight": "bold"}
    return chart.mark_text(**{**defaults, **options}).encode(text=alt.Text(text, type="nominal"))


def panel(layers: Sequence[alt.Chart], title: str, **options: Any) -> alt.LayerChart:
    """A small chart under its own title; `options` are those of the title."""
    heading = alt.TitleParams(title, fontSize=13, offset=6, **options)
    return alt.LayerChart(layer=layers).properties(width="container", height=130, title=heading)


def token_text(text: str) -> str:
    """A token as a label: its spaces and line breaks become visible, control characters inert.

    >>> token_text(" Paris"), token_text("\\n"), token_text("")
    ('␣Paris', '⏎', '∅')
    """
    return plain(text).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


STYLE = """<style>
.js-cards { display: flex; flex-wrap: wrap; gap: 14px; }
.js-card { flex: 1 1 260px; min-width: 0; border-left: 4px solid var(--role);
  padding: 2px 14px; color: inherit; }
.js-card h4 { margin: 0 0 4px; font-size: 0.85rem; font-weight: 700; color: var(--role); }
.js-card p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 4.5em; }
.js-veil { filter: blur(7px); user-select: none; }
.js-note { opacity: 0.75; font-size: 0.85rem; margin: 6px 0 0 18px; }
</style>"""


def escaped(text: str) -> str:
    """Text as HTML that shows exactly its characters.

    Markdown and formula marks are escaped too, so that the result may stand in `mo.md`.

    >>> escaped("<b>*x*</b>")
    '&lt;b&gt;&#42;x&#42;&lt;/b&gt;'
    """
    marks = "*_`$\\[]|~#:+-"
    return "".join(f"&#{ord(c)};" if c in marks else html.escape(c) for c in plain(text))


def card(title: str, text: str, role: Role, *, veiled: bool = False, marked: str = "") -> str:
    """One reply as an HTML card in its role's colour; a veiled one is blurred and not selectable.

    A veil is for the eyes: the text is in the page. Ask the reader before lifting it. `marked` is
    HTML that replaces the text, from `steering.token_strip`.
    """
    veil = ' class="js-veil" aria-hidden="true"' if veiled else ""
    return (
        f'<div class="js-card" style="--role: {PALETTE[role]}" data-role="{role}">'
        f"<h4>{html.escape(plain(title))}</h4>"
        f"<p{veil}>{marked or html.escape(plain(text))}</p></div>"
    )


def cards(*made: str, note: str = "") -> str:
    """Cards side by side, with a note below; they wrap under each other on a narrow page."""
    below = f'<p class="js-note">{html.escape(plain(note))}</p>' if note else ""
    return f'{STYLE}<div class="js-cards">{"".join(made)}</div>{below}'


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
