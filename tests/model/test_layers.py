from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.model.config import AttentionKind, Rope
from jaxsteer.model.layers import (
    attend,
    causal_mask,
    contain_overflow,
    positions,
    view,
    views,
    visible_slots,
    windowed,
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
def test_attention_over_two_caches_is_that_over_their_slots_in_one(rng, tokens):
    q = draw(rng, tokens, 2, 3, 4)
    keys, values = draw(rng, 2, 10, 4), draw(rng, 2, 10, 4)
    visible = jnp.asarray(rng.random((tokens, 10)) < 0.6).at[:, 0].set(True)
    apart = [(keys[:, :7], values[:, :7]), (keys[:, 7:], values[:, 7:])]
    found = attend(q, apart, visible, 0.5)
    # Softmax attention written out, in float64.
    score = np.einsum("tkgh,ksh->tkgs", *(np.asarray(x, np.float64) for x in (q, keys))) / 2
    weight = np.exp(score) * np.asarray(visible)[:, None, None]
    weight /= weight.sum(-1, keepdims=True)
    expected = np.einsum("tkgs,ksh->tkgh", weight, np.asarray(values, np.float64))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_not_visible_weighs_nothing(rng):
    q, values = draw(rng, 1, 2, 1, 4), draw(rng, 2, 6, 4)
    keys = draw(rng, 2, 6, 4)
    visible = jnp.arange(6)[None] < 4
    loud = keys.at[:, 4:].set(1e4)
    first, second = (
        jax.jit(functools.partial(attend, scale=0.5))(q, [(k, values)], visible)
        for k in (keys, loud)
    )
    np.testing.assert_array_equal(first, second)


def test_masks_hide_padding_and_count_positions_over_real_tokens():
    real = jnp.array([False, True, True])
    expected = [[False, False, False], [False, True, False], [False, True, True]]
    np.testing.assert_array_equal(causal_mask(real), expected)
    np.testing.assert_array_equal(positions(real), [0, 0, 1])


def test_prompts_of_one_packed_sequence_do_not_see_each_other_and_count_on_their_own():
    segment_ids, before = jnp.array([1, 1, 2, 0]), jnp.array([False, True])
    none, prefix = [False, False, False, False], [False, True]
    expected = [
        [*prefix, True, False, False, False],
        [*prefix, True, True, False, False],
        [*prefix, False, False, True, False],
        [*prefix, *none],
    ]
    np.testing.assert_array_equal(causal_mask(segment_ids, before), expected)
    np.testing.assert_array_equal(positions(segment_ids, before)[:3], [1, 2, 1])


def test_a_window_counts_visible_slots_and_not_those_between():
    visible = jnp.array([[True, True, False, True, False], [False] * 4 + [True]])
    expected = [[False, True, False, True, False], [False] * 4 + [True]]
    np.testing.assert_array_equal(windowed(visible, 2), expected)
    np.testing.assert_array_equal(windowed(visible, 0), visible)


def test_a_window_of_a_packed_sequence_is_one_of_each_prompt():
    mask = windowed(causal_mask(jnp.array([1, 1, 1, 2, 2, 2]), jnp.array([True])), 2)
    # The slot of the prefix, and then those of both prompts.
    assert np.asarray(mask).astype(int).tolist() == [
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_a_generated_token_sees_the_prompt_and_the_reply_up_to_itself():
    held = jnp.array([False, True, True, False, False, False])
    found = visible_slots(held, jnp.int32(3), jnp.int32(4))
    np.testing.assert_array_equal(found, [False, True, True, True, True, False])


def test_each_layer_sees_what_its_kind_of_attention_does():
    kinds = (AttentionKind(rope=Rope(theta=1e4)), AttentionKind(rope=None, window=2))
    config = tiny.config(attention=kinds, pattern=(0, 1, 0))
    visible = causal_mask(jnp.ones(4, bool))
    made = views(config, jnp.arange(4), visible)
    for layer, window in enumerate((0, 2, 0)):
        # The layer may be a number, or one that is known only when the program runs.
        for at in (layer, jnp.int32(layer)):
            rotation, seen = view(config, made, at)
            np.testing.assert_array_equal(seen, windowed(visible, window))
            assert np.asarray(rotation[1]).any() == (window == 0)
    only = tiny.config(attention=kinds[1:], pattern=(0, 0, 0))
    np.testing.assert_array_equal(
        view(only, views(only, jnp.arange(4), visible), 2)[1], windowed(visible, 2)
    )


def test_an_overflow_marks_its_own_key_and_leaves_no_value(rng):
    keys, values = draw(rng, 3, 2, 4), draw(rng, 3, 2, 4).at[1, 0, 2].set(jnp.inf)
    marked, kept = contain_overflow(keys, values)
    bad = np.zeros((3, 2), bool)
    bad[1, 0] = True
    np.testing.assert_array_equal(np.isnan(marked).all(-1), bad)
    np.testing.assert_array_equal(np.asarray(marked)[~bad], np.asarray(keys)[~bad])
    np.testing.assert_array_equal(kept, np.where(bad[..., None], 0, values))
