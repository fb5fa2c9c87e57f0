"""From a study's spec to its conditions: layers resolved, repeats and unsteered twins made.

Two things are done for the author. A projection that contains the vector just added at the same
tap gives exactly what projecting without adding gives, (I - uu^T)(h + a u) = (I - uu^T) h, so such
a condition is marked `cancels_steering`. And every knockout gets its twin without steering, named
`NAME, unsteered`, because only the difference between the two is evidence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from jaxsteer.data import prompts as data
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.files import sha256_bytes
from jaxsteer.model import interventions
from jaxsteer.model.interventions import Interventions, Layers
from jaxsteer.study.layer_expr import resolve_layer, resolve_layers
from jaxsteer.study.record import Add, Condition, Operation, Project, unsteered
from jaxsteer.study.spec import AddSpec, ConditionSpec, OperationSpec, StudySpec

UNSTEERED = ", unsteered"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeat:
    """One repeat of a condition of the spec.

    Attributes:
      base: the condition's name in the spec.
      mode: persona mode, or "".
      scale: strength, or None where the spec has no `scales`.
      seed: of the random direction, or None.
    """

    base: str
    mode: str
    scale: float | None
    seed: int | None

    @property
    def name(self) -> str:
        """The name of the condition.

        >>> Repeat(base="random", mode="calm", scale=0.5, seed=3).name
        'calm: random x0.5 #3'
        """
        before = f"{self.mode}: " if self.mode else ""
        strength = "" if self.scale is None else f" x{self.scale:g}"
        return f"{before}{self.base}{strength}" + ("" if self.seed is None else f" #{self.seed}")


def repeats(item: ConditionSpec, modes: Sequence[str]) -> list[Repeat]:
    """A condition's repeats over modes (none is [""]), strengths and seeds."""
    scales: list[float | None] = [*item.scales] or [None]
    seeds: list[int | None] = [*item.random_seeds] or [None]
    return [
        Repeat(base=item.name, mode=mode, scale=scale, seed=seed)
        for mode, scale, seed in itertools.product(modes, scales, seeds)
    ]


def system_prompts(spec: StudySpec) -> dict[str, str]:
    """The whole system prompt of each mode; of "" where the study has no modes.

    Raises:
      UserError: an unknown mode or policy.
    """
    policy = data.policy(spec.system).text
    found = {mode: data.mode(mode).with_policy(policy) for mode in spec.modes}
    return found or {"": policy}


def conditions(
    spec: StudySpec, layers: Mapping[str, int], dose: float, n_layers: int
) -> list[Condition]:
    """The spec's conditions: repeats over modes, strengths and seeds, then the twins.

    Whether one cancels its own steering depends on the directions: see `mark_cancelling`.

    Args:
      spec: the study.
      layers: by name: the spec's own, `steer` and `refusal`.
      dose: what the strength "dose" means, in natural norms.
      n_layers: blocks of the model.

    Raises:
      UserError: an unknown layer, mode or policy, additions of nothing only, or a name that two
        conditions have.
    """
    found: list[Condition] = []
    systems = system_prompts(spec)
    for mode in spec.modes or [""]:
        for item in spec.condition:
            for repeat in repeats(item, [mode]):
                where = f"study {spec.name}, condition {repeat.name!r}"
                place = _Place(layers=layers, dose=dose, n_layers=n_layers, where=where)
                operations = tuple(_operation(op, repeat, place) for op in item.ops)
                if operations and all(isinstance(o, Add) and o.scale == 0 for o in operations):
                    raise UserError(
                        f"{where}: a strength of 0 changes nothing; drop it, since a condition "
                        "without operations is the untouched model"
                    )
                found.append(
                    Condition(
                        name=repeat.name,
                        base=repeat.base,
                        seed=repeat.seed,
                        scale=repeat.scale,
                        mode=mode,
                        operations=operations,
                        scope=item.scope,
                        benign=item.benign,
                        cancels_steering=False,
                        unsteered_twin_of="",
                        system_sha256=sha256_bytes(systems[mode].encode()),
                    )
                )
    names = [condition.name for condition in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"study {spec.name}: {min(twice)!r} repeats a seed, scale or mode")
    twins = _twins(found)
    # By their repeats' names as well as by the name that claims use for all of them.
    taken = {*names, *(condition.base for condition in found)}
    for twin in twins:
        for name in taken & {twin.name, twin.base}:
            raise UserError(
                f"study {spec.name}: {name!r} is the name of the automatic twin without steering "
                f"of {twin.unsteered_twin_of!r}; rename the condition"
            )
    return found + twins


def unsteered_twin(conditions: Sequence[Condition], condition: Condition) -> Condition | None:
    """The control of a knockout: the same projection in the same mode, without the addition.

    Knockouts that differ in what they add share one.
    """
    kept = unsteered(condition.operations)
    wanted = (condition.mode, condition.scope, kept)
    twins = (c for c in conditions if (c.mode, c.scope, c.operations) == wanted)
    return next(twins, None) if kept else None


