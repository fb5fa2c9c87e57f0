"""Controls of a study: random envelopes, paired differences, and strengths.

A condition is a control of another when their operations have the same shape (what is done, where,
at which strength) and differ in the direction alone, which is `random` or `neutral` in the control.
Of several such conditions it is the one whose added vectors have the control's norms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from jaxsteer import stats
from jaxsteer.evidence import claims
from jaxsteer.evidence.claims import Count
from jaxsteer.study.conditions import unsteered_twin
from jaxsteer.study.record import Condition, RunRecord
from jaxsteer.study.results import Results
from jaxsteer.study.spec import ConditionSpec, OperationSpec, StudySpec

Outcome = Literal["refusal", "bypass", "degenerate"]
Share = Annotated[float, Meta(ge=0, le=1)]
Difference = Annotated[float, Meta(ge=-1, le=1)]
OUTCOMES: tuple[Outcome, ...] = ("refusal", "bypass", "degenerate")
STAND_INS = ("random", "neutral")


class RandomControl(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A condition against the same condition with random directions, one per seed.

    Attributes:
      control: name in the specification of the random condition.
      treated: name of the condition compared, or "" when the study has none of the same shape.
      n: seeds; low, mean, high: the rate under them.
      value: the rate of the treated condition.
      p_low, p_high: empirical one-sided p, at least 1 / (n + 1).
    """

    control: str
    treated: str
    family: str
    outcome: Outcome
    n: Count
    low: Share
    mean: Share
    high: Share
    value: Share | None
    p_low: Share | None
    p_high: Share | None


