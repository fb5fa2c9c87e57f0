"""Tiny random models of every family against HF transformers on torch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.model import decoder
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import TAPS, Add, Cap, Project
from jaxsteer.model.layers import causal_mask, positions
from tests import oracle, tiny

PROMPT = 13
# Longer than two windows, and left-padded in the first pass.
ROW = np.random.default_rng(5).integers(3, 64, 23).tolist()
WIDTH = 16


@functools.partial(jax.jit, static_argnames=("definition",))
def step(definition, params, tokens, real, held, cache, slot, interventions):
    """Read tokens from `slot` on: the cache, the stream at every tap, and logits."""
    model = decoder.bind(definition, params)
    earlier = jnp.broadcast_to(held, (tokens.shape[0], held.shape[0]))
    steered = jnp.where(slot == 0, interventions.on_prompt, interventions.on_response)
    out = model(
        tokens,
        positions(real, held),
        jax.lax.dynamic_update_slice_in_dim(earlier, causal_mask(real), slot, axis=1),
        cache,
        slot,
        steering=decoder.Steering(
            interventions=interventions,
            steered=real & steered,
            real=real,
            probes=jnp.zeros((model.config.n_layers, 0, model.config.d_model)),
        ),
        capture=decoder.Capture(taps=TAPS, weights=jnp.eye(tokens.shape[0])),
    )
    held = jax.lax.dynamic_update_slice_in_dim(held, real, slot, axis=0)
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


def steering(config):
    draw = np.random.default_rng(1)
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
