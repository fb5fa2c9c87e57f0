"""Interventions as data: what is done to the residual stream, written as arrays.

At a tap, for every touched token, in float32 and in this order (x is the stream, one token):

    x <- x + add                               add a vector
    x <- x - U^T (U x)                         remove the span of U's orthonormal rows
    x <- x + V^T (clip(V x, low, high) - V x)  keep projections within bounds

Zero `add`, zero rows of U and infinite bounds change nothing, so "no intervention" is an array
of zeros and a condition is a row of a stacked array. There are no hooks: the model applies these
arrays at each tap of every program, and one compiled program serves every condition.

This module does not know models, prompts or studies; it knows layers and widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsteer.errors import UserError
from jaxsteer.model.arrays import AnyArray

Tap = Literal["embed", "resid_mid", "resid_post"]
TAPS: tuple[Tap, ...] = ("embed", "resid_mid", "resid_post")
Scope = Literal["all", "prompt", "response"]
SCOPES: tuple[Scope, ...] = ("all", "prompt", "response")

Layers = Float[np.ndarray, "n_layers d_model"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteArrays:
    """The three operations at one tap; leading axes (condition or row, then layer) may be there.

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
    """What is applied where; stacked over conditions on a leading axis, or one row of that.

    Attributes:
      sites: arrays by tap name, each with a layer axis (length 1 for `embed`). A tap that is
        missing costs nothing; which taps are present is part of the compiled program's shape.
      on_prompt: whether prompt tokens are touched.
      on_response: whether generated tokens are touched, from the forward pass that reads the
        first generated token on. (That token itself is predicted by the last prompt token.)
    """

    sites: dict[str, SiteArrays]
    on_prompt: Bool[AnyArray, "*lead"]
    on_response: Bool[AnyArray, "*lead"]

    def rows(self, condition: np.ndarray) -> Interventions:
        """Gather one entry per row by condition index, on the host.

        Outside the compiled program on purpose: its shapes then depend on the number of rows
        only, so that adding a condition compiles nothing.
        """
        return jax.tree.map(lambda a: np.asarray(a)[condition], self)

    def layers(self, first: int, last: int) -> Interventions:
        """Layers `first` to `last` - 1 of stacked ones, then counted from 0; without `embed`."""
        return dataclasses.replace(
            self,
            sites={
                tap: jax.tree.map(lambda a: a[:, first:last], site)
                for tap, site in self.sites.items()
                if tap != "embed"
            },
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Add:
    """Add `scale` times the direction at each of `layers`.

    Attributes:
      direction: one vector per layer, natural norm.
      layers: 0-based blocks where it is applied.
      scale: multiples of the direction's natural norm.
      tap: where in the block.
      measured_at: use this layer's vector everywhere instead of each layer's own.
    """

    direction: Layers
    layers: tuple[int, ...]
    scale: float
    tap: Tap = "resid_post"
    measured_at: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Project:
    """Remove the span of `directions` at each of `layers`; fields as in `Add`."""

    directions: tuple[Layers, ...]
    layers: tuple[int, ...]
    tap: Tap = "resid_post"
    measured_at: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cap:
    """Clamp the projection onto the unit direction into [low, high]; other fields as in `Add`.

    Attributes:
      low: lower bound in residual-stream units, -inf for none.
      high: upper bound, +inf for none.
    """

    direction: Layers
    layers: tuple[int, ...]
    low: float = -np.inf
    high: float = np.inf
    tap: Tap = "resid_post"
    measured_at: int | None = None


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
    """Projections of a direction at every tap: no write to the stream keeps any of it.

    Equal to ablating block inputs, attention outputs and MLP outputs at all layers (Arditi et
    al. 2024, section 2.4): what no write puts in, the stream never has.
    """
    layers = tuple(range(len(direction)))
    sites: tuple[tuple[Tap, tuple[int, ...]], ...] = (
        ("embed", (0,)),
        ("resid_mid", layers),
        ("resid_post", layers),
    )
    return [
        Project(directions=(direction,), layers=at, tap=tap, measured_at=measured_at)
        for tap, at in sites
    ]


def _sites(tap: Tap, n_layers: int) -> int:
    return 1 if tap == "embed" else n_layers


def _vector(operation: Add | Project | Cap, direction: Layers, layer: int) -> np.ndarray:
    measured = layer if operation.measured_at is None else operation.measured_at
    return np.asarray(direction, np.float64)[measured]


def _check(operation: Operation, n_layers: int, d_model: int) -> None:
    directions = operation.directions if isinstance(operation, Project) else (operation.direction,)
    for direction in directions:
        if direction.shape != (n_layers, d_model):
            raise UserError(
                f"direction has shape {direction.shape}, the model needs ({n_layers}, {d_model}): "
                "it was extracted from another model; run `jaxsteer extract` on this one"
            )
        if not np.isfinite(direction).all():
            raise UserError("direction holds NaN or infinity; extract it again")
    if operation.tap not in TAPS:
        raise UserError(f"unknown tap {operation.tap!r}; the taps are {', '.join(TAPS)}")
    if not operation.layers:
        raise UserError(f"{type(operation).__name__} names no layer; name at least one")
    sites = _sites(operation.tap, n_layers)
    for layer in operation.layers:
        if not 0 <= layer < sites:
            raise UserError(
                f"unknown layer {operation.tap}.{layer}: this model has {operation.tap}.0 to "
                f"{operation.tap}.{sites - 1} (layers count from 0, negatives are not taken)"
            )
    if operation.measured_at is not None and not 0 <= operation.measured_at < n_layers:
        raise UserError(f"measured_at={operation.measured_at} is no layer of 0 to {n_layers - 1}")
    if isinstance(operation, Cap) and operation.low > operation.high:
        raise UserError(f"cap has low {operation.low} above high {operation.high}; swap them")


def _width(count: int) -> int:
    # 0, 1, 2, 4, 8...: a condition with one direction more seldom changes the compiled shape.
    return 0 if count == 0 else 1 << (count - 1).bit_length()


def compile_conditions(
    conditions: Sequence[Sequence[Operation]],
    scopes: Sequence[Scope],
    *,
    n_layers: int,
    d_model: int,
    taps: Sequence[Tap] = (),
) -> Interventions:
    """Stack conditions into arrays, one leading-axis entry per condition.

    Args:
      conditions: the operations of each condition; an empty list is no intervention.
      scopes: which tokens each condition touches.
      n_layers: blocks of the model.
      d_model: width of the residual stream.
      taps: taps to include even when no operation names them (`resid_post` always is).

    Returns:
      Float32 arrays: add [condition, layer, d_model], project [condition, layer, k, d_model],
      cap [condition, layer, c, d_model] per tap, k and c rounded up to powers of two.

    Raises:
      UserError: a layer, tap, scope, width or bound that this model does not have, or caps at
        one site whose directions are not orthogonal (their bounds could not all hold).
    """
    used = {"resid_post", *taps}
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
    add = np.zeros((len(conditions), sites, d_model))
    removed: dict[tuple[int, int], list[np.ndarray]] = {}
    capped: dict[tuple[int, int], list[tuple[np.ndarray, float, float]]] = {}
    for c, operations in enumerate(conditions):
        for operation in operations:
            if operation.tap != tap:
                continue
            for layer in operation.layers:
                if isinstance(operation, Add):
                    add[c, layer] += operation.scale * _vector(
                        operation, operation.direction, layer
                    )
                elif isinstance(operation, Project):
                    removed.setdefault((c, layer), []).extend(
                        _vector(operation, direction, layer) for direction in operation.directions
                    )
                else:
                    vector = _vector(operation, operation.direction, layer)
                    unit = vector / max(float(np.linalg.norm(vector)), 1e-30)
                    capped.setdefault((c, layer), []).append((unit, operation.low, operation.high))

    k = _width(max((len(v) for v in removed.values()), default=0))
    project = np.zeros((len(conditions), sites, k, d_model))
    for (c, layer), vectors in removed.items():
        project[c, layer, : len(vectors)] = orthonormal_rows(np.stack(vectors))

    n = _width(max((len(v) for v in capped.values()), default=0))
    cap = np.zeros((len(conditions), sites, n, d_model))
    low = np.full((len(conditions), sites, n), -np.inf)
    high = np.full((len(conditions), sites, n), np.inf)
    for (c, layer), entries in capped.items():
        units = np.stack([unit for unit, _, _ in entries])
        overlap = units @ units.T
        # Off the diagonal only: a zero vector has no length there and is inert, as elsewhere.
        if np.abs(overlap - np.diag(np.diag(overlap))).max() > 1e-4:
            raise UserError(
                f"caps at {tap}.{layer} have directions that are not orthogonal, so their bounds "
                "cannot all hold; cap one of them, or orthogonalise them first"
            )
        for i, (unit, lo, hi) in enumerate(entries):
            cap[c, layer, i], low[c, layer, i], high[c, layer, i] = unit, lo, hi
    return SiteArrays(
        add=add.astype(np.float32),
        project=project.astype(np.float32),
        cap=cap.astype(np.float32),
        cap_low=low.astype(np.float32),
        cap_high=high.astype(np.float32),
    )


def apply(
    h: Float[Array, "token d_model"],
    site: SiteArrays,
    touched: Bool[Array, " token"],
) -> tuple[Float[Array, "token d_model"], Float[Array, "token d_model"]]:
    """Apply one site's operations to the touched tokens of one row.

    Args:
      h: the residual stream, any float dtype.
      site: the arrays of one tap and layer (no leading axes).
      touched: tokens to change; padding is False here, always.

    Returns:
      The new stream in h's dtype, and the change in float32 that is left of the operations once
      rounded to that dtype (exactly zero where not touched).
    """
    x = h.astype(jnp.float32)
    y = x + site.add
    if site.project.shape[0]:
        y = y - _span(_coordinates(y, site.project), site.project)
    if site.cap.shape[0]:
        before = _coordinates(y, site.cap)
        y = y + _span(jnp.clip(before, site.cap_low, site.cap_high) - before, site.cap)
    # What equals x keeps its bits: x + 0 would turn a negative zero into a positive one.
    new = jnp.where(touched[:, None] & (y != x), y, x)
    # Rounded by name: a compiler may leave out a cast to h's dtype that is undone at once.
    kind = jnp.finfo(h.dtype)
    new = jax.lax.reduce_precision(new, kind.nexp, kind.nmant)
    return new.astype(h.dtype), new - x


def _coordinates(x, rows):
    # Highest precision: TPUs and GPUs would otherwise round float32 inputs to fewer bits.
    return jnp.einsum("td,kd->tk", x, rows, precision=jax.lax.Precision.HIGHEST)


def _span(coordinates, rows):
    return jnp.einsum("tk,kd->td", coordinates, rows, precision=jax.lax.Precision.HIGHEST)