class PairedControl(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Two conditions on the same prompts, compared row by row.

    Attributes:
      kind: `neutral` the same steering with a direction that has nothing to do with refusal;
        `unsteered` a knockout and its twin without steering; `benign` a condition and the
        untouched model on benign prompts.
      raised, lowered: prompts with the outcome under `treated` alone, under `control` alone.
      difference: treated rate minus control rate, with the paired bootstrap 95 % interval.
    """

    kind: Literal["neutral", "unsteered", "benign"]
    treated: str
    control: str
    family: str
    outcome: Outcome
    n: Count
    raised: Count
    lowered: Count
    difference: Difference
    low: Difference
    high: Difference


class DoseResponse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One condition over its strengths, on the same prompts.

    Attributes:
      conditions: names, in order of strength.
      strengths: in natural norms.
      z, p: trend test within prompts (Cochran-Mantel-Haenszel correlation).
    """

    base: str
    mode: str
    family: str
    outcome: Outcome
    conditions: list[str]
    strengths: list[float]
    z: float
    p: Share


class Table:
    """The rows by condition and family.

    Attributes:
      unjudged: row ids of which nobody knows whether they are a bypass.
    """

    def __init__(self, found: Results) -> None:
        self.unjudged = claims.unjudged(found)
        self._labels: dict[tuple[str, str], list[tuple[str, str, bool]]] = {}
        self._families: dict[str, list[str]] = {}
        columns = found.rows.select("row_id", "condition", "family", "prompt_id", "label")
        for row, name, family, prompt, label in columns.iter_rows():
            if (name, family) not in self._labels:
                self._families.setdefault(name, []).append(family)
            group = self._labels.setdefault((name, family), [])
            group.append((prompt, label, row not in self.unjudged))

    def families(self, name: str) -> list[str]:
        """Families a condition was run on."""
        return self._families.get(name, [])

    def counts(self, name: str, family: str) -> tuple[Counter[str], int]:
        """(rows by label, rows of which nobody knows whether they are a bypass)."""
        group = self._labels.get((name, family), [])
        return Counter(label for _, label, _ in group), sum(not known for *_, known in group)

    def hits(self, name: str, family: str, outcome: str) -> tuple[set[str], set[str]] | None:
        """(all prompts, prompts with the outcome), or None where it is not known of every row."""
        group = self._labels.get((name, family), [])
        if not group or (outcome == "bypass" and not all(known for *_, known in group)):
            return None
        prompts = {prompt for prompt, _, _ in group}
        if len(prompts) < len(group):
            return None
        return prompts, {prompt for prompt, label, _ in group if label == outcome}


def _shape(op: OperationSpec) -> tuple[object, ...]:
    return bool(op.add), op.at, op.scale, op.everywhere


def _norms(spec: StudySpec, condition: ConditionSpec) -> list[tuple[str, str]]:
    """Whose norm each added vector has, and at which layers."""
    # Random directions are made as long as the persona, or as the first direction there is.
    first = "persona" if "persona" in spec.directions else next(iter(spec.directions), "random")
    return [
        (
            op.norm_of or (first if op.add == "random" else op.add),
            op.norm_at or op.measured_at or op.at,
        )
        for op in condition.ops
        if op.add
    ]


def treated_of(spec: StudySpec, control: ConditionSpec, stand_in: str) -> ConditionSpec | None:
    """The condition that `control` is a control of, by its operations' shape, or None.

    `stand_in` is the direction that takes another's place in the control. Where no condition of
    that shape has the control's norms, the first of them is taken.
    """

    def fits(other: ConditionSpec) -> bool:
        if len(other.ops) != len(control.ops) or other.scope != control.scope:
            return False
        if other.scales != control.scales or other.random_seeds:
            return False
        return all(
            _shape(own) == _shape(its)
            and (
                (own.add or own.project) == (its.add or its.project)
                or (
                    (own.add or own.project) == stand_in
                    and (its.add or its.project) not in STAND_INS
                )
            )
            for own, its in zip(control.ops, other.ops, strict=True)
        )

    names = [op.add or op.project for op in control.ops]
    if stand_in not in names:
        return None
    found = [c for c in spec.condition if c.name != control.name and fits(c)]
    alike = [c for c in found if _norms(spec, c) == _norms(spec, control)]
    return next(iter([*alike, *found]), None)


def random_controls(spec: StudySpec, run: RunRecord, rows: Table) -> list[RandomControl]:
    """Each condition with random seeds as an envelope, against the condition it controls."""
    found = []
    for item in spec.condition:
        if not item.random_seeds:
            continue
        treated = treated_of(spec, item, "random")
        repeats = [c for c in run.conditions if c.base == item.name]
        for mode, scale in dict.fromkeys((c.mode, c.scale) for c in repeats):
            seeds = [c for c in repeats if (c.mode, c.scale) == (mode, scale)]
            target = _same_repeat(run, treated, mode, scale)
            for family in rows.families(seeds[0].name):
                for outcome in OUTCOMES:
                    values = [_rate(rows, c, family, outcome) for c in seeds]
                    known = [value for value in values if value is not None]
                    if len(known) < len(seeds):
                        continue
                    value = _rate(rows, target, family, outcome) if target else None
                    found.append(_envelope(item.name, target, family, outcome, known, value))
    return found


def _same_repeat(
    run: RunRecord, item: ConditionSpec | None, mode: str, scale: float | None
) -> Condition | None:
    if item is None:
        return None
    wanted = (item.name, mode, scale)
    return next((c for c in run.conditions if (c.base, c.mode, c.scale) == wanted), None)


def _rate(rows: Table, condition: Condition, family: str, outcome: str) -> float | None:
    hits = rows.hits(condition.name, family, outcome)
    return None if hits is None else len(hits[1]) / len(hits[0])


def _envelope(
    control: str,
    target: Condition | None,
    family: str,
    outcome: Outcome,
    values: list[float],
    value: float | None,
) -> RandomControl:
    envelope = stats.envelope(values, 0.0 if value is None else value)
    return RandomControl(
        control=control,
        treated=target.name if target else "",
        family=family,
        outcome=outcome,
        n=envelope.n,
        low=envelope.low,
        mean=envelope.mean,
        high=envelope.high,
        value=value,
        p_low=None if value is None else envelope.p_low,
        p_high=None if value is None else envelope.p_high,
    )


def paired_controls(spec: StudySpec, run: RunRecord, rows: Table) -> list[PairedControl]:
    """Neutral directions, unsteered twins, and benign prompts against the untouched model."""
    made = (
        _paired(rows, kind, treated, control, family, outcome)
        for kind, treated, control, family, outcome in _pairs(spec, run, rows)
    )
    return [pair for pair in made if pair is not None]


def _pairs(
    spec: StudySpec, run: RunRecord, rows: Table
) -> Iterator[tuple[str, str, str, str, Outcome]]:
    for item in spec.condition:
        treated = treated_of(spec, item, "neutral")
        for control in [c for c in run.conditions if c.base == item.name and treated]:
            target = _same_repeat(run, treated, control.mode, control.scale)
            for family in rows.families(control.name) if target else ():
                for outcome in OUTCOMES:
                    yield "neutral", target.name if target else "", control.name, family, outcome
    for condition in run.conditions:
        twin = unsteered_twin(run.conditions, condition)
        for family in rows.families(twin.name) if twin else ():
            for outcome in OUTCOMES:
                yield "unsteered", condition.name, twin.name if twin else "", family, outcome
    for mode in dict.fromkeys(c.mode for c in run.conditions):
        plain = next((c for c in run.conditions if c.mode == mode and not c.operations), None)
        for condition in run.conditions if plain else ():
            if plain and condition.mode == mode and condition.operations:
                for outcome in OUTCOMES:
                    yield "benign", condition.name, plain.name, "benign", outcome


def _paired(
    rows: Table, kind: str, treated: str, control: str, family: str, outcome: Outcome
) -> PairedControl | None:
    first, second = rows.hits(treated, family, outcome), rows.hits(control, family, outcome)
    if first is None or second is None or first[0] != second[0]:
        return None
    raised, lowered, n = len(first[1] - second[1]), len(second[1] - first[1]), len(first[0])
    low, high = stats.paired_bootstrap(raised, lowered, n)
    return PairedControl(
        kind=kind,  # type: ignore[arg-type]
        treated=treated,
        control=control,
        family=family,
        outcome=outcome,
        n=n,
        raised=raised,
        lowered=lowered,
        difference=(raised - lowered) / n,
        low=low,
        high=high,
    )


def dose_responses(run: RunRecord, rows: Table) -> list[DoseResponse]:
    """Each condition that is repeated over strengths, with a trend test within prompts."""
    found = []
    groups = dict.fromkeys((c.base, c.mode, c.seed) for c in run.conditions if c.scale is not None)
    for group in groups:
        repeats = [c for c in run.conditions if (c.base, c.mode, c.seed) == group]
        repeats = sorted((c for c in repeats if c.scale is not None), key=lambda c: c.scale or 0.0)
        for family in rows.families(repeats[0].name):
            for outcome in OUTCOMES:
                hits = [rows.hits(c.name, family, outcome) for c in repeats]
                known = [h for h in hits if h is not None]
                prompts = known[0][0] if known else set()
                if len(known) < 2 or len(known) < len(hits) or any(h[0] != prompts for h in known):
                    continue
                table = np.array([[p in h[1] for h in known] for p in sorted(prompts)])
                strengths = [c.scale or 0.0 for c in repeats]
                z, p = stats.paired_trend(table, strengths)
                found.append(
                    DoseResponse(
                        base=group[0],
                        mode=group[1],
                        family=family,
                        outcome=outcome,
                        conditions=[c.name for c in repeats],
                        strengths=strengths,
                        z=z,
                        p=p,
                    )
                )
    return found
