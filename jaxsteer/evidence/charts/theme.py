"""One look for all charts: palette, type, number formats, light and dark.

Colours belong to roles, not to positions, so the persona is the same orange in every chart. They
are chosen so that any two stay apart under the three kinds of colour blindness, and so that each
has a contrast of at least 3:1 both on white and on marimo's dark page (tests/charts/test_theme.py
checks both). Everything that is not data - text, axes, grid - is drawn in the page's own ink
(`currentColor`), which is why charts are SVG on a transparent ground: they follow the reader's
switch between light and dark without being drawn again.

Colour never carries meaning alone: label marks directly, or give them a shape (`SHAPES`).
"""

from __future__ import annotations

from typing import Literal

import altair as alt

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

PERCENT = ".0%"  # of rates on axes: 42%
# d3 formats of numbers in tooltips
FORMATS = {
    "percent": ".1%",  # rates: 42.5%
    "tiny": ".3~p",  # probabilities: 0.0123%
    "signed": "+.2f",  # cosines and changes: +0.18
    "plain": ".3~g",  # any other number
}


def role(direction: str) -> Role:
    """The role of a direction, by its name; a trait has the role of the assistant axis.

    `random-3` and the like are random controls.
    """
    if direction.startswith("random"):
        return "random"
    return direction if direction in PALETTE else "axis"


def colour(direction: str) -> str:
    """The colour of a direction's role."""
    return PALETTE[role(direction)]


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
        "usermeta": {"embedOptions": {"renderer": "svg", "actions": False}},
        "background": "transparent",
        "padding": 4,
        "config": {
            "font": FONT,
            "view": {"stroke": "transparent", "continuousWidth": 560, "continuousHeight": 260},
            "title": {
                "color": INK,
                "anchor": "start",
                "frame": "group",
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
