from __future__ import annotations

import json

import polars as pl
import pytest

from jaxsteer.evidence.charts import steering

TOKENS = pl.DataFrame(
    {
        "token": [3, 9, 5],
        "text": [" I", "Sure", "\n"],
        "baseline": [0.6, 0.1, 0.0004],
        "steered": [0.2, 0.5, 0.0],
    }
)


def spread(change: float = 1.5) -> pl.DataFrame:
    rows = [
        {
            "direction": name,
            "layer": layer,
            "position": position,
            "text": f" w{position}",
            "baseline": 100.0 if layer == 0 else 1.0 * layer,
            "steered": (100.0 if layer == 0 else 1.0 * layer) + (change if layer >= 5 else 0),
            "change": change if layer >= 5 else 0.0,
        }
        for name in ("persona", "refusal")
        for layer in range(8)
        for position in range(30)
    ]
    return pl.DataFrame(rows)


def title(chart) -> str:
    return " ".join(chart.to_dict()["title"]["text"])


@pytest.mark.parametrize(
    ("kind", "strength", "words"),
    [
        ("add", 4.0, "+4 × persona at resid_post.21"),
        ("add", -0.5, "−0.5 × persona at resid_post.21"),
        ("project", 4.0, "persona projected out at resid_post.21"),
        ("cap", -2.0, "persona capped to ±2 norms at resid_post.21"),
    ],
)
def test_operations_are_named_with_tap_and_unit(kind, strength, words):
    assert steering.describe(kind, "persona", 21, strength) == words


def test_a_minus_sign_is_of_a_number_and_a_hyphen_in_a_name_stays():
    named = spread(-1.5).with_columns(direction=pl.lit("assistant-axis"))
    chart = steering.depth_chart(named, 5, steering.describe("add", "assistant-axis", 5, -2.0))
    assert "assistant-axis −1.50" in title(chart)
    assert "−2 × assistant-axis" in " ".join(chart.to_dict()["title"]["subtitle"])


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


def test_the_depth_chart_frames_the_later_layers_and_states_the_last_change():
    chart = steering.depth_chart(spread(), 5, "x")
    assert "persona +1.50 and refusal +1.50" in title(chart)
    low, high = chart.to_dict()["hconcat"][0]["layer"][1]["encoding"]["y"]["scale"]["domain"]
    assert low < 0 and 8.5 < high < 12


def test_the_map_shows_the_prompts_end_unless_asked_for_all():
    for last, expected in ((24, 24), (None, 30)):
        chart = steering.token_map(spread(), "change", "x", last=last).to_dict()
        tables = chart["datasets"].values()
        assert {len({row["label"] for row in table}) for table in tables} == {expected}


def test_the_map_says_when_nothing_changed():
    assert title(steering.token_map(spread(0.0), "change", "x")).startswith("Nothing is changed")


def test_the_survival_chart_states_both_ends():
    table = pl.DataFrame(
        {"later": [0, 1, 2], "layer": [5, 6, 7], "moved": [1e-7, 0.16, 0.2], "alone": [0.22] * 3}
    )
    assert title(steering.survival_chart(table, "x")) == (
        "Projected out where it was added, the steer moves < 0.1 % of the probability; one layer "
        "later, 16 %; never, 22 %"
    )
    assert "never" in title(steering.survival_chart(table.head(1), "x"))


@pytest.mark.parametrize("text", ["</script>", "${alert(1)}", "\x1b[2J"])
def test_hostile_tokens_reach_the_chart_as_labels_only(text):
    table = TOKENS.with_columns(text=pl.Series([text, "a", "b"]))
    spec = json.dumps(steering.next_token_chart(table, "x").to_dict())
    assert "\\u001b" not in spec
