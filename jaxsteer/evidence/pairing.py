"""Which condition is a control of which, from what both do to the residual stream.

random     the same operations with a random direction in the place of another
neutral    the same operations with the direction `neutral` in the place of another
unsteered  the same projections without the addition (`study.conditions.unsteered_twin`)
matched    the same addition, and a random vector of a stated norm subtracted where the condition
           projects out a direction
swapped    the same two additions, each at the other's layers
plain      no operations

A control and its condition always share their mode and the steered tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from jaxsteer.study.record import Add, Condition, Layers, Operation, RunRecord

NEUTRAL = "neutral"


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
    wanted = {
        (one.direction, one.scale, two.layers),
        (two.direction, two.scale, one.layers),
    }
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
