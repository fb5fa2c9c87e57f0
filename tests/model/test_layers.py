from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.model.config import AttentionKind, Rope
from jaxsteer.model.layers import (
    LONG,
    Visible,
    attend,
    causal,
    contain_overflow,
    view,
    views,
    write_all,
    write_block,
    write_in_place,
)
from tests import tiny


def draw(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("slot", [0, 4, 8])
def test_a_block_is_written_alike_on_every_platform(rng, slot):
    cache, recent = draw(rng, 2, 12, 3), draw(rng, 2, 4, 3)
    expected = np.array(cache)
    expected[:, slot : slot + 4] = recent
    for way in (write_block, write_in_place, write_all):
        np.testing.assert_array_equal(way(cache, recent, jnp.int32(slot)), expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_over_several_caches_is_that_over_their_slots_in_one(rng, tokens):
    q = draw(rng, tokens, 2, 3, 4)
    keys, values = draw(rng, 2, 10, 4), draw(rng, 2, 10, 4)
    visible = causal(jnp.ones(tokens, int), jnp.asarray(rng.random(10 - tokens) < 0.6))
    parts = (slice(2), slice(2, 7), slice(7, None))
    apart = [(keys[:, part], values[:, part]) for part in parts]
    found = attend(q, apart, visible, 0.5)
    # Softmax attention written out, in float64.
    score = np.einsum("tkgh,ksh->tkgs", *(np.asarray(x, np.float64) for x in (q, keys))) / 2
    weight = np.exp(score) * np.asarray(visible.mask())[:, None, None]
    weight /= weight.sum(-1, keepdims=True)
    expected = np.einsum("tkgs,ksh->tkgh", weight, np.asarray(values, np.float64))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, LONG + 1])
def test_attention_of_short_numbers_adds_up_in_float32(rng, tokens):
    q, kv = (draw(rng, *s, 4).astype(jnp.bfloat16) for s in ((tokens, 2, 3), (2, tokens)))
    one = functools.partial(attend, visible=causal(jnp.ones(tokens, int)), scale=0.5)
    program = jax.jit(one).lower(q, [(kv, kv)]).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert [line for line in products if not line.endswith("xf32>")] == []


def test_what_is_not_visible_weighs_nothing(rng):
    q, values = draw(rng, 1, 2, 1, 4), draw(rng, 2, 6, 4)
    keys = draw(rng, 2, 6, 4)
    visible = causal(jnp.ones(1, int), jnp.arange(5) > 0)
    loud = keys.at[:, :1].set(1e4)
    first, second = (
        jax.jit(functools.partial(attend, scale=0.5))(q, [(k, values)], visible)
        for k in (keys, loud)
    )
    np.testing.assert_array_equal(first, second)


def test_masks_hide_padding_and_count_positions_over_real_tokens():
    visible = causal(jnp.array([False, True, True]))
    expected = [[False, False, False], [False, True, False], [False, True, True]]
    np.testing.assert_array_equal(visible.mask(), expected)
    np.testing.assert_array_equal(visible.positions, [0, 0, 1])


def test_prompts_of_one_packed_sequence_do_not_see_each_other_and_count_on_their_own():
    visible = causal(jnp.array([1, 1, 2, 0]), jnp.array([False, True]))
    none, prefix = [False, False, False, False], [False, True]
    expected = [
        [*prefix, True, False, False, False],
        [*prefix, True, True, False, False],
        [*prefix, False, False, True, False],
        [*prefix, *none],
    ]
    np.testing.assert_array_equal(visible.mask(), expected)
    np.testing.assert_array_equal(visible.positions[:3], [1, 2, 1])


def test_a_window_counts_visible_slots_and_not_those_between():
    held = jnp.array([1, 1, 0, 1, 0])
    visible = Visible(
        segment_ids=jnp.ones(1, int),
        positions=jnp.array([2]),
        slot_segment_ids=held,
        slot_positions=jnp.cumsum(held) - 1,
    )
    np.testing.assert_array_equal(
        dataclasses.replace(visible, window=2).mask(), [[False, True, False, True, False]]
    )
    np.testing.assert_array_equal(visible.mask(), [[True, True, False, True, False]])


