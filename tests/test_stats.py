from __future__ import annotations

import pytest
from scipy.stats import binomtest

from jaxsteer.stats import holm, mcnemar, wilson


@pytest.mark.parametrize("n", [1, 7, 40, 313])
def test_wilson_equals_scipy(n):
    for k in range(n + 1):
        theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_nothing_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_equals_the_exact_binomial_test():
    for b in range(12):
        for c in range(12):
            expected = binomtest(min(b, c), b + c, 0.5).pvalue if b + c else 1.0
            assert mcnemar(b, c) == pytest.approx(expected)


def test_holm_is_monotone_and_never_below_the_raw_value():
    raw = [0.2, 0.001, 0.04, 0.04, 0.9]
    adjusted = holm(raw)
    assert adjusted == pytest.approx([0.4, 0.005, 0.16, 0.16, 0.9])
