from __future__ import annotations

import msgspec
import pytest
from scipy.stats import binomtest

from jaxsteer.evidence import claims
from jaxsteer.study import spec
from jaxsteer.study.results import Condition
from tests.receipt import made
from tests.study.stand_ins import compiled

SIZES = {"strongreject": 96, "benign": 40}


def of(name, sizes):
    study = spec.load(name)
    return claims.powers(study, compiled(study), sizes)


def test_a_difference_needs_as_many_prompts_as_mcnemar_with_holm_asks_for():
    found = of("smollm2-demo", SIZES)
    (suppression,) = [f for f in found if f.claim == "suppression"]
    # Five comparisons share Holm's correction: p below 0.05 / 5 for the first.
    tests = 5
    assert binomtest(0, suppression.limit).pvalue * tests < 0.05
    assert binomtest(0, suppression.limit - 1).pvalue * tests >= 0.05
    assert "must change" in claims.could_show(suppression)


def test_every_claim_of_the_demo_is_decidable():
    found = of("smollm2-demo", SIZES)
    assert found and not [f for f in found if f.limit is None]
    assert {f.n for f in found if f.kind == "beyond-random"} == {19}


def test_a_study_too_small_to_confirm_anything_is_told_so():
    found = of("smollm2-demo", {"strongreject": 4, "benign": 4})
    small = [f for f in found if f.kind != "beyond-random"]
    assert small and not [f for f in small if f.limit is not None]
    assert "no outcome can confirm it with 4 prompts" in claims.could_show(small[0])


def test_few_raised_tolerates_what_its_bound_leaves():
    (early,) = [f for f in of("smollm2-demo", SIZES) if f.claim == "refusal early fails"]
    bound = [binomtest(k, 96).proportion_ci(0.95, "wilson").high for k in range(97)]
    assert bound[early.limit] <= 0.3 < bound[early.limit + 1]
    # With fewer prompts at risk even no new outcome leaves a bound above the margin.
    alone = [binomtest(0, early.at_risk - k).proportion_ci(0.95, "wilson").high for k in (0, 1)]
    assert alone[0] <= 0.3 < alone[1]
    assert f"at least {early.at_risk} of 96 prompts must be at risk" in claims.could_show(early)


@pytest.mark.parametrize(("seeds", "limit"), [(18, None), (19, 0), (38, 0), (39, 1)])
def test_a_rank_among_seeds_tolerates_one_in_twenty(seeds, limit):
    study = made.with_seeds(seeds, made.test("persona", "random direction", "lower"))
    conditions = msgspec.convert(made.conditions(study), list[Condition])
    [found] = claims.powers(study, conditions, SIZES)
    assert (found.n, found.limit) == (seeds, limit)


@pytest.mark.parametrize(
    ("expect", "n", "limit", "at_risk"),
    [
        # Of five prompts that all change, the exact p is 0.063, and of six 0.031.
        ("lower", 5, None, None),
        ("lower", 6, 6, None),
        # The bound of none in 8 is above 0.3, and that of none in 9 is not.
        ("few-raised", 8, None, None),
        ("few-raised", 9, 0, 9),
    ],
)
def test_the_smallest_study_that_can_confirm_a_claim_is_known(expect, n, limit, at_risk):
    study = made.study([made.claim("claim", made.test("persona", "baseline", expect, margin=0.3))])
    conditions = msgspec.convert(made.conditions(study), list[Condition])
    [found] = claims.powers(study, conditions, {"strongreject": n})
    assert (found.n, found.limit, found.at_risk) == (n, limit, at_risk)


@pytest.mark.parametrize("name", spec.shipped())
def test_every_shipped_study_says_what_it_could_show(name):
    found = of(name, {"strongreject": 313, "benign": 50})
    assert {f.claim for f in found} <= {claim.name for claim in spec.load(name).claim}
    assert all(claims.could_show(f) for f in found)
