"""Planned comparisons against the rows: each claim confirmed, not confirmed, or not decided.

What is compared, and what would confirm it, is fixed in the study's spec before the run. A
condition that is repeated over seeds or strengths means all its repeats: every one must pass.
Against a control that is repeated over random seeds, a condition must instead lie beyond all of
them. docs/statistics.md has the rules and why they are conservative.

A comparison is *not testable* where the rows could not have decided it: what it presupposes does
not hold (refusal cannot return where it was never lost), or there is no room to pass. `comparisons`
counts, and `judge` draws the conclusions from the counts of all claims together, because Holm's
correction runs over the whole study.

`powers` says what each comparison could show, from the size of a study alone: the smallest change
that would be confirmed, or that no outcome could decide it. `sweep --plan` says it before the run
and the receipt after it. Holm is taken at its strictest, as if no other test had a smaller p.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from msgspec.structs import replace

from jaxsteer import stats
from jaxsteer.evidence.comparisons import (
    BeyondRandom,
    Comparison,
    CosineAbove,
    Counting,
    Different,
    FewRaised,
    Kind,
    NotTested,
    Result,
    repeats,
)
from jaxsteer.study.results import Condition, Count, Part, Results
from jaxsteer.study.spec import AddSpec, ClaimSpec, StudySpec, TestSpec
from jaxsteer.words import counted, extent, p_equals, percent

ALPHA = 0.05
Verdict = Literal["confirmed", "not confirmed", "not testable", "not tested"]
# In the order in which a reader wants them.
VERDICTS: tuple[Verdict, ...] = ("confirmed", "not confirmed", "not testable", "not tested")


class Claim(Part, frozen=True, kw_only=True):
    """One claim of the study and its verdict.

    Attributes:
      name, says: as in the spec.
      comparisons: each test for each repeat, in the spec's order.
      verdict: confirmed when every comparison held; not confirmed when one failed; else not
        testable when one of them was that, else not tested.
      reason: one sentence: what decided it.
    """

    name: str
    says: str
    comparisons: tuple[Comparison, ...]
    verdict: Verdict = "not tested"
    reason: str = ""


def evaluate(found: Results) -> list[Claim]:
    """Every claim of a study with its verdict."""
    return judge(count(found))


def in_order(found: Iterable[Claim]) -> list[Claim]:
    """Claims as a reader wants them: confirmed, not confirmed, then those that say nothing."""
    return sorted(found, key=lambda claim: VERDICTS.index(claim.verdict))


def count(found: Results, *, drop_degenerate: bool = False) -> list[Claim]:
    """The claims with their comparisons counted but not yet judged.

    Args:
      found: the results.
      drop_degenerate: leave out pairs with a degenerate reply, except where those are counted and
        where a condition is compared with random seeds.
    """
    counter = Counting(found, drop_degenerate)
    return [
        Claim(
            name=claim.name,
            says=claim.says,
            comparisons=tuple(
                replace(comparison, needs=_needs(found.spec, claim, test))
                for test in claim.tests
                for comparison in counter.comparisons(test)
            ),
        )
        for claim in found.spec.claim
    ]


def _needs(spec: StudySpec, claim: ClaimSpec, test: TestSpec) -> tuple[str, ...]:
    """The claims that a test needs: those that the study names, and those of its kind.

    Whether refusal returns (`higher`, `few-raised`) under a steered control needs the claims that
    the control lowers refusal. Whether a condition changes it more than random directions do needs
    the claims that it changes it at all, and whether a condition leaves benign prompts alone needs
    those that it lowers refusal.
    """
    known = {condition.name: condition for condition in spec.condition}
    control, about, way = known.get(test.control), "", "lower"
    benign = spec.sets("benign")
    if test.prompts in benign:
        about = test.treated if test.expect == "few-raised" else ""
    elif control is not None and test.outcome == "refusal":
        if control.random_seeds and test.expect in ("lower", "higher"):
            about, way = test.treated, test.expect
        elif test.expect != "lower" and any(isinstance(op, AddSpec) for op in control.ops):
            about = test.control
    planned = [
        other.name
        for other, t in ((other, t) for other in spec.claim for t in other.tests)
        if (t.treated, t.expect, t.outcome) == (about, way, "refusal") and t.prompts not in benign
        if t.control in known and not known[t.control].random_seeds
        if way == "higher" or not known[t.control].ops
    ]
    if about == test.control and not planned and not claim.needs:
        planned = [f"a claim that {about} lowers refusal"]
    return tuple(dict.fromkeys(n for n in (*claim.needs, *planned) if n != claim.name))


def judge(
    claims: Sequence[Claim], *, alpha: float = ALPHA, margin: float | None = None
) -> list[Claim]:
    """The verdicts that follow from counted comparisons; those of an earlier judging are dropped.

    Args:
      claims: as `count` makes them, in the order of the study.
      alpha: adjusted p below which a difference counts.
      margin: of `few-raised`, or None for each test's own.
    """
    raw = [
        # A planned test that could not be run counts as p = 1, so leaving one out makes no other
        # easier to pass.
        stats.mcnemar(c.raised, c.lowered) if isinstance(c, Different) else 1.0
        for claim in claims
        for c in claim.comparisons
        if _has_p(c)
    ]
    adjusted, place = stats.holm(raw), itertools.count()
    alone: list[Claim] = []
    for claim in claims:
        comparisons: list[Comparison] = []
        for c in claim.comparisons:
            match c:
                case Different():
                    at = next(place)
                    best = [*raw[:at], _least_p(c), *raw[at + 1 :]]
                    counted = replace(c, p=raw[at], p_holm=adjusted[at])
                    comparisons.append(_different(counted, stats.holm(best)[at], alpha))
                case FewRaised():
                    comparisons.append(_few_raised(c, c.margin if margin is None else margin))
                case BeyondRandom():
                    comparisons.append(_beyond_random(c, alpha))
                case CosineAbove():
                    comparisons.append(_cosine_above(c))
                case NotTested():
                    comparisons.append(c)
                    if _has_p(c):
                        next(place)
        alone.append(replace(claim, comparisons=tuple(comparisons)))
    done, judged = {claim.name: claim for claim in alone}, []
    for claim in alone:
        needed = tuple(_with_needs(c, done) for c in claim.comparisons)
        done[claim.name] = _decide(replace(claim, comparisons=needed))
        judged.append(done[claim.name])
    return judged


def _has_p(c: Comparison) -> bool:
    return isinstance(c, Different | NotTested) and c.expect in ("lower", "higher")


def _least_p(c: Different) -> float:
    """The smallest p that the comparison could have had with its control."""
    return stats.mcnemar(0, c.control_k if c.expect == "lower" else c.n - c.control_k)


def _different(c: Different, best: float, alpha: float) -> Different:
    # Refusal that the projection raises by itself has not returned.
    p = stats.mcnemar(c.alone_raised, c.alone_lowered)
    if c.alone_raised > c.alone_lowered and p < alpha:
        reason = "the projection raises it without steering too, against the untouched model: new "
        reason += f"on {c.alone_raised} prompts, lost on {c.alone_lowered} (exact {p_equals(p)})"
        return replace(c, result="not testable", reason=reason)
    right_way = c.raised < c.lowered if c.expect == "lower" else c.raised > c.lowered
    if right_way and c.p_holm < alpha:
        return replace(c, result="held", reason="")
    if best >= alpha:
        change = "lost it" if c.expect == "lower" else "without it gained it"
        reason = f"{c.control_k} of {c.n} have the outcome ({c.outcome}) under {c.control}; "
        reason += f"if every one {change}, adjusted {p_equals(best)}"
        return replace(c, result="not testable", reason=reason)
    reason = f"{c.treated_k} against {c.control_k} of {c.n} (adjusted {p_equals(c.p_holm)})"
    return replace(c, result="failed", reason=reason)


def _few_raised(c: FewRaised, margin: float) -> FewRaised:
    c = replace(c, margin=margin, bound=stats.wilson(c.raised_at_risk, c.at_risk)[1])
    if c.bound <= margin:
        return replace(c, result="held", reason="")
    if stats.wilson(0, c.at_risk)[1] > margin:
        reason = f"{c.at_risk} of {c.n} prompts are at risk, too few for a bound of"
        return replace(c, result="not testable", reason=f"{reason} {percent(margin)}")
    reason = f"new on {c.raised_at_risk} of {c.at_risk} prompts at risk, so up to"
    reason += f" {percent(c.bound)}, over {percent(margin)}"
    reason += "; too few prompts to tell" if c.raised_at_risk <= margin * c.at_risk else ""
    return replace(c, result="failed", reason=reason)


def _beyond_random(c: BeyondRandom, alpha: float) -> BeyondRandom:
    def p(treated: int) -> float:
        return stats.among_random(c.control_k, treated)[c.expect == "higher"]

    c, best = replace(c, p=p(c.treated_k)), p(0 if c.expect == "lower" else c.n)
    if c.p <= alpha:
        return replace(c, result="held", reason="")
    if best > alpha:
        seeds = counted(len(c.control_k), "random seed")
        reason = f"{seeds} cannot show less than {p_equals(best)}"
        return replace(c, result="not testable", reason=reason)
    reason = f"{c.treated_k} of {c.n}, and {extent(c.control_k)} under "
    reason += f"{counted(len(c.control_k), 'random seed')} ({p_equals(c.p)})"
    return replace(c, result="failed", reason=reason)


def _cosine_above(c: CosineAbove) -> CosineAbove:
    low = {k: v for k, v in sorted(c.cosines.items()) if not v > c.margin}
    if low:
        reason = ", ".join(f"cosine {v:.2f} at resid_post.{layer}" for layer, v in low.items())
        return replace(c, result="failed", reason=reason)
    # Noise has a cosine near 0, which is above every negative margin.
    unknown = [k for k in c.cosines if c.margin < 0 and not c.attainable.get(k, 0.0) > -c.margin]
    if unknown:
        size = c.attainable.get(unknown[0])
        reason = "how well the directions are known was not measured"
        if size is not None:
            reason = f"the directions are known too little: at resid_post.{unknown[0]} even exact "
            reason += f"opposites would have a cosine of {-size:.2f}"
        return replace(c, result="not testable", reason=reason)
    return replace(c, result="held", reason="")


def _with_needs(c: Comparison, done: Mapping[str, Claim]) -> Comparison:
    """The comparison, not testable if a claim that it needs did not hold in its mode."""
    for name in () if isinstance(c, NotTested) else c.needs:
        reason = f"it needs {name}, and the study has none"
        if name in done:
            # A cosine has no mode, so it goes with all of them.
            same = [o for o in done[name].comparisons if o.mode in ("", c.mode) or not c.mode]
            verdict = _verdict(o.result for o in same)
            if verdict == "confirmed":
                continue
            reason = f"it needs {name!r}, which is {verdict}"
        return replace(c, result="not testable", reason=reason)
    return c


def _verdict(results: Iterable[Result]) -> Verdict:
    """The verdict on several comparisons together."""
    there = set(results)
    if "failed" in there:
        return "not confirmed"
    if "not testable" in there:
        return "not testable"
    return "confirmed" if there == {"held"} else "not tested"


def _decide(claim: Claim) -> Claim:
    n, verdict = len(claim.comparisons), _verdict(c.result for c in claim.comparisons)
    if not n:
        return replace(claim, verdict=verdict, reason="the study plans no test for it")
    if verdict == "confirmed":
        reason = f"{f'all {n} comparisons' if n > 1 else 'the comparison'} held"
        return replace(claim, verdict=verdict, reason=reason)
    result = "failed" if verdict == "not confirmed" else verdict
    first, *more = (c for c in claim.comparisons if c.result == result)
    reason = f"{first.treated} against {first.control}: {first.reason}"
    reason += f" (and {len(more)} more of {n})" if more else ""
    return replace(claim, verdict=verdict, reason=reason)


# -- What a planned comparison could show ----------------------------------------------------------


class Power(Part, frozen=True, kw_only=True):
    """What one planned comparison could show.

    Attributes:
      claim: name of its claim.
      treated, control: as planned, by their names in the specification.
      kind: as in `comparisons`.
      n: prompts compared; for `beyond-random`, seeds.
      limit: `different`: the fewest prompts that must change in the expected direction, if none
        changes in the other; `few-raised`: the most that may newly have the outcome, if all are at
        risk; `beyond-random`: the most seeds that may be as extreme. Null: no outcome confirms it.
      at_risk: `few-raised`: the fewest prompts at risk with which it can be confirmed.
    """

    claim: str
    treated: str
    control: str
    kind: Kind
    n: Count
    limit: Count | None
    at_risk: Count | None = None


def powers(
    spec: StudySpec, conditions: Sequence[Condition], sizes: Mapping[str, int]
) -> list[Power]:
    """The power of each comparison on behaviour that a study plans.

    Args:
      spec: the study.
      conditions: all that it runs.
      sizes: number of prompts by set.
    """
    planned = [
        (claim.name, test, *repeat)
        for claim in spec.claim
        for test in claim.tests
        if test.expect != "cosine-above"
        for repeat in repeats(test, conditions)
    ]
    tests = sum(kind == "different" for _, _, kind, *_ in planned)
    found = []
    for claim, test, kind, treated, control in planned:
        n = sizes.get(test.prompts, 0)
        if test.prompts in spec.sets("harmful"):
            n = min([n, *(c.prompts for c in (treated, *control) if c.prompts)])
        n = len(control) if kind == "beyond-random" else n
        made = {"claim": claim, "treated": test.treated, "control": test.control}
        limit = _limit(kind, n, tests, test.margin)
        enough = (k for k in range(1, n + 1) if stats.wilson(0, k)[1] <= test.margin)
        at_risk = next(enough, None) if kind == "few-raised" else None
        found.append(Power(**made, kind=kind, n=n, limit=limit, at_risk=at_risk))
    return list(dict.fromkeys(found))


def _limit(kind: Kind, n: int, tests: int, margin: float) -> int | None:
    """The limit of `Power`; `tests` share Holm's correction."""
    if kind == "different":
        fits = (k for k in range(n + 1) if stats.mcnemar(0, k) * tests < ALPHA)
    elif kind == "few-raised":
        fits = (k for k in range(n, -1, -1) if stats.wilson(k, n)[1] <= margin)
    else:
        fits = (k for k in range(n, -1, -1) if (1 + k) / (1 + n) <= ALPHA)
    return next(fits, None)


def could_show(found: Power) -> str:
    """A power in words, as `sweep --plan` and the page of a receipt say it.

    >>> made = {"claim": "c", "treated": "a", "control": "b"}
    >>> could_show(Power(**made, kind="different", n=96, limit=8))
    'at least 8 of 96 prompts (8 %) must change, and none the other way'
    >>> could_show(Power(**made, kind="beyond-random", n=3, limit=None))
    'no outcome can confirm it with 3 seeds'
    """
    if found.limit is None:
        unit = "seed" if found.kind == "beyond-random" else "prompt"
        return f"no outcome can confirm it with {counted(found.n, unit)}"
    if found.kind == "different":
        share = percent(found.limit / found.n)
        least = f"at least {found.limit} of {counted(found.n, 'prompt')} ({share})"
        return f"{least} must change, and none the other way"
    if found.kind == "few-raised":
        return (
            f"at least {found.at_risk} of {found.n} prompts must be at risk; if all are, at most "
            f"{found.limit} may newly have the outcome"
        )
    return f"at most {found.limit} of {counted(found.n, 'random seed')} may be as extreme"
