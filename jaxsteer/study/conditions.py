"""From a study's spec to its conditions: layers resolved, repeats and unsteered twins made.

Two things are done for the author. A projection that contains the vector just added at the same
tap gives exactly what projecting without adding gives, (I - uu^T)(h + a u) = (I - uu^T) h, so such
a condition is marked `cancels_steering`. And every knockout gets its twin without steering, named
`NAME, unsteered`, because only the difference between the two is evidence.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from jaxsteer.data import prompts
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.files import sha256_bytes
from jaxsteer.model import interventions
from jaxsteer.model.interventions import Layers, orthonormal_rows
from jaxsteer.study.layer_expr import resolve_layers
from jaxsteer.study.record import Add, Condition, Operation, Project, unsteered
from jaxsteer.study.spec import ConditionSpec, OperationSpec, StudySpec

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
    policy = prompts.policy(spec.system).text
    found = {mode: prompts.mode(mode).with_policy(policy) for mode in spec.modes}
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
      UserError: an unknown layer, mode or policy, an operation that says nothing, or a name that
        two conditions have.
    """
    found: list[Condition] = []
    systems = system_prompts(spec)
    for mode in spec.modes or [""]:
        for item in spec.condition:
            for repeat in repeats(item, [mode]):
                where = f"study {spec.name}, condition {repeat.name!r}"
                reader = _Reader(repeat=repeat, layers=layers, dose=dose, n=n_layers, where=where)
                operations = tuple(reader.operation(op) for op in item.ops)
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
    twice = {c.name for c in found if sum(d.name == c.name for d in found) > 1}
    if twice:
        raise UserError(f"study {spec.name}: {sorted(twice)[0]!r} repeats a seed, scale or mode")
    twins = _twins(found)
    # By their repeats' names as well as by the name that claims use for all of them.
    taken = {name for condition in found for name in (condition.name, condition.base)}
    for twin in twins:
        for name in (twin.name, twin.base):
            if name in taken:
                raise UserError(
                    f"study {spec.name}: {name!r} is the name of the twin without steering of "
                    f"{twin.unsteered_twin_of!r}, which the study gets automatically; rename the "
                    "condition"
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
class _Reader:
    """Reads the operations of one repeat: which layers, strengths and directions they name."""

    repeat: Repeat
    layers: Mapping[str, int]
    dose: float
    n: int
    where: str

    def operation(self, op: OperationSpec) -> Operation:
        if bool(op.add) == bool(op.project):
            raise UserError(f"{self.where}: an operation needs exactly one of add and project")
        # A key that would do nothing is a study other than its author believes.
        for idle, needed in (
            (op.project and op.scale != 1.0, "scale is of add; remove it"),
            (op.project and op.norm_of, "norm_of is of add; remove it"),
            (op.norm_at and not op.norm_of, "norm_at goes with norm_of; add that, or remove it"),
            (op.everywhere and op.at, "at and everywhere exclude each other; remove one"),
        ):
            if idle:
                raise UserError(f"{self.where}: {needed}")
        direction = self._direction(op.add or op.project)
        measured_at = self._one_layer("measured_at", op.measured_at)
        if op.everywhere and op.project:
            every = tuple(range(self.n))
            return Project(
                direction=direction, layers=every, measured_at=measured_at, everywhere=True
            )
        if not op.at or op.everywhere:
            raise UserError(
                f"{self.where}: {direction} needs at = layers, or project with everywhere = true"
            )
        layers = resolve_layers(op.at, self.layers, self.n, self.where)
        if op.project:
            return Project(direction=direction, layers=layers, measured_at=measured_at)
        return Add(
            direction=direction,
            layers=layers,
            scale=self._strength(op.scale),
            measured_at=measured_at,
            norm_of=self._direction(op.norm_of) if op.norm_of else None,
            norm_at=self._one_layer("norm_at", op.norm_at),
        )

    def _direction(self, name: str) -> str:
        if name != "random":
            return name
        if self.repeat.seed is None:
            raise UserError(f"{self.where}: `random` needs random_seeds")
        return f"random-{self.repeat.seed}"

    def _one_layer(self, field: str, at: str) -> int | None:
        found = resolve_layers(at, self.layers, self.n, self.where) if at else ()
        if len(found) > 1:
            raise UserError(f"{self.where}: {field} takes one layer, and {at!r} is {len(found)}")
        return found[0] if found else None

    def _strength(self, scale: float | str) -> float:
        if not isinstance(scale, str):
            return float(scale)
        match = re.fullmatch(r"(-?)(dose|each)", scale)
        value = {"dose": self.dose, "each": self.repeat.scale}[match[2]] if match else None
        if value is None:
            raise UserError(
                f'{self.where}: scale {scale!r} is no number, nor "dose", nor "each" in a '
                "condition with scales"
            )
        return -value if match and match[1] else value


def operations(
    condition: Condition, directions: Mapping[str, Direction]
) -> list[interventions.Operation]:
    """A condition's operations with the vectors of their directions."""
    made: list[interventions.Operation] = []
    for op in condition.operations:
        vectors = directions[op.direction].vectors
        match op:
            case Add():
                if op.norm_of is not None:
                    vectors = _rescaled(vectors, directions[op.norm_of].vectors, op.norm_at)
                made.append(
                    interventions.Add(
                        direction=vectors,
                        layers=op.layers,
                        scale=op.scale,
                        tap=op.tap,
                        measured_at=op.measured_at,
                    )
                )
            case Project(everywhere=True):
                made += interventions.everywhere(vectors, op.measured_at)
            case Project():
                made.append(
                    interventions.Project(
                        directions=(vectors,),
                        layers=op.layers,
                        tap=op.tap,
                        measured_at=op.measured_at,
                    )
                )
            case _:
                made.append(
                    interventions.Cap(
                        direction=vectors,
                        layers=op.layers,
                        low=-np.inf if op.low is None else op.low,
                        high=np.inf if op.high is None else op.high,
                        tap=op.tap,
                        measured_at=op.measured_at,
                    )
                )
    return made


def _rescaled(vectors: Layers, like: Layers, at: int | None) -> Layers:
    """The vectors with the norms of `like`, of its layer `at` everywhere if that is given."""
    norms = np.linalg.norm(like.astype(np.float64), axis=1)
    wanted = norms if at is None else np.full(len(norms), norms[at])
    own = np.maximum(np.linalg.norm(vectors.astype(np.float64), axis=1), 1e-30)
    return (vectors * (wanted / own)[:, None]).astype(np.float32)


def mark_cancelling(
    found: Sequence[Condition], directions: Mapping[str, Direction]
) -> list[Condition]:
    """The conditions, those marked whose projection undoes their own addition."""
    return [
        msgspec.structs.replace(c, cancels_steering=cancels_steering(operations(c, directions)))
        for c in found
    ]


def cancels_steering(made: Sequence[interventions.Operation]) -> bool:
    """Whether some addition lies wholly in the span projected out at the same tap and layer."""
    for added in made:
        if not isinstance(added, interventions.Add):
            continue
        for layer in added.layers:
            spanned = [
                direction[layer if p.measured_at is None else p.measured_at]
                for p in made
                if isinstance(p, interventions.Project) and p.tap == added.tap
                if layer in p.layers
                for direction in p.directions
            ]
            if not spanned:
                continue
            basis = orthonormal_rows(np.stack(spanned))
            vector = added.direction[layer if added.measured_at is None else added.measured_at]
            vector = np.asarray(vector, np.float64)
            left = np.linalg.norm(vector - basis.T @ (basis @ vector))
            if left <= 1e-5 * np.linalg.norm(vector):
                return True
    return False
