from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from jaxsteer.data import prompts as data
from jaxsteer.directions import direction, extraction, samples
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.extraction import (
    InStudy,
    Random,
    UserPersona,
    axis_contrast,
    contrast,
    difference,
    prompt_contrast,
    trait_contrast,
)
from jaxsteer.errors import UserError
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests import tiny


@pytest.fixture(scope="module")
def hf():
    return tiny.qwen2()


@pytest.fixture(scope="module")
def model(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("directions")
    return ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


TRAIT = data.Trait(
    name="loud",
    description="",
    positive=[f"w{i} w1" for i in range(5)],
    negative=[f"w{i} w2 w3" for i in range(5)],
    questions=[f"w{i} w{i + 1}" for i in range(15)],
)


def last_states(hf, rows):
    """`resid_post` of all but the last layer at the last token, float64 [row, layer, width]."""
    states = []
    for row in rows:
        hidden = hf(torch.tensor([row]), output_hidden_states=True).hidden_states
        states.append([h[0, -1].double().numpy() for h in hidden[1:-1]])
    return np.array(states)


def test_a_trait_is_the_difference_of_means_of_hf_states_at_the_last_prompt_token(hf, model):
    made = difference(model, "loud", trait_contrast(TRAIT))

    def mean(side):
        rows = [model.tokenizer.chat(q, system) for system in side for q in TRAIT.questions]
        return last_states(hf, rows).mean(axis=0)

    expected = mean(TRAIT.positive) - mean(TRAIT.negative)
    np.testing.assert_allclose(made.vectors[:-1], expected, atol=2e-5)
    assert made.provenance["n_positive"] == made.provenance["n_negative"] == 75
    halves = made.provenance["split_half"]
    assert (halves["unit"], halves["units"]) == ("instruction", 10)
    assert len(halves["mean"]) == len(made.vectors)
    assert made.provenance["weights_sha256"] == model.weights_sha256


def test_a_contrast_is_the_difference_of_means_under_its_system_prompt(hf, model):
    one, two = ["w4", "w5 w6"], ["w7 w8 w9", "w10"]
    made = difference(model, "refusal", prompt_contrast(one, two, "w20"))
    means = [
        last_states(hf, [model.tokenizer.chat(text, "w20") for text in side]).mean(axis=0)
        for side in (one, two)
    ]
    np.testing.assert_allclose(made.vectors[:-1], means[0] - means[1], atol=2e-5)


def test_sampled_positions_depend_on_the_seed_and_on_nothing_else(model):
    for position in ("response_start", "response_avg"):
        one, same, other = (
            difference(
                model, "loud", replace(trait_contrast(TRAIT, position), seed=seed, max_new_tokens=4)
            ).sha256
            for seed in (3, 3, 4)
        )
        assert one == same != other


def test_a_reply_depends_on_its_prompt_and_the_seed_whatever_runs_beside_it(model):
    prompts = [[3, 9, 8], [4, 20], [5, 7, 30, 31]]

    def replies(some, seed=1):
        return samples.sample_replies(model, some, seed=seed, max_new_tokens=6)

    together = replies(prompts)
    assert replies(prompts[::-1]) == together[::-1]
    assert replies(prompts[1:2]) == together[1:2]
    assert replies(prompts, 2) != together


def test_provenance_says_how_replies_were_sampled_if_any_were(model):
    made = {
        position: difference(
            model, "loud", replace(trait_contrast(TRAIT, position), seed=3, max_new_tokens=4)
        )
        for position in ("prompt_end", "response_avg")
    }
    assert "seed" not in made["prompt_end"].provenance
    assert made["response_avg"].provenance["seed"] == 3
    sampled = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 4}
    assert made["response_avg"].provenance["sampled"] == sampled


def test_the_assistant_axis_gives_each_role_the_same_weight(hf, model):
    default, roles, questions = ["w20", "w21 w22"], [("a", "w3"), ("b", "w4 w5")], ["w6", "w7 w8"]
    axis = replace(axis_contrast(default, roles, questions), position="prompt_end")
    made = difference(model, "assistant-axis", axis)

    def mean(*systems):
        rows = [model.tokenizer.chat(q, system) for system in systems for q in questions]
        return last_states(hf, rows).mean(axis=0)

    expected = mean(*default) - (mean("w3") + mean("w4 w5")) / 2
    np.testing.assert_allclose(made.vectors[:-1], expected, atol=2e-5)
    assert (made.provenance["n_positive"], made.provenance["n_negative"]) == (4, 4)


