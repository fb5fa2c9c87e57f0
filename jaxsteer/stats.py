"""Statistics of rates, judges and controls: plain functions of counts and arrays.

docs/statistics.md says where each is used and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Int

_TAILS = (0.025, 0.975)  # of a 95 % interval


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson score 95 % interval of a rate k / n (Wilson 1927); (0, 1) when n is 0.

    >>> low, high = wilson(16, 40)
    >>> round(low, 3), round(high, 3)
    (0.263, 0.554)
    """
    # Imported here: it takes a second, and most commands need no statistics.
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p-value from the discordant pairs' counts (McNemar 1947).

    Under the null each discordant pair falls either way with probability 1/2.

    >>> mcnemar(0, 6)
    0.03125
    """
    from scipy.stats import binomtest

    n = only_first + only_second
    return float(binomtest(only_first, n).pvalue) if n else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def newcombe(k1: int, n1: int, k2: int, n2: int) -> tuple[float, float]:
    """95 % interval of the difference k1 / n1 - k2 / n2 of two independent rates.

    The Wilson intervals of both rates, combined by squares (Newcombe 1998, Statistics in Medicine
    17:873, method 10). Where both rates are of the same prompts, it is too wide, and never too
    narrow as long as the outcomes on a prompt are not negatively correlated; a paired interval
    needs the rows.

    >>> low, high = newcombe(56, 70, 48, 80)
    >>> round(low, 4), round(high, 4)
    (0.0524, 0.3339)
    """
    if n1 == 0 or n2 == 0:
        return -1.0, 1.0
    (low1, high1), (low2, high2) = wilson(k1, n1), wilson(k2, n2)
    p1, p2 = k1 / n1, k2 / n2
    down, up = math.hypot(p1 - low1, high2 - p2), math.hypot(high1 - p1, p2 - low2)
    return p1 - p2 - down, p1 - p2 + up


def paired_bootstrap(
    only_first: int, only_second: int, n: int, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of a difference of paired rates, first minus second.

    Drawing n pairs with replacement draws the counts of the three kinds of pair from a
    multinomial, so the counts are enough (Efron & Tibshirani 1993, chapter 13). Two cases have no
    spread to resample. Without a discordant pair every draw is 0, but n pairs that agree do not
    show that all pairs do: the interval is then the Wilson bound of 0 in n, either way. Where every
    pair is discordant the same way every draw is 1, but of further pairs only a share w, the Wilson
    bound of n in n, is sure to be so: the interval then begins at w - (1 - w).

    Args:
      only_first: pairs with the outcome in the first arm alone.
      only_second: pairs with it in the second arm alone.
      n: all pairs.
      draws: number of resamples.
      seed: of the generator (PCG64).

    >>> low, high = paired_bootstrap(16, 2, 40)
    >>> round(low, 3), round(high, 3)
    (0.175, 0.525)
    >>> paired_bootstrap(0, 0, 40) == (-wilson(0, 40)[1], wilson(0, 40)[1])
    True
    >>> paired_bootstrap(40, 0, 40) == (2 * wilson(40, 40)[0] - 1, 1.0)
    True
    """
    if only_first == only_second == 0:
        bound = wilson(0, n)[1]
        return -bound, bound
    least = 2 * wilson(n, n)[0] - 1
    if only_first == n:
        return least, 1.0
    if only_second == n:
        return -1.0, -least
    generator = np.random.Generator(np.random.PCG64(seed))
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    counts = generator.multinomial(n, shares, size=draws)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / n, _TAILS)
    return float(low), float(high)