def test_a_window_of_a_packed_sequence_is_one_of_each_prompt():
    visible = causal(jnp.array([1, 1, 1, 2, 2, 2]), jnp.array([True]))
    mask = dataclasses.replace(visible, window=2).mask()
    # The slot of the prefix, and then those of both prompts.
    assert np.asarray(mask).astype(int).tolist() == [
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_each_layer_sees_what_its_kind_of_attention_does():
    kinds = (AttentionKind(rope=Rope(theta=1e4)), AttentionKind(rope=None, window=2))
    config = tiny.config(attention=kinds, pattern=(0, 1, 0))
    visible = causal(jnp.ones(4, bool))
    short, made = dataclasses.replace(visible, window=2), views(config, visible)
    for layer, window in enumerate((0, 2, 0)):
        # The layer may be a number, or one that is known only when the program runs.
        for at in (layer, jnp.int32(layer)):
            rotation, seen = view(config, made, at)
            np.testing.assert_array_equal(seen.mask(), (short if window else visible).mask())
            assert np.asarray(rotation[1]).any() == (window == 0)
    only = tiny.config(attention=kinds[1:], pattern=(0, 0, 0))
    np.testing.assert_array_equal(view(only, views(only, visible), 2)[1].mask(), short.mask())


def test_an_overflow_marks_its_own_key_and_leaves_no_value(rng):
    keys, values = draw(rng, 3, 2, 4), draw(rng, 3, 2, 4).at[1, 0, 2].set(jnp.inf)
    marked, kept = contain_overflow(keys, values)
    bad = np.zeros((3, 2), bool)
    bad[1, 0] = True
    np.testing.assert_array_equal(np.isnan(marked).all(-1), bad)
    np.testing.assert_array_equal(np.asarray(marked)[~bad], np.asarray(keys)[~bad])
    np.testing.assert_array_equal(kept, np.where(bad[..., None], 0, values))


# Packed prompts and padding, in small blocks and in large ones.
@pytest.mark.parametrize("lengths", [(LONG, 290, 40, 25), (LONG, 290, 700, 34)])
@pytest.mark.parametrize("window", [2**30, 70])
@pytest.mark.parametrize("bound", [0.0, 2.0])
def test_attention_block_by_block_is_that_over_the_whole_score_matrix(rng, lengths, window, bound):
    segments = np.repeat([1, 2, 3, 0], lengths)
    # After a prefix, so that the last block of slots is not full.
    tokens, prefix = len(segments), 48
    visible = causal(jnp.asarray(segments), jnp.arange(prefix) > 5)
    visible = dataclasses.replace(visible, window=window)
    q = draw(rng, tokens, 2, 3, 8)
    caches = [tuple(draw(rng, 2, length, 8) for _ in "kv") for length in (prefix, tokens)]
    found = attend(q, caches, visible, 0.5, bound, first=prefix)
    keys, values = (
        np.concatenate(kv, axis=1, dtype=np.float64) for kv in zip(*caches, strict=True)
    )
    score = np.einsum("tkgh,ksh->tkgs", np.asarray(q, np.float64), keys) / 2
    score = bound * np.tanh(score / bound) if bound else score
    weight = np.exp(score) * np.asarray(visible.mask())[:, None, None]
    real = segments > 0
    expected = np.einsum("tkgs,ksh->tkgh", weight / weight.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(found[real], expected[real], atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("tokens", [2, LONG, LONG + 1])
def test_only_the_tokens_of_a_long_prompt_are_attended_to_in_blocks(tokens):
    q, kv = jnp.zeros((tokens, 2, 3, 4)), jnp.zeros((2, tokens, 4))
    one = functools.partial(attend, visible=causal(jnp.ones(tokens, int)), scale=0.5)
    loops = "while" in jax.jit(one).lower(q, [(kv, kv)]).as_text()
    assert loops == (tokens > LONG)


def test_scores_that_are_all_far_below_zero_weigh_what_they_are_relative_to_the_highest(rng):
    tokens = LONG + 1
    q, values = jnp.ones((tokens, 1, 1, 4)), draw(rng, 1, tokens, 4)
    keys = jnp.full((1, tokens, 4), -100.0)
    found = attend(q, [(keys, values)], causal(jnp.ones(tokens, int)), 1.0)
    # All scores are -400, so that each token takes the mean of those up to itself.
    expected = np.cumsum(values[0], axis=0) / np.arange(1, tokens + 1)[:, None]
    np.testing.assert_allclose(found[:, 0, 0], expected, atol=1e-5)
