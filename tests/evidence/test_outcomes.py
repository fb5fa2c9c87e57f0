from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from statsmodels.stats.contingency_tables import mcnemar

from jaxsteer.evidence import outcomes as flips


def rows(**labels: list[str]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "row_id": f"{name}/sr-{i}",
                "condition": name,
                "family": "strongreject",
                "kind": "harmful",
                "prompt_id": f"sr-{i}",
                "category": "any",
                "response": "",
                "label": label,
            }
            for name, given in labels.items()
            for i, label in enumerate(given)
        ]
    )


def pairs(rows: pl.DataFrame, treated: str, control: str) -> pl.DataFrame:
    return flips.Labels(rows, {}).pair(treated, control, "strongreject")


def test_flips_count_each_prompt_once_and_agree_with_statsmodels():
    rng = np.random.default_rng(3)
    names = np.array(["refusal", "degenerate", "complied-unscored"])
    one, other = (list(names[rng.integers(3, size=60)]) for _ in range(2))
    paired = pairs(rows(a=one, b=other), "a", "b")
    found = flips.flips(paired, "refusal")
    table = [[found.both, found.raised], [found.lowered, found.neither]]
    assert found.n == 60 == sum(map(sum, table))
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert found.difference == pytest.approx((one.count("refusal") - other.count("refusal")) / 60)
    assert found.low <= found.difference <= found.high


def test_only_prompts_that_both_answered_are_paired():
    paired = pairs(rows(a=["refusal"] * 3, b=["refusal", "bypass"]), "a", "b")
    assert paired["prompt_id"].to_list() == ["sr-0", "sr-1"]
    assert pairs(rows(a=["refusal"]), "a", "none").is_empty()


def test_a_pair_goes_when_either_reply_is_degenerate():
    given = rows(a=["refusal", "degenerate", "bypass"], b=["refusal", "refusal", "degenerate"])
    paired = pairs(given, "a", "b")
    assert flips.without_degenerate(paired)["prompt_id"].to_list() == ["sr-0"]


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([], [], "No prompt was answered"),
        (["refusal"], ["refusal"], "Of 1 prompt, none lose the outcome “refusal” and none gain"),
        (
            ["refusal"] * 2,
            ["bypass"] * 2,
            "Of 2 prompts, none lose the outcome “refusal” and 2 gain",
        ),
        (
            ["bypass", "refusal"],
            ["refusal", "bypass"],
            "1 loses the outcome “refusal” and 1 gains it",
        ),
    ],
)
def test_the_words_follow_the_counts(a: list[str], b: list[str], words: str):
    table = pl.DataFrame(
        {"treated": a, "control": b}, schema=dict.fromkeys(("treated", "control"), pl.String)
    )
    assert words in flips.summary(flips.flips(table, "refusal"), "refusal")


def test_flipped_prompts_stand_first():
    pairs = pl.DataFrame(
        {
            "prompt_id": list("abcd"),
            "control": ["degenerate", "refusal", "degenerate", "refusal"],
            "treated": ["degenerate", "refusal", "refusal", "degenerate"],
        }
    )
    table = flips.flip_table(pairs, "refusal", 4)
    assert table["flip"].to_list() == ["lost", "gained", "kept", "without"]
    assert flips.flip_table(pairs, "refusal", 3)["flip"].to_list() == ["lost", "gained"]
