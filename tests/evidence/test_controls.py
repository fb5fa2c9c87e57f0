from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from jaxsteer.evidence import controls
from jaxsteer.evidence.outcomes import Labels
from jaxsteer.study.results import Results
from jaxsteer.study.spec import AddSpec, ConditionSpec, ProjectSpec
from tests.receipt import made


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return made.loaded(tmp_path_factory.mktemp("controls") / "made")


def test_random_controls_are_compared_with_the_condition_of_the_same_operations(found: Results):
    every = controls.random_controls(found.run, Labels(found.rows, found.verdicts))
    by_name = {(c.control, c.treated): c for c in every if c.outcome == "refusal"}
    assert set(by_name) == {
        ("random direction", "persona"),
        ("persona, random out", "persona, out late"),
    }
    control = by_name["random direction", "persona"]
    assert (control.n, control.low, control.mean, control.high) == (3, 0.425, 0.425, 0.425)
    assert (control.value, control.p_low, control.p_high) == (0.025, 0.25, 1.0)


def paired(found: Results) -> dict[tuple[str, str, str], controls.PairedControl]:
    every = controls.paired_controls(found.run, Labels(found.rows, found.verdicts))
    return {(c.kind, c.treated, c.control): c for c in every if c.outcome == "refusal"}


def test_knockouts_are_compared_with_their_unsteered_twins_and_benign_with_untouched(
    found: Results,
):
    by_name = paired(found)
    twin = by_name["unsteered", "persona, out late", "persona, out late, unsteered"]
    assert (twin.raised, twin.lowered, twin.difference) == (0, 3, -0.075)
    benign = by_name["benign", "persona", "baseline"]
    assert (benign.n, benign.raised, benign.lowered) == (20, 0, 1)


def test_a_knockout_that_shares_its_twin_is_compared_with_it(tmp_path: Path):
    study = made.study()
    weak = ConditionSpec(
        name="weak persona, out late",
        ops=[
            AddSpec(direction="persona", at="steer", scale=1.0),
            ProjectSpec(direction="persona", at="steer+1..last"),
        ],
    )
    study.condition.append(weak)
    by_name = paired(made.loaded(tmp_path, study=study))
    assert ("unsteered", "weak persona, out late", "persona, out late, unsteered") in by_name


def test_bypasses_are_not_compared_before_a_judge_of_harm_scored_every_row(found: Results):
    unscored = Labels(found.rows, {})
    scored = Labels(found.rows, {"llama-guard": made.guard(found.rows)})
    for measure in (controls.random_controls, controls.paired_controls, controls.dose_responses):
        outcomes = [
            {c.outcome for c in measure(found.run, labels)} for labels in (unscored, scored)
        ]
        assert outcomes == [{"refusal", "degenerate"}, {"refusal", "bypass", "degenerate"}]


def test_strengths_have_a_trend(found: Results):
    labels = Labels(found.rows, found.verdicts)
    [dose] = [d for d in controls.dose_responses(found.run, labels) if d.outcome == "refusal"]
    assert dose.strengths == [1.0, 2.0, 4.0]
    assert dose.z < -3
    assert dose.p < 0.001


def test_strengths_that_ran_on_different_prompts_have_no_trend(found: Results):
    one = pl.col("condition") == "persona by strength x2"
    fewer = found.rows.filter(~(one & (pl.col("n_tokens") == 4)))
    assert list(controls.dose_responses(found.run, Labels(fewer, {}))) == []
