from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logit, logsumexp, softmax
from scipy.stats import entropy

from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, everywhere
from jaxsteer.stats import newcombe
from jaxsteer.study import selection
from jaxsteer.study.selection import (
    DoseCandidate,
    PolicyCandidate,
    Rates,
    RefusalCandidate,
    RestoringCandidate,
)
from tests import oracle, tiny


def test_the_refusal_score_is_the_log_odds_of_the_opening_tokens(rng):
    logits = rng.standard_normal((5, 40)).astype(np.float32) * 4
    opening = [3, 17]
    rest = [i for i in range(40) if i not in opening]
    wide = logits.astype(np.float64)
    expected = logsumexp(wide[:, opening], axis=1) - logsumexp(wide[:, rest], axis=1)
    np.testing.assert_allclose(selection.refusal_score(logits, opening), expected, rtol=1e-10)


def test_kl_equals_torch(rng):
    p, q = (rng.standard_normal((5, 40)).astype(np.float32) * 3 for _ in range(2))
    expected = torch.nn.functional.kl_div(
        torch.tensor(log_softmax(q.astype(np.float64), axis=1)),
        torch.tensor(log_softmax(p.astype(np.float64), axis=1)),
        reduction="none",
        log_target=True,
    ).sum(1)
    np.testing.assert_allclose(selection.kl(p, q), expected, rtol=1e-10)
    np.testing.assert_allclose(selection.kl(p, p), 0, atol=1e-12)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    hf, folder = tiny.llama(), tmp_path_factory.mktemp("selection")
    return hf, ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


def test_candidates_are_scored_as_hf_scores_them_under_hooks(pair, rng):
    hf, model = pair
    vectors = rng.standard_normal((3, 32)).astype(np.float32)
    harmful, harmless = [[3, 9, 33, 7], [3, 9, 5]], [[3, 8, 8], [3, 8, 41, 12], [3, 8, 2]]
    found = selection.refusal_candidates(
        model,
        Direction(name="refusal", vectors=vectors, provenance={}),
        *(harmful, harmless, [0, 2]),
        opening=[11],
        kl_limit=1e-9,
    )

    def last(prompts, operations):
        return np.array([oracle.logits(hf, p, operations)[-1] for p in prompts])

    for candidate, layer in zip(found, (0, 2), strict=True):
        out = everywhere(vectors, layer)
        add = [Add(direction=vectors, layers=(layer,), scale=1.0)]
        p = softmax(last(harmful, out).astype(np.float64), axis=1)[:, 11]
        assert candidate.bypass == pytest.approx(logit(p).mean(), abs=1e-3)
        p = softmax(last(harmless, add).astype(np.float64), axis=1)[:, 11]
        assert candidate.induce == pytest.approx(logit(p).mean(), abs=1e-3)
        plain, ablated = (softmax(last(harmless, o), axis=1) for o in ([], out))
        assert candidate.kl == pytest.approx(entropy(plain, ablated, axis=1).mean(), abs=1e-4)
        reasons = " ".join(candidate.reasons)
        assert "KL" in reasons and ("induced" in reasons) == (candidate.induce < 0)
        assert ("last fifth" in reasons) == (layer == 2)


def test_a_candidate_whose_scores_are_no_numbers_is_filtered(pair):
    _, model = pair
    broken = dataclasses.replace(model, params=jax.tree.map(lambda a: a * np.nan, model.params))
    vectors = np.ones((3, 32), np.float32)
    direction = Direction(name="refusal", vectors=vectors, provenance={})
    (found,) = selection.refusal_candidates(broken, direction, [[3, 9]], [[3, 8]], [1], [11])
    assert found.induce is None and "not finite" in " ".join(found.reasons)


def refusal(layer, bypass, kl=0.01, reasons=()):
    return RefusalCandidate(layer=layer, bypass=bypass, induce=1.0, kl=kl, reasons=reasons)


def test_the_eligible_candidate_with_the_lowest_bypass_score_wins():
    found = [refusal(1, -9.0, reasons=("KL 3 > 0.1",)), refusal(2, -3.0), refusal(3, -5.0)]
    assert selection.choose_refusal(found, allow_near_miss=False).layer == 3


def test_with_none_eligible_the_near_misses_are_shown_or_the_nearest_taken():
    found = [
        refusal(1, -9.0, 0.9, ("KL 0.90 > 0.1", "induced score -1.00 < 0")),
        refusal(2, -3.0, 0.3, ("KL 0.30 > 0.1",)),
        refusal(3, -5.0, 0.2, ("KL 0.20 > 0.1",)),
    ]
    with pytest.raises(UserError, match=r"resid_post\.3: KL 0\.20.*resid_post\.2.*resid_post\.1"):
        selection.choose_refusal(found, allow_near_miss=False)
    broken = refusal(4, None, None, ("a score is not finite",))
    assert selection.choose_refusal([broken, *found], allow_near_miss=True).layer == 3


def cell(layer, scale, refusal, degenerate):
    return DoseCandidate(layer=layer, scale=scale, refusal=refusal, degenerate=degenerate)


