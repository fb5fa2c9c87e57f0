"""A study: a TOML file that says what is run, and its compilation into conditions.

Layers are named in the file: `steer` is chosen by the selection rule, others are fractions of
depth or offsets. `at = "steer+2"` is one layer, `at = "steer+1..last"` a window. Two things are
done for the author. A projection that contains the vector just added at the same tap gives exactly
what projecting without adding gives, (I - uu^T)(h + a u) = (I - uu^T) h, so such a condition is
marked `cancels_steering`. And every knockout gets its twin without steering, named
`NAME, unsteered`, because only the difference between the two is evidence.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from jaxsteer.directions import Direction
from jaxsteer.errors import UserError
from jaxsteer.interventions import (
    Add,
    Operation,
    Project,
    Scope,
    everywhere,
    orthonormal_rows,
)

STUDIES = Path(__file__).parent / "studies"


class DataSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which prompts are reported on: `harmful` of StrongREJECT (0 = all 313), `benign` ours."""

    harmful: int
    benign: int
    seed: int


class DirectionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one direction is made: a trait by name, or refusal (HarmBench against harmless)."""

    kind: Literal["trait", "refusal"]
    trait: str = ""
    position: Literal["prompt_end", "response_start", "response_avg"] = "prompt_end"


class SelectionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The selection rules' inputs; layers are fractions of depth, scales multiples of the norm."""

    prompts: int
    layers: list[float]
    scales: list[float]
    max_new_tokens: int = 24
    max_degenerate: float = 0.1
    refusal_train: int = 128
    refusal_validation: int = 16
    refusal_layers: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    refusal_openings: tuple[str, ...] = ("I",)
    kl_limit: float = 0.1
    allow_near_miss: bool = False


class DecodingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Decoding; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 32


class OperationSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One operation: `add` or `project` names a direction, `at` says where.

    `scale` is a number of natural norms or "dose", the strength the selection rule chose.
    `everywhere` projects at embed, every resid_mid and every resid_post instead of `at`.
    `measured_at` names the layer whose vector is used; by default each layer uses its own.
    """

    add: str = ""
    project: str = ""
    at: str = ""
    scale: float | str = 1.0
    everywhere: bool = False
    measured_at: str = ""


class ConditionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A named condition; `random_seeds` repeats it with `random` replaced by each seed's vector."""

    name: str
    ops: list[OperationSpec] = []
    scope: Literal["all", "prompt", "response"] = "all"
    benign: bool = False
    random_seeds: list[int] = []


class StudySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole study file."""

    name: str
    system: str
    data: DataSpec
    decoding: DecodingSpec
    directions: dict[str, DirectionSpec]
    selection: SelectionSpec
    layers: dict[str, float]
    condition: list[ConditionSpec]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """A condition ready to compile.

    Attributes:
      name: unique in the study.
      operations: what is applied.
      scope: which tokens are touched.
      benign: whether the benign prompts run under it too.
      cancels_steering: the projection undoes the addition by algebra, whatever the model does.
      unsteered_twin_of: the knockout this is the control of, or "".
      sites: human-readable taps and strengths, such as `add persona at resid_post.21 x4`.
    """

    name: str
    operations: list[Operation]
    scope: Scope
    benign: bool
    cancels_steering: bool
    unsteered_twin_of: str
    sites: tuple[str, ...]


def load(source: str | Path) -> StudySpec:
    """Read a study by path, or by name from the ones shipped.

    Raises:
      UserError: no such study, broken TOML, an unknown key, a wrong type, or names that clash.
    """
    path = Path(source)
    if not path.suffix:
        path = STUDIES / f"{source}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in STUDIES.glob("*.toml")))
        raise UserError(f"no study {source}; give a .toml file or one of: {shipped}")
    try:
        spec = msgspec.toml.decode(path.read_bytes(), type=StudySpec)
    except msgspec.ValidationError as error:
        raise UserError(f"{path.name}: {error}; see the fields in jaxsteer/study.py") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is not valid TOML: {error}") from None
    names = [c.name for c in spec.condition]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path.name}: condition {name!r} appears twice; rename one")
    return spec


def depth(fraction: float, n_layers: int) -> int:
    """The 0-based layer nearest to a fraction of depth: 0 is the first block, 1 the last."""
    if not 0 <= fraction <= 1:
        raise UserError(f"layer fraction {fraction} is not between 0 and 1")
    return round(fraction * (n_layers - 1))


def resolve_layers(at: str, named: Mapping[str, int], n_layers: int, where: str) -> tuple[int, ...]:
    """Layers of an expression: `21`, `steer+2`, `22..29`, `steer+1..last`.

    Raises:
      UserError: not such an expression, an unknown name, or a layer the model does not have.
    """

    def one(text: str) -> int:
        match = re.fullmatch(r"([a-z_]+|\d+)([+-]\d+)?", text)
        names = {**named, "last": n_layers - 1}
        if not match or not (match[1].isdigit() or match[1] in names):
            raise UserError(
                f"{where}: cannot read layer {text!r}; use a number, or one of "
                f"{', '.join(names)} with an offset such as steer+2"
            )
        layer = (int(match[1]) if match[1].isdigit() else names[match[1]]) + int(match[2] or 0)
        if not 0 <= layer < n_layers:
            raise UserError(
                f"{where}: unknown layer resid_post.{layer} (from {text!r}); this model has "
                f"resid_post.0 to resid_post.{n_layers - 1}"
            )
        return layer

    first, dots, last = at.replace(" ", "").partition("..")
    start = one(first)
    stop = one(last) if dots else start
    if stop < start:
        raise UserError(f"{where}: window {at!r} ends (layer {stop}) before it starts ({start})")
    return tuple(range(start, stop + 1))


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
    """Compile the spec's conditions, expand random seeds, and add the unsteered twins.

    Args:
      spec: the study.
      directions: by name, including `random-SEED` for every seed the spec uses.
      named: layer numbers of the spec's layer names and of `steer`.
      dose: what the strength "dose" means, in natural norms.

    Raises:
      UserError: an unknown direction or layer, or an operation that says nothing.
    """
    found: list[Condition] = []
    for item in spec.condition:
        seeds: list[int | None] = [*item.random_seeds] or [None]
        for seed in seeds:
            name = item.name if seed is None else f"{item.name} #{seed}"
            found.append(_condition(item, name, seed, directions, named, dose, spec.name))
    seen = {condition.sites for condition in found}
    twins = []
    for condition in found:
        projected = any(isinstance(o, Project) for o in condition.operations)
        kept: list[Operation] = [o for o in condition.operations if not isinstance(o, Add)]
        sites = tuple(s for s in condition.sites if not s.startswith("add "))
        if projected and len(kept) < len(condition.operations) and sites not in seen:
            seen.add(sites)
            twins.append(
                dataclasses.replace(
                    condition,
                    name=f"{condition.name}, unsteered",
                    operations=kept,
                    sites=sites,
                    benign=False,
                    cancels_steering=False,
                    unsteered_twin_of=condition.name,
                )
            )
    return found + twins


def _condition(
    item: ConditionSpec,
    name: str,
    seed: int | None,
    directions: Mapping[str, Direction],
    named: Mapping[str, int],
    dose: float,
    study: str,
) -> Condition:
    where = f"study {study}, condition {name!r}"
    operations: list[Operation] = []
    sites: list[str] = []
    for op in item.ops:
        if bool(op.add) == bool(op.project):
            raise UserError(f"{where}: an operation needs exactly one of add and project")
        called = op.add or op.project
        key = f"random-{seed}" if called == "random" and seed is not None else called
        if key not in directions:
            raise UserError(
                f"{where}: unknown direction {called!r}; the study has {', '.join(directions)}"
            )
        vectors = directions[key].vectors
        n_layers = len(vectors)
        measured = (
            resolve_layers(op.measured_at, named, n_layers, where)[0] if op.measured_at else None
        )
        source = "" if measured is None else f" (measured at resid_post.{measured})"
        if op.add:
            if not op.at:
                raise UserError(f"{where}: add {called} needs at = a layer")
            layers = resolve_layers(op.at, named, n_layers, where)
            scale = _scale(op.scale, dose, where)
            operations.append(
                Add(direction=vectors, layers=layers, scale=scale, measured_at=measured)
            )
            sites.append(f"add {key} at {_span(layers)} x{scale:g}{source}")
        elif op.everywhere:
            operations += everywhere(vectors, measured)
            sites.append(f"project {key} everywhere{source}")
        else:
            if not op.at:
                raise UserError(
                    f"{where}: project {called} needs at = layers, or everywhere = true"
                )
            layers = resolve_layers(op.at, named, n_layers, where)
            operations.append(Project(directions=(vectors,), layers=layers, measured_at=measured))
            sites.append(f"project {key} at {_span(layers)}{source}")
    return Condition(
        name=name,
        operations=operations,
        scope=item.scope,
        benign=item.benign,
        cancels_steering=cancels_steering(operations),
        unsteered_twin_of="",
        sites=tuple(sites),
    )


def _scale(scale: float | str, dose: float, where: str) -> float:
    if isinstance(scale, str):
        match = re.fullmatch(r"(-?)dose", scale)
        if not match:
            raise UserError(f'{where}: scale {scale!r} is neither a number nor "dose"')
        return -dose if match[1] else dose
    return float(scale)


def _span(layers: Sequence[int]) -> str:
    first, last = layers[0], layers[-1]
    return f"resid_post.{first}" if first == last else f"resid_post.{first}..{last}"
