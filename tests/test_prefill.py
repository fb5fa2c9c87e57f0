from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jaxsteer.prefill import part, stages


@given(st.integers(1, 200))
def test_stages_cover_every_layer_once_in_order_and_compile_two_programs_at_most(n_layers):
    found = stages(n_layers)
    assert [layer for first, last in found for layer in range(first, last)] == list(range(n_layers))
    assert len(found) <= 12
    sizes = [last - first for first, last in found]
    assert len(set(sizes)) == 1 or sizes[-1] < sizes[0] == max(sizes[:-1]) == min(sizes[:-1])


def test_the_layers_of_a_part_count_from_zero():
    params = {"embed": 0, "layers": {str(i): f"layer {i}" for i in range(12)}}
    assert part(params, 9, 12) == {"layers": {"0": "layer 9", "1": "layer 10", "2": "layer 11"}}
