"""From a study's spec to conditions ready to compile: layers resolved, repeats and twins made.

Two things are done for the author. A projection that contains the vector just added at the same
tap gives exactly what projecting without adding gives, (I - uu^T)(h + a u) = (I - uu^T) h, so such
a condition is marked `cancels_steering`. And every knockout gets its twin without steering, named
`NAME, unsteered`, because only the difference between the two is evidence.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from jaxsteer.data import prompts
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.model.interventions import (
    Add,
    Layers,
    Operation,
    Project,
    Scope,
    everywhere,
    orthonormal_rows,
)
from jaxsteer.study.spec import LAYER_NAME, ConditionSpec, OperationSpec, StudySpec

UNSTEERED = ", unsteered"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """A condition ready to compile.

    Attributes:
      name: unique in the study: `MODE: BASE xSCALE #SEED`, parts that do not apply left out.
      base: the name in the spec (with `, unsteered` for a twin); claims name this.
      seed: of the random direction, or None.
      scale: strength of a repeat over `scales`, or None.
      mode: persona mode of the system prompt, or "".
      system: the whole system prompt.
      operations: what is applied.
      scope: which tokens are touched.
      benign: whether the benign prompts run under it too.
      cancels_steering: the projection undoes the addition by algebra, whatever the model does.
      unsteered_twin_of: name of the knockout this is the control of, or "".
      sites: what is applied where, readable: `add persona at resid_post.21 x4`.
    """

    name: str
    base: str
    seed: int | None
    scale: float | None
    mode: str
    system: str
    operations: list[Operation]
    scope: Scope
    benign: bool
    cancels_steering: bool
    unsteered_twin_of: str
    sites: tuple[str, ...]


def repeat_name(base: str, *, mode: str, scale: float | None, seed: int | None) -> str:
    """The name of a repeat of a condition.

    >>> repeat_name("random", mode="calm", scale=0.5, seed=3)
    'calm: random x0.5 #3'
    """
    before = f"{mode}: " if mode else ""
    strength = "" if scale is None else f" x{scale:g}"
    return f"{before}{base}{strength}" + ("" if seed is None else f" #{seed}")


def depth(fraction: float, n_layers: int) -> int:
    """The 0-based layer nearest to a fraction of depth: 0 is the first block, 1 the last."""
    return round(fraction * (n_layers - 1))


def windows(at: str) -> list[tuple[str, str]]:
    """First and last layer of each part of an expression, as they are written.

    >>> windows("21, steer+1..last")
    [('21', '21'), ('steer+1', 'last')]
    """
    parts = [piece.partition("..") for piece in at.replace(" ", "").split(",")]
    return [(first, last if dots else first) for first, dots, last in parts]


def read_layer(text: str, names: Collection[str], where: str) -> tuple[str, int]:
    """A layer's number or name, and its offset; `last` is a name too.

    >>> read_layer("steer+2", ["steer"], "at")
    ('steer', 2)

    Raises:
      UserError: not such a text, or an unknown name.
    """
    match = re.fullmatch(rf"({LAYER_NAME}|[0-9]{{1,6}})([+-][0-9]{{1,6}})?", text)
    if not match or not (match[1].isdecimal() or match[1] in (*names, "last")):
        raise UserError(
            f"{where}: cannot read layer {text!r}; use a number, or one of "
            f"{', '.join([*names, 'last'])} with an offset such as steer+2"
        )
    return match[1], int(match[2] or 0)


def resolve_layers(at: str, named: Mapping[str, int], n_layers: int, where: str) -> tuple[int, ...]:
    """Layers of an expression: `21`, `steer+2`, `22,24`, `22..29`, `steer+1..last`.

    Raises:
      UserError: not such an expression, an unknown name, or a layer the model does not have.
    """

    def one(text: str) -> int:
        base, offset = read_layer(text, named, where)
        layer = {**named, "last": n_layers - 1}.get(base)
        layer = (int(base) if layer is None else layer) + offset
        if not 0 <= layer < n_layers:
            window = re.fullmatch(r"([0-9]+)-([0-9]+)", text)
            hint = f"; write a window as {window[1]}..{window[2]}" if window else ""
            raise UserError(
                f"{where}: unknown layer resid_post.{layer} (from {text!r}); this model has "
                f"resid_post.0 to resid_post.{n_layers - 1}{hint}"
            )
        return layer

    found: set[int] = set()
    for first, last in windows(at):
        start, stop = one(first), one(last)
        if stop < start:
            raise UserError(
                f"{where}: window {at!r} ends (layer {stop}) before it starts ({start})"
            )
        found |= set(range(start, stop + 1))
    return tuple(sorted(found))


def cancels_steering(operations: Sequence[Operation]) -> bool:
    """Whether some addition lies wholly in the span projected out at the same tap and layer."""
    for added in operations:
        if not isinstance(added, Add):
            continue
        for layer in added.layers:
            spanned = [
                direction[layer if p.measured_at is None else p.measured_at]
                for p in operations
                if isinstance(p, Project) and p.tap == added.tap and layer in p.layers
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


def conditions(
    spec: StudySpec,
    directions: Mapping[str, Direction],
    named: Mapping[str, int],
    dose: float,
) -> list[Condition]:
    """Compile the spec's conditions: repeats over modes, strengths and seeds, then the twins.

    Args:
      spec: the study.
      directions: by name, including `random-SEED` for every seed the spec uses.
      named: layer numbers of the spec's layer names, and of `steer` and `refusal`.
      dose: what the strength "dose" means, in natural norms.

    Raises:
      UserError: an unknown direction, layer, mode or policy, an operation that says nothing, or a
        name that two conditions have.
    """
    policy = prompts.policy(spec.system).text
    found: list[Condition] = []
    for mode in spec.modes or [""]:
        system = prompts.mode(mode).with_policy(policy) if mode else policy
        for item in spec.condition:
            scales: list[float | None] = [*item.scales] or [None]
            seeds: list[int | None] = [*item.random_seeds] or [None]
            for scale, seed in itertools.product(scales, seeds):
                repeat = _Repeat(
                    item=item, mode=mode, scale=scale, seed=seed, study=spec.name, dose=dose
                )
                found.append(_condition(repeat, system, directions, named))
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
                    f"{twin.unsteered_twin_of!r}, made by itself; rename the condition"
                )
    return found + twins


def unsteered_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """The sites of a knockout's twin without steering; none where nothing was added, or all was.

    >>> unsteered_sites(["add persona at resid_post.3 x4", "project persona at resid_post.5"])
    ('project persona at resid_post.5',)
    """
    kept = tuple(site for site in sites if not site.startswith("add "))
    return kept if len(kept) < len(sites) else ()


def _twins(found: Sequence[Condition]) -> list[Condition]:
    # Within a mode: two may have the same text, and each is compared with what is its own.
    seen = {(c.mode, c.system, c.scope, c.sites) for c in found}
    twins = []
    for condition in found:
        kept: list[Operation] = [o for o in condition.operations if not isinstance(o, Add)]
        sites = unsteered_sites(condition.sites)
        identity = (condition.mode, condition.system, condition.scope, sites)
        if not sites or identity in seen:
            continue
        seen.add(identity)
        twins.append(
            dataclasses.replace(
                condition,
                name=condition.name + UNSTEERED,
                base=condition.base + UNSTEERED,
                operations=kept,
                sites=sites,
                benign=False,
                cancels_steering=False,
                unsteered_twin_of=condition.name,
            )
        )
    return twins


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Repeat:
    """One repeat of a condition of the spec: which mode, strength and seed."""

    item: ConditionSpec
    mode: str
    scale: float | None
    seed: int | None
    study: str
    dose: float

    @property
    def name(self) -> str:
        return repeat_name(self.item.name, mode=self.mode, scale=self.scale, seed=self.seed)

    @property
    def where(self) -> str:
        return f"study {self.study}, condition {self.name!r}"

    def strength(self, scale: float | str) -> float:
        if not isinstance(scale, str):
            return float(scale)
        match = re.fullmatch(r"(-?)(dose|each)", scale)
        value = {"dose": self.dose, "each": self.scale}[match[2]] if match else None
        if value is None:
            raise UserError(
                f'{self.where}: scale {scale!r} is no number, nor "dose", nor "each" in a '
                "condition with scales"
            )
        return -value if match and match[1] else value


def _condition(
    repeat: _Repeat,
    system: str,
    directions: Mapping[str, Direction],
    named: Mapping[str, int],
) -> Condition:
    operations: list[Operation] = []
    sites: list[str] = []
    for op in repeat.item.ops:
        made, site = _operation(repeat, op, directions, named)
        operations += made
        sites.append(site)
    if operations and all(isinstance(op, Add) and op.scale == 0 for op in operations):
        raise UserError(
            f"{repeat.where}: a strength of 0 changes nothing; drop it, since a condition without "
            "operations is the untouched model"
        )
    return Condition(
        name=repeat.name,
        base=repeat.item.name,
        seed=repeat.seed,
        scale=repeat.scale,
        mode=repeat.mode,
        system=system,
        operations=operations,
        scope=repeat.item.scope,
        benign=repeat.item.benign,
        cancels_steering=cancels_steering(operations),
        unsteered_twin_of="",
        sites=tuple(sites),
    )


def _operation(
    repeat: _Repeat,
    op: OperationSpec,
    directions: Mapping[str, Direction],
    named: Mapping[str, int],
) -> tuple[list[Operation], str]:
    where = repeat.where
    if bool(op.add) == bool(op.project):
        raise UserError(f"{where}: an operation needs exactly one of add and project")
    # A key that would do nothing is a study other than its author believes.
    for idle, needed in (
        (op.project and op.scale != 1.0, "scale is of add; remove it"),
        (op.project and op.norm_of, "norm_of is of add; remove it"),
        (op.norm_at and not op.norm_of, "norm_at goes with norm_of; add that, or remove it"),
        (op.everywhere and op.at, "at and everywhere exclude each other; remove one"),
    ):
        if idle:
            raise UserError(f"{where}: {needed}")

    def find(name: str) -> tuple[str, Layers]:
        key = f"random-{repeat.seed}" if name == "random" and repeat.seed is not None else name
        if key not in directions:
            raise UserError(
                f"{where}: unknown direction {name!r}; the study has {', '.join(directions)}"
                + ("; `random` needs random_seeds" if name == "random" else "")
            )
        return key, directions[key].vectors

    key, vectors = find(op.add or op.project)
    n_layers = len(vectors)

    def one_layer(field: str, at: str) -> int | None:
        found = resolve_layers(at, named, n_layers, where) if at else ()
        if len(found) > 1:
            raise UserError(f"{where}: {field} takes one layer, and {at!r} is {len(found)}")
        return found[0] if found else None

    measured = one_layer("measured_at", op.measured_at)
    source = "" if measured is None else f" (measured at resid_post.{measured})"
    if op.everywhere and op.project:
        return everywhere(vectors, measured), f"project {key} everywhere{source}"
    if not op.at or op.everywhere:
        raise UserError(f"{where}: {key} needs at = layers, or project with everywhere = true")
    layers = resolve_layers(op.at, named, n_layers, where)
    span = spans(layers)
    if op.project:
        done = Project(directions=(vectors,), layers=layers, measured_at=measured)
        return [done], f"project {key} at {span}{source}"
    scale = repeat.strength(op.scale)
    if op.norm_of:
        other, norms = find(op.norm_of)
        at = one_layer("norm_at", op.norm_at)
        vectors = _rescaled(vectors, norms, at)
        source += f" (norm of {other}" + (f" at resid_post.{at})" if at is not None else ")")
    added = Add(direction=vectors, layers=layers, scale=scale, measured_at=measured)
    return [added], f"add {key} at {span} x{scale:g}{source}"


def _rescaled(vectors: Layers, like: Layers, at: int | None) -> Layers:
    """The vectors with the norms of `like`, of its layer `at` everywhere if that is given."""
    norms = np.linalg.norm(like.astype(np.float64), axis=1)
    wanted = norms if at is None else np.full(len(norms), norms[at])
    own = np.maximum(np.linalg.norm(vectors.astype(np.float64), axis=1), 1e-30)
    return (vectors * (wanted / own)[:, None]).astype(np.float32)


def spans(layers: Sequence[int]) -> str:
    """Layers as text: (22, 24, 25, 26) is `resid_post.22, resid_post.24..26`."""
    groups: list[list[int]] = []
    for layer in layers:
        if groups and layer == groups[-1][-1] + 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return ", ".join(
        f"resid_post.{g[0]}" if len(g) == 1 else f"resid_post.{g[0]}..{g[-1]}" for g in groups
    )
