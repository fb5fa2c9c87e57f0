"""Marks and words shared by all notebooks: titles, intervals, direct labels, model text as text."""

from __future__ import annotations

import textwrap
from typing import Any, Literal, TypeVar

import altair as alt
import polars as pl

from jaxsteer.errors import UserError
from jaxsteer.terminal import plain

Chart = TypeVar("Chart", bound=alt.TopLevelMixin)


def titled(chart: Chart, finding: str, detail: str = "", *, wrap: int = 80) -> Chart:
    """Head a chart with what it shows and, below, what was measured on how much.

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


def with_interval(
    chart: alt.Chart, channel: Literal["x", "y"], low: str, high: str
) -> alt.LayerChart:
    """A chart's marks with their intervals behind them, in the marks' own colour.

    Args:
      chart: has data and encodings; its marks are drawn on top.
      channel: the axis along which the interval runs.
      low: the column of its lower end, in the unit of that axis.
      high: the column of its upper end.

    Raises:
      UserError: the chart's table lacks an end, so that a value would stand without interval.
    """
    if isinstance(chart.data, pl.DataFrame):
        missing = {low, high} - set(chart.data.columns)
        if missing:
            raise UserError(
                f"the chart's table has no column {', '.join(sorted(missing))}: compute the "
                "interval (jaxsteer.stats) before drawing the value"
            )
    encoding = chart.encoding
    title = encoding[channel]["title"]
    ends: dict[str, Any] = {
        channel: (alt.X if channel == "x" else alt.Y)(low, type="quantitative", title=title),
        channel + "2": (alt.X2 if channel == "x" else alt.Y2)(high),
    }
    other = "y" if channel == "x" else "x"
    # Shape and size belong to the value's own mark: a rule has neither.
    shared = (other, "color", "detail", "yOffset", "xOffset", "opacity", "row")
    given = {k: encoding[k] for k in shared if encoding[k] is not alt.Undefined}
    whisker = alt.Chart(chart.data).mark_rule(strokeWidth=2.5, opacity=0.55, strokeCap="round")
    return alt.LayerChart(layer=[whisker.encode(**given, **ends), chart])


def labelled(chart: alt.Chart, text: str, **options: Any) -> alt.Chart:
    """Direct labels for a chart's marks, from a column of its table: better than a legend.

    `options` are those of a text mark; the default sets the words to the right of the mark.
    """
    defaults = {"align": "left", "baseline": "middle", "dx": 8, "fontWeight": "bold"}
    return chart.mark_text(**{**defaults, **options}).encode(text=alt.Text(text, type="nominal"))


def reference(value: float, channel: Literal["x", "y"], words: str) -> alt.LayerChart:
    """A dashed line at a value that matters, with the words that say why."""
    table = pl.DataFrame({"value": [value], "words": [words]})
    at = {channel: alt.datum(value)}
    rule = alt.Chart(table).mark_rule(strokeDash=[4, 4], opacity=0.6).encode(**at)
    side = {"y": alt.value(-4)} if channel == "x" else {"x": alt.value(4)}
    label = alt.Chart(table).mark_text(align="left", dy=-6, dx=2, opacity=0.8)
    return alt.LayerChart(layer=[rule, label.encode(text="words:N", **at, **side)])


def token_text(text: str) -> str:
    """A token as a label: its spaces and line breaks become visible, control characters inert.

    >>> token_text(" Paris"), token_text("\\n"), token_text("")
    ('␣Paris', '⏎', '∅')
    """
    return plain(text).replace("\n", "⏎").replace(" ", "␣") or "∅"