def mean_bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of a mean of scores from 0 to 1, 10,000 draws.

    Fewer than two scores do not show how much scores differ: the interval is then the whole range.
    Where all scores are equal every resample is too, which does not show that no other score
    differs. The share that does is at most the Wilson bound of 0 in n, so the interval is then the
    mean with that share of it moved to 0, or to 1.

    >>> low, high = mean_bootstrap([0.0, 0.0, 0.25, 1.0, 0.5, 0.0])
    >>> round(low, 2), round(high, 2)
    (0.04, 0.62)
    >>> mean_bootstrap([0.0] * 40) == wilson(0, 40)
    True
    """
    n = len(values)
    if n < 2:
        return 0.0, 1.0
    sample = np.asarray(values, np.float64)
    if sample.min() == sample.max():
        mean, share = float(sample[0]), wilson(0, n)[1]
        return mean - share * mean, mean + share * (1 - mean)
    generator = np.random.Generator(np.random.PCG64(0))
    means = [sample[generator.integers(n, size=n)].mean() for _ in range(10_000)]
    low, high = np.quantile(means, _TAILS)
    return float(low), float(high)


def mean_interval(
    values: Sequence[float],
) -> tuple[float, float, tuple[float, float] | tuple[None, None]]:
    """Mean, standard deviation and Student's t interval at 95 % of the mean (Student 1908).

    Of paired values these are differences. Fewer than two have no interval.

    >>> mean, sd, (low, high) = mean_interval([1.0, 2.0, 3.0, 6.0])
    >>> round(mean, 2), round(sd, 2), round(low, 2), round(high, 2)
    (3.0, 2.16, -0.44, 6.44)
    """
    from scipy.stats import t

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, 0.0, (None, None)
    sd = float(np.std(values, ddof=1))
    half = float(t.ppf(_TAILS[1], n - 1)) * sd / math.sqrt(n)
    return mean, sd, (mean - half, mean + half)


def kappa(confusion: Int[np.ndarray, "first second"]) -> float | None:
    """Cohen's kappa of two judges from their square confusion table (Cohen 1960).

    Agreement beyond chance: (observed - expected) / (1 - expected), the expected share from the
    judges' own rates. None, because undefined, when both gave the same verdict throughout or there
    are no rows.

    >>> round(kappa(np.array([[20, 5], [10, 15]])), 3)
    0.4
    """
    table, n = confusion.astype(np.float64), confusion.sum()
    if n == 0:
        return None
    observed = np.trace(table) / n
    expected = float(table.sum(axis=0) @ table.sum(axis=1)) / n**2
    return None if expected >= 1 else float((observed - expected) / (1 - expected))


def among_random(controls: Sequence[float], treated: float) -> tuple[float, float]:
    """One-sided p-values of a value among the same measure under random controls, one per seed.

    (1 + controls at or below it) / (1 + controls), and the same at or above. Neither can fall below
    1 / (1 + controls), so few seeds cannot give a small p (Phipson & Smyth 2010); without controls
    both are 1. The values may have any unit, such as shares.

    >>> among_random([0.40, 0.35, 0.45, 0.40], treated=0.02)
    (0.2, 1.0)
    """
    n = len(controls)
    below, above = np.less_equal(controls, treated).sum(), np.greater_equal(controls, treated).sum()
    return (1 + int(below)) / (1 + n), (1 + int(above)) / (1 + n)


def paired_trend(
    outcomes: Bool[np.ndarray, "prompt strength"], strengths: Sequence[float]
) -> tuple[float, float]:
    """Trend over strengths that were run on the same prompts: (z, two-sided p).

    Under the null a prompt's outcomes do not depend on the strength, so they are exchanged within
    prompts: the Cochran-Mantel-Haenszel correlation statistic with prompts as strata (Landis,
    Heyman & Koch 1978). At two strengths z squared is McNemar's chi-square. (0, 1) when no
    prompt changes.

    >>> outcomes = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]], bool)
    >>> z, p = paired_trend(outcomes, [0.0, 1.0, 2.0])
    >>> round(z, 3), round(p, 4)
    (-2.121, 0.0339)
    """
    width = outcomes.shape[1]
    if width < 2:
        return 0.0, 1.0
    centred = np.asarray(strengths, np.float64) - np.mean(strengths)
    hits = outcomes.sum(axis=1)
    spread = float((hits * (width - hits)).sum()) / (width * (width - 1))
    variance = spread * float(centred @ centred)
    if variance <= 1e-12:
        return 0.0, 1.0
    z = float((outcomes @ centred).sum()) / math.sqrt(variance)
    return z, 2 * NormalDist().cdf(-abs(z))


def spearman_brown(correlation: float) -> float:
    """Reliability of a whole from the correlation of its halves, 2r / (1 + r).

    Spearman 1910, Brown 1910. A correlation of 0 or less gives 0.

    >>> round(spearman_brown(0.6), 3)
    0.75
    """
    return 2 * correlation / (1 + correlation) if correlation > 0 else 0.0
