"""Marks, axes and words shared by all charts: titles, intervals, bands, tooltips, roles."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import altair as alt
import polars as pl

from jaxsteer.errors import UserError
from jaxsteer.evidence.charts import theme
from jaxsteer.terminal import plain

Chart = TypeVar("Chart", bound=alt.TopLevelMixin)
Axis = TypeVar("Axis", alt.X, alt.Y)
LAYER = "layer (resid_post)"


def titled(chart: Chart, finding: str, detail: str = "", *, wrap: int = 80) -> Chart:
    """Give a chart a title that says what it shows and a subtitle that says what was measured.

    Args:
      chart: any Altair chart.
      finding: one sentence computed from the data, never a fixed claim.
      detail: unit, n, and how the interval was made.
      wrap: letters to a line of the title; about a ninth of the chart's width in pixels.
    """
    title = alt.TitleParams(
        textwrap.wrap(finding, wrap), subtitle=textwrap.wrap(detail, wrap * 6 // 5)
    )
    return chart.properties(title=title)


def tooltip(
    fields: str, *, titles: Mapping[str, str] | None = None, **formatted: str
) -> list[alt.Tooltip]:
    """What is shown when the pointer is on a mark.

    Args:
      fields: columns that are shown as they are, with spaces between them.
      titles: what a column is called, where its name does not say it.
      formatted: columns of numbers by their format, a key of `theme.FORMATS`.
    """
    called = titles or {}
    shown = [alt.Tooltip(field, title=called.get(field, field)) for field in fields.split()]
    return shown + [
        alt.Tooltip(f"{field}:Q", title=called.get(field, field), format=theme.FORMATS[form])
        for form, columns in formatted.items()
        for field in columns.split()
    ]


def by_role(field: str, roles: Mapping[str, theme.Role], **options: Any) -> dict[str, Any]:
    """The encodings `color` and `shape` for a column whose values have roles.

    Args:
      field: the column.
      roles: the role of each value, in the order of the legend.
      options: of both channels; `legend=None` leaves the legend out.
    """
    colours = alt.Scale(domain=list(roles), range=[theme.PALETTE[r] for r in roles.values()])
    shapes = alt.Scale(domain=list(roles), range=[theme.SHAPES[r] for r in roles.values()])
    return {
        "color": alt.Color(f"{field}:N", title=None, scale=colours, **options),
        "shape": alt.Shape(f"{field}:N", title=None, scale=shapes, **options),
    }


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
        axis=alt.Axis(format=theme.PERCENT, tickCount=6),
        scale=alt.Scale(**(scale or {"domain": [0, 1]})),
    )


def points_axis(field: str, title: str, values: Iterable[float]) -> alt.X:
    """An axis of differences of shares, in points, symmetric and wide enough for the values."""
    return alt.X(
        f"{field}:Q",
        title=title,
        axis=alt.Axis(format="+.0%", tickCount=6, labelExpr="replace(datum.label, '%', '')"),
        scale=theme.symmetric(1.05 * max(0.2, *map(abs, values))),
    )


def layer_axis(first: int, last: int, *, ticks: int = 10) -> alt.X:
    """An axis of layers with whole numbers at its ticks."""
    step = max(1, -(-(last - first) // ticks))
    return alt.X(
        "layer:Q",
        title=LAYER,
        scale=alt.Scale(domain=[first - 0.5, last + 0.5], nice=False),
        axis=alt.Axis(values=list(range(first, last + 1, step)), format="d"),
    )


def numbered(labels: Iterable[str]) -> list[str]:
    """Labels with their place in front: two equal ones keep rows of their own.

    `row_axis(..., numbers=True)` does not draw the numbers.

    >>> numbered(["a", "a"])
    ['0000 a', '0001 a']
    """
    return [f"{place:04d} {label}" for place, label in enumerate(labels)]


def row_axis(field: str, *, numbers: bool = False, **axis: Any) -> alt.Y:
    """A named row for each value of a column, in the order of the table."""
    if numbers:
        axis["labelExpr"] = "slice(datum.label, 5)"
    return alt.Y(f"{field}:N", sort=None, title=None, axis=alt.Axis(labelLimit=360, **axis))


def with_interval(chart: alt.Chart, low: str, high: str) -> alt.LayerChart:
    """A chart's marks with their horizontal intervals behind them, in the marks' own colour.

    Args:
      chart: has data and encodings; its marks are drawn on top.
      low: the column of the interval's lower end, in the unit of the horizontal axis.
      high: the column of its upper end.

    Raises:
      UserError: the chart's table lacks an end, so that a value would have no interval.
    """
    missing = {low, high} - set(chart.data.columns)
    if missing:
        raise UserError(
            f"the chart's table has no column {', '.join(sorted(missing))}: compute the "
            "interval (jaxsteer.stats) before drawing the value"
        )
    encoding = chart.encoding
    # Shape and size belong to the value's own mark: a rule has neither.
    shared = ("y", "color", "yOffset")
    given = {k: encoding[k] for k in shared if encoding[k] is not alt.Undefined}
    whisker = alt.Chart(chart.data).mark_rule(strokeWidth=2.5, opacity=0.55, strokeCap="round")
    whisker = whisker.encode(x=on_axis(encoding["x"], low), x2=high, **given)
    return alt.LayerChart(layer=[whisker, chart])


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


def panel(
    layers: Sequence[alt.Chart], title: str, width: int = 195, height: int = 130, **options: Any
) -> alt.LayerChart:
    """A small chart under its own title; `options` are those of the title."""
    heading = alt.TitleParams(title, fontSize=13, offset=6, **options)
    return alt.LayerChart(layer=layers).properties(width=width, height=height, title=heading)


def token_text(text: str) -> str:
    """A token as a label: its spaces and line breaks become visible, control characters inert.

    >>> token_text(" Paris"), token_text("\\n"), token_text("")
    ('␣Paris', '⏎', '∅')
    """
    return plain(text).replace("\n", "⏎").replace(" ", "␣") or "∅"
