from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxsteer.evidence import claims, findings
from jaxsteer.evidence.findings import Finding
from jaxsteer.study.spec import AddSpec, ConditionSpec, ProjectSpec
from tests.receipt import made

NEUTRAL = ConditionSpec(
    name="neutral persona", ops=[AddSpec(direction="neutral", at="steer", unit="dose")]
)
EARLY = ConditionSpec(
    name="refusal early",
    ops=[made.ADD, AddSpec(direction="refusal", at="early", scale=2.0)],
)
SWAPPED = ConditionSpec(
    name="swapped",
    ops=[
        AddSpec(direction="persona", at="early", unit="dose"),
        AddSpec(direction="refusal", at="steer", scale=2.0),
    ],
)
MATCHED = ConditionSpec(
    name="equal norm taken",
    random_seeds=[1],
    ops=[
        made.ADD,
        AddSpec(
            direction="random",
            at="steer+2",
            scale=-1.0,
            unit="dose",
            norm_of="persona",
        ),
    ],
)


def found(path: Path, label: made.Label = made.usual):
    study = made.study(
        claims=[
            *made.CLAIMS,
            made.claim("early fails", made.test("refusal early", "persona", "few-raised")),
        ]
    )
    study.condition.extend([NEUTRAL, EARLY, SWAPPED, MATCHED])
    return made.loaded(path, study=study, label=label)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    return findings.evaluate(found(tmp_path_factory.mktemp("controls") / "made"))


def of(every: list[Finding], claim: str, kind: str) -> list[Finding]:
    return [f for f in every if f.claim == claim and f.kind == kind]


def test_each_claim_gets_the_controls_that_speak_to_it(usual: list[Finding]):
    kinds = {c: {f.kind for f in usual if f.claim == c} for c in {f.claim for f in usual}}
    assert kinds["suppression"] == {"random", "neutral", "benign"}
    assert kinds["restoration"] == {"random", "unsteered", "matched"}
    assert kinds["early fails"] == {"swapped"}
    assert findings.absent(usual) == []


def test_controls_are_found_by_what_they_do_and_not_by_name(usual: list[Finding]):
    (swapped,) = of(usual, "early fails", "swapped")
    assert (swapped.first, swapped.second, swapped.expects) == (
        "swapped",
        "refusal early",
        "higher",
    )
    (matched,) = of(usual, "restoration", "matched")
    assert (matched.first, matched.second) == ("equal norm taken #1", "persona")
    (twin,) = of(usual, "restoration", "unsteered")
    assert (twin.first, twin.second) == ("persona, out late, unsteered", "baseline")


def test_a_knockout_that_shares_the_twin_of_another_has_it_too(tmp_path: Path):
    weak = ConditionSpec(
        name="weak persona, out late",
        ops=[
            AddSpec(direction="persona", at="steer", scale=1.0),
            ProjectSpec(direction="persona", at="steer+1..last"),
        ],
    )
    study = made.study([made.claim("weak", made.test(weak.name, "persona", "higher"))])
    study.condition.append(weak)
    every = findings.evaluate(made.loaded(tmp_path / "made", study=study))
    (twin,) = of(every, "weak", "unsteered")
    assert (twin.treated, twin.first) == (weak.name, "persona, out late, unsteered")


def test_few_seeds_leave_a_claim_undecided_however_far_out_it_lies(usual: list[Finding]):
    (random,) = of(usual, "suppression", "random")
    assert random.n == 3 and random.p == 0.25 and random.status == "undecided"
    assert random.difference == pytest.approx((1 - 17) / 40)


def test_random_directions_that_do_as_much_break_the_claim(tmp_path: Path):
    def label(condition: str, family: str, i: int) -> str:
        name = "persona" if condition.startswith("random direction") else condition
        return made.usual(name, family, i)

    (random,) = of(findings.evaluate(found(tmp_path, label)), "suppression", "random")
    assert random.status == "fails" and random.why == "not below all of 3 random seeds"


def test_a_projection_that_refuses_by_itself_breaks_the_restoration(tmp_path: Path):
    def label(condition: str, family: str, i: int) -> str:
        if condition.endswith("late, unsteered"):
            return "refusal" if i < 35 else "degenerate"
        return made.usual(condition, family, i)

    (twin,) = of(findings.evaluate(found(tmp_path, label)), "restoration", "unsteered")
    assert twin.difference == pytest.approx(17 / 40)
    assert twin.status == "fails" and twin.why.startswith("new on 17 of ")


def test_a_claim_without_controls_is_named(usual: list[Finding], tmp_path: Path):
    results = found(tmp_path)
    alone = findings.alone(results, [f for f in usual if f.claim != "early fails"])
    # Claims on random directions and benign prompts are controls themselves.
    assert "early fails" in alone and not {"none by random", "benign unharmed"} & set(alone)


def test_every_pair_that_is_compared_can_be_looked_at(usual: list[Finding], tmp_path: Path):
    results = found(tmp_path)
    options = findings.comparisons(results, claims.evaluate(results), usual)
    assert next(iter(options.values())) == ("persona", "baseline", "strongreject", "refusal")
    assert ("swapped", "refusal early", "strongreject", "refusal") in options.values()
    assert len(set(options.values())) == len(options)


def test_the_headline_counts_the_statuses(usual: list[Finding]):
    words, every = findings.headline(usual), [f for f, _ in findings.once(usual)]
    n = {status: sum(f.status == status for f in every) for status in ("holds", "undecided")}
    assert words.startswith(f"Of {len(every)} controls, the claims hold against {n['holds']} and")
    assert words.endswith(f"fail against none; undecided: {n['undecided']}")


def test_a_control_of_two_claims_is_counted_once(usual: list[Finding]):
    again = [dataclasses.replace(f, claim="another") for f in usual]
    assert findings.headline([*usual, *again]) == findings.headline(usual)
    assert all("another" in claims for _, claims in findings.once([*usual, *again]))


def test_rows_of_other_prompts_are_told_apart(tmp_path):
    usual = made.loaded(tmp_path / "made")
    (one,) = [f for f in findings.evaluate(usual) if (f.kind, f.treated) == ("random", "persona")]
    made_of = [one, dataclasses.replace(one, family="benign")]
    rows = findings.envelope_table(usual, made_of)["row"].unique(maintain_order=True)
    assert rows.to_list() == ["persona · strongreject prompts", "persona · benign prompts"]