def test_a_group_whose_replies_are_all_empty_is_named(model):
    silent = replace(model, eos=tuple(range(model.config.vocab_size)))
    with pytest.raises(UserError, match="reply under 'w0 w1' was empty"):
        difference(silent, "loud", replace(trait_contrast(TRAIT, "response_avg"), max_new_tokens=2))


def test_a_user_persona_is_read_where_the_models_replies_are_a_users_messages(hf, model):
    asked = contrast(UserPersona(trait=TRAIT))
    asked = replace(asked, replayed_under="w9", seed=3, max_new_tokens=4)
    made = difference(model, "user", asked)

    def mean(side):
        asked = [model.tokenizer.chat(q, i) for i in side for q in TRAIT.questions]
        replies = samples.sample_replies(model, asked, seed=3, max_new_tokens=4)
        texts = [text for text in map(model.tokenizer.decode, replies) if text.strip()]
        return last_states(hf, [model.tokenizer.chat(text, "w9") for text in texts]).mean(axis=0)

    expected = mean(TRAIT.positive) - mean(TRAIT.negative)
    np.testing.assert_allclose(made.vectors[:-1], expected, atol=2e-5)
    assert made.provenance["kind"] == "user-persona" and made.provenance["seed"] == 3


def test_directions_that_a_file_lacks_are_extracted_once_and_kept_in_it(model, tmp_path):
    path, said = tmp_path / "d.safetensors", []
    first = extraction.find_or_extract(model, ["compliant", "random-3"], path, say=said.append)
    assert [line.split(";")[0] for line in said] == ["extracting compliant"]
    again = extraction.find_or_extract(model, ["random-3", "compliant"], path, say=said.append)
    assert len(said) == 1 and list(direction.load(path)) == ["compliant"]
    for name in ("compliant", "random-3"):
        assert again[name].sha256 == first[name].sha256


def test_a_file_of_another_model_is_not_added_to(model, tmp_path):
    path = tmp_path / "d.safetensors"
    extraction.find_or_extract(model, ["compliant"], path)
    other = replace(model, weights_sha256="0" * 64)
    with pytest.raises(UserError, match="other weights"):
        extraction.find_or_extract(other, ["evil"], path)


def test_a_name_that_is_neither_a_direction_nor_a_trait_is_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"no trait w; give a .toml file or one of"):
        extraction.find_or_extract(model, ["w"], tmp_path / "d.safetensors")


def test_a_random_direction_has_its_name_and_the_norms_of_the_first_that_is_not_random(model, rng):
    vectors = rng.standard_normal((3, 32)).astype(np.float32)
    about = {"kind": "trait", "weights_sha256": model.weights_sha256}
    found = {
        "random-1": Direction(name="random-1", vectors=2 * vectors, provenance={"kind": "random"}),
        "real": Direction(name="real", vectors=vectors, provenance=about),
    }
    made = extraction.extract(model, "noise", Random(seed=7), found=found)
    assert made.name == "noise" and made.provenance["norm_of"] == "real"
    with pytest.raises(UserError, match="noise takes the norms of another direction"):
        extraction.extract(model, "noise", Random(seed=7))


@pytest.mark.parametrize(
    "entry", [{"kind": "trait"}, {"kind": "minus"}, {"kind": "refusal", "position": "prompt_end"}]
)
def test_a_kind_without_its_fields_or_with_another_kinds_is_refused(entry):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(entry, InStudy)


def test_a_kept_direction_is_extracted_again_when_its_texts_have_changed(model, tmp_path):
    text = (data.HERE / "traits/compliant.toml").read_text(encoding="utf-8")
    mine, file, said = tmp_path / "mine.toml", tmp_path / "d.safetensors", list[str]()
    for added in ("", "", " Indeed."):
        mine.write_text(text.replace('.",', f'.{added}",', 1), encoding="utf-8")
        extraction.find_or_extract(model, [str(mine)], file, say=said.append)
    assert len(said) == 2


def test_a_random_direction_has_the_norms_of_the_one_asked_for_with_it(model, tmp_path):
    file = tmp_path / "d.safetensors"
    extraction.find_or_extract(model, ["evil"], file)
    found = extraction.find_or_extract(model, ["random-3", "compliant"], file)
    assert found["random-3"].provenance["norm_of"] == "compliant"
    with pytest.raises(UserError, match="name one"):
        extraction.find_or_extract(model, ["random-3"], file)
