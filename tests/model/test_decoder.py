"""Tiny random models against HF transformers on torch, padded and not, at every tap."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from jaxsteer.generation.requests import left_pad
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import AttentionKind, ModelConfig, Rope
from jaxsteer.model.convert import convert
from jaxsteer.model.decoder import graph
from jaxsteer.model.weights import nest, param_shapes
from tests import reference, tiny

FAMILIES = {"llama": tiny.llama, "qwen2": tiny.qwen2}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    hf = FAMILIES[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    return hf, ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


ROWS = [[3, 9, 33, 7, 12], [5] * 17, [41, 8], list(range(3, 60))]


def run(model, rows, taps=("embed", "resid_post"), definition=None):
    ids, real = left_pad(rows, 64)
    captured, logits = reference.read(definition or model.definition, model.params, ids, real, taps)
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


# How a change of each config field shows; a field that is added must say how it does.
PLAIN, NONE = AttentionKind(rope=Rope(theta=1e4)), AttentionKind(rope=None)
OTHER_LOGITS = {
    "norm_eps": {"norm_eps": 0.5},
    "norm_offset": {"norm_offset": 1.0},
    "attention": {"attention": (dataclasses.replace(PLAIN, window=4), NONE)},
    "pattern": {"pattern": (1, 0)},
    "rotary_dim": {"rotary_dim": 6},
    # As many query weights, cut into heads of another width.
    "head_dim": {"head_dim": 6, "n_heads": 8, "n_kv_heads": 4, "rotary_dim": 6},
    "activation": {"activation": "gelu_tanh"},
    "attention_scale": {"attention_scale": 0.5},
    "attention_softcap": {"attention_softcap": 1.0},
    "embedding_scale": {"embedding_scale": 3.0},
    "residual_scale": {"residual_scale": 0.5},
    "logit_divisor": {"logit_divisor": 2.0},
    "logit_softcap": {"logit_softcap": 3.0},
}
OTHER_SHAPES = {
    "vocab_size": 65, "d_model": 36, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "d_ff": 52,
    "qkv_bias": None, "o_bias": None, "mlp_bias": None, "pre_norm": None, "post_norm": None,
    "qk_norm": "head", "tied": None,
}  # fmt: skip
TESTED_ELSEWHERE = {
    "family": "test_weights: the names of tensors, and only Llama's GGUFs have q and k permuted",
    "max_position": "test_sampling: a prompt beyond the context is refused",
}


def test_every_config_field_is_known_to_matter():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields == {*OTHER_LOGITS, *OTHER_SHAPES, *TESTED_ELSEWHERE}


@pytest.mark.parametrize("name", OTHER_LOGITS)
def test_config_values_that_have_no_weights_change_the_logits(name):
    # One layer's worth of everything, whatever the fixture's head width is.
    config = tiny.config(
        vocab_size=40, d_model=24, n_layers=2, d_ff=32, norm_eps=1e-5, tied=True,
        attention=(PLAIN, NONE), pattern=(0, 1),
    )  # fmt: skip
    draw = np.random.default_rng(0)
    shapes = param_shapes(config)
    params = nest(
        (path, draw.standard_normal(shape).astype(np.float32)) for path, shape in shapes.items()
    )
    changed = dataclasses.replace(config, **OTHER_LOGITS[name])
    assert param_shapes(changed) == shapes
    ids, real = left_pad([list(range(3, 23))], 32)
    logits = [
        reference.read(graph(c), params, ids, real, last_only=True)[1] for c in (config, changed)
    ]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_config_values_that_have_weights_refuse_those_of_another_model(pair, name):
    _, model = pair
    value = OTHER_SHAPES[name]
    value = not getattr(model.config, name) if value is None else value
    changed = dataclasses.replace(model.config, **{name: value})
    assert param_shapes(changed) != param_shapes(model.config)


def test_bfloat16_weights_keep_their_dtype_and_stay_close(tmp_path):
    hf = tiny.llama()
    folder = tiny.save(hf, tmp_path / "hf")
    wide = ChatModel.load(convert(folder, tmp_path / "wide", "float32"))
    narrow = ChatModel.load(convert(folder, tmp_path / "narrow", "bfloat16"))
    assert narrow.params["layers"]["0"]["attn"]["q"]["kernel"].dtype == "bfloat16"
    _, a, real = run(wide, ROWS)
    _, b, _ = run(narrow, ROWS)
    assert np.abs(a - b)[real].max() < 0.1 * np.abs(a[real]).max()


def test_float32_products_are_float32_on_every_device(pair):
    # Unless told otherwise, GPUs and TPUs round the inputs of a float32 product to fewer bits.
    _, model = pair
    ids, real = left_pad(ROWS[:1], 64)
    arguments = (model.definition, model.params, ids, real)
    program = reference.read.lower(*arguments, ("embed", "resid_post")).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) > 20
    assert [line for line in products if "[HIGHEST, HIGHEST]" not in line] == []
