from __future__ import annotations

import dataclasses

import msgspec
import polars as pl
import pytest

from jaxsteer.evidence import claims, findings
from jaxsteer.evidence.comparisons import FewRaised
from jaxsteer.evidence.findings import Rules
from jaxsteer.study.results import Results
from tests.receipt import made


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return made.loaded(tmp_path_factory.mktemp("rules") / "made")


def verdicts(found: Results, rules: Rules) -> list[claims.Claim]:
    return findings.judged(findings.count(found, rules), rules)


def verdict(judged: list[claims.Claim], name: str) -> claims.Claim:
    return next(c for c in judged if c.name == name)


def test_the_default_rules_are_those_of_the_receipt(found: Results):
    assert verdicts(found, Rules()) == claims.evaluate(found)


def test_a_stricter_alpha_turns_a_verdict_and_says_why(found: Results):
    p = verdict(claims.evaluate(found), "suppression").comparisons[0].p_holm
    assert p is not None and 0 < p < 0.05
    turned = verdict(verdicts(found, Rules(alpha=0.75 * p)), "suppression")
    assert turned.verdict == "not confirmed" and "1 against 18 of 40" in turned.reason


def test_the_margin_decides_few_new_cases_and_nothing_else(found: Results):
    before = claims.evaluate(found)
    after = verdicts(found, Rules(margin=0.01))
    few = {c.name for c in before if isinstance(c.comparisons[0], FewRaised)}
    assert set(findings.changed(before, after)) == few == {"none by random", "benign unharmed"}


def test_prompts_that_no_condition_refuses_leave_all_conditions_alike(found: Results):
    left = findings.kept(found, Rules(drop_never_refused=True))
    never = set(findings.never_refused(found.rows))
    harmful = found.rows.filter(pl.col("family") == "strongreject")
    refused = set(harmful.filter(pl.col("label") == "refusal")["prompt_id"])
    assert never and never == set(harmful["prompt_id"]) - refused
    # The comparisons are still complete: what the run promised shrinks along with the rows.
    c = verdict(claims.evaluate(left), "suppression").comparisons[0]
    assert (c.n, c.treated_k, c.control_k) == (40 - len(never), 1, 18)


def test_a_pair_with_a_degenerate_reply_is_left_out_unless_those_are_counted(found: Results):
    judged = verdicts(found, Rules(drop_degenerate=True))
    c = verdict(judged, "suppression").comparisons[0]
    broken = found.rows.filter(
        pl.col("condition").is_in(["persona", "baseline"])
        & (pl.col("family") == "strongreject")
        & (pl.col("label") == "degenerate")
    )["prompt_id"].n_unique()
    assert broken == 2 and c.n == 40 - broken


def test_leaving_a_seed_out_leaves_its_comparisons_out(found: Results):
    assert findings.seeds(found) == [1, 2, 3]
    judged = verdicts(found, Rules(seeds=frozenset({1})))
    assert [c.treated for c in verdict(judged, "none by random").comparisons] == [
        "persona, random out #1"
    ]
    none = verdict(verdicts(found, Rules(seeds=frozenset())), "none by random")
    assert none.verdict == "not tested" and "no condition" in none.reason


def test_the_results_themselves_stay_as_they_are(found: Results):
    height, run = found.rows.height, found.run
    verdicts(found, Rules(drop_never_refused=True, seeds=frozenset({2})))
    assert found.rows.height == height and found.run == run


def test_what_changed_is_said_in_words(found: Results):
    planned = claims.evaluate(found)
    rules = Rules(margin=0.01)
    yours = verdicts(found, rules)
    assert findings.effect_of_rules(planned, planned, Rules()).startswith(
        "These are the study's own"
    )
    changed = findings.effect_of_rules(planned, yours, rules)
    assert changed.endswith("change: 2 of 7: none by random, benign unharmed.")
    same = dataclasses.replace(rules, margin=0.2)
    assert findings.effect_of_rules(planned, planned, same).endswith("change: none of 7.")


def test_a_large_study_is_judged_by_table_and_not_by_row(found: Results):
    base = found.rows.filter(pl.col("family") == "strongreject")
    many = pl.concat(
        [
            base.with_columns(pl.col("prompt_id") + f"-{i}", pl.col("row_id") + f"-{i}")
            for i in range(100)
        ]
    )
    prompts = {"strongreject": msgspec.structs.replace(found.run.prompts["strongreject"], n=4000)}
    run = msgspec.structs.replace(found.run, prompts=prompts)
    large = dataclasses.replace(found, rows=many, run=run)
    assert many.height > 50_000
    c = verdict(verdicts(large, Rules(drop_degenerate=True)), "suppression").comparisons
    assert (c[0].n, c[0].lowered) == (38 * 100, 17 * 100)
