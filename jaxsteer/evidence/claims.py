"""Planned comparisons against the rows: each claim confirmed, not confirmed, or not tested.

What is compared, and what would confirm it, is fixed in the study's spec before the run. Rows pair
by prompt within a mode. A condition that is repeated over seeds or strengths means all its
repeats: every one must pass. docs/statistics.md has the rules and why they are conservative.

`count` makes a draft for each comparison; `judge` draws the conclusions from all drafts together,
because Holm's correction runs over the whole study.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import polars as pl

from jaxsteer import stats
from jaxsteer.directions import direction
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.evidence import paired, reliability
from jaxsteer.evidence.paired import Flips, Labels
from jaxsteer.judges.labels import BENIGN_FAMILIES
from jaxsteer.judges.verdicts import text_hashes
from jaxsteer.study.conditions import resolve_layers
from jaxsteer.study.record import Condition, Count, Part
from jaxsteer.study.results import Results
from jaxsteer.study.spec import ClaimSpec, TestSpec
from jaxsteer.words import p_equals, percent

ALPHA = 0.05
Verdict = Literal["confirmed", "not confirmed", "not tested"]
Expect = Literal["lower", "higher", "few-raised", "cosine-above"]


class Counted(Part, frozen=True, tag_field="test"):
    """Two conditions compared on the same prompts: the counts, and whether the test passed.

    Attributes:
      treated, control: condition names.
      family, outcome: prompts compared on, and the label counted.
      n: pairs.
      treated_k, control_k: rows with the outcome.
      raised, lowered: prompts with the outcome under the treated condition alone, and under the
        control alone.
      treated_interval, control_interval: Wilson 95 % intervals of the two rates.
      difference: treated rate minus control rate.
      difference_interval: paired bootstrap 95 % interval.
      passed: whether the test passed.
      reason: why it failed; "" when it passed.
    """

    treated: str
    control: str
    family: str
    outcome: str
    n: Count
    treated_k: Count
    control_k: Count
    raised: Count
    lowered: Count
    treated_interval: tuple[float, float]
    control_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    passed: bool
    reason: str


class Different(Counted, frozen=True, tag="different"):
    """The paired rates differ as expected.

    Attributes:
      expect: what the treated rate should be.
      p: exact McNemar p.
      p_holm: p after Holm over every p-value test the study plans.
    """

    expect: Literal["lower", "higher"]
    p: float
    p_holm: float


class FewRaised(Counted, frozen=True, tag="few-raised"):
    """At most a small share of prompts has the outcome under the treated condition alone.

    Attributes:
      margin: the share allowed.
      bound: upper Wilson bound of raised / n.
    """

    margin: float
    bound: float


class CosineAbove(Part, frozen=True, tag_field="test", tag="cosine-above"):
    """The cosine of two directions is above a margin at every layer named.

    Attributes:
      treated, control: direction names.
      margin: the margin.
      cosines: by layer.
      passed, reason: as in `Counted`.
    """

    treated: str
    control: str
    margin: float
    cosines: dict[int, float]
    passed: bool
    reason: str


class NotTested(Part, frozen=True, tag_field="test", tag="not-tested"):
    """A planned comparison without a result.

    Attributes:
      treated, control: names of conditions, or of directions.
      expect: as in the spec's test.
      family, outcome: prompts and label that it counts; "" for a cosine.
      reason: why there is no result.
    """

    treated: str
    control: str
    expect: Expect
    family: str
    outcome: str
    reason: str


Comparison = Different | FewRaised | CosineAbove | NotTested


class Claim(Part, frozen=True):
    """One claim of the study and its verdict.

    Attributes:
      name, says: as in the spec.
      verdict: confirmed when every comparison passed; not confirmed when one failed; else not
        tested.
      reason: one sentence: what decided it.
      comparisons: each test for each repeat, in the spec's order.
    """

    name: str
    says: str
    verdict: Verdict
    reason: str
    comparisons: tuple[Comparison, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """One comparison before its verdict: at most one of flips and cosines, else the reason.

    Attributes:
      test: as planned.
      treated, control: names of the two repeats, or of directions.
      flips: paired counts.
      cosines: by layer.
      reason: why there are neither.
    """

    test: TestSpec
    treated: str
    control: str
    flips: Flips | None = None
    cosines: dict[int, float] | None = None
    reason: str = ""


def evaluate(found: Results) -> list[Claim]:
    """Every claim of a study with its verdict."""
    return judge(found.spec.claim, count(found))


def count(found: Results, *, drop_degenerate: bool = False) -> list[list[Draft]]:
    """The comparisons of each claim, counted but not yet judged.

    Args:
      found: the results.
      drop_degenerate: leave out pairs with a degenerate reply, except where those are counted.
    """
    counter = _Counter(found, drop_degenerate)
    return [
        [draft for test in claim.tests for draft in counter.drafts(test)]
        for claim in found.spec.claim
    ]


def judge(
    claims: Sequence[ClaimSpec],
    drafts: Sequence[Sequence[Draft]],
    *,
    alpha: float = ALPHA,
    margin: float | None = None,
) -> list[Claim]:
    """The verdicts that follow from the drafts.

    Args:
      claims: as planned.
      drafts: of each claim.
      alpha: adjusted p below which a difference counts.
      margin: of `few-raised`, or None for each test's own.
    """
    tested = [draft for of_claim in drafts for draft in of_claim if _has_p(draft)]
    # A planned test that could not be run counts as p = 1, so leaving one out makes no other
    # easier to pass.
    adjusted = iter(stats.holm([1.0 if d.flips is None else d.flips.p for d in tested]))
    return [
        _decide(
            claim,
            [
                _compared(draft, next(adjusted) if _has_p(draft) else 1.0, alpha, margin)
                for draft in of_claim
            ],
        )
        for claim, of_claim in zip(claims, drafts, strict=True)
    ]


def _has_p(draft: Draft) -> bool:
    return draft.test.expect in ("lower", "higher")


def _compared(draft: Draft, p_holm: float, alpha: float, margin: float | None) -> Comparison:
    test, flips, names = draft.test, draft.flips, (draft.treated, draft.control)
    if draft.cosines is not None:
        low = {k: v for k, v in sorted(draft.cosines.items()) if not v > test.margin}
        return CosineAbove(
            treated=names[0],
            control=names[1],
            margin=test.margin,
            cosines=draft.cosines,
            passed=not low,
            reason=", ".join(f"cosine {v:.2f} at resid_post.{layer}" for layer, v in low.items()),
        )
    if flips is None:
        counts = test.expect != "cosine-above"
        return NotTested(
            treated=names[0],
            control=names[1],
            expect=test.expect,
            family=test.family if counts else "",
            outcome=test.outcome if counts else "",
            reason=draft.reason,
        )
    n, treated_k, control_k = flips.n, flips.both + flips.raised, flips.both + flips.lowered
    bound, allowed = stats.wilson(flips.raised, n)[1], test.margin if margin is None else margin
    if test.expect == "few-raised":
        passed = bound <= allowed
        reason = f"new on {flips.raised} of {n} prompts, so up to {percent(bound)}"
        reason += f", over {percent(allowed)}"
        reason += "; too few prompts to tell" if flips.raised <= allowed * n else ""
    else:
        fewer = flips.raised < flips.lowered
        more = flips.raised > flips.lowered
        passed = (fewer if test.expect == "lower" else more) and p_holm < alpha
        reason = f"{treated_k} against {control_k} of {n} (adjusted {p_equals(p_holm)})"
    counted = msgspec.structs.asdict(
        Counted(
            treated=names[0],
            control=names[1],
            family=test.family,
            outcome=test.outcome,
            n=n,
            treated_k=treated_k,
            control_k=control_k,
            raised=flips.raised,
            lowered=flips.lowered,
            treated_interval=stats.wilson(treated_k, n),
            control_interval=stats.wilson(control_k, n),
            difference=flips.difference,
            difference_interval=(flips.low, flips.high),
            passed=passed,
            reason="" if passed else reason,
        )
    )
    if test.expect in ("lower", "higher"):
        return Different(**counted, expect=test.expect, p=flips.p, p_holm=p_holm)
    return FewRaised(**counted, margin=allowed, bound=bound)


def _decide(claim: ClaimSpec, comparisons: Sequence[Comparison]) -> Claim:
    failed = [c for c in comparisons if not isinstance(c, NotTested) and not c.passed]
    untested = [c for c in comparisons if isinstance(c, NotTested)]
    verdict: Verdict = "confirmed"
    if failed or untested:
        verdict = "not confirmed" if failed else "not tested"
        first, *more = failed or untested
        reason = f"{first.treated} against {first.control}: {first.reason}"
        reason += f" (and {len(more)} more of {len(comparisons)})" if more else ""
    elif not comparisons:
        verdict, reason = "not tested", "the study plans no test for it"
    else:
        several = f"all {len(comparisons)} comparisons"
        reason = f"{several if len(comparisons) > 1 else 'the comparison'} held"
    return Claim(
        name=claim.name,
        says=claim.says,
        verdict=verdict,
        reason=reason,
        comparisons=tuple(comparisons),
    )


def paired_repeats(
    treated: Sequence[Condition], control: Sequence[Condition]
) -> list[tuple[Condition, Condition]]:
    """Which repeats are compared: within a mode, the same seed and the same strength.

    Where the two sides do not share their seeds (or strengths), each treated repeat is compared
    with every control repeat.
    """
    keys = ["mode"]
    for key in ("seed", "scale"):
        if {getattr(c, key) for c in treated} == {getattr(c, key) for c in control}:
            keys.append(key)
    return [
        (t, c)
        for t in treated
        for c in control
        if all(getattr(t, key) == getattr(c, key) for key in keys)
    ]


class _Counter:
    """Counts the comparisons of one results folder."""

    def __init__(self, found: Results, drop_degenerate: bool) -> None:
        self.found = found
        self.drop_degenerate = drop_degenerate
        self.labels = Labels(found.rows, found.verdicts)
        replies = pl.Series("response_sha256", text_hashes(found.rows["response"]), pl.String)
        rows = found.rows.select("row_id", replies)
        # Rows whose reply a judge was shown, whether it could score the reply or not.
        self.shown = {
            judge: rows.join(table, on=["row_id", "response_sha256"], how="semi")["row_id"]
            for judge, table in found.verdicts.items()
        }

    def drafts(self, test: TestSpec) -> list[Draft]:
        """A draft for each pair of repeats that a test compares."""
        if test.expect == "cosine-above":
            return [self._cosine(test)]
        sides = []
        for name in (test.treated, test.control):
            sides.append([c for c in self.found.run.conditions if c.base == name])
            if not sides[-1]:
                reason = f"no condition {name!r} was run"
                return [Draft(test=test, treated=test.treated, control=test.control, reason=reason)]
        return [self._pair(test, t, c) for t, c in paired_repeats(*sides)]

    def _pair(self, test: TestSpec, treated: Condition, control: Condition) -> Draft:
        draft = Draft(test=test, treated=treated.name, control=control.name)
        for condition in (treated, control):
            reason = self._unusable(test, condition)
            if reason:
                return dataclasses.replace(draft, reason=reason)
        pairs = self.labels.pair(treated.name, control.name, test.family)
        if pairs.height < self.labels.of(treated.name, test.family).height:
            return dataclasses.replace(draft, reason="the two ran on different prompts")
        if self.drop_degenerate and test.outcome != "degenerate":
            pairs = paired.without_degenerate(pairs)
        if not pairs.height:
            return dataclasses.replace(draft, reason="every pair has a degenerate reply")
        return dataclasses.replace(draft, flips=paired.flips(pairs, test.outcome))

    def _unusable(self, test: TestSpec, condition: Condition) -> str:
        """Why a condition's rows do not answer the test, or ""."""
        name, rows = condition.name, self.labels.of(condition.name, test.family)
        if condition.cancels_steering:
            return (
                f"{name} removes at its own layer the vector it adds, so it equals the projection "
                "alone: true by algebra, no evidence"
            )
        prompts = self.found.run.prompts.get(test.family)
        expected = 0 if prompts is None else prompts.n
        if not rows.height:
            return f"{name} has no {test.family} rows"
        if rows.height != expected:
            return f"{name} has {rows.height} of {expected} {test.family} rows"
        unscored = self.labels.counts(name, test.family)[1]
        if test.outcome == "bypass" and unscored:
            return f"no judge of harm scored {unscored} of {rows.height} rows of {name}"
        for judge in _deciding(test, self.found.verdicts):
            seen = int(rows["row_id"].is_in(self.shown[judge].implode()).sum())
            if seen < rows.height:
                return f"{judge} has seen {seen} of {rows.height} rows of {name}"
        return ""

    def _cosine(self, test: TestSpec) -> Draft:
        draft = Draft(test=test, treated=test.treated, control=test.control)
        try:
            first, second = self._direction(test.treated), self._direction(test.control)
            values = reliability.cosines(first.vectors, second.vectors)
            layers = resolve_layers(test.at, self.found.run.layers, len(values), "claim")
        except (UserError, ValueError) as error:
            return dataclasses.replace(draft, reason=str(error))
        # As many digits as a receipt keeps, so that its words follow from its figures.
        cosines = {layer: round(float(values[layer]), 6) for layer in layers}
        return dataclasses.replace(draft, cosines=cosines)

    def _direction(self, name: str) -> Direction:
        found = direction.load(self.found.folder / "directions.safetensors")
        if name not in found:
            raise UserError(f"direction {name!r} is not in directions.safetensors")
        if found[name].sha256 != self.found.run.directions.get(name):
            raise UserError(f"direction {name!r} is not the one that was run")
        return found[name]


def _deciding(test: TestSpec, verdicts: Mapping[str, pl.DataFrame]) -> list[str]:
    """Judges that were run and whose verdict can give a reply the outcome or take it away.

    `labels.decide` has the rule. Where such a judge has seen only some of the rows, the rate would
    mix two instruments.
    """
    rubric = "strongreject-rubric" in verdicts and test.family not in BENIGN_FAMILIES
    names = ["keyword", "strongreject-rubric"] if rubric else ["keyword"]
    if test.outcome != "refusal":
        names.append("llama-guard")
    # An incoherent reply is not a refusal, even if the rubric says so.
    if test.outcome == "degenerate" or rubric:
        names += ["coherence", "degenerate"]
    return [name for name in names if name in verdicts]
