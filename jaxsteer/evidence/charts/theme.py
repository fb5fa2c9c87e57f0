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

from typing import Any, Literal

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

PERCENT = ".0%"  # rates: 42%
SHARE = ".3~p"  # probabilities that may be tiny: 0.0123%
COUNT = ",d"  # 12,345
SIGNED = "+.2f"  # cosines and changes: +0.18
PLAIN = ".3~g"  # any other measured number


def colour(name: str) -> str:
    """The colour of a role; directions without one (traits) share the axis's green.

    `random-3` and the like are random controls.
    """
    if name.startswith("random"):
        return PALETTE["random"]
    return PALETTE.get(name, PALETTE["axis"])  # type: ignore[call-overload]


def colours(names: list[str], **options: Any) -> alt.Scale:
    """A scale that gives each name its role's colour."""
    return alt.Scale(domain=names, range=[colour(name) for name in names], **options)


def diverging() -> list[str]:
    """Range for domain [-m, 0, m]: blue, the page itself, orange. Zero is empty, light or dark."""
    # A transparent middle must keep its end's hue, or the blend passes through grey.
    blue, orange = PALETTE["refusal"], PALETTE["persona"]
    return [blue, blue + "00", orange + "00", orange]


def around_zero(limit: float) -> alt.Scale:
    """A diverging colour scale over [-limit, limit]; values beyond are drawn as the ends."""
    tiny = limit * 1e-6
    return alt.Scale(domain=[-limit, -tiny, tiny, limit], range=diverging(), clamp=True)


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
                "font": FONT,
                "color": INK,
                "anchor": "start",
                "frame": "group",
                "fontSize": 15,
                "fontWeight": "bold",
                "offset": 14,
                "lineHeight": 19,
                "subtitleFont": FONT,
                "subtitleColor": INK,
                "subtitleFontSize": 12.5,
                "subtitlePadding": 5,
                "subtitleLineHeight": 16,
            },
            "axis": {
                "labelFont": FONT,
                "labelFontSize": 12,
                "labelColor": INK,
                "labelOpacity": 0.85,
                "labelPadding": 5,
                "titleFont": FONT,
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
                "labelFont": FONT,
                "labelFontSize": 12,
                "labelColor": INK,
                "titleFont": FONT,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
                "titleColor": INK,
                "orient": "top",
                "direction": "horizontal",
                "gradientThickness": 8,
                "symbolStrokeWidth": 2,
            },
            "header": {
                "labelFont": FONT,
                "labelFontSize": 13,
                "labelFontWeight": "bold",
                "labelColor": INK,
                "labelAnchor": "start",
                "title": None,
            },
            "text": {"font": FONT, "fontSize": 12.5, "color": INK},
            "line": {"strokeWidth": 2.25, "strokeCap": "round", "strokeJoin": "round"},
            "point": {"filled": True, "size": 75, "opacity": 1},
            "rule": {"color": INK, "opacity": 0.3},
            "bar": {"cornerRadiusEnd": 2},
        },
    }


def use() -> None:
    """Make every chart that is shown from here on look like this module says."""
    alt.theme.enable("jaxsteer")
