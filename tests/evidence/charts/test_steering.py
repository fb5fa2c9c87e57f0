from __future__ import annotations

import json

import polars as pl
import pytest

from jaxsteer.evidence import lesson
from jaxsteer.evidence.charts import marks, steering
from jaxsteer.evidence.lesson import View
from jaxsteer.stats import wilson

VIEW = View("add", "persona", 5, 4.0)
TOKENS = pl.DataFrame(
    {
        "token": [3, 9, 5],
        "text": [" I", "Sure", "\n"],
        "baseline": [0.6, 0.1, 0.0004],
        "steered": [0.2, 0.5, 0.0],
    }
)


def grid(opens, names=("persona",), layers=(2, 5), top=1):
    """A table of `lesson.grid`, whose openings are a function of layer and strength."""
    return pl.DataFrame(
        [
            {"direction": name, "layer": layer, "strength": strength, "rank": rank,
             "opens": opens(layer, strength), "moved": abs(strength) / (10 + 5 * number),
             "token": " I", "probability": 0.5 / (1 + rank)}
            for number, name in enumerate(names)
            for layer in layers
            for strength in lesson.STRENGTHS
            for rank in range(top)
        ]
    )  # fmt: skip


def title(chart) -> str:
    return chart.to_dict()["description"].split(". ")[0]


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (View("add", "persona", 21, 4.0), "+4 × persona at resid_post.21"),
        (View("add", "persona", 21, -0.5), "−0.5 × persona at resid_post.21"),
        (View("project out", "persona", 21, 4.0), "persona projected out at resid_post.21"),
        (View("cap", "persona", 21, -2.0), "persona capped to ±2 norms at resid_post.21"),
        (
            View("add, then project out", "assistant-axis", 21, -2.0),
            "−2 × assistant-axis at resid_post.21, projected out there",
        ),
    ],
)
def test_operations_are_named_with_tap_and_unit(view, words):
    assert steering.describe(view) == words


def test_a_changed_first_token_is_the_finding():
    assert "moves from “␣I” (60 %) to “Sure” (50 %)" in title(
        steering.next_token_chart(TOKENS, "x")
    )


def test_an_unchanged_first_token_is_the_finding():
    same = TOKENS.with_columns(steered=pl.Series([0.4, 0.3, 0.0]))
    assert "“␣I” stays" in title(steering.next_token_chart(same, "x"))


def test_tokens_that_print_alike_keep_rows_of_their_own():
    alike = TOKENS.with_columns(text=pl.Series(["a", "a", "a"]))
    data = steering.next_token_chart(alike, "x").to_dict()["datasets"]
    rows = {row["row"] for table in data.values() for row in table if "row" in row}
    assert len(rows) == 3


def test_the_map_states_its_ends_and_frames_what_the_controls_say():
    chart = steering.refusal_map(grid(lambda layer, s: 0.5 + s / 20), VIEW)
    assert title(chart) == ("Refusal openings: 10 % (−8 at layer 2) to 90 % (+8 at layer 5)")
    spec = chart.to_dict()
    assert spec["encoding"]["strokeWidth"]["condition"]["test"] == (
        "datum.layer == 5 && datum.strength == 4"
    )
    assert spec["encoding"]["color"]["scale"]["domain"] == [0, 1]


@pytest.mark.parametrize(("share", "words"), [(0.0, "0 %"), (1.0, "100 %")])
def test_a_map_on_which_nothing_or_everything_refuses_says_so(share, words):
    chart = steering.refusal_map(grid(lambda layer, s: share), VIEW)
    assert title(chart) == f"No cell moves the refusal openings: {words} everywhere"


def test_the_end_of_a_map_that_is_not_steered_is_named_so():
    chart = steering.refusal_map(grid(lambda layer, s: 0.9 - abs(s) / 10), VIEW)
    assert "to 90 % (unsteered)" in title(chart)


