from __future__ import annotations

import pytest

from jaxsteer.words import p_equals, p_value, percent, points, span


@pytest.mark.parametrize(
    ("p", "shown"), [(None, "–"), (0.00001, "< 0.0001"), (0.0312, "0.031"), (1.0, "1")]
)
def test_p_values_are_short_and_never_zero(p, shown):
    assert p_value(p) == shown
    if p is not None:
        assert p_equals(p).startswith("p ") and p_equals(p).endswith(shown)


@pytest.mark.parametrize("share", [0.0001, 0.004, 0.9955, 0.99999])
def test_a_share_that_is_not_all_or_nothing_does_not_read_so(share):
    assert percent(share) not in ("0 %", "1 %", "99 %", "100 %")


def test_an_interval_names_its_unit_once():
    assert span(0.0004, 0.31) == "< 0.1 to 31 %"


def test_a_difference_that_rounds_to_nothing_has_no_minus_sign():
    assert points(-0.0001) == "+0"
