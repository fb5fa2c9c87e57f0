from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsteer.generation.prefill import Level, gather, part, stages


@given(st.integers(1, 200))
def test_stages_cover_every_layer_once_in_order_and_compile_two_programs_at_most(n_layers):
    found = stages(n_layers)
    assert [layer for first, last in found for layer in range(first, last)] == list(range(n_layers))
    assert len(found) <= 10
    sizes = [last - first for first, last in found]
    assert len(set(sizes)) == 1 or sizes[-1] < sizes[0] == max(sizes[:-1]) == min(sizes[:-1])


@pytest.mark.parametrize(
    ("n_layers", "sizes"),
    [
        (1, [1]),
        (11, [2, 2, 2, 2, 2, 1]),
        # Llama-3.2-1B, Qwen2.5-0.5B, Qwen2.5-7B, SmolLM2-135M, Llama-3.1-8B, Qwen2.5-3B and
        # Llama-3.1-70B.
        (16, [2] * 8),
        (24, [3] * 8),
        (28, [4] * 7),
        (30, [3] * 10),
        (32, [4] * 8),
        (36, [4] * 9),
        (80, [8] * 10),
    ],
)
def test_the_stages_of_known_models_are_these(n_layers, sizes):
    assert [last - first for first, last in stages(n_layers)] == sizes


def test_the_layers_of_a_part_count_from_zero():
    params = {"embed": 0, "layers": {str(i): f"layer {i}" for i in range(12)}}
    assert part(params, 9, 12) == {"layers": {"0": "layer 9", "1": "layer 10", "2": "layer 11"}}


@pytest.mark.parametrize("beginning", [0, 3])
def test_a_row_takes_its_own_tokens_out_of_its_lane_and_puts_them_after_its_beginning(beginning):
    def marked(shape, sign):
        # [entry, head, slot, 1]: a number that tells where it was.
        return sign * jnp.asarray(np.arange(1, 1 + np.prod(shape)).reshape(shape), jnp.float32)

    keys, values = marked((2, 1, 6, 1), 1.0), marked((2, 1, 6, 1), -1.0)
    level = Level(stream=jnp.zeros((2, 6, 1)), cache=[(keys, values)], realised={})
    begun = marked((3, 1, beginning, 1), 100.0)
    at, first = np.array([1, 0, 1], np.int32), [2, 0, 5]
    real = np.array([[slot >= start for slot in range(6)] for start in first])
    past = [(begun, -begun)] if beginning else None
    cache, _ = gather(level, at, np.ones(3, np.int32), real, past, 10)
    for row, (entry, start) in enumerate(zip(at, first, strict=True)):
        own = np.asarray(keys)[entry, 0, start:, 0]
        expected = [*np.asarray(begun)[row, 0, :, 0], *own, *[0.0] * (10 - beginning - len(own))]
        np.testing.assert_array_equal(cache[0][0][row, 0, :, 0], expected)
        np.testing.assert_array_equal(cache[0][1][row, 0, :, 0], -np.array(expected))
