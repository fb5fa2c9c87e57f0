"""Verdicts on comparisons that are made by hand, without rows."""

from __future__ import annotations

import pytest

from jaxsteer.evidence import claims
from jaxsteer.evidence.claims import Claim
from jaxsteer.evidence.comparisons import BeyondRandom, CosineAbove, Different, FewRaised

SIDES = {"treated": "persona", "control": "baseline"}
COUNTED = {
    **SIDES,
    "family": "strongreject",
    "outcome": "refusal",
    "n": 40,
    "treated_interval": (0.0, 1.0),
    "control_interval": (0.0, 1.0),
    "difference": 0.0,
    "difference_interval": (-1.0, 1.0),
}


def different(expect, treated_k, control_k, raised, lowered, **more):
    counts = {"treated_k": treated_k, "control_k": control_k, "raised": raised, "lowered": lowered}
    return Different(**COUNTED, **counts, expect=expect, **more)


def few_raised(raised, at_risk, margin):
    counts = {"treated_k": raised, "control_k": 0, "raised": raised, "lowered": 0}
    return FewRaised(**COUNTED, **counts, margin=margin, at_risk=at_risk, raised_at_risk=raised)


def beyond_random(expect, treated_k, control_k):
    return BeyondRandom(
        **SIDES,
        family="strongreject",
        outcome="refusal",
        expect=expect,
        n=40,
        treated_k=treated_k,
        control_k=control_k,
    )


def claim(name, *comparisons):
    return Claim(name=name, says="It holds.", comparisons=comparisons)


def judged(*comparisons):
    [found] = claims.judge([claim("claim", *comparisons)])
    return found


@pytest.mark.parametrize(
    ("expect", "counts"), [("lower", (40, 20, 20, 0)), ("higher", (0, 20, 0, 20))]
)
def test_a_clear_difference_the_wrong_way_does_not_hold(expect, counts):
    assert judged(different(expect, *counts)).verdict == "not confirmed"


def test_a_difference_that_six_prompts_could_have_shown_is_decided():
    # Of six prompts that all change, the exact p is 0.031, and of five 0.063.
    found = [judged(different("lower", k, k, 0, 0)).verdict for k in (6, 5)]
    assert found == ["not confirmed", "not testable"]


def test_what_a_projection_alone_raises_a_little_leaves_a_claim_testable():
    for alone, verdict in (
        ((3, 0), "confirmed"),
        ((0, 20), "confirmed"),
        ((20, 0), "not testable"),
    ):
        raised, lowered = alone
        c = different("higher", 20, 0, 20, 0, alone_raised=raised, alone_lowered=lowered)
        assert judged(c).verdict == verdict


def test_a_share_of_raised_prompts_up_to_the_margin_may_be_too_few_to_tell():
    said = {k: judged(few_raised(k, 10, 0.5)).reason for k in (4, 5, 6)}
    assert {k: "too few prompts to tell" in reason for k, reason in said.items()} == {
        4: True,
        5: True,
        6: False,
    }


def test_too_few_prompts_at_risk_for_the_margin_are_not_testable():
    found = judged(few_raised(0, 8, 0.3))
    assert found.verdict == "not testable"
    assert "8 of 40 prompts are at risk, too few for a bound of 30 %" in found.reason
    assert judged(few_raised(0, 9, 0.3)).verdict == "confirmed"


@pytest.mark.parametrize(("expect", "beyond"), [("lower", 0), ("higher", 40)])
def test_a_rate_among_those_of_enough_random_seeds_is_not_confirmed(expect, beyond):
    seeds = tuple(range(10, 29))
    assert judged(beyond_random(expect, beyond, seeds)).verdict == "confirmed"
    found = judged(beyond_random(expect, 20, seeds))
    assert found.verdict == "not confirmed"
    assert "20 of 40, and 10 to 28 under 19 random seeds" in found.reason


def test_a_layer_at_which_directions_are_hardly_known_is_named_with_its_own_bound():
    found = judged(
        CosineAbove(
            **SIDES, margin=-0.5, cosines={1: 0.0, 2: 0.0, 3: 0.0}, attainable={1: 0.6, 2: 0.4}
        )
    )
    assert found.verdict == "not testable"
    assert "at resid_post.2 even exact opposites would have a cosine of -0.40" in found.reason


def test_a_claim_waits_for_all_that_it_needs():
    met = claim("met", different("lower", 0, 20, 0, 20))
    unmet = claim("unmet", different("lower", 20, 20, 0, 0))
    both = different("lower", 0, 20, 0, 20, needs=("met", "unmet"))
    found = claims.judge([met, unmet, claim("needy", both)])[-1]
    assert found.verdict == "not testable"
    assert "it needs 'unmet', which is not confirmed" in found.reason