def test_a_dose_may_break_few_replies_more_than_the_baseline_does():
    grid = [cell(0, 0.0, 0.5, 0.1), cell(4, 1.0, 0.3, 0.1), cell(4, 4.0, 0.0, 0.21)]
    assert selection.choose_dose(grid, 0.1).scale == 1.0
    assert selection.choose_dose(grid, 0.11).scale == 4.0


def test_equal_doses_are_settled_by_health_then_strength_then_depth():
    base = cell(0, 0.0, 0.5, 0.0)
    grid = [base, cell(4, 4.0, 0.1, 0.1), cell(5, 4.0, 0.1, 0.05), cell(6, 2.0, 0.1, 0.05)]
    assert selection.choose_dose(grid, 0.2) == grid[3]
    assert selection.choose_dose([*grid, cell(5, 2.0, 0.1, 0.05)], 0.2).layer == 5


def test_a_grid_that_breaks_the_model_everywhere_is_refused():
    with pytest.raises(UserError, match="weaker strengths"):
        selection.choose_dose([cell(0, 0.0, 0.5, 0.0), cell(4, 9.0, 0.0, 0.9)], 0.1)


def policy(name, harmful, harmless, n=32):
    return PolicyCandidate(
        policy=name,
        n=n,
        harmful=harmful,
        harmless=harmless,
        youden=harmful - harmless,
        low=-1.0,
        high=1.0,
    )


def test_the_policy_that_tells_the_prompts_apart_best_wins_and_of_equal_ones_the_first():
    found = [policy("a", 0.5, 0.25), policy("b", 1.0, 1.0), policy("c", 0.25, 0.0)]
    assert selection.choose_policy(found).policy == "a"
    assert selection.choose_policy(found[::-1]).policy == "c"


@pytest.mark.parametrize(
    ("harmful", "harmless", "said"),
    [
        (1.0, 0.97, "nearly everything gets one label; choose a milder policy"),
        (0.03, 0.0, "nearly everything gets one label; choose a stricter policy"),
        (0.5, 0.45, "hardly tells them apart"),
        (0.2, 0.6, "J \u22120.40, needed: 0.1"),
        (0.5, 0.4, ""),
    ],
)
def test_a_study_that_would_say_nothing_is_told_why(harmful, harmless, said):
    reason = selection.uninformative(policy("mine", harmful, harmless), 0.1)
    assert said in reason and bool(reason) == bool(said)
    assert not reason or "under policy mine the untouched model refuses" in reason


def test_policies_are_scored_by_the_rule_on_what_the_model_says(pair):
    _, model = pair
    # Its words are `w7` and the like, which no rule reads as a refusal.
    rater = selection.Rater(model, 3, 8)
    both = ([[3, 9, 33, 7], [3, 9, 5]], [[3, 8, 8], [3, 8, 41, 12]])
    (found,) = selection.policy_candidates(rater, {"p": both})
    low, high = newcombe(0, 2, 0, 2)
    assert (found.policy, found.n, found.youden) == ("p", 2, 0.0)
    assert (found.low, found.high) == (low, high)


def restoring(layer, width, steered, alone, broken=0.0, scale=0.0):
    return RestoringCandidate(
        layer=layer,
        width=width,
        scale=scale,
        steered=Rates(refusal=steered, degenerate=0.0),
        alone=Rates(refusal=alone, degenerate=broken),
    )


def chosen(*cells, near_miss=False):
    plain = restoring(0, 0, 0.0, 0.5, broken=0.1)
    return selection.choose_restoring([plain, *cells], 0.1, 0.1, allow_near_miss=near_miss)


def test_the_window_that_restores_most_is_taken_of_those_that_do_little_alone():
    strong, broken = restoring(4, 4, 0.9, 0.2), restoring(4, 3, 0.8, 0.5, broken=0.3)
    assert chosen(strong, broken, restoring(5, 2, 0.3, 0.6), restoring(6, 1, 0.2, 0.4)) == (
        restoring(5, 2, 0.3, 0.6),
        (),
    )


def test_equal_windows_are_settled_by_width_then_strength_then_depth():
    cells = [
        restoring(4, 2, 0.3, 0.5, scale=1.0),
        restoring(6, 1, 0.3, 0.5, scale=2.0),
        restoring(7, 1, 0.3, 0.5, scale=1.0),
        restoring(5, 1, 0.3, 0.5, scale=1.0),
    ]
    assert chosen(*cells)[0] == cells[3]


def test_without_a_harmless_window_the_nearest_is_shown_or_taken():
    cells = [restoring(4, 2, 0.9, 0.1), restoring(5, 1, 0.3, 0.3)]
    with pytest.raises(UserError, match=r"nearest begins at resid_post\.5 .* from 50 % to 30 %"):
        chosen(*cells)
    best, why = chosen(*cells, near_miss=True)
    assert best == cells[1] and "alone it moves refusal from 50 % to 30 %" in why[0]
