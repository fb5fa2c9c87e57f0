from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxsteer.generation.prefill import LayerOutput, gather, group_params


def test_the_layers_of_a_group_count_from_zero():
    params = {"embed": 0, "layers": {str(i): f"layer {i}" for i in range(12)}}
    assert group_params(params, 9, 12) == {
        "layers": {"0": "layer 9", "1": "layer 10", "2": "layer 11"}
    }


def test_a_rows_own_tokens_are_taken_from_its_packed_sequence():
    def marked(shape, sign):
        # [entry, head, slot, 1]: each number tells its place.
        return sign * jnp.asarray(np.arange(1, 1 + np.prod(shape)).reshape(shape), jnp.float32)

    keys, values = marked((2, 1, 6, 1), 1.0), marked((2, 1, 6, 1), -1.0)
    output = LayerOutput(stream=jnp.zeros((2, 6, 1)), cache=[(keys, values)], realised={})
    at, first = np.array([1, 0, 1], np.int32), [2, 0, 5]
    real = np.array([[slot >= start for slot in range(6)] for start in first])
    cache, _ = gather(output, at, np.ones(3, np.int32), real, 10)
    for row, (entry, start) in enumerate(zip(at, first, strict=True)):
        own = np.asarray(keys)[entry, 0, start:, 0]
        expected = [*own, *[0.0] * (10 - len(own))]
        np.testing.assert_array_equal(cache[0][0][row, 0, :, 0], expected)
        np.testing.assert_array_equal(cache[0][1][row, 0, :, 0], -np.array(expected))