def test_a_direction_is_compared_with_the_random_ones_at_the_same_strength():
    table = grid(lambda layer, s: 0.3, ("persona", "random-1", "random-2"), (5,))
    table = table.with_columns(
        moved=pl.when(pl.col("direction") == "random-2").then(0.9).otherwise("moved")
    )
    assert "moves 80 % of the probability: more than 1 of 2 random" in title(
        steering.fan_chart(table, VIEW)
    )


def test_depth_names_its_directions_and_leaves_the_random_ones_grey():
    rows = [
        {"direction": name, "layer": layer, "change": size if layer >= 5 else 0.0}
        for name, size in (("persona", 1.5), ("assistant-axis", -1.5), ("random-1", 0.1))
        for layer in range(8)
    ]
    chart = steering.depth_chart(pl.DataFrame(rows), ["persona", "assistant-axis"], VIEW)
    assert "persona +1.50 and assistant-axis −1.50" in title(chart)
    _, fan, own = chart.to_dict()["layer"]
    assert fan["mark"]["color"] == marks.PALETTE["baseline"]
    assert own["encoding"]["color"]["scale"]["domain"] == ["persona", "assistant-axis"]


def test_the_histogram_gives_the_count_with_its_wilson_interval(rng):
    harmful, harmless = rng.normal(1, 1, 30), rng.normal(0, 1, 30)
    table = pl.DataFrame(
        {"group": ["harmful"] * 30 + ["harmless"] * 30, "projection": [*harmful, *harmless]}
    )
    right, n = lesson.separation(harmful, harmless)
    low, high = (round(100 * end) for end in wilson(right, n))
    words = title(steering.histogram(table, "refusal", 5))
    assert words.startswith(f"{right} of {n} prompts are on their own side")
    assert words.endswith(f"{round(100 * right / n)} % (95 % interval {low} to {high} %)")


@pytest.mark.parametrize(
    ("guess", "moved", "word"),
    [("a", [0.5, 0.2], "Yes."), ("b", [0.5, 0.2], "Not on"), ("b", [0.503, 0.5], "Yes.")],
)
def test_the_check_of_an_exercise_follows_from_what_moved(guess, moved, word):
    said = steering.verdict(guess, pl.DataFrame({"option": ["a", "b"], "moved": moved}))
    assert said.startswith(f"**{word}") and "a 50.0 %" in said.replace("50.3", "50.0")
    assert steering.verdict(None, None) == ""


def test_colours_of_tokens_end_at_the_limit_and_hostile_tokens_stay_text():
    made = steering.token_strip(["<img src=x>", "\x1b[2J", " b"], [100.0, -2.0, 0.0])
    assert "<img" not in made and "&lt;img" in made and "\x1b" not in made
    shares = [part.split("%")[0].split()[-1] for part in made.split("color-mix")[1:]]
    assert shares == ["70", "35", "0"]
    assert marks.PALETTE["persona"] in made and marks.PALETTE["refusal"] in made


def test_the_explorer_binds_its_own_menus_to_the_table():
    table = grid(lambda layer, s: 0.3, ("persona", "random-1"), (2, 5, 8), top=4)
    spec = steering.explorer(table).to_dict()
    options = {p["name"]: p["bind"]["options"] for p in spec["params"]}
    assert options == {
        "chosen_direction": ["persona", "random-1"],
        "chosen_layer": [2, 5, 8],
        "chosen_strength": list(lesson.STRENGTHS),
    }
    for param in spec["params"]:
        assert param["value"] in param["bind"]["options"]
    rows = [row for data in spec["datasets"].values() for row in data]
    assert len(rows) == len(table)


@pytest.mark.parametrize("text", ["</script>", "${alert(1)}", "\x1b[2J"])
def test_hostile_tokens_reach_the_charts_as_labels_only(text):
    table = TOKENS.with_columns(text=pl.Series([text, "a", "b"]))
    spec = json.dumps(steering.next_token_chart(table, "x").to_dict())
    assert "\\u001b" not in spec
