"""What a receipt's figures say of each other: everything that follows from its counts, recomputed.

These checks need neither results nor model. They find a receipt whose rates, intervals, p-values
or verdicts do not follow from its own counts, even when its digest was made anew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxsteer import stats
from jaxsteer.evidence import claims
from jaxsteer.files import sha256_bytes
from jaxsteer.receipt import build
from jaxsteer.receipt.statement import Condition, Outcomes, Predicate, Rate, Statement
from jaxsteer.study.results import LABELS

Problems = Iterator[str]


def checks() -> dict[str, Callable[[Statement], Iterable[str]]]:
    """The checks by what they show when they find nothing."""
    return {
        "the subjects are the model's files": _subjects,
        "texts match their hashes": _texts,
        "rates and intervals follow from the counts": _rates,
        "the counts add up": _totals,
        "claims follow from their counts": _claims,
        "controls follow from the rates": _controls,
        "the judges' agreement follows from its tables": _agreement,
    }


def close(first: Any, second: Any) -> bool:
    """Equality up to the six digits a receipt keeps, through lists and dicts.

    Whole numbers are kept whole, so they have to be equal.

    >>> close(0.333333, 1 / 3), close(20260101, 20260102)
    (True, False)
    """
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, int) or isinstance(second, int):
        return bool(first == second)
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-5, abs_tol=1e-12)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(close(v, second[k]) for k, v in first.items())
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(close, first, second))
    return bool(first == second)


def _subjects(receipt: Statement) -> Problems:
    if receipt.subject != build.subjects(receipt.predicate.model):
        yield "the subjects differ from the model that the predicate names"


def _texts(receipt: Statement) -> Problems:
    p = receipt.predicate
    texts = [("policy", p.policy.sha256, p.policy.text)]
    texts += [(f"mode {mode.name}", mode.sha256, mode.text) for mode in p.modes]
    texts += [(f"system prompt {s.mode!r}", s.sha256, s.text) for s in p.system_prompts]
    for name, sha256, text in texts:
        if sha256_bytes(text.encode("utf-8", "surrogatepass")) != sha256:
            yield f"the text of {name} does not match its hash"
    known = {(s.mode, s.sha256) for s in p.system_prompts}
    for condition in p.conditions:
        if (condition.mode, condition.system_sha256) not in known:
            yield f"{condition.name}: its system prompt is not in the receipt"


def _outcomes(p: Predicate) -> Iterator[tuple[Condition, str, Outcomes]]:
    for condition in p.conditions:
        for family, outcomes in condition.outcomes.items():
            yield condition, family, outcomes


def _rates(receipt: Statement) -> Problems:
    for condition, family, o in _outcomes(receipt.predicate):
        where = f"{condition.name}, {family}"
        for outcome in ("refusal", "bypass", "degenerate"):
            shown: Rate | None = getattr(o, outcome)
            if shown is None:
                continue
            k = o.counts.get(outcome, o.n + 1)
            if not k <= o.n or not close(_fields(shown), _fields(build.rate(k, o.n))):
                yield f"{where}: the {outcome} rate does not follow from its count"
        if (o.bypass is None) != (o.unjudged > 0):
            yield f"{where}: bypass is given and unjudged rows are there, or neither"
        leak = o.leakage
        if leak is not None and not leak.low <= leak.mean <= leak.high:
            yield f"{where}: the mean leakage lies outside its interval"


def _fields(rate: Rate) -> dict[str, Any]:
    """A rate's fields."""
    return {field: getattr(rate, field) for field in rate.__struct_fields__}


def _totals(receipt: Statement) -> Problems:
    p = receipt.predicate
    for condition, family, o in _outcomes(p):
        where = f"{condition.name}, {family}"
        if set(o.counts) != set(LABELS) or sum(o.counts.values()) != o.n:
            yield f"{where}: the labels do not add up to {o.n}"
        if o.unjudged > o.n - o.counts.get("refusal", 0) - o.counts.get("bypass", 0):
            yield f"{where}: more rows are unjudged than can be"
        if family not in p.prompts or o.n > p.prompts[family].n:
            yield f"{where}: more rows than prompts"
    if sum(o.n for _, _, o in _outcomes(p)) != p.rows.n:
        yield "the conditions' rows do not add up to the table's"
    if sum(p.judges.decided.values()) != p.rows.n:
        yield "the judges' rows do not add up to the table's"
    if len({c.name for c in p.conditions}) != len(p.conditions):
        yield "a condition is there twice"


def _claims(receipt: Statement) -> Problems:
    p = receipt.predicate
    known = {(c.name, family): o for c, family, o in _outcomes(p)}
    cancelled = {c.name for c in p.conditions if c.cancels_steering}
    impossible = [
        f"claim {claim.name}: {problem}"
        for claim in p.claims
        for c in claim.comparisons
        for problem in _pair(c, known, cancelled)
    ]
    if impossible:
        yield from impossible
        return
    drafts = [[_bare(c) for c in claim.comparisons] for claim in p.claims]
    for claim, settled in zip(p.claims, claims.settle(drafts), strict=True):
        made = claims.decide(claim.name, claim.says, settled)
        for shown, right in zip(claim.comparisons, made.comparisons, strict=True):
            for field in dataclasses.fields(right):
                # Another version may say the same in other words.
                if field.name == "reason" and p.tool != build.tool():
                    continue
                if not close(getattr(shown, field.name), getattr(right, field.name)):
                    yield f"claim {claim.name}: {field.name} of {shown.treated} does not follow"
        if claim.verdict != made.verdict or (
            claim.reason != made.reason and p.tool == build.tool()
        ):
            yield f"claim {claim.name}: the counts say {made.verdict}, the receipt {claim.verdict}"


