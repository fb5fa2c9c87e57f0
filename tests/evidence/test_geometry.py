from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as theirs

from jaxsteer.directions.samples import Samples, kept
from jaxsteer.evidence import reliability

LAYERS, WIDTH = 2, 24


def instructed(rng, *, instructions=6, questions=5, effect=1.0, shared=1.0, stretch=None):
    """Synthetic states: an effect per side, noise per instruction, question and sample."""
    side = rng.standard_normal((LAYERS, WIDTH)) * effect
    of_instruction = rng.standard_normal((2 * instructions, 1, LAYERS, WIDTH)) * shared
    of_question = rng.standard_normal((1, questions, LAYERS, WIDTH))
    noise = 0.5 * rng.standard_normal((2 * instructions, questions, LAYERS, WIDTH))
    positive = np.arange(2 * instructions) < instructions
    values = of_instruction + of_question + noise + side * positive[:, None, None, None]
    if stretch is not None:
        values = values * stretch
    n = 2 * instructions * questions
    return Samples(
        values=values.reshape(n, LAYERS, WIDTH).astype(np.float32),
        group=np.repeat(np.where(positive, 0, 1), questions),
        units={
            "instruction": np.repeat(np.arange(2 * instructions), questions),
            "question": np.tile(np.arange(questions), 2 * instructions),
        },
        labelled="instruction",
    )


def test_the_direction_is_the_difference_of_the_two_means(rng):
    made = instructed(rng)
    expected = made.values[made.positive].mean(axis=0) - made.values[~made.positive].mean(axis=0)
    np.testing.assert_allclose(made.direction(), expected, atol=1e-5)


def test_cosines_equal_scipys_and_are_zero_where_a_vector_is(rng):
    first, second = rng.standard_normal((2, LAYERS, WIDTH)).astype(np.float32)
    first[1] = 0
    expected = 1 - theirs_cosine(first[0], second[0])
    assert reliability.cosines(first, second) == pytest.approx([expected, 0.0], abs=1e-6)


def theirs_cosine(a, b):
    from scipy.spatial.distance import cosine

    return cosine(a.astype(np.float64), b.astype(np.float64))


def test_one_instruction_a_side_has_no_halves(rng):
    assert instructed(rng, instructions=1).parts("instruction").split_half() is None


