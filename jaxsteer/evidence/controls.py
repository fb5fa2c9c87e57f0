"""The controls of a study: which condition is a control of which, and what they measure.

A control is found by what it does to the residual stream:

random     the same operations with a random direction in the place of another
neutral    the same operations with the direction `neutral` in the place of another
unsteered  the same projections without the addition (`study.conditions.unsteered_twin`)
matched    the same addition, and a random vector of a stated norm subtracted where the condition
           projects out a direction
swapped    the same two additions, each at the other's layers
plain      no operations

A control and its condition always share their mode and the steered tokens. The receipt shows what
is measured here: random envelopes, paired differences, and strengths.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
import numpy as np
from jaxtyping import Bool
from msgspec.structs import asdict

from jaxsteer import stats
from jaxsteer.evidence.outcomes import Flips, Labels, Share
from jaxsteer.study.conditions import unsteered_twin
from jaxsteer.study.results import Add, Condition, Count, Layers, Operation, Part, RunRecord

Outcome = Literal["refusal", "bypass", "degenerate"]
PairKind = Literal["neutral", "unsteered", "benign"]
NEUTRAL = "neutral"
OUTCOMES: tuple[Outcome, ...] = ("refusal", "bypass", "degenerate")


class RandomControl(Part, frozen=True):
    """A condition against the same condition with random directions, one per seed.

    Attributes:
      control: name in the specification of the random condition.
      treated: name of the condition compared, or "" when the study has none of the same shape.
      n: seeds; low, mean, high: the rate under them.
      value: the rate of the treated condition on the prompts of the control.
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

    def p(self, expect: str | None = None) -> float | None:
        """One-sided p on the side that a claim expects, or without one on the side of the value."""
        if self.value is None:
            return None
        side = expect or ("lower" if self.value <= self.mean else "higher")
        return self.p_low if side == "lower" else self.p_high


class PairedControl(Flips, frozen=True, kw_only=True):
    """Two conditions on the same prompts, compared row by row.

    Attributes:
      kind: `neutral` the same steering with a direction that has nothing to do with refusal;
        `unsteered` a knockout and its twin without steering; `benign` a condition and the
        untouched model on benign prompts.
      treated, control: names of the conditions.
      family, outcome: prompts compared on, and the label counted.
    """

    kind: PairKind
    treated: str
    control: str
    family: str
    outcome: Outcome


class DoseResponse(Part, frozen=True):
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


def random_controls(run: RunRecord, labels: Labels) -> Iterator[RandomControl]:
    """Each condition with random seeds as an envelope, against the condition it controls."""
    groups: dict[tuple[str, str, float | None], list[Condition]] = {}
    for c in run.conditions:
        if c.seed is not None and not c.unsteered_twin_of:
            groups.setdefault((c.base, c.mode, c.scale), []).append(c)
    for (base, _, _), seeds in groups.items():
        treated, first = random_control_of(run, seeds[0]), seeds[0].name
        for family, outcome in itertools.product(labels.families(first), OUTCOMES):
            rates = [labels.rate(c.name, family, outcome) for c in seeds]
            known = [rate for rate in rates if rate is not None]
            if len(known) < len(seeds):
                continue
            value = labels.rate(treated.name, family, outcome, like=first) if treated else None
            p = (None, None) if value is None else stats.among_random(known, value)
            yield RandomControl(
                control=base,
                treated=treated.name if treated else "",
                family=family,
                outcome=outcome,
                n=len(known),
                low=min(known),
                mean=statistics.fmean(known),
                high=max(known),
                value=value,
                p_low=p[0],
                p_high=p[1],
            )


def paired_controls(run: RunRecord, labels: Labels) -> Iterator[PairedControl]:
    """Neutral directions, unsteered twins, and benign prompts against the untouched model."""
    for kind, treated, control in _pairs(run):
        families = run.study.sets("benign") if kind == "benign" else labels.families(control.name)
        for family, outcome in itertools.product(families, OUTCOMES):
            flips = labels.flips(treated.name, control.name, family, outcome)
            if flips is not None:
                yield PairedControl(
                    kind=kind,
                    treated=treated.name,
                    control=control.name,
                    family=family,
                    outcome=outcome,
                    **asdict(flips),
                )


def _pairs(run: RunRecord) -> Iterator[tuple[PairKind, Condition, Condition]]:
    for c in run.conditions:
        treated = None if c.unsteered_twin_of else neutral_control_of(run, c)
        if treated is not None:
            yield "neutral", treated, c
    for c in run.conditions:
        twin = unsteered_twin(run.conditions, c)
        if twin is not None:
            yield "unsteered", c, twin
    for c in run.conditions:
        untouched = plain(run, c.mode)
        if untouched is not None and c.operations:
            yield "benign", c, untouched


def dose_responses(run: RunRecord, labels: Labels) -> Iterator[DoseResponse]:
    """Each condition that is repeated over strengths, with a trend test within prompts."""
    groups: dict[tuple[str, str, int | None], list[tuple[float, str]]] = {}
    for c in run.conditions:
        if c.scale is not None:
            groups.setdefault((c.base, c.mode, c.seed), []).append((c.scale, c.name))
    for (base, mode, _), repeats in groups.items():
        repeats.sort()
        strengths, names = [scale for scale, _ in repeats], [name for _, name in repeats]
        for family, outcome in itertools.product(labels.families(names[0]), OUTCOMES):
            table = _outcomes(labels, names, family, outcome)
            if table is not None:
                z, p = stats.paired_trend(table, strengths)
                yield DoseResponse(
                    base=base,
                    mode=mode,
                    family=family,
                    outcome=outcome,
                    conditions=names,
                    strengths=strengths,
                    z=z,
                    p=p,
                )


