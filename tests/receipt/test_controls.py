"""Which condition a control stands beside, in the studies that are shipped."""

from __future__ import annotations

import msgspec
import pytest

from jaxsteer import spec
from jaxsteer.receipt import controls
from jaxsteer.spec import ConditionSpec, OperationSpec
from tests.receipt import made

PAPER = ["llama3.1-8b-paper", "qwen2.5-7b-paper"]


def treated(study, control, stand_in):
    [item] = [c for c in study.condition if c.name == control]
    found = controls.treated_of(study, item, stand_in)
    return found and found.name


@pytest.mark.parametrize("name", PAPER)
def test_a_random_control_stands_beside_the_condition_of_its_own_norm(name):
    study = spec.load(name)
    assert treated(study, "random, norm of I-Thou", "random") == "I-Thou, natural"
    assert treated(study, "random direction", "random") == "persona"
    assert treated(study, "persona, random out at 22", "random") == "persona, out at 22"


def test_the_demos_controls_stand_beside_the_persona():
    study = spec.load("smollm2-demo")
    assert treated(study, "random direction", "random") == "persona"
    assert treated(study, "neutral persona", "neutral") == "persona"
    assert (
        treated(study, "persona, random out over late window", "random")
        == "persona, out over late window"
    )


def test_a_random_direction_is_as_long_as_the_persona_unless_told_otherwise():
    study = made.study()
    other = ConditionSpec(
        name="refusal", ops=[OperationSpec(add="refusal", at="steer", scale="dose")]
    )
    study = msgspec.structs.replace(study, condition=[other, *study.condition])
    assert treated(study, "random direction", "random") == "persona"


def test_a_control_of_a_norm_that_no_condition_has_takes_the_first_of_its_shape():
    study = made.study()
    longer = ConditionSpec(
        name="long",
        random_seeds=[1],
        ops=[OperationSpec(add="random", at="steer", scale="dose", norm_of="refusal")],
    )
    study = msgspec.structs.replace(study, condition=[*study.condition, longer])
    assert treated(study, "long", "random") == "persona"
