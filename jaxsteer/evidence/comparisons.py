"""Planned comparisons, counted on the rows of a study and not yet judged.

Rows pair by prompt within a persona mode. A comparison holds its counts and all else that `claims`
needs to judge it, so that a receipt's own figures are enough to judge it again.

    different      two rates on the same prompts                        exact McNemar
    few-raised     the prompts at risk that newly have an outcome       a Wilson bound
    beyond-random  a rate against that of the same under random seeds   rank among the seeds
    cosine-above   two directions                                       their cosine
    not-tested     rows, or labels, that are missing

Whether a comparison is usable at all is decided here: rows that are incomplete, that a judge saw in
part only, or whose steering cancels by algebra leave it not tested.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import polars as pl
from msgspec import Meta
from msgspec.structs import asdict, replace

from jaxsteer import stats
from jaxsteer.data import prompts
from jaxsteer.directions import direction
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.evidence import controls, outcomes, reliability
from jaxsteer.evidence.outcomes import Labels
from jaxsteer.judges.verdicts import judges_of_harm, judges_of_refusal, text_hashes
from jaxsteer.study.conditions import resolve_layers, unsteered_twin
from jaxsteer.study.results import Add, Condition, Count, Part, Results
from jaxsteer.study.spec import TestSpec

Result = Literal["held", "failed", "not testable", "not tested"]
Expect = Literal["lower", "higher", "few-raised", "cosine-above"]
# Of comparisons on behaviour.
Kind = Literal["different", "few-raised", "beyond-random"]


class Compared(Part, frozen=True, kw_only=True):
    """One planned comparison: what is the same in every kind.

    Attributes:
      treated, control: names of conditions, or of directions.
      mode: the persona mode of both conditions, or "".
      needs: claims that must be confirmed in this mode, or the comparison says nothing.
      result: whether it held or failed; `not testable` where the rows could not have decided it,
        `not tested` where they are missing.
      reason: why it did not hold; "" when it did.
    """

    treated: str
    control: str
    mode: str = ""
    needs: tuple[str, ...] = ()
    result: Result = "not tested"
    reason: str = ""


class Counted(Compared, frozen=True, kw_only=True):
    """Two conditions compared on the same prompts.

    Attributes:
      family, outcome: prompts compared on, and the label counted.
      n: pairs.
      treated_k, control_k: rows with the outcome.
      raised, lowered: prompts with the outcome under the treated condition alone, and under the
        control alone.
      treated_interval, control_interval: Wilson 95 % intervals of the two rates.
      difference: treated rate minus control rate.
      difference_interval: paired bootstrap 95 % interval.
    """

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


class Different(Counted, frozen=True, kw_only=True, tag_field="test", tag="different"):
    """The paired rates differ as expected.

    Attributes:
      expect: what the treated rate should be.
      p: exact McNemar p.
      p_holm: p after Holm over every p-value test the study plans.
      alone_raised, alone_lowered: of a knockout under which refusal is to return, prompts that its
        projection alone, without steering, raises and lowers against the untouched model.
    """

    expect: Literal["lower", "higher"]
    p: float = 1.0
    p_holm: float = 1.0
    alone_raised: Count = 0
    alone_lowered: Count = 0


class FewRaised(Counted, frozen=True, kw_only=True, tag_field="test", tag="few-raised"):
    """Of the prompts at risk, at most a small share has the outcome under the treated condition.

    Attributes:
      margin: the share allowed.
      at_risk: prompts that could newly have the outcome (`outcomes.at_risk`).
      raised_at_risk: of these, prompts with it under the treated condition.
      bound: upper Wilson bound of raised_at_risk / at_risk.
    """

    margin: float
    at_risk: Count
    raised_at_risk: Count
    bound: float = 1.0


class BeyondRandom(Compared, frozen=True, kw_only=True, tag_field="test", tag="beyond-random"):
    """The treated rate lies beyond the rates of a control that is repeated over random seeds.

    Attributes:
      family, outcome, expect: as in `Different`.
      n: prompts, the same for every seed.
      treated_k: rows with the outcome under the treated condition.
      control_k: the same for each seed.
      p: one-sided, (1 + seeds at least as extreme) / (1 + seeds).
    """

    family: str
    outcome: str
    expect: Literal["lower", "higher"]
    n: Count
    treated_k: Count
    control_k: Annotated[tuple[Count, ...], Meta(min_length=1)]
    p: float = 1.0


class CosineAbove(Compared, frozen=True, kw_only=True, tag_field="test", tag="cosine-above"):
    """The cosine of two directions is above a margin at every layer named.

    Attributes:
      margin: the margin.
      cosines: by layer.
      attainable: by layer, the largest size of cosine that the reliability of the two directions
        leaves, as far as that is known: sqrt(r1 r2), Spearman's attenuation (1904).
    """

    margin: float
    cosines: dict[int, float]
    attainable: dict[int, float]


class NotTested(Compared, frozen=True, kw_only=True, tag_field="test", tag="not-tested"):
    """A planned comparison without counts; `reason` says why.

    Attributes:
      expect: as in the spec's test.
      family, outcome: prompts and label that it counts; "" for a cosine.
    """

    expect: Expect
    family: str = ""
    outcome: str = ""


Comparison = Different | FewRaised | BeyondRandom | CosineAbove | NotTested


def repeats(
    test: TestSpec, conditions: Sequence[Condition]
) -> list[tuple[Kind, Condition, list[Condition]]]:
    """What a test on behaviour compares: kind, treated condition, and its control or all its seeds.

    Repeats are compared within a mode, with the same seed and the same strength. Where the two
    sides do not share their seeds (or strengths), each treated repeat is compared with every
    control repeat; a control that is repeated over random seeds is one control.
    """
    treated, control = (
        [c for c in conditions if c.base == name] for name in (test.treated, test.control)
    )
    keys = ["mode"]
    for key in ("seed", "scale"):
        if {getattr(c, key) for c in treated} == {getattr(c, key) for c in control}:
            keys.append(key)
    found: dict[object, tuple[Kind, Condition, list[Condition]]] = {}
    for t, c in itertools.product(treated, control):
        if all(getattr(t, key) == getattr(c, key) for key in keys):
            kind: Kind = "few-raised" if test.expect == "few-raised" else "different"
            if kind == "different" and t.seed is None and c.seed is not None:
                kind = "beyond-random"
            one = c.scale if kind == "beyond-random" else c.name
            found.setdefault((t.name, one), (kind, t, []))[2].append(c)
    return list(found.values())


class Counting:
    """Counts the comparisons of one results folder.

    Attributes:
      found: the results.
      drop_degenerate: leave out pairs with a degenerate reply, except where those are counted and
        where a condition is compared with random seeds.
    """

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

    def comparisons(self, test: TestSpec) -> list[Comparison]:
        """One for each pair of repeats that a test compares; random seeds are compared together."""
        if test.expect == "cosine-above":
            return [self._cosine(test)]
        conditions = self.found.run.conditions
        for name in (test.treated, test.control):
            if name not in [c.base for c in conditions]:
                reason = f"no condition {name!r} was run"
                return [_untested(test, test.treated, test.control, "", reason)]
        return [
            self._beyond(test, treated, controls)
            if kind == "beyond-random"
            else self._pair(test, treated, controls[0])
            for kind, treated, controls in repeats(test, conditions)
        ]

    def _pair(self, test: TestSpec, treated: Condition, control: Condition) -> Comparison:
        names, run = (treated.name, control.name, treated.mode), self.found.run
        untouched = twin = None
        kind = run.kind(test.prompts)
        if test.expect != "lower" and _returns(test, kind, control):
            untouched = controls.plain(run, control.mode)
            twin = unsteered_twin(run.conditions, treated) if test.expect == "higher" else None
            if untouched is None:
                return _untested(test, *names, "the model was not run without interventions")
        for condition in filter(None, (treated, control, untouched, twin)):
            if reason := self._unusable(test, condition):
                return _untested(test, *names, reason)
        pairs = self.labels.pair(treated.name, control.name, test.prompts)
        sizes = [self.labels.of(name, test.prompts).height for name in names[:2]]
        if pairs.height < min(sizes):
            return _untested(test, *names, "the two ran on different prompts")
        if self.drop_degenerate and test.outcome != "degenerate":
            pairs = outcomes.without_degenerate(pairs)
        if not pairs.height:
            return _untested(test, *names, "every pair has a degenerate reply")
        found = outcomes.flips(pairs, test.outcome)
        treated_k, control_k = found.both + found.raised, found.both + found.lowered
        counted = asdict(
            Counted(
                treated=treated.name,
                control=control.name,
                mode=treated.mode,
                family=test.prompts,
                outcome=test.outcome,
                n=found.n,
                treated_k=treated_k,
                control_k=control_k,
                raised=found.raised,
                lowered=found.lowered,
                treated_interval=stats.wilson(treated_k, found.n),
                control_interval=stats.wilson(control_k, found.n),
                difference=found.difference,
                difference_interval=(found.low, found.high),
            )
        )
        if test.expect in ("lower", "higher"):
            made = Different(**counted, expect=test.expect)
            if not (untouched and twin):
                return made
            both = self.labels.pair(twin.name, untouched.name, test.prompts)
            alone = outcomes.flips(both, test.outcome)
            return replace(made, alone_raised=alone.raised, alone_lowered=alone.lowered)
        before = self.labels.of(untouched.name, test.prompts) if untouched else None
        risk = outcomes.at_risk(pairs, test.outcome, kind, before)
        raised = int((risk["treated"] == test.outcome).sum())
        return FewRaised(**counted, margin=test.margin, at_risk=risk.height, raised_at_risk=raised)

    def _beyond(self, test: TestSpec, treated: Condition, seeds: Sequence[Condition]) -> Comparison:
        control = seeds[0].name.removesuffix(f" #{seeds[0].seed}")
        names = (treated.name, control, treated.mode)
        for condition in (treated, *seeds):
            if reason := self._unusable(test, condition):
                return _untested(test, *names, reason)
        pairs = [self.labels.pair(treated.name, c.name, test.prompts) for c in seeds]
        sizes = {self.labels.of(c.name, test.prompts).height for c in seeds}
        if len(sizes) > 1 or sizes != {pair.height for pair in pairs}:
            return _untested(test, *names, "the two ran on different prompts")
        assert test.expect in ("lower", "higher")
        return BeyondRandom(
            treated=treated.name,
            control=control,
            mode=treated.mode,
            family=test.prompts,
            outcome=test.outcome,
            expect=test.expect,
            n=pairs[0].height,
            treated_k=int((pairs[0]["treated"] == test.outcome).sum()),
            control_k=tuple(int((pair["control"] == test.outcome).sum()) for pair in pairs),
        )

    def _unusable(self, test: TestSpec, condition: Condition) -> str:
        """Why a condition's rows do not answer the test, or ""."""
        name, rows = condition.name, self.labels.of(condition.name, test.prompts)
        if condition.cancels_steering:
            return (
                f"{name} removes at its own layer the vector it adds, so it equals the projection "
                "alone: true by algebra, no evidence"
            )
        expected = self.found.run.size(condition, test.prompts)
        if not rows.height:
            return f"{name} has no {test.prompts} rows"
        if rows.height != expected:
            return f"{name} has {rows.height} of {expected} {test.prompts} rows"
        unscored = self.labels.counts(name, test.prompts)[1]
        if test.outcome == "bypass" and unscored:
            return f"no judge of harm scored {unscored} of {rows.height} rows of {name}"
        for judge in self._deciding(test):
            seen = int(rows["row_id"].is_in(self.shown[judge].implode()).sum())
            if seen < rows.height:
                return f"{judge} has seen {seen} of {rows.height} rows of {name}"
        return ""

    def _deciding(self, test: TestSpec) -> list[str]:
        """Judges that were run and whose verdict can give a reply the outcome or take it away.

        `verdicts.decide` has the rule. Where such a judge has seen only some of the rows, the rate
        would mix two instruments; a judge that has seen no reply to such prompts is not about them.
        """
        rows = self.found.rows.filter(family=test.prompts)["row_id"]
        verdicts = {
            name: table
            for name, table in self.found.verdicts.items()
            if table["row_id"].is_in(rows.implode()).any()
        }
        refusal = judges_of_refusal(verdicts)
        names = ["keyword", *(refusal if test.outcome == "refusal" else judges_of_harm(verdicts))]
        # An incoherent reply is not a refusal, even if a judge of harm says so.
        if test.outcome == "degenerate" or refusal:
            names += ["coherence", "degenerate"]
        return [name for name in names if name in verdicts]

    def _cosine(self, test: TestSpec) -> Comparison:
        try:
            both = [self._direction(name) for name in (test.treated, test.control)]
            values = reliability.cosines(both[0].vectors, both[1].vectors)
            layers = resolve_layers(test.at, self.found.run.layers, len(values), "claim")
        except (UserError, ValueError) as error:
            return _untested(test, test.treated, test.control, "", str(error))
        halves = [d.provenance.get("split_half", {}).get("mean", []) for d in both]
        known = layers if all(len(half) == len(values) for half in halves) else ()
        # As many digits as a receipt keeps, so that its words follow from its figures.
        return CosineAbove(
            treated=test.treated,
            control=test.control,
            margin=test.margin,
            cosines={layer: round(float(values[layer]), 6) for layer in layers},
            attainable={
                k: round(math.sqrt(math.prod(stats.spearman_brown(half[k]) for half in halves)), 6)
                for k in known
            },
        )

    def _direction(self, name: str) -> Direction:
        found = direction.load(self.found.folder / "directions.safetensors")
        if name not in found:
            raise UserError(f"direction {name!r} is not in directions.safetensors")
        if found[name].sha256 != self.found.run.directions.get(name):
            raise UserError(f"direction {name!r} is not the one that was run")
        return found[name]


def _untested(test: TestSpec, treated: str, control: str, mode: str, reason: str) -> NotTested:
    counts = test.expect != "cosine-above"
    return NotTested(
        treated=treated,
        control=control,
        mode=mode,
        expect=test.expect,
        family=test.prompts if counts else "",
        outcome=test.outcome if counts else "",
        reason=reason,
    )


def _returns(test: TestSpec, kind: prompts.Kind, control: Condition) -> bool:
    """Whether a test asks for refusals that the steering of its control has taken away."""
    steered = any(isinstance(op, Add) for op in control.operations)
    return steered and test.outcome == "refusal" and kind != "benign"