def _bare(c: claims.Comparison) -> claims.Comparison:
    # What was not counted has a reason of its own, which counts cannot give.
    reason = "" if c.counted else c.reason
    return claims.Comparison(
        treated=c.treated,
        control=c.control,
        expect=c.expect,
        family=c.family,
        outcome=c.outcome,
        margin=c.margin,
        n=c.n,
        treated_k=c.treated_k,
        control_k=c.control_k,
        raised=c.raised,
        lowered=c.lowered,
        cosines=c.cosines,
        reason=reason,
    )


def _pair(
    c: claims.Comparison, known: dict[tuple[str, str], Outcomes], cancelled: set[str]
) -> Problems:
    if c.expect in ("few-raised", "cosine-above") and c.margin is None:
        yield f"{c.treated} has no margin"
    if not c.n:
        return
    if cancelled & {c.treated, c.control}:
        yield f"{c.treated} against {c.control} is true by algebra, and counted all the same"
    for name, k in ((c.treated, c.treated_k), (c.control, c.control_k)):
        o = known.get((name, c.family))
        if o is None or (o.n, o.counts.get(c.outcome)) != (c.n, k):
            yield f"the counts of {name} are not those of the condition"
        elif c.outcome == "bypass" and o.unjudged:
            yield f"bypass is tested on rows of {name} that nobody judged"
    if c.raised - c.lowered != c.treated_k - c.control_k:
        yield f"the flips of {c.treated} do not add up to its difference"
    if c.raised > c.treated_k or c.lowered > c.control_k or c.raised + c.lowered > c.n:
        yield f"more prompts of {c.treated} flipped than there are"


def _controls(receipt: Statement) -> Problems:
    p = receipt.predicate
    known = {(c.name, family): o for c, family, o in _outcomes(p)}

    def count(name: str, family: str, outcome: str) -> tuple[int, int] | None:
        o = known.get((name, family))
        return None if o is None else (o.counts.get(outcome, 0), o.n)

    for control in p.random_controls:
        where = f"random control {control.control}, {control.family}"
        target = count(control.treated, control.family, control.outcome)
        if control.value is not None and (
            target is None or not close(control.value, target[0] / max(target[1], 1))
        ):
            yield f"{where}: the value is not that of {control.treated}"
        modes = {c.mode for c in p.conditions if c.name == control.treated}
        scales = {c.scale for c in p.conditions if c.name == control.treated}
        rates = [
            o.counts.get(control.outcome, 0) / max(o.n, 1)
            for c, family, o in _outcomes(p)
            if c.base == control.control and family == control.family
            if not control.treated or (c.mode in modes and c.scale in scales)
        ]
        if not control.treated:
            continue
        # The stated value is rounded, so against it a seed that ties would not tie any more.
        value = 0.0 if control.value is None or target is None else target[0] / max(target[1], 1)
        made = stats.envelope(rates, value) if rates else None
        if made is None or made.n != control.n:
            yield f"{where}: its seeds are not in the receipt"
            continue
        fields = ["low", "mean", "high"] + (
            ["p_low", "p_high"] if control.value is not None else []
        )
        if not all(close(getattr(made, f), getattr(control, f)) for f in fields):
            yield f"{where}: the envelope does not follow from the seeds' rates"
    for pair in p.paired_controls:
        where = f"{pair.treated} against {pair.control}, {pair.family} {pair.outcome}"
        sides = [count(name, pair.family, pair.outcome) for name in (pair.treated, pair.control)]
        if any(side is None or side[1] != pair.n for side in sides) or not pair.n:
            yield f"{where}: its rows are not those of the conditions"
            continue
        up, down = (side[0] for side in sides if side is not None)
        if pair.raised > up or pair.lowered > down or pair.raised + pair.lowered > pair.n:
            yield f"{where}: more prompts flipped than there are"
            continue
        interval = stats.paired_bootstrap(pair.raised, pair.lowered, pair.n)
        right = [(pair.raised - pair.lowered) / pair.n, *interval]
        if pair.raised - pair.lowered != up - down or not close(
            right, [pair.difference, pair.low, pair.high]
        ):
            yield f"{where}: the difference does not follow from the flips"
    for dose in p.dose_responses:
        if len(dose.conditions) != len(dose.strengths) or any(
            (name, dose.family) not in known for name in dose.conditions
        ):
            yield f"strengths of {dose.base}: its conditions are not in the receipt"


def _agreement(receipt: Statement) -> Problems:
    for pair in receipt.predicate.judges.agreement:
        made = stats.kappa(pair.table)
        if not close(pair.kappa, None if math.isnan(made) else made):
            yield f"kappa of {pair.first} and {pair.second} does not follow from their table"