def _twins(found: Sequence[Condition]) -> list[Condition]:
    twins: list[Condition] = []
    for condition in found:
        kept = unsteered(condition.operations)
        if kept and unsteered_twin([*found, *twins], condition) is None:
            twins.append(
                msgspec.structs.replace(
                    condition,
                    name=condition.name + UNSTEERED,
                    base=condition.base + UNSTEERED,
                    operations=kept,
                    benign=False,
                    unsteered_twin_of=condition.name,
                )
            )
    return twins


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """What the expressions of a spec mean in one run: layers by name, the dose, the model's depth.

    `where` begins the message of an error.
    """

    layers: Mapping[str, int]
    dose: float
    n_layers: int
    where: str

    def all(self, at: str) -> tuple[int, ...]:
        return resolve_layers(at, self.layers, self.n_layers, self.where)

    def one(self, at: str | None) -> int | None:
        return None if at is None else resolve_layer(at, self.layers, self.n_layers, self.where)


def _operation(op: OperationSpec, repeat: Repeat, place: _Place) -> Operation:
    def named(direction: str) -> str:
        return f"random-{repeat.seed}" if direction == "random" else direction

    direction, measured_at = named(op.direction), place.one(op.measured_at)
    if isinstance(op, AddSpec):
        unit = {"norm": 1.0, "dose": place.dose, "each": repeat.scale or 0.0}[op.unit]
        return Add(
            direction=direction,
            layers=place.all(op.at),
            scale=op.scale * unit,
            measured_at=measured_at,
            norm_of=named(op.norm.direction) if op.norm else None,
            norm_at=place.one(op.norm.at) if op.norm else None,
        )
    return Project(
        direction=direction,
        layers=tuple(range(place.n_layers)) if op.at is None else place.all(op.at),
        measured_at=measured_at,
        everywhere=op.at is None,
    )


def operations(
    condition: Condition, directions: Mapping[str, Direction]
) -> list[interventions.Operation]:
    """A condition's operations with the vectors of their directions."""
    made: list[interventions.Operation] = []
    for op in condition.operations:
        vectors = directions[op.direction].vectors
        place: dict[str, Any] = {
            "layers": op.layers, "tap": op.tap, "measured_at": op.measured_at
        }  # fmt: skip
        if isinstance(op, Add):
            if op.norm_of is not None:
                vectors = _rescaled(vectors, directions[op.norm_of].vectors, op.norm_at)
            made.append(interventions.Add(direction=vectors, scale=op.scale, **place))
        elif isinstance(op, Project):
            removed = interventions.Project(directions=(vectors,), **place)
            made += (
                interventions.everywhere(vectors, op.measured_at) if op.everywhere else [removed]
            )
        else:
            low, high = (
                -np.inf if op.low is None else op.low,
                np.inf if op.high is None else op.high,
            )
            made.append(interventions.Cap(direction=vectors, low=low, high=high, **place))
    return made


def _rescaled(vectors: Layers, like: Layers, at: int | None) -> Layers:
    """The vectors with the norms of `like`, of its layer `at` everywhere if that is given."""
    norms = np.linalg.norm(like.astype(np.float64), axis=1)
    wanted = norms if at is None else np.full(len(norms), norms[at])
    own = np.maximum(np.linalg.norm(vectors.astype(np.float64), axis=1), 1e-30)
    return (vectors * (wanted / own)[:, None]).astype(np.float32)


def stacked(
    found: Sequence[Condition],
    directions: Mapping[str, Direction],
    *,
    n_layers: int,
    d_model: int,
) -> Interventions:
    """The operations of all conditions as arrays, stacked in their order."""
    return interventions.compile_conditions(
        [operations(condition, directions) for condition in found],
        [condition.scope for condition in found],
        n_layers=n_layers,
        d_model=d_model,
    )


def mark_cancelling(found: Sequence[Condition], arrays: Interventions) -> list[Condition]:
    """The conditions, those marked that project out all they add at some tap and layer.

    Args:
      found: the conditions.
      arrays: their operations, from `stacked`.
    """
    cancels = np.zeros(len(found), bool)
    for site in arrays.sites.values():
        for c, (added, basis) in enumerate(zip(site.add, site.project, strict=True)):
            added = added.astype(np.float64)
            removed = np.einsum("lkd,lk->ld", basis, np.einsum("lkd,ld->lk", basis, added))
            size = np.linalg.norm(added, axis=1)
            left = np.linalg.norm(added - removed, axis=1)
            cancels[c] |= ((size > 0) & (left <= 1e-5 * size)).any()
    return [
        msgspec.structs.replace(condition, cancels_steering=bool(cancel))
        for condition, cancel in zip(found, cancels, strict=True)
    ]
