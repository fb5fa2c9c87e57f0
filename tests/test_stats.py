"""Every statistic against scipy or statsmodels, or against plain enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as theirs
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from jaxsteer.stats import (
    among_random,
    holm,
    kappa,
    mcnemar,
    mean_bootstrap,
    mean_interval,
    newcombe,
    paired_bootstrap,
    paired_trend,
    spearman_brown,
    wilson,
)


@pytest.mark.parametrize("n", [1, 7, 40, 313])
def test_wilson_equals_statsmodels(n):
    for k in range(n + 1):
        expected = proportion_confint(k, n, method="wilson")
        assert wilson(k, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [1, 40, 1000])
def test_wilson_of_none_or_all_ends_exactly_at_0_or_1(n):
    assert wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1


def test_wilson_of_nothing_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("b", "c"), [(0, 9), (14, 3), (5, 5), (120, 80), (700, 620)])
def test_mcnemar_equals_statsmodels(b, c):
    assert mcnemar(b, c) == pytest.approx(their_mcnemar([[10, b], [c, 10]], exact=True).pvalue)


def test_mcnemar_without_discordant_pairs_shows_nothing():
    assert mcnemar(0, 0) == 1.0


def test_holm_is_monotone_and_never_below_the_raw_value():
    raw = [0.2, 0.001, 0.04, 0.04, 0.9]
    adjusted = holm(raw)
    assert adjusted == pytest.approx([0.4, 0.005, 0.16, 0.16, 0.9])


def test_holm_equals_statsmodels(rng):
    for size in (1, 2, 9, 30):
        raw = rng.random(size) ** 3
        expected = multipletests(raw, method="holm")[1]
        assert holm(raw.tolist()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "counts", [(16, 40, 0, 40), (5, 5, 3, 9), (1, 313, 309, 313), (7, 20, 7, 31)]
)
def test_newcombe_equals_statsmodels(counts):
    expected = confint_proportions_2indep(*counts, method="newcomb")
    assert newcombe(*counts) == pytest.approx(expected, abs=1e-12)


def test_newcombe_of_nothing_knows_nothing():
    assert newcombe(0, 0, 4, 9) == newcombe(4, 9, 0, 0) == (-1.0, 1.0)


@pytest.mark.parametrize(("b", "c", "n"), [(16, 2, 40), (0, 7, 60), (30, 25, 313), (1, 0, 40)])
def test_paired_bootstrap_equals_scipys(b, c, n):
    differences = np.array([1] * b + [-1] * c + [0] * (n - b - c))
    expected = theirs.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    # Both are simulations; their quantiles move by one pair, 1 / n, between seeds.
    assert paired_bootstrap(b, c, n) == pytest.approx(tuple(expected), abs=1.01 / n)


def test_paired_bootstrap_is_the_same_every_time_and_differs_between_seeds():
    assert paired_bootstrap(30, 25, 313) == paired_bootstrap(30, 25, 313)
    seeds = {paired_bootstrap(130, 25, 313, seed=seed, draws=200) for seed in range(8)}
    assert len(seeds) > 1


def test_paired_bootstrap_draws_ten_thousand_times_from_seed_0():
    # So many pairs that no two sets of draws have the same quantiles.
    counts = (300_000, 250_000, 1_000_000)
    assert paired_bootstrap(*counts) == paired_bootstrap(*counts, draws=10_000, seed=0)


def test_paired_bootstrap_of_nothing_knows_nothing():
    assert paired_bootstrap(0, 0, 0) == (-1.0, 1.0)


def test_paired_bootstrap_without_flips_is_not_certain():
    low, high = paired_bootstrap(0, 0, 40)
    assert -high == low < -0.08


@pytest.mark.parametrize("n", [1, 3, 40, 1000])
def test_paired_bootstrap_of_pairs_that_all_fall_one_way_is_not_certain(n):
    low, high = paired_bootstrap(n, 0, n)
    assert low < 1 == high
    assert paired_bootstrap(0, n, n) == (-high, -low)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_up_to_three_pairs_that_fall_one_way_may_be_chance(n):
    low, high = paired_bootstrap(n, 0, n)
    assert low < 0 < high


def test_paired_bootstrap_covers_the_truth_as_often_as_it_says(rng):
    truth, n = np.array([0.3, 0.1, 0.6]), 60
    samples = rng.multinomial(n, truth, size=400)
    hits = 0
    for b, c, _ in samples.tolist():
        low, high = paired_bootstrap(b, c, n, draws=1000)
        hits += low <= 0.2 <= high
    assert binomtest(hits, 400).proportion_ci(0.999).high > 0.94


def test_mean_bootstrap_equals_scipys(rng):
    values = rng.beta(0.5, 2, size=70)
    expected = theirs.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=2
    ).confidence_interval
    assert mean_bootstrap(values.tolist()) == pytest.approx(tuple(expected), abs=0.004)


@pytest.mark.parametrize("values", [[], [0.0], [0.5]])
def test_mean_bootstrap_of_fewer_than_two_scores_is_the_whole_range(values):
    assert mean_bootstrap(values) == (0.0, 1.0)


def test_mean_bootstrap_draws_ten_thousand_times_from_seed_0():
    # So many means are possible that no two sets of draws have the same quantiles.
    values, generator = np.sqrt(np.arange(20) / 20).tolist(), np.random.default_rng(0)
    drawn = [np.take(values, generator.integers(20, size=20)).mean() for _ in range(10_000)]
    assert mean_bootstrap(values) == tuple(np.quantile(drawn, [0.025, 0.975]))
    assert mean_bootstrap([0.2, 0.4]) == pytest.approx((0.2, 0.4))


@pytest.mark.parametrize("n", [2, 9])
def test_mean_interval_equals_scipys(rng, n):
    values = rng.standard_normal(n)
    mean, sd, interval = mean_interval(values.tolist())
    assert (mean, sd) == pytest.approx((values.mean(), values.std(ddof=1)))
    expected = theirs.t.interval(0.95, n - 1, loc=mean, scale=theirs.sem(values))
    assert interval == pytest.approx(expected)


def test_one_value_has_a_mean_and_no_interval():
    assert mean_interval([3.0]) == (3.0, 0.0, (None, None))


@pytest.mark.parametrize("score", [0.0, 0.25, 1.0])
def test_mean_bootstrap_of_scores_all_alike_is_not_certain(score):
    few, many = mean_bootstrap([score] * 2), mean_bootstrap([score] * 40)
    assert 0 <= few[0] <= many[0] <= score <= many[1] <= few[1] <= 1
    assert many[1] - many[0] == pytest.approx(wilson(0, 40)[1])


def test_kappa_equals_statsmodels(rng):
    for size in (2, 3, 5):
        table = rng.integers(0, 30, size=(size, size))
        assert kappa(table) == pytest.approx(cohens_kappa(table).kappa)


def test_kappa_is_undefined_when_both_say_the_same_throughout():
    assert kappa(np.array([[12, 0], [0, 0]])) is None
    assert kappa(np.zeros((2, 2), int)) is None


def test_a_tie_with_a_random_control_counts_against_the_treated_value():
    assert among_random([0.2, 0.2, 0.3], treated=0.2) == (0.75, 1.0)


def test_the_p_among_random_controls_is_that_of_scipys_permutation_convention(rng):
    controls = rng.random(99)
    for treated in (-1.0, 0.1, 0.5, 2.0):
        low, _ = among_random(controls.tolist(), treated)
        # scipy: the observed value counts as one of the draws.
        everything = np.append(controls, treated)
        assert low == pytest.approx(theirs.percentileofscore(everything, treated) / 100)


def test_paired_trend_has_the_moments_of_all_exchanges_within_prompts():
    outcomes = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]], bool)
    strengths = np.array([0.0, 1.0, 4.0])
    every = itertools.product(*(list(itertools.permutations(row)) for row in outcomes.tolist()))
    sums = np.array([(np.array(table) @ strengths).sum() for table in every])
    z, _ = paired_trend(outcomes, strengths.tolist())
    observed = (outcomes @ strengths).sum()
    assert z == pytest.approx((observed - sums.mean()) / sums.std())


def test_paired_trend_agrees_with_scipys_permutation_test(rng):
    strengths = np.array([0.0, 1.0, 2.0, 4.0])
    outcomes = rng.random((40, 4)) < np.array([0.6, 0.55, 0.45, 0.4])

    def statistic(*columns, axis=-1):
        return sum(s * c.sum(axis=axis) for s, c in zip(strengths, columns, strict=True))

    expected = theirs.permutation_test(
        tuple(outcomes.T.astype(float)),
        statistic,
        permutation_type="samples",
        n_resamples=9999,
        vectorized=True,
        rng=0,
    )
    assert paired_trend(outcomes, strengths.tolist())[1] == pytest.approx(expected.pvalue, abs=0.03)


def test_paired_trend_at_two_strengths_is_mcnemars_chi_square():
    outcomes = np.array([[1, 0]] * 9 + [[0, 1]] * 2 + [[1, 1]] * 5 + [[0, 0]] * 4, bool)
    expected = their_mcnemar([[5, 9], [2, 4]], exact=False, correction=False)
    z, p = paired_trend(outcomes, [0.0, 1.0])
    assert (z * z, p) == pytest.approx((expected.statistic, expected.pvalue))


def test_paired_trend_does_not_depend_on_the_unit_of_strengths():
    outcomes = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
    small = paired_trend(outcomes, [0.0, 1e-3, 3e-3])
    assert small == pytest.approx(paired_trend(outcomes, [0.0, 1.0, 3.0]))


@pytest.mark.parametrize("outcomes", [[[1], [0]], [[1, 1], [0, 0]]])
def test_paired_trend_without_a_change_is_none(outcomes):
    strengths = [float(s) for s in range(len(outcomes[0]))]
    assert paired_trend(np.array(outcomes, bool), strengths) == (0.0, 1.0)


def test_spearman_brown_predicts_the_reliability_of_the_double_length(rng):
    signal, noise = rng.standard_normal(20_000), rng.standard_normal((4, 20_000))
    halves = signal + noise
    half = np.corrcoef(halves[0], halves[1])[0, 1]
    whole = np.corrcoef(halves[:2].mean(axis=0), halves[2:].mean(axis=0))[0, 1]
    assert spearman_brown(half) == pytest.approx(whole, abs=0.02)
    assert spearman_brown(-0.3) == spearman_brown(-1.0) == 0.0
