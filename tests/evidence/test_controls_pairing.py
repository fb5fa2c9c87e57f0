"""Which condition a control belongs to, in the studies that are shipped."""

from __future__ import annotations

import msgspec
import pytest

from jaxsteer.evidence import controls
from jaxsteer.study import conditions, spec
from jaxsteer.study.results import RunRecord
from jaxsteer.study.spec import AddSpec, ConditionSpec
from tests.receipt import made
from tests.study.stand_ins import compiled

PAPER = ["llama3.1-8b-paper", "qwen2.5-7b-paper"]


def treated(study, control, kind):
    """Base of the condition that the first repeat of a control belongs to."""
    made_run = msgspec.convert(made.run_record(made.study()), RunRecord)
    run = msgspec.structs.replace(made_run, study=study, conditions=compiled(study))
    repeat = next(c for c in run.conditions if c.base == control)
    find = {"random": controls.random_control_of, "neutral": controls.neutral_control_of}[kind]
    found = find(run, repeat)
    return found and found.base


@pytest.mark.parametrize("name", PAPER)
def test_a_random_control_belongs_to_the_condition_of_its_own_norm(name):
    study = spec.load(name)
    assert treated(study, "random, norm of I-Thou", "random") == "I-Thou, natural"
    assert treated(study, "random direction", "random") == "persona"
    assert treated(study, "persona, random out at 22", "random") == "persona, out at 22"
    assert treated(study, "neutral persona", "neutral") == "persona"


def test_the_demos_controls_belong_to_the_persona():
    study = spec.load("smollm2-demo")
    assert treated(study, "random direction", "random") == "persona"
    assert treated(study, "neutral persona", "neutral") == "persona"
    assert treated(study, "persona, random out of window", "random") == "persona, out of window"


def test_a_random_direction_is_as_long_as_the_persona_unless_told_otherwise():
    study = made.study()
    other = ConditionSpec(
        name="refusal", ops=[AddSpec(direction="refusal", at="steer", unit="dose")]
    )
    study = msgspec.structs.replace(study, condition=[other, *study.condition])
    assert treated(study, "random direction", "random") == "persona"


def test_a_control_of_a_norm_that_no_condition_has_takes_the_first_of_its_shape():
    study = made.study()
    longer = ConditionSpec(
        name="long",
        random_seeds=[1],
        ops=[AddSpec(direction="random", at="steer", unit="dose", norm_of="refusal")],
    )
    study = msgspec.structs.replace(study, condition=[*study.condition, longer])
    assert treated(study, "long", "random") == "persona"


def test_a_random_direction_at_the_dose_belongs_to_a_repeat_of_that_strength():
    assert treated(spec.load("trait-characterisation"), "random direction", "random") == "evil"


def test_a_knockout_of_every_strength_has_its_unsteered_twin():
    run = compiled(spec.load("layer-window"))
    knockouts = [c for c in run if ", out" in c.base and not c.unsteered_twin_of]
    assert len(knockouts) == 27
    for knockout in knockouts:
        twin = conditions.unsteered_twin(run, knockout)
        assert twin is not None and twin.operations == knockout.operations[1:]


@pytest.mark.parametrize("name", PAPER)
def test_a_knockout_with_refusal_added_shares_the_twin_of_the_one_without(name):
    run = compiled(spec.load(name))
    [knockout] = [c for c in run if c.name == "persona, refusal added early, out at 22"]
    twin = conditions.unsteered_twin(run, knockout)
    assert twin is not None and twin.name == "persona, out at 22, unsteered"


def test_what_only_adds_or_only_projects_has_no_unsteered_twin():
    run = compiled(spec.load("smollm2-demo"))
    for name in ("baseline", "persona", "random direction #1", "persona, refusal added late"):
        [condition] = [c for c in run if c.name == name]
        assert conditions.unsteered_twin(run, condition) is None
