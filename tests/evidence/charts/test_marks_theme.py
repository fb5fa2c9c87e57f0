from __future__ import annotations

import itertools
import json
from pathlib import Path

import altair as alt
import marimo
import numpy as np
import polars as pl
import pytest

from jaxsteer.evidence.charts import marks

# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0; they act on linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [  # IEC 61966-2-1, D65
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array(TO_XYZ) @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def ciede2000(one, other):
    """Sharma, Wu and Dalal 2005, equations 2 to 22."""
    lightness, a, b = np.array([one, other]).T
    factor = np.hypot(a, b).mean() ** 7
    a = a * (1 + 0.5 * (1 - np.sqrt(factor / (factor + 25**7))))
    chroma, hue = np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360
    turn = hue[1] - hue[0]
    mean_hue = hue.mean()
    if abs(turn) > 180:
        turn -= 360 * np.sign(turn)
        mean_hue = (hue.sum() + 360 * (1 if hue.sum() < 360 else -1)) / 2
    if chroma.prod() == 0:
        turn, mean_hue = 0.0, hue.sum()
    d_hue = 2 * np.sqrt(chroma.prod()) * np.sin(np.radians(turn) / 2)
    waves = [(-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.20, 4, -63)]
    t = 1 + sum(w * np.cos(np.radians(n * mean_hue + shift)) for w, n, shift in waves)
    middle, mean_chroma = (lightness.mean() - 50) ** 2, chroma.mean()
    d_light = np.diff(lightness)[0] / (1 + 0.015 * middle / np.sqrt(20 + middle))
    d_chroma = np.diff(chroma)[0] / (1 + 0.045 * mean_chroma)
    d_hue /= 1 + 0.015 * mean_chroma * t
    angle = 60 * np.exp(-(((mean_hue - 275) / 25) ** 2))
    rotation = -2 * np.sqrt(mean_chroma**7 / (mean_chroma**7 + 25**7)) * np.sin(np.radians(angle))
    return np.sqrt(d_light**2 + d_chroma**2 + d_hue**2 + rotation * d_chroma * d_hue)


def contrast(one, other):
    """WCAG 2.2 contrast ratio."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) + 0.05 for c in (one, other))
    return high / low


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [  # from the test data of Sharma, Wu and Dalal 2005, table 1
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_colour_difference_of_these_tests_is_ciede2000(one, other, expected):
    assert ciede2000(one, other) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vision", VISION)
def test_any_two_colours_stay_apart_under(vision):
    seen = {k: lab(np.array(VISION[vision]) @ linear(v)) for k, v in marks.PALETTE.items()}
    apart = {
        pair: ciede2000(seen[pair[0]], seen[pair[1]]) for pair in itertools.combinations(seen, 2)
    }
    nearest = min(apart, key=apart.get)
    # 2.3 is a just noticeable difference side by side; marks in a chart lie apart and are small.
    assert apart[nearest] > 15, f"{nearest}: {apart[nearest]:.1f}"


@pytest.mark.parametrize("page", [marks.PAPER, marks.NIGHT])
@pytest.mark.parametrize("role", marks.PALETTE)
def test_every_colour_has_contrast_on_light_and_dark_pages(role, page):
    assert contrast(marks.PALETTE[role], page) >= 3


def test_the_dark_page_is_the_one_marimo_draws():

    sheets = (Path(marimo.__file__).parent / "_static/assets").glob("*.css")
    assert any(f"--lightningcss-dark,{marks.NIGHT}" in sheet.read_text() for sheet in sheets)


def test_every_role_has_its_own_shape():
    assert set(marks.SHAPES) == set(marks.PALETTE)
    assert len(set(marks.SHAPES.values())) == len(marks.SHAPES)


def test_text_and_axes_take_the_colour_of_the_page():
    def colours(node):
        if isinstance(node, dict):
            for key, value in node.items():
                if key.lower().endswith("color"):
                    yield key, value
                yield from colours(value)

    found = dict(colours(marks.config()["config"]))
    assert len(found) >= 6 and set(found.values()) == {marks.INK}


def test_use_puts_the_theme_into_every_chart():
    before = alt.theme.active
    try:
        marks.use()
        table = pl.DataFrame({"x": [1.0]})
        spec = json.loads(alt.Chart(table).mark_point().encode(x="x").to_json())
    finally:
        alt.theme.enable(before)
    assert spec["background"] == "transparent"
    assert spec["usermeta"]["embedOptions"]["renderer"] == "svg"


def test_random_directions_share_a_colour_and_unknown_names_have_one():
    assert marks.colour("random-1") == marks.colour("random-19") == marks.PALETTE["random"]
    assert marks.colour("evil") == marks.PALETTE["axis"]
    assert marks.colour("persona") == marks.PALETTE["persona"]


def test_the_diverging_scale_is_empty_at_zero_and_symmetric():
    scale = marks.around_zero(3.0).to_dict()
    assert scale["domain"] == [-3.0, pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5), 3.0]
    assert scale["range"][1].endswith("00") and scale["range"][2].endswith("00")
    assert scale["range"][1][:7] == scale["range"][0] and scale["range"][2][:7] == scale["range"][3]
