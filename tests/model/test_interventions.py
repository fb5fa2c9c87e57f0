from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsteer.errors import UserError
from jaxsteer.model.interventions import (
    Add,
    Cap,
    Project,
    apply,
    compile_conditions,
    everywhere,
    orthonormal_rows,
)

L, D = 3, 16
seeds = st.integers(0, 2**32 - 1)


def site(operations, layer=1):
    stacked = compile_conditions([operations], ["all"], n_layers=L, d_model=D)
    return stacked.rows(np.array([0])).sites["resid_post"].at(0).at(layer)


def steer(h, operations):
    new, _ = apply(jnp.asarray(h), site(operations), jnp.ones(len(h), bool))
    return np.asarray(new)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_projection_is_idempotent(seed):
    h, v = draw(seed, 5, D), draw(seed + 1, L, D)
    once = steer(h, [Project(directions=(v,), layers=(1,))])
    twice = steer(once, [Project(directions=(v,), layers=(1,))])
    np.testing.assert_allclose(once, twice, atol=1e-5)


@given(seeds, st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_projection_leaves_no_component_of_any_of_k_non_orthogonal_directions(seed, k):
    h = draw(seed, 5, D)
    shared = draw(seed + 1, L, D)
    directions = tuple(shared + 0.3 * draw(seed + 2 + i, L, D) for i in range(k))
    out = steer(h, [Project(directions=directions, layers=(1,))])
    for direction in directions:
        unit = direction[1] / np.linalg.norm(direction[1])
        np.testing.assert_allclose(out @ unit, 0, atol=2e-5)


@given(seeds, st.floats(-8, 8))
@settings(max_examples=25, deadline=None)
def test_projection_cancels_a_parallel_add_at_the_same_tap(seed, scale):
    h, v = draw(seed, 5, D), draw(seed + 1, L, D)
    knockout = Project(directions=(v,), layers=(1,))
    both = steer(h, [Add(direction=v, layers=(1,), scale=scale), knockout])
    np.testing.assert_allclose(both, steer(h, [knockout]), atol=1e-4)


@given(seeds, st.floats(-3, 0), st.floats(0, 3))
@settings(max_examples=25, deadline=None)
def test_cap_bounds_hold_and_nothing_else_moves(seed, low, high):
    h, v = draw(seed, 6, D) * 3, draw(seed + 1, L, D)
    out = steer(h, [Cap(direction=v, layers=(1,), low=low, high=high)])
    unit = v[1] / np.linalg.norm(v[1])
    assert (out @ unit >= low - 1e-4).all() and (out @ unit <= high + 1e-4).all()
    np.testing.assert_allclose(
        out - np.outer(out @ unit, unit), h - np.outer(h @ unit, unit), atol=1e-4
    )


@given(seeds)
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_are_the_identity_bit_for_bit(dtype, seed):
    # One condition uses every operation, so the empty one has all the arrays, all inert.
    v = draw(0, L, D)
    used = [
        Add(direction=v, layers=(1,), scale=2.0),
        Project(directions=(v,), layers=(1,)),
        Cap(direction=v, layers=(1,), low=-1, high=1),
    ]
    stacked = compile_conditions([used, []], ["all", "all"], n_layers=L, d_model=D)
    h = draw(seed, 7, D)
    # Negative zeros equal zeros and have other bits.
    h[np.abs(h) < 0.3] = -0.0
    h = jnp.asarray(h, dtype)
    new, change = apply(
        h, stacked.rows(np.array([1])).sites["resid_post"].at(0).at(1), jnp.ones(7, bool)
    )
    assert np.asarray(new).tobytes() == np.asarray(h).tobytes()
    assert not np.asarray(change).any()


def test_the_change_reported_is_what_is_left_of_it_in_the_models_dtype():
    # At 256 bfloat16 steps by 2: adding 0.5 to every entry changes nothing at all.
    h = jnp.full((2, D), 256, jnp.bfloat16)
    nothing = [Add(direction=np.ones((L, D)), layers=(1,), scale=0.5)]
    # Compiled, since XLA may leave out a rounding that is undone at once.
    new, change = jax.jit(apply)(h, site(nothing), jnp.ones(2, bool))
    np.testing.assert_array_equal(new, h)
    assert not np.asarray(change).any()
    some = [Add(direction=np.ones((L, D)), layers=(1,), scale=2.9)]
    _, change = jax.jit(apply)(h, site(some), jnp.ones(2, bool))
    np.testing.assert_array_equal(change, 2.0)


def test_untouched_tokens_keep_their_bits():
    h, v = draw(0, 4, D), draw(1, L, D)
    touched = jnp.array([False, True, False, True])
    new, change = apply(jnp.asarray(h), site([Add(direction=v, layers=(1,), scale=1.0)]), touched)
    np.testing.assert_array_equal(np.asarray(new)[[0, 2]], h[[0, 2]])
    np.testing.assert_allclose(np.asarray(change)[1], v[1], atol=1e-5)


def test_dependent_directions_give_zero_rows():
    v = draw(0, 1, D)
    basis = orthonormal_rows(np.concatenate([v, 2 * v, draw(1, 1, D)]))
    np.testing.assert_allclose(basis[:2] @ basis[:2].T, np.eye(2), atol=1e-12)
    assert not basis[2].any()


def test_measured_at_uses_that_layers_vector_everywhere():
    v = draw(0, L, D)
    stacked = compile_conditions(
        [[Add(direction=v, layers=(0, 2), scale=2.0, measured_at=1)]],
        ["all"],
        n_layers=L,
        d_model=D,
    )
    add = stacked.sites["resid_post"].add[0]
    np.testing.assert_allclose(add[0], 2 * v[1], rtol=1e-6)
    np.testing.assert_allclose(add[2], 2 * v[1], rtol=1e-6)
    assert not add[1].any()


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (Add(direction=np.ones((L, D)), layers=(3,), scale=1.0), "resid_post.3"),
        (Add(direction=np.ones((L, D)), layers=(-1,), scale=1.0), "resid_post.-1"),
        (Add(direction=np.ones((L, D + 1)), layers=(0,), scale=1.0), "another model"),
        (Add(direction=np.full((L, D), np.nan), layers=(0,), scale=1.0), "NaN"),
        (Add(direction=np.ones((L, D)), layers=(1,), scale=1.0, tap="embed"), "embed.0"),
        (Add(direction=np.ones((L, D)), layers=(), scale=1.0), "no layer"),
        (
            Add(direction=np.ones((L, D)), layers=(1,), scale=1.0, measured_at=L),
            "3 is not in 0 to 2",
        ),
        (Add(direction=np.ones((L, D)), layers=(1,), scale=1.0, measured_at=-1), "measured_at=-1"),
        (Cap(direction=np.ones((L, D)), layers=(0,), low=1, high=0), "swap"),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_name(operation, message):
    with pytest.raises(UserError, match=message):
        compile_conditions([[operation]], ["all"], n_layers=L, d_model=D)


def test_an_operation_equals_itself_alone_since_arrays_have_no_one_answer():
    v = draw(0, L, D)
    for kind, more in (
        (Add, {"direction": v, "scale": 1.0}),
        (Project, {"directions": (v,)}),
        (Cap, {"direction": v}),
    ):
        first, second = (kind(layers=(1,), **more) for _ in range(2))
        assert first == first and first != second
        assert len({first, second}) == 2


def test_caps_that_are_not_orthogonal_are_refused():
    a, b = draw(0, L, D), draw(1, L, D)
    caps = [Cap(direction=a, layers=(0,), high=1), Cap(direction=a + b, layers=(0,), high=1)]
    with pytest.raises(UserError, match="orthogonal"):
        compile_conditions([caps], ["all"], n_layers=L, d_model=D)


def test_a_cap_on_a_zero_vector_is_inert():
    h = draw(0, 4, D)
    np.testing.assert_array_equal(
        steer(h, [Cap(direction=np.zeros((L, D)), layers=(1,), high=-1)]), h
    )


def test_a_projection_of_a_zero_vector_is_inert():
    h = draw(0, 4, D)
    np.testing.assert_array_equal(
        steer(h, [Project(directions=(np.zeros((L, D)),), layers=(1,))]), h
    )


def test_a_cap_measures_along_the_direction_whatever_its_norm():
    h, v = draw(0, 4, D), draw(1, L, D)
    first, second = (
        steer(h, [Cap(direction=scale * v, layers=(1,), low=0.5, high=0.5)]) for scale in (1, 1e-3)
    )
    np.testing.assert_allclose(first, second, atol=1e-5)
    np.testing.assert_allclose(first @ v[1] / np.linalg.norm(v[1]), 0.5, atol=1e-5)


def test_operations_at_one_place_work_together():
    h, a, b = draw(0, 4, D), draw(1, L, D), draw(2, L, D)
    added = steer(h, [Add(direction=v, layers=(1,), scale=2.0) for v in (a, b)])
    np.testing.assert_allclose(added, h + 2 * a[1] + 2 * b[1], atol=1e-5)
    apart = steer(h, [Project(directions=(v,), layers=(1,)) for v in (a, b)])
    np.testing.assert_allclose(apart, steer(h, [Project(directions=(a, b), layers=(1,))]))


def test_each_condition_steers_the_tokens_of_its_scope():
    made = compile_conditions([[]] * 3, ["all", "prompt", "response"], n_layers=L, d_model=D)
    assert made.on_prompt.tolist() == [True, True, False]
    assert made.on_response.tolist() == [True, False, True]


@pytest.mark.parametrize(("count", "width"), [(0, 1), (1, 1), (2, 2), (3, 4), (5, 8)])
def test_rows_of_a_projection_come_in_powers_of_two(count, width):
    directions = tuple(draw(i, L, D) for i in range(count))
    operations = [Project(directions=directions, layers=(1,))] if count else []
    operations.append(Add(direction=draw(9, L, D), layers=(0,), scale=1.0, tap="embed"))
    made = compile_conditions([operations], ["all"], n_layers=L, d_model=D)
    assert made.sites["resid_post"].project.shape == (1, L, width, D)
    assert made.sites["embed"].project.shape == (1, 1, 1, D)
    assert made.sites["resid_post"].cap.shape == (1, L, 0, D)
    assert list(made.sites) == ["embed", "resid_post"]


def test_everywhere_removes_the_direction_at_each_layer_of_every_tap():
    v = draw(0, L, D)
    unit = v / np.linalg.norm(v, axis=1, keepdims=True)
    for at, expected in ((None, unit), (2, unit[[2, 2, 2]])):
        made = compile_conditions([everywhere(v, at)], ["all"], n_layers=L, d_model=D)
        assert list(made.sites) == ["embed", "resid_mid", "resid_post"]
        for tap, site in made.sites.items():
            rows = site.project[0, :, 0]
            wanted = expected[: len(rows)]
            assert len(rows) == (1 if tap == "embed" else L)
            np.testing.assert_allclose(np.abs((rows * wanted).sum(axis=1)), 1, atol=1e-6)


def test_a_part_of_the_layers_is_taken_without_the_embedding():
    made = compile_conditions([everywhere(draw(0, L, D))], ["all"], n_layers=L, d_model=D)
    part = made.layers(1, 3)
    assert list(part.sites) == ["resid_mid", "resid_post"]
    np.testing.assert_array_equal(
        part.sites["resid_mid"].project, made.sites["resid_mid"].project[:, 1:3]
    )
