"""Directions against means of HF hidden states, computed here in plain numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jaxsteer.data import prompts as data
from jaxsteer.directions import activations, means
from jaxsteer.directions import direction as directions
from jaxsteer.directions.direction import Direction
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
    made = directions.extract_trait(model, TRAIT)["prompt_end"]

    def mean(side):
        rows = [model.tokenizer.chat(q, system) for system in side for q in TRAIT.questions]
        return last_states(hf, rows).mean(axis=0)

    expected = mean(TRAIT.positive) - mean(TRAIT.negative)
    np.testing.assert_allclose(made.vectors[:-1], expected, atol=2e-5)
    assert made.provenance["n_positive"] == made.provenance["n_negative"] == 75
    assert made.provenance["weights_sha256"] == model.weights_sha256


def test_a_contrast_is_the_difference_of_means_under_its_system_prompt(hf, model):
    one, two = ["w4", "w5 w6"], ["w7 w8 w9", "w10"]
    made = directions.extract_contrast(model, "r", "refusal", one, two, "w20")
    means = [
        last_states(hf, [model.tokenizer.chat(text, "w20") for text in side]).mean(axis=0)
        for side in (one, two)
    ]
    np.testing.assert_allclose(made.vectors[:-1], means[0] - means[1], atol=2e-5)


def test_sampled_positions_depend_on_the_seed_and_on_nothing_else(model):
    asked = ("response_start", "response_avg")
    one = directions.extract_trait(model, TRAIT, asked, seed=3, max_new_tokens=4)
    same = directions.extract_trait(model, TRAIT, asked, seed=3, max_new_tokens=4)
    other = directions.extract_trait(model, TRAIT, asked, seed=4, max_new_tokens=4)
    for position in asked:
        assert one[position].sha256 == same[position].sha256 != other[position].sha256


def test_a_reply_depends_on_its_prompt_and_the_seed_whatever_runs_beside_it(model):
    prompts = [[3, 9, 8], [4, 20], [5, 7, 30, 31]]

    def replies(some, seed=1):
        return means.sample_replies(model, some, seed=seed, max_new_tokens=6)

    together = replies(prompts)
    assert replies(prompts[::-1]) == together[::-1]
    assert replies(prompts[1:2]) == together[1:2]
    assert replies(prompts, 2) != together


def test_provenance_says_how_replies_were_sampled_if_any_were(model):
    asked = ("prompt_end", "response_avg")
    made = directions.extract_trait(model, TRAIT, asked, seed=3, max_new_tokens=4)
    assert "seed" not in made["prompt_end"].provenance
    assert made["response_avg"].provenance["seed"] == 3
    sampled = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 4}
    assert made["response_avg"].provenance["sampled"] == sampled


def test_the_assistant_axis_gives_each_role_the_same_weight(hf, model):
    default, roles, questions = ["w20", "w21 w22"], [("a", "w3"), ("b", "w4 w5")], ["w6", "w7 w8"]
    made = directions.extract_assistant_axis(model, default, roles, questions, "prompt_end")

    def mean(*systems):
        rows = [model.tokenizer.chat(q, system) for system in systems for q in questions]
        return last_states(hf, rows).mean(axis=0)

    expected = mean(*default) - (mean("w3") + mean("w4 w5")) / 2
    np.testing.assert_allclose(made.vectors[:-1], expected, atol=2e-5)
    assert (made.provenance["n_positive"], made.provenance["n_negative"]) == (4, 4)


def test_a_side_that_never_says_anything_is_named(model):
    silent = dataclasses.replace(model, eos=tuple(range(model.config.vocab_size)))
    with pytest.raises(UserError, match="reply under 'w0 w1' was empty"):
        directions.extract_trait(silent, TRAIT, ["response_avg"], max_new_tokens=2)


def test_captures_at_the_three_positions_are_hf_states_and_their_mean(hf, model):
    prompt, response = model.tokenizer.chat("w4 w5", "w6"), [9, 10, 11]
    ((_, captured),) = activations.capture(model, [prompt], [response], activations.POSITIONS)
    hidden = hf(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states
    for layer in range(2):
        state, end = hidden[layer + 1][0].numpy(), len(prompt)
        expected = [state[end - 1], state[end], state[end:].mean(axis=0)]
        np.testing.assert_allclose(captured[layer], expected, atol=1e-5)


def test_position_weights_of_the_documented_row():
    weights = activations.position_weights([7, 8], [5, 6], 5, activations.POSITIONS)
    expected = [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0.5, 0.5]]
    np.testing.assert_array_equal(weights, expected)
    with pytest.raises(UserError, match="empty"):
        activations.position_weights([7, 8], [], 5, ["response_avg"])


def test_streamed_means_keep_what_float32_sums_lose():
    mean = means.Mean()
    values = np.full(20_000, 0.1, np.float32)
    values[0] = 1e7
    for value in values:
        mean.add(np.array([value]))
    expected = values.astype(np.float64).mean()
    assert mean.value()[0] == pytest.approx(expected, rel=1e-12)


def direction(rng, name="v", **provenance):
    vectors = rng.standard_normal((3, 32)).astype(np.float32)
    return Direction(name=name, vectors=vectors, provenance={"tap": "resid_post", **provenance})


def test_a_random_direction_has_the_norms_of_its_model_and_no_other_likeness(rng):
    real = direction(rng, weights_sha256="abc")
    made = directions.random_like(real, 7)
    norms = [np.linalg.norm(d.vectors, axis=1) for d in (real, made)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert made.sha256 == directions.random_like(real, 7).sha256
    assert made.sha256 != directions.random_like(real, 8).sha256
    assert made.provenance["norm_of_sha256"] == real.sha256


def test_minus_and_without_say_what_they_are_made_of(rng):
    one, two = direction(rng, "a", weights_sha256="x"), direction(rng, "b", weights_sha256="x")
    difference, rest = directions.minus("c", one, two), directions.without("d", one, two)
    np.testing.assert_allclose(difference.vectors, one.vectors - two.vectors, atol=1e-6)
    np.testing.assert_allclose(np.einsum("ld,ld->l", rest.vectors, two.vectors), 0, atol=1e-4)
    assert rest.provenance["of"] == {"a": one.sha256, "b": two.sha256}
    assert rest.provenance["weights_sha256"] == "x"


def test_saved_directions_come_back_with_their_provenance(rng, tmp_path):
    saved = [direction(rng, "a", kind="trait", n=3), direction(rng, "b", source="ü <b>")]
    directions.save(tmp_path / "d.safetensors", saved)
    found = directions.load(tmp_path / "d.safetensors")
    assert list(found) == ["a", "b"]
    for one in saved:
        assert found[one.name].sha256 == one.sha256
        assert found[one.name].provenance == one.provenance


def test_the_hash_changes_with_any_value(rng):
    one = direction(rng)
    vectors = one.vectors.copy()
    vectors[1, 5] = np.nextafter(vectors[1, 5], np.float32(np.inf))
    assert Direction(name="v", vectors=vectors, provenance={}).sha256 != one.sha256


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_files_that_are_no_directions_are_refused_by_name(tmp_path, content):
    path = tmp_path / "d.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"d\.safetensors"):
        directions.load(path)


@pytest.mark.parametrize("vectors", [np.zeros((3, 4)), np.zeros(3, np.float32)])
def test_tensors_that_are_no_directions_are_refused(tmp_path, vectors):
    path = tmp_path / "d.safetensors"
    about = {"format": directions.FORMAT, "provenance": '{"v": {}}'}
    save_file({"v": vectors}, path, metadata=about)
    with pytest.raises(UserError, match=r"d\.safetensors: 'v' is float.*extract it again"):
        directions.load(path)


def test_a_direction_of_another_width_or_other_weights_is_refused(model, rng):
    mine = direction(rng, weights_sha256=model.weights_sha256)
    directions.check_model(mine, model, "here")
    wide = Direction(name="v", vectors=np.zeros((3, 33), np.float32), provenance=mine.provenance)
    with pytest.raises(UserError, match=r"here.*\(3, 33\).*\(3, 32\)"):
        directions.check_model(wide, model, "here")
    with pytest.raises(UserError, match="other weights"):
        directions.check_model(direction(rng, weights_sha256="0" * 64), model, "here")
