from __future__ import annotations

import re

import pytest

from jaxsteer.data import prompts as data
from jaxsteer.errors import UserError


def test_public_sets_have_their_published_sizes():
    assert len(data.strongreject()) == 313
    assert len({p.id for p in data.strongreject()}) == 313
    assert len(data.harmbench()) == 200


def test_our_sets_are_large_enough_and_disjoint():
    harmless, benign = data.harmless(), data.benign()
    assert len(harmless) >= 128 and len(benign) >= 32
    assert not {p.text for p in harmless} & {p.text for p in benign}


def test_no_question_holds_its_answer_or_is_a_prompt_of_another_set():
    questions = data.questions()
    assert len({q.id for q in questions}) == len({q.text for q in questions}) >= 60
    for question in questions:
        assert question.answers
        for answer in question.answers:
            assert not re.search(rf"\b{re.escape(answer)}\b", question.text, re.IGNORECASE)
    others = {p.text for p in [*data.benign(), *data.harmless()]}
    assert not others & {q.text for q in questions}


def test_the_policies_differ_and_go_from_none_to_a_strict_one():
    policies = list(data.policies().values())
    assert len({policy.sha256 for policy in policies}) == len(policies) >= 7
    assert policies[0].name == "generic" and policies[-1].name == "safety-strict"


def test_every_shipped_trait_is_valid_and_the_expected_ones_are_there():
    names = data.traits()
    for name in names:
        assert data.trait(name).name == name
    relational = {
        "evil",
        "nurturing",
        "callous",
        "supportive",
        "hostile",
        "patient",
        "arrogant",
        "diplomatic",
    }
    compliant = {"compliant", "compliant-neutral", "compliant-v2", "compliant-neutral-v2"}
    assert relational | compliant == set(names)
    for name in relational:
        assert data.trait(data.trait(name).opposite).opposite == name


@pytest.mark.parametrize("version", ["", "-v2"])
def test_the_neutral_variant_never_instructs_refusal(version):
    plain, neutral = data.trait(f"compliant{version}"), data.trait(f"compliant-neutral{version}")
    assert (plain.positive, plain.questions) == (neutral.positive, neutral.questions)
    text = " ".join(neutral.negative).lower()
    for word in ("refus", "declin", "deny", "warn", "cannot", "withh", "judg", "suspic"):
        assert word not in text


def test_samples_do_not_depend_on_order_and_are_nested():
    prompts = data.benign()
    assert data.sample(prompts, 8, 1) == data.sample(prompts[::-1], 8, 1)
    assert data.sample(prompts, 8, 1) == data.sample(prompts, 20, 1)[:8]
    assert data.sample(prompts, 8, 1) != data.sample(prompts, 8, 2)
    assert len(data.sample(prompts, 0, 1)) == len(prompts)


GOOD = {
    "positive": [f"p{i}" for i in range(5)],
    "negative": [f"n{i}" for i in range(5)],
    "questions": [f"q{i}" for i in range(15)],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": ["p"]}, "positive has 1"),
        ({"questions": ["q"]}, "questions has 1"),
        ({"positive": [f"p{i}" for i in range(6)]}, "equally many"),
        ({"negative": ["n", "n", "a", "b", "c"]}, "twice"),
        ({"negative": [" ", "n", "a", "b", "c"]}, "empty"),
        ({"negative": "n"}, "negative"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_malformed_trait_names_the_key(tmp_path, change, message):
    lines = [f"{k} = {v!r}" for k, v in ({"name": "x", "description": "y"} | GOOD | change).items()]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        data.trait(str(path))


def test_broken_toml_and_a_missing_trait_are_one_line(tmp_path):
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(UserError, match=r"bad\.toml"):
        data.trait(str(tmp_path / "bad.toml"))
    with pytest.raises(UserError, match="no trait nosuch"):
        data.trait("nosuch")
