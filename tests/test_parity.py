"""The script behind docs/parity.md, on the tiny models."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests import parity, tiny


@pytest.mark.parametrize("build", [tiny.llama, pytest.param(tiny.qwen2, marks=pytest.mark.slow)])
def test_tiny_models_agree_with_hf_at_every_step_steered_and_not(build, tmp_path):
    folder = tiny.save(build(), tmp_path / "hf")
    model = ChatModel.load(convert(folder, tmp_path / "out", "float32"))
    hf = parity.hf_model({"pretrained_model_name_or_path": str(folder)}, "float32")
    measured = [
        parity.measure("plain", model, hf, [], 16),
        parity.measure("steered", model, hf, parity.steering(model), 16),
    ]
    for line in measured:
        for part in (line.prefill, line.decode):
            assert part.highest <= 1e-4 and part.argmax == part.tokens
        assert line.prefill.tokens > 200 and line.decode.tokens > 200
        assert line.greedy == line.replies == parity.PROMPTS
    page = parity.render(measured, [("llama", *measured)])
    assert page.count("| 16 / 16 |") == 2 and page.count("| 32 / 32 |") == 1


def test_every_family_has_a_row_that_says_what_sets_it_apart():
    assert parity.FEATURES.keys() == tiny.FAMILIES.keys()


def test_differences_are_counted_over_tokens():
    ours = [np.array([[0.0, 1.0], [3.0, 2.0]]), np.array([[1.0, 0.0]])]
    theirs = [np.array([[0.0, 1.5], [3.0, 4.0]]), np.array([[1.0, 0.0]])]
    expected = parity.Difference(highest=2.0, mean=2.5 / 6, argmax=2, tokens=3)
    assert parity.Difference.of(ours, theirs) == expected
