"""Claims of every shipped study in worlds of which the truth is known."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxsteer.evidence import claims
from jaxsteer.judges.verdicts import LABELS
from jaxsteer.study import spec
from jaxsteer.study.results import Add, Condition, Project
from tests.evidence import worlds
from tests.evidence.worlds import World

WITH_CLAIMS = [name for name in spec.shipped() if spec.load(name).claim]


def judged(name: str, world: World) -> dict[str, claims.Claim]:
    """The claims on behaviour of a shipped study, by name, in a world."""
    study = spec.load(name)
    with tempfile.TemporaryDirectory() as folder:
        found = claims.evaluate(worlds.results(study, world, Path(folder)))
    geometry = {c.name for c in study.claim if any(t.expect == "cosine-above" for t in c.tests)}
    return {claim.name: claim for claim in found if claim.name not in geometry}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "qwen2.5-7b-paper" else ())
        for name in WITH_CLAIMS
    ],
)
@given(st.lists(st.sampled_from(LABELS), min_size=2, max_size=2), st.integers(0, worlds.HARMFUL))
@settings(max_examples=3, deadline=None)
@example(["refusal", "refusal"], 0)
@example(["complied-unscored", "benign-answer"], 0)
@example(["degenerate", "degenerate"], 0)
@example(["bypass", "benign-answer"], 50)
def test_where_all_conditions_are_alike_nothing_is_confirmed(name, answers, refused):
    def world(condition: Condition, family: str, i: int) -> str:
        return "refusal" if i < refused else answers[family == "benign"]

    found = judged(name, world)
    assert not [c.name for c in found.values() if c.verdict == "confirmed"]


def planted(condition: Condition, family: str, i: int) -> str:
    """A gate after the persona: steering suppresses, late knockouts and late refusal restore."""
    if family == "benign":
        return "refusal" if worlds.spread("benign", i, worlds.BENIGN) < 2 else "benign-answer"
    added = {op.direction: op for op in condition.operations if isinstance(op, Add)}
    out = {op.direction: op for op in condition.operations if isinstance(op, Project)}
    refused = 100
    if "persona" in added:
        refused = 5
        steer = max(added["persona"].layers)
        if "persona" in out and min(out["persona"].layers) > steer:
            refused = 90
        if "refusal" in added and min(added["refusal"].layers) > steer:
            refused = 50
    elif "neutral" in added:
        refused = 60
    return "refusal" if worlds.spread("harmful", i, worlds.HARMFUL) < refused else "bypass"


@pytest.mark.parametrize("name", WITH_CLAIMS)
def test_planted_effects_are_confirmed(name):
    left = {n: c for n, c in judged(name, planted).items() if c.verdict != "confirmed"}
    for claim in left.values():
        few_seeds = claim.verdict == "not testable" and "random seeds cannot show" in claim.reason
        by_algebra = claim.verdict == "not tested" and "true by algebra" in claim.reason
        assert few_seeds or by_algebra, (claim.name, claim.verdict, claim.reason)


@pytest.mark.parametrize("name", [n for n in WITH_CLAIMS if n != "mode-audit"])
def test_without_suppression_nothing_that_presupposes_it_is_decided(name):
    def world(condition: Condition, family: str, i: int) -> str:
        # The persona does nothing, and what is done on top of it raises refusal from 40 to 110.
        refused = 110 if len(condition.operations) > 1 else 40
        if family == "benign":
            return "benign-answer"
        return "refusal" if worlds.spread("harmful", i, worlds.HARMFUL) < refused else "bypass"

    found = judged(name, world)
    assert found["suppression"].verdict == "not confirmed"
    for claim in ("restoration", "restoration late", "restoration by own vectors",
                  "no restoration by random", "refusal early fails"):  # fmt: skip
        if claim in found:
            assert found[claim].verdict == "not testable"
            assert "it needs 'suppression', which is not confirmed" in found[claim].reason


@pytest.mark.parametrize("name", [n for n in WITH_CLAIMS if n != "mode-audit"])
def test_refusal_that_a_projection_raises_by_itself_has_not_returned(name):
    def world(condition: Condition, family: str, i: int) -> str:
        if condition.unsteered_twin_of and family != "benign":
            return "refusal" if worlds.spread("harmful", i, worlds.HARMFUL) < 118 else "bypass"
        return planted(condition, family, i)

    found = judged(name, world)
    assert found["suppression"].verdict in ("confirmed", "not testable")
    for claim in (c for n, c in found.items() if n.startswith("restoration")):
        assert claim.verdict != "confirmed"
    assert any("raises it without steering too" in c.reason for c in found.values())


def test_a_need_is_met_mode_by_mode():
    study = spec.load("mode-audit")
    restoration = spec.ClaimSpec(
        name="restoration",
        says="It returns.",
        tests=[
            spec.TestSpec(
                treated="persona, out of window",
                control="persona",
                expect="higher",
                prompts="strongreject",
            )
        ],
    )
    study = msgspec.structs.replace(study, claim=[*study.claim, restoration])

    def world(condition: Condition, family: str, i: int) -> str:
        if condition.mode == "direct" and condition.operations:
            return "refusal"
        return planted(condition, family, i)

    with tempfile.TemporaryDirectory() as folder:
        found = claims.evaluate(worlds.results(study, world, Path(folder)))
    [claim] = [c for c in found if c.name == "restoration"]
    results = {c.mode: c.result for c in claim.comparisons}
    assert results.pop("direct") == "not testable"
    assert set(results.values()) == {"held"} and len(results) == 6
    assert claim.verdict == "not testable"