def _outcomes(
    labels: Labels, names: list[str], family: str, outcome: str
) -> Bool[np.ndarray, "prompt strength"] | None:
    """Which prompts have the outcome under which condition, if that is known of all of them."""
    rows = [labels.of(name, family).sort("prompt_id") for name in names]
    same = all(r["prompt_id"].equals(rows[0]["prompt_id"]) for r in rows)
    if len(names) < 2 or not same or not all(labels.known(n, family, outcome) for n in names):
        return None
    return np.stack([(r["label"] == outcome).to_numpy() for r in rows], axis=1)


def plain(run: RunRecord, mode: str) -> Condition | None:
    """The condition of a mode in which nothing is done to the model."""
    return next((c for c in run.conditions if c.mode == mode and not c.operations), None)


def is_random(run: RunRecord, operation: Operation) -> bool:
    """Whether an operation uses a random direction; all others are defined by the study."""
    return operation.direction not in run.study.directions


def random_control_of(run: RunRecord, control: Condition) -> Condition | None:
    """The condition that `control` repeats with a random direction, or None.

    Of several, those come first whose added vectors have the control's norms, then those that
    repeat over strengths as it does.
    """
    places = [is_random(run, op) for op in control.operations]
    return _same_elsewhere(run, control, places) if any(places) else None


def neutral_control_of(run: RunRecord, control: Condition) -> Condition | None:
    """The condition that `control` repeats with the direction `neutral`, chosen as for random."""
    places = [op.direction == NEUTRAL for op in control.operations]
    return _same_elsewhere(run, control, places) if any(places) else None


def _same_elsewhere(run: RunRecord, control: Condition, places: Sequence[bool]) -> Condition | None:
    """The condition with the control's operations, but meaningful directions at some places."""

    def same(own: Operation, other: Operation, place: bool) -> bool:
        if place and (is_random(run, other) or other.direction == NEUTRAL):
            return False
        direction = other.direction if place else own.direction
        return _shape(msgspec.structs.replace(own, direction=direction)) == _shape(other)

    found = [
        c
        for c in _comparable(run, control)
        if c.seed is None and len(c.operations) == len(places)
        if all(map(same, control.operations, c.operations, places))
    ]
    norms = _norms(run, control)
    return min(
        found,
        key=lambda c: (_norms(run, c) != norms, c.scale != control.scale),
        default=None,
    )


def _comparable(run: RunRecord, condition: Condition) -> list[Condition]:
    """Conditions of the study's own making with the same mode and steered tokens."""
    return [
        c
        for c in run.conditions
        if (c.mode, c.scope) == (condition.mode, condition.scope)
        if c.name != condition.name and not c.unsteered_twin_of
    ]


def _shape(operation: Operation) -> Operation:
    """The operation without where its vector and its norm were measured."""
    if isinstance(operation, Add):
        operation = msgspec.structs.replace(operation, norm_of=None, norm_at=None)
    return msgspec.structs.replace(operation, measured_at=None)


def _norms(run: RunRecord, condition: Condition) -> list[tuple[str, Layers]]:
    """Whose norm each added vector has, and of which layers."""
    # Random directions are made as long as the persona, or as the first direction there is.
    names = list(run.study.directions)
    first = "persona" if "persona" in names else (names or [""])[0]
    found = []
    for op in condition.operations:
        if isinstance(op, Add):
            own = first if is_random(run, op) else op.direction
            at = op.measured_at if op.norm_at is None else op.norm_at
            found.append((op.norm_of or own, op.layers if at is None else (at,)))
    return found


def swapped_controls(run: RunRecord, condition: Condition) -> list[Condition]:
    """The conditions that add the same two vectors, each at the other's layers."""
    if len(condition.operations) != 2:
        return []
    one, two = condition.operations
    if not (isinstance(one, Add) and isinstance(two, Add)):
        return []
    if one.direction == two.direction or one.layers == two.layers:
        return []
    wanted = {(one.direction, one.scale, two.layers), (two.direction, two.scale, one.layers)}
    return [
        c
        for c in _comparable(run, condition)
        if len(c.operations) == 2
        if {(op.direction, op.scale, op.layers) for op in c.operations if isinstance(op, Add)}
        == wanted
    ]


def matched_controls(run: RunRecord, condition: Condition) -> Iterator[tuple[Condition, Condition]]:
    """The conditions that subtract a random vector in the place of a knockout's projection.

    Yields:
      (such a condition, the condition with the addition alone).
    """
    added = tuple(op for op in condition.operations if isinstance(op, Add))
    knockout = any(
        not isinstance(op, Add) and not is_random(run, op) for op in condition.operations
    )
    if len(added) != 1 or not knockout:
        return
    others = _comparable(run, condition)
    for base in [c for c in others if c.operations == added][:1]:
        for c in others:
            rest = [op for op in c.operations if op != added[0]]
            if len(c.operations) == 2 and len(rest) == 1 and _subtracts_random(run, rest[0]):
                yield c, base


def _subtracts_random(run: RunRecord, operation: Operation) -> bool:
    return isinstance(operation, Add) and is_random(run, operation) and operation.scale < 0
