"""Tiny random models against HF transformers on torch, padded and not, at every tap."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from jaxsteer import activations, chat
from jaxsteer.chatmodel import ChatModel
from jaxsteer.config import RopeConfig
from jaxsteer.convert import convert
from jaxsteer.model import graph
from tests import tiny

FAMILIES = {"llama": tiny.llama, "qwen2": tiny.qwen2}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    hf = FAMILIES[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    return hf, ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


ROWS = [[3, 9, 33, 7, 12], [5] * 17, [41, 8], list(range(3, 60))]


def run(model, rows, taps=("embed", "resid_post"), definition=None):
    ids, real = chat.left_pad(rows, 64)
    weights = np.tile(np.eye(64, dtype=np.float32), (len(rows), 1, 1))
    captured, logits = activations.read(
        definition or model.definition, model.params, ids, real, weights, taps, None, False
    )
    return captured, np.asarray(logits), real


def test_logits_equal_hf_at_every_token_of_a_padded_batch(pair):
    hf, model = pair
    _, logits, real = run(model, ROWS)
    for i, row in enumerate(ROWS):
        expected = hf(torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(logits[i][real[i]], expected, atol=1e-4)


def test_captured_taps_equal_hidden_states_but_for_the_last_which_is_normed(pair):
    hf, model = pair
    captured, _, real = run(model, ROWS)
    for i, row in enumerate(ROWS):
        states = hf(torch.tensor([row]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(captured["embed"][i, 0][real[i]], states[0][0], atol=1e-5)
        for layer in range(len(states) - 2):
            ours = captured["resid_post"][i, layer][real[i]]
            np.testing.assert_allclose(ours, states[layer + 1][0], atol=1e-4)
        normed = hf.model.norm(torch.tensor(np.asarray(captured["resid_post"][i, -1][real[i]])))
        np.testing.assert_allclose(normed, states[-1][0], atol=1e-4)


def test_resid_mid_is_what_the_mlp_norm_reads(pair):
    hf, model = pair
    seen = []
    hook = hf.model.layers[1].post_attention_layernorm.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().numpy())
    )
    hf(torch.tensor([ROWS[0]]))
    hook.remove()
    captured, _, real = run(model, ROWS[:1], ("resid_mid",))
    np.testing.assert_allclose(captured["resid_mid"][0, 1][real[0]], seen[0][0], atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_eps": 0.5},
        {"rope": RopeConfig(theta=50.0)},
        {"rope": RopeConfig(theta=10000.0, kind="llama3", factor=3.0, original_max_position=16)},
    ],
)
def test_config_values_that_have_no_weights_change_the_logits(pair, change):
    _, model = pair
    _, plain, real = run(model, ROWS)
    changed = graph(dataclasses.replace(model.config, **change))
    _, other, _ = run(model, ROWS, definition=changed)
    assert np.abs(plain - other)[real].max() > 1e-3


def test_bfloat16_weights_keep_their_dtype_and_stay_close(tmp_path):
    hf = tiny.llama()
    folder = tiny.save(hf, tmp_path / "hf")
    wide = ChatModel.load(convert(folder, tmp_path / "wide", "float32"))
    narrow = ChatModel.load(convert(folder, tmp_path / "narrow", "bfloat16"))
    assert narrow.params["layers"]["0"]["attn"]["q"]["kernel"].dtype == "bfloat16"
    _, a, real = run(wide, ROWS)
    _, b, _ = run(narrow, ROWS)
    assert np.abs(a - b)[real].max() < 0.1 * np.abs(a[real]).max()
