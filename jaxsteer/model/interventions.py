"""Interventions as data: the operations on the residual stream, written as arrays.

At a tap, for every steered token, in float32 and in this order (x is the stream at one token):

    x <- x + add                               add a vector
    x <- x - U^T (U x)                         remove the span of U's orthonormal rows
    x <- x + V^T (clip(V x, low, high) - V x)  keep projections within bounds

Zero `add`, zero rows of U and infinite bounds change nothing, so "no intervention" is an array
of zeros and a condition is a row of a stacked array. There are no hooks: the model applies these
arrays at each tap of every program, and one compiled program serves every condition.

This module knows layers and widths, but no models, prompts or studies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence, Sized
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsteer.errors import UserError

# On the device (jax) or on the host (numpy).
AnyArray = jax.Array | np.ndarray
Tap = Literal["embed", "resid_mid", "resid_post"]
TAPS: tuple[Tap, ...] = ("embed", "resid_mid", "resid_post")
Scope = Literal["all", "prompt", "response"]
SCOPES: tuple[Scope, ...] = ("all", "prompt", "response")

Layers = Float[np.ndarray, "n_layers d_model"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteArrays:
    """The three operations at one tap, with leading axes for condition or row, then layer.

    Attributes:
      add: vector added, in residual-stream units; zeros are inert.
      project: orthonormal rows whose span is removed; zero rows are inert.
      cap: orthonormal rows whose projections are clamped; zero rows are inert.
      cap_low: lower bound of each clamped projection; -inf is inert.
      cap_high: upper bound of each clamped projection; +inf is inert.
    """

    add: Float[AnyArray, "*lead d_model"]
    project: Float[AnyArray, "*lead k d_model"]
    cap: Float[AnyArray, "*lead c d_model"]
    cap_low: Float[AnyArray, "*lead c"]
    cap_high: Float[AnyArray, "*lead c"]

    def at(self, layer: int) -> SiteArrays:
        """The arrays of one layer: drops a leading layer axis."""
        return jax.tree.map(lambda a: a[layer], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Interventions:
    """The arrays of one condition, or of several stacked on a leading axis.

    Attributes:
      sites: arrays by tap name, each with a layer axis (length 1 for `embed`). A missing tap costs
        nothing; which taps are present is part of the compiled program's shape.
      on_prompt: whether prompt tokens are steered.
      on_response: whether generated tokens are steered, beginning with the forward pass that reads
        the first generated token. (The last prompt token predicts that token.)
    """

    sites: dict[str, SiteArrays]
    on_prompt: Bool[AnyArray, "*lead"]
    on_response: Bool[AnyArray, "*lead"]

    def rows(self, condition: np.ndarray) -> Interventions:
        """Gather one entry per row by condition index, on the host.

        Done outside the compiled program, whose shapes then depend on the number of rows alone:
        adding a condition compiles nothing.
        """
        return jax.tree.map(lambda a: np.asarray(a)[condition], self)

    def layers(self, first: int, last: int) -> Interventions:
        """Layers `first` to `last` - 1 of stacked conditions, numbered from 0, without `embed`."""
        below = {tap: site for tap, site in self.sites.items() if tap != "embed"}
        return dataclasses.replace(self, sites=jax.tree.map(lambda a: a[:, first:last], below))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Operation:
    """Where an operation applies.

    Attributes:
      layers: 0-based blocks.
      tap: where in the block.
      measured_at: use this layer's vector everywhere instead of each layer's own.
    """

    layers: tuple[int, ...]
    tap: Tap = "resid_post"
    measured_at: int | None = None

    def vector(self, direction: Layers, layer: int) -> Float[np.ndarray, " d_model"]:
        """The vector of `direction` that is used at a layer, float64."""
        measured = layer if self.measured_at is None else self.measured_at
        return np.asarray(direction, np.float64)[measured]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Add(_Operation):
    """Add `scale` times the direction at each of `layers`.

    Attributes:
      direction: one vector per layer, natural norm.
      scale: multiples of the direction's natural norm.
    """

    direction: Layers
    scale: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Project(_Operation):
    """Remove the span of `directions` at each of `layers`."""

    directions: tuple[Layers, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cap(_Operation):
    """Clamp the projection onto the unit direction into [low, high] at each of `layers`.

    Attributes:
      direction: one vector per layer; its norm does not matter.
      low: lower bound in residual-stream units, -inf for none.
      high: upper bound, +inf for none.
    """

    direction: Layers
    low: float = -np.inf
    high: float = np.inf


Operation = Add | Project | Cap


def orthonormal_rows(vectors: Float[np.ndarray, "k d_model"]) -> Float[np.ndarray, "k d_model"]:
    """An orthonormal basis of the rows' span, float64, padded with zero rows back to k.

    All directions of one projection are made orthonormal together: removing non-orthogonal
    directions one after another depends on the order and leaves a remainder. Rows that are
    (numerically) combinations of the others add nothing to the span and become zero rows.
    """
    rows = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    _, singular, basis = np.linalg.svd(rows, full_matrices=False)
    rank = int((singular > 1e-6).sum())
    out = np.zeros_like(rows)
    out[:rank] = basis[:rank]
    return out


def everywhere(direction: Layers, measured_at: int | None = None) -> list[Operation]:
    """Projections that remove a direction at every tap, so that the stream never contains it.

    Equal to ablating block inputs, attention outputs and MLP outputs at all layers (Arditi et
    al. 2024, section 2.4): these are all the writes to the stream.
    """
    made: list[Operation] = []
    for tap in TAPS:
        layers = tuple(range(_sites(tap, len(direction))))
        made.append(
            Project(directions=(direction,), layers=layers, tap=tap, measured_at=measured_at)
        )
    return made


def _sites(tap: Tap, n_layers: int) -> int:
    return 1 if tap == "embed" else n_layers


def _check(operation: Operation, n_layers: int, d_model: int) -> None:
    directions = operation.directions if isinstance(operation, Project) else (operation.direction,)
    for direction in directions:
        if direction.shape != (n_layers, d_model):
            raise UserError(
                f"direction has shape {direction.shape}, the model needs ({n_layers}, {d_model}): "
                "it was extracted from another model; run `jaxsteer extract` on this one"
            )
        if not np.isfinite(direction).all():
            raise UserError("direction contains NaN or infinity; extract it again")
    if operation.tap not in TAPS:
        raise UserError(f"unknown tap {operation.tap!r}; the taps are {', '.join(TAPS)}")
    if not operation.layers:
        raise UserError(f"{type(operation).__name__} names no layer; name at least one")
    tap, last = operation.tap, _sites(operation.tap, n_layers) - 1
    for layer in operation.layers:
        if not 0 <= layer <= last:
            raise UserError(
                f"unknown layer {tap}.{layer}: this model has {tap}.0 to {tap}.{last} (layers "
                "count from 0; negative numbers are not supported)"
            )
    if operation.measured_at is not None and not 0 <= operation.measured_at < n_layers:
        raise UserError(f"measured_at={operation.measured_at} is not in 0 to {n_layers - 1}")
    if isinstance(operation, Cap) and operation.low > operation.high:
        raise UserError(f"cap has low {operation.low} above high {operation.high}; swap them")


def compile_conditions(
    conditions: Sequence[Sequence[Operation]],
    scopes: Sequence[Scope],
    *,
    n_layers: int,
    d_model: int,
) -> Interventions:
    """Stack conditions into arrays, one leading-axis entry per condition.

    Args:
      conditions: the operations of each condition; an empty list is no intervention.
      scopes: which tokens each condition steers.
      n_layers: blocks of the model.
      d_model: width of the residual stream.

    Returns:
      Float32 arrays at `resid_post` and at every other tap that an operation names: add
      [condition, layer, d_model], project [condition, layer, k, d_model], cap [condition, layer, c,
      d_model], k and c rounded up to powers of two; k is at least 1.

    Raises:
      UserError: a layer, tap, scope, width or bound that this model does not have, or caps at
        one tap and layer whose directions are not orthogonal (their bounds could not all hold).
    """
    used = {"resid_post"}
    for operations in conditions:
        for operation in operations:
            _check(operation, n_layers, d_model)
            used.add(operation.tap)
    for scope in scopes:
        if scope not in SCOPES:
            raise UserError(f"unknown scope {scope!r}; the scopes are {', '.join(SCOPES)}")
    return Interventions(
        sites={
            tap: _compile_tap(conditions, tap, _sites(tap, n_layers), d_model)
            for tap in TAPS
            if tap in used
        },
        on_prompt=np.array([scope in ("all", "prompt") for scope in scopes]),
        on_response=np.array([scope in ("all", "response") for scope in scopes]),
    )


def _compile_tap(
    conditions: Sequence[Sequence[Operation]], tap: Tap, sites: int, d_model: int
) -> SiteArrays:
    lead = (len(conditions), sites)
    add = np.zeros((*lead, d_model))
    removed: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    capped: dict[tuple[int, int], list[tuple[np.ndarray, float, float]]] = defaultdict(list)
    for c, operations in enumerate(conditions):
        for o in operations:
            for layer in o.layers if o.tap == tap else ():
                if isinstance(o, Add):
                    add[c, layer] += o.scale * o.vector(o.direction, layer)
                elif isinstance(o, Project):
                    removed[c, layer] += [o.vector(each, layer) for each in o.directions]
                else:
                    vector = o.vector(o.direction, layer)
                    unit = vector / max(float(np.linalg.norm(vector)), 1e-30)
                    capped[c, layer].append((unit, o.low, o.high))

    # A zero row at least, so that the first projection compiles nothing.
    project = np.zeros((*lead, max(1, _width(removed)), d_model))
    for at, vectors in removed.items():
        project[at][: len(vectors)] = orthonormal_rows(np.stack(vectors))

    cap = np.zeros((*lead, _width(capped), d_model))
    low, high = np.full(cap.shape[:-1], -np.inf), np.full(cap.shape[:-1], np.inf)
    for at, entries in capped.items():
        units, lows, highs = map(np.stack, zip(*entries, strict=True))
        overlap = units @ units.T
        # Not the diagonal: a zero vector has no length, and is inert here as elsewhere.
        if np.abs(overlap - np.diag(np.diag(overlap))).max() > 1e-4:
            raise UserError(
                f"caps at {tap}.{at[1]} have directions that are not orthogonal, so their bounds "
                "cannot all hold; cap one of them, or orthogonalise them first"
            )
        n = len(entries)
        cap[at][:n], low[at][:n], high[at][:n] = units, lows, highs
    arrays = {"add": add, "project": project, "cap": cap, "cap_low": low, "cap_high": high}
    return SiteArrays(**{name: array.astype(np.float32) for name, array in arrays.items()})


def _width(entries: Mapping[tuple[int, int], Sized]) -> int:
    """Rows for the most entries at one place, a power of two: few shapes mean few programs."""
    most = max(map(len, entries.values()), default=0)
    return 1 << (most - 1).bit_length() if most else 0


# Highest precision: TPUs and GPUs would otherwise round float32 inputs to fewer bits.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def apply(
    h: Float[Array, "token d_model"],
    site: SiteArrays,
    steered: Bool[Array, " token"],
) -> tuple[Float[Array, "token d_model"], Float[Array, "token d_model"]]:
    """Apply one site's operations to the steered tokens of one row.

    Args:
      h: the residual stream, any float dtype.
      site: the arrays of one tap and layer (no leading axes).
      steered: the tokens to change; always False for padding.

    Returns:
      The new stream in h's dtype, and the change in float32 after rounding to that dtype (exactly
      zero where nothing is steered).
    """
    x = h.astype(jnp.float32)
    y = x + site.add
    if site.project.shape[0]:
        y = y - _einsum("tk,kd->td", _einsum("td,kd->tk", y, site.project), site.project)
    if site.cap.shape[0]:
        before = _einsum("td,kd->tk", y, site.cap)
        moved = jnp.clip(before, site.cap_low, site.cap_high) - before
        y = y + _einsum("tk,kd->td", moved, site.cap)
    # A value that equals x keeps its bits: x + 0 would make a negative zero positive.
    new = jnp.where(steered[:, None] & (y != x), y, x)
    # Rounded explicitly: a compiler may drop a cast to h's dtype and back.
    kind = jnp.finfo(h.dtype)
    new = jax.lax.reduce_precision(new, kind.nexp, kind.nmant)
    return new.astype(h.dtype), new - x
