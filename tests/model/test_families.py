"""Tiny random models of every family against HF transformers on torch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding
from jaxsteer.model import decoder
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import from_hf
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import TAPS, Add, Cap, Project
from jaxsteer.model.layers import Visible
from tests import compiles, oracle, tiny

PROMPT = 13
# Longer than two windows, and left-padded in the first pass.
ROW = np.random.default_rng(5).integers(3, 64, 23).tolist()
WIDTH = 16


@functools.partial(jax.jit, static_argnames=("definition",))
def step(definition, params, tokens, real, held, cache, slot, interventions):
    """Read tokens from `slot` on: the cache, the stream at every tap, and logits."""
    model = decoder.bind(definition, params)
    held = jax.lax.dynamic_update_slice_in_dim(held, real, slot, axis=0)
    counted = jnp.cumsum(held) - 1
    steered = jnp.where(slot == 0, interventions.on_prompt, interventions.on_response)
    out = model(
        tokens,
        Visible(
            segment_ids=real.astype(int),
            positions=jax.lax.dynamic_slice_in_dim(counted, slot, len(real)),
            slot_segment_ids=held.astype(int),
            slot_positions=counted,
        ),
        cache,
        slot,
        steering=decoder.Steering(
            interventions=interventions,
            steered=real & steered,
            real=real,
            probes=jnp.zeros((model.config.n_layers, 0, model.config.d_model)),
        ),
        capture=TAPS,
    )
    return out.cache, held, out.captured, model.logits(out.hidden)


def read(model, interventions):
    """The stream at every tap and the logits, of a padded prompt and then token by token."""
    config = model.config
    pad = WIDTH - PROMPT
    slots = WIDTH + len(ROW) - PROMPT
    cache = decoder.empty_cache(config, config.n_layers, slots, jnp.float32)
    held, captured, logits = jnp.zeros(slots, bool), [], []
    chunks = [([0] * pad + ROW[:PROMPT], [False] * pad + [True] * PROMPT)]
    chunks += [([token], [True]) for token in ROW[PROMPT:]]
    slot = 0
    for tokens, real in chunks:
        given = jnp.array(tokens), jnp.array(real), held, cache, jnp.int32(slot), interventions
        cache, held, taps, after = step(model.definition, model.params, *given)
        captured.append({tap: np.asarray(states)[:, real] for tap, states in taps.items()})
        logits.append(np.asarray(after)[real])
        slot += len(tokens)
    joined = {tap: np.concatenate([c[tap] for c in captured], axis=1) for tap in TAPS}
    return joined, np.concatenate(logits)


def steering(config, seed=1):
    draw = np.random.default_rng(seed)
    shape = (config.n_layers, config.d_model)
    a, b, c = (draw.standard_normal(shape).astype(np.float32) for _ in range(3))
    return [
        Add(direction=a, layers=(1,), scale=2.0),
        Add(direction=b, layers=(0,), scale=0.5, tap="embed"),
        Project(directions=(a, a + b), layers=(0, 2), tap="resid_mid"),
        Cap(direction=c, layers=(1, 2), low=-0.5, high=0.5),
    ]


def pair(hf, folder):
    return hf, ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


def check(hf, model, scopes=("all", "prompt", "response")):
    """Every tap and the logits at every token, of the plain model and under interventions."""
    conditions = [[], *[steering(model.config)] * len(scopes)]
    stacked = oracle.compiled(model, conditions, ["all", *scopes])
    for condition, scope in enumerate(("all", *scopes)):
        one = jax.tree.map(lambda leaf, c=condition: jnp.asarray(leaf[c]), stacked)
        ours, logits = read(model, one)
        theirs, expected = oracle.taps(hf, ROW, conditions[condition], scope, PROMPT)
        for tap in TAPS:
            scale = np.abs(theirs[tap]).max()
            np.testing.assert_allclose(ours[tap], theirs[tap], atol=2e-5 * scale, err_msg=tap)
        np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_tap_and_the_logits_equal_hf_at_every_step(name, tmp_path):
    check(*pair(tiny.family(name), tmp_path), ("all",))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_they_do_so_in_every_scope_and_with_either_head(name, tied, tmp_path):
    check(*pair(tiny.family(name, tie_word_embeddings=tied), tmp_path))


PREFIX = [3, 9, 33, 4, 17, 60, 8, 8, 21, 30, 5]
# Short and long beside each other in a packed sequence, and longer than two windows.
PROMPTS = [[41, 8], [5] * 17, [3, 9, 33, 7, 12], list(range(3, 23)), [7]]


def replies_equal_hf(hf, model):
    """The engine's replies, packed and behind a shared prefix, steered and not."""
    prompts = [[*PREFIX, *prompt] for prompt in PROMPTS]
    conditions = [[], steering(model.config)]
    requests = [
        engine.Request(tokens=prompt, condition=condition, shared=len(PREFIX))
        for condition in range(2)
        for prompt in prompts
    ]
    decoding = Decoding(max_new_tokens=12, eos=(), keep_logits=True)
    stacked = oracle.compiled(model, conditions)
    found = [r for b in engine.run(model, requests, stacked, decoding, batch=8) for r in b]
    assert len(found) == len(requests)
    for reply in found:
        request = requests[reply.index]
        expected = oracle.steps(hf, request.tokens, reply, conditions[request.condition])
        np.testing.assert_allclose(reply.logits, expected, atol=3e-5 * np.abs(expected).max())


# The engine needs seconds to compile: here those whose layers differ, and whose norms do.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("gemma3_text", "olmo3") else pytest.mark.slow)
        for name in tiny.FAMILIES
    ],
)
def test_packed_prompts_behind_a_shared_prefix_get_hfs_replies(name, tmp_path):
    replies_equal_hf(*pair(tiny.family(name), tmp_path))


def test_layers_that_differ_are_one_program_and_another_condition_compiles_nothing(tmp_path):
    # Three groups of one layer each: with a sliding window, without, and with one again.
    _, model = pair(tiny.family("gemma2"), tmp_path)
    requests = [engine.Request(tokens=[*PREFIX, 41, 8], condition=c) for c in (0, 0)]
    decoding = Decoding(max_new_tokens=2, eos=())

    def run(seed):
        stacked = oracle.compiled(model, [steering(model.config, seed)])
        return list(engine.run(model, requests, stacked, decoding, batch=2))

    with compiles.counted() as first:
        run(1)
    with compiles.counted() as second:
        run(2)
    assert first["run_layers"] == 1
    assert not second


@pytest.mark.slow
def test_groups_of_several_layers_that_differ_get_hfs_replies(tmp_path):
    # Twelve layers are six groups of two, and three kinds in a row do not fit into two.
    kinds = ["sliding_attention", "full_attention", "full_attention"] * 4
    replies_equal_hf(
        *pair(tiny.family("gemma2", num_hidden_layers=12, layer_types=kinds), tmp_path)
    )


@pytest.mark.parametrize(("name", "text"), [("gemma3", "gemma3_text"), ("mistral3", "mistral")])
def test_the_text_part_of_a_model_of_text_and_images_is_read(name, text, tmp_path):
    hf, model = pair(tiny.wrapper(name, text), tmp_path)
    assert model.config.tied == (name == "gemma3")
    check(hf, model, ())


@pytest.mark.parametrize(
    "named", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "Gemma4Model"]
)
def test_other_architectures_are_refused_by_name(named):
    with pytest.raises(UserError, match=f"architecture {named} is not supported; supported: Llama"):
        from_hf({"architectures": [named]}, "test")
