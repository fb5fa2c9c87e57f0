from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from jaxsteer.data.prompts import Trait
from jaxsteer.directions.extraction import (
    axis_contrast,
    difference,
    prompt_contrast,
    trait_contrast,
)
from jaxsteer.directions.samples import POSITIONS, Samples, forward, gather, position_weights
from jaxsteer.errors import UserError
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests import tiny

TRAIT = Trait(
    name="loud",
    description="",
    positive=[f"w{i} w{i + 1}" for i in range(5)],
    negative=[f"w{i + 20} w{i}" for i in range(5)],
    questions=[f"w{i + 30} w7" for i in range(4)],
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


@pytest.mark.parametrize("position", ["prompt_end", "response_avg"])
def test_trait_samples_make_the_direction_that_was_extracted(model, position):
    contrast = replace(trait_contrast(TRAIT, position), seed=3, max_new_tokens=6)
    made, expected = gather(model, contrast), difference(model, "loud", contrast)
    np.testing.assert_allclose(made.direction(), expected.vectors, atol=1e-5)
    assert len(np.unique(made.units["instruction"])) == 10
    assert len(np.unique(made.units["question"])) == 4


def test_contrast_samples_make_the_direction_that_was_extracted(model):
    sides = [f"w{i}" for i in range(6)], [f"w{i} w2" for i in range(20, 24)]
    contrast = prompt_contrast(*sides, "w9")
    made, expected = gather(model, contrast), difference(model, "refusal", contrast)
    np.testing.assert_allclose(made.direction(), expected.vectors, atol=1e-5)


def test_axis_samples_make_the_axis_that_was_extracted(model):
    default, roles, questions = ["w1", "w2 w3"], ["w4", "w5", "w6 w6"], ["w30", "w31 w32"]
    contrast = axis_contrast(default, [(r, r) for r in roles], questions)
    contrast = replace(contrast, max_new_tokens=5)
    made, expected = gather(model, contrast), difference(model, "assistant-axis", contrast)
    np.testing.assert_allclose(made.direction(), expected.vectors, atol=1e-4)


def test_means_keep_what_float32_sums_lose():
    values = np.full((20_000, 1, 1), 0.1, np.float32)
    values[0], values[-1] = 1e7, 1e7 + 1
    halves = np.arange(20_000) // 10_000
    made = Samples(values=values, group=halves, units={"prompt": halves}, labelled="prompt")
    assert made.direction()[0, 0] == pytest.approx(-1 / 10_000, rel=1e-6)


def test_states_at_the_three_positions_are_hf_states_and_their_mean(tmp_path):
    hf = tiny.qwen2()
    model = ChatModel.load(convert(tiny.save(hf, tmp_path / "hf"), tmp_path / "out", "float32"))
    prompt, response = model.tokenizer.chat("w4 w5", "w6"), [9, 10, 11]
    ((_, captured, _),) = forward(model, [prompt], [response], POSITIONS)
    hidden = hf(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states
    for layer in range(2):
        state, end = hidden[layer + 1][0].numpy(), len(prompt)
        expected = [state[end - 1], state[end], state[end:].mean(axis=0)]
        np.testing.assert_allclose(captured[layer], expected, atol=1e-5)


def test_position_weights_of_the_documented_row():
    real = np.array([False, True, True, True, True, False])
    weights = position_weights(real, 2, POSITIONS)
    expected = [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0.5, 0.5, 0]]
    np.testing.assert_array_equal(weights, expected)
    with pytest.raises(UserError, match="needs a response"):
        position_weights(real, 0, ["response_avg"])