def test_sums_that_are_kept_say_the_same(rng, tmp_path):
    made = instructed(rng)
    made.keep(tmp_path / "samples" / "one.safetensors")
    again = kept(tmp_path / "samples" / "one.safetensors")
    assert again.keys() == made.units.keys()
    for unit, parts in again.items():
        assert parts.sums.dtype == np.float32 and parts.counts.sum() == len(made.group)
        expected = made.parts(unit).split_half(halves=10)
        np.testing.assert_allclose(parts.split_half(halves=10), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_smaller_halves_agree_as_far_as_their_noise_allows(rng, size):
    # No noise but that of the instructions: two directions of n instructions a side are the effect
    # plus independent noise of variance 2 / n a dimension.
    side = np.ones((1, 400), np.float32)
    noise = 2.0 * rng.standard_normal((64, 1, 400)).astype(np.float32)
    made = Samples(
        values=noise + side * (np.arange(64) < 32)[:, None, None],
        group=(np.arange(64) >= 32).astype(int),
        units={"instruction": np.arange(64)},
        labelled="instruction",
    )
    found = made.parts("instruction").split_half(halves=200, size=size).mean()
    assert found == pytest.approx(1 / (1 + 2 * 4 / size), abs=0.05)


@pytest.mark.parametrize("unit", ["instruction", "question"])
def test_halves_are_directions_of_disjoint_units(rng, unit):
    made = instructed(rng, instructions=2, questions=2)
    ids = made.units[unit]
    sides = [np.unique(ids[made.positive]), np.unique(ids[~made.positive])]
    possible = set()
    for chosen in itertools.product(*sides):
        first = np.isin(ids, chosen)
        if unit == "question" and chosen[0] != chosen[1]:
            continue
        halves = [
            made.values[made.positive & h].mean(axis=0)
            - made.values[~made.positive & h].mean(axis=0)
            for h in (first, ~first)
        ]
        possible.add(round(float(reliability.cosines(*halves)[0]), 4))
    found = made.parts(unit).split_half(halves=30)
    assert {round(float(value), 4) for value in found[:, 0]} == possible


def test_reliability_rises_with_the_effect_and_falls_to_nothing_without_one(rng):
    means = [
        instructed(rng, effect=effect).parts("instruction").split_half().mean()
        for effect in (0.0, 1.0, 5.0)
    ]
    assert abs(means[0]) < 0.2 < means[1] < means[2]
    assert means[2] > 0.95


def test_reliability_over_questions_hides_what_reliability_over_instructions_shows(rng):
    # No effect at all: the same few instructions in both halves still look like a direction.
    made = instructed(rng, effect=0.0, shared=2.0)
    assert made.parts("question").split_half().mean() > 0.9
    assert made.parts("instruction").split_half().mean() < 0.3


def test_the_null_is_all_relabellings_of_whole_units(rng):
    made = instructed(rng, instructions=2, questions=3)
    other = rng.standard_normal((LAYERS, WIDTH)).astype(np.float32)
    possible = set()
    for chosen in itertools.combinations(range(4), 2):
        up = np.isin(made.units["instruction"], chosen)
        direction = made.values[up].mean(axis=0) - made.values[~up].mean(axis=0)
        possible.add(round(float(reliability.cosines(direction, other)[1]), 4))
    found = reliability.permutation_null(made.parts(made.labelled), other, draws=200)
    assert {round(float(value), 4) for value in found[:, 1]} == possible
    assert reliability.relabellings(made.parts(made.labelled)) == len(possible) == 6


def test_the_p_value_agrees_with_scipys_permutation_test(rng):
    values = rng.standard_normal((40, 1, WIDTH)).astype(np.float32)
    values[:20, 0] += 0.25
    made = Samples(
        values=values,
        group=np.arange(40) // 20,
        units={"prompt": np.arange(40)},
        labelled="prompt",
    )
    other = np.ones((1, WIDTH), np.float32) + rng.standard_normal((1, WIDTH)).astype(np.float32)

    def statistic(a, b):
        # scipy permutes scalars, so it is given the samples' numbers.
        up, down = values[a.astype(int), 0], values[b.astype(int), 0]
        return 1 - theirs_cosine(up.mean(axis=0) - down.mean(axis=0), other[0])

    expected = theirs.permutation_test(
        (np.arange(20), np.arange(20, 40)), statistic, n_resamples=2000, vectorized=False, rng=0
    )
    null = reliability.permutation_null(made.parts(made.labelled), other, draws=2000)
    observed = reliability.cosines(made.direction(), other)
    assert reliability.two_sided_p(observed, null)[0] == pytest.approx(expected.pvalue, abs=0.03)


def test_the_isotropic_null_is_too_narrow_where_a_few_dimensions_carry_the_variance(rng):
    stretch = np.ones(WIDTH)
    stretch[0] = 30.0
    other = np.ones((LAYERS, WIDTH), np.float32) * stretch.astype(np.float32)
    made = instructed(rng, effect=0.0, stretch=stretch)
    null = reliability.permutation_null(made.parts(made.labelled), other)
    assert null.std() > 3 * WIDTH**-0.5


def test_the_permutation_null_rejects_no_more_often_than_it_says(rng):
    rejected = 0
    other = rng.standard_normal((LAYERS, WIDTH)).astype(np.float32)
    for _ in range(60):
        made = instructed(rng, effect=0.0, shared=2.0)
        null = reliability.permutation_null(made.parts(made.labelled), other, draws=200)
        observed = reliability.cosines(made.direction(), other)
        rejected += reliability.two_sided_p(observed, null)[0] <= 0.05
    assert theirs.binomtest(int(rejected), 60).proportion_ci(0.99).low <= 0.05
