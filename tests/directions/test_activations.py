from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxsteer.directions import activations
from jaxsteer.errors import UserError
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests import tiny


@pytest.fixture(scope="module")
def hf():
    return tiny.qwen2()


@pytest.fixture(scope="module")
def model(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("activations")
    return ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


def test_captures_at_the_three_positions_are_hf_states_and_their_mean(hf, model):
    prompt, response = model.tokenizer.chat("w4 w5", "w6"), [9, 10, 11]
    ((_, captured, _),) = activations.forward(model, [prompt], [response], activations.POSITIONS)
    hidden = hf(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states
    for layer in range(2):
        state, end = hidden[layer + 1][0].numpy(), len(prompt)
        expected = [state[end - 1], state[end], state[end:].mean(axis=0)]
        np.testing.assert_allclose(captured[layer], expected, atol=1e-5)


def test_position_weights_of_the_documented_row():
    real = np.array([False, True, True, True, True, False])
    weights = activations.position_weights(real, 2, activations.POSITIONS)
    expected = [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0.5, 0.5, 0]]
    np.testing.assert_array_equal(weights, expected)
    with pytest.raises(UserError, match="needs a response"):
        activations.position_weights(real, 0, ["response_avg"])
