from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxsteer.model.masks import causal_mask, positions


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
