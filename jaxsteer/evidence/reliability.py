"""How well directions are known, and whether two of them are more aligned than chance allows.

A direction is a difference of two means over samples. Samples share instructions and questions, so
they are not independent, and a null that ignores this finds nearly everything significant. So
halves and relabellings consist of whole *units*: an instruction with all its questions, a question
with all its instructions, or a prompt.

    reliability  cosine of the directions of two random halves of the units, repeated
    null         cosine with another direction after the units' labels are shuffled

Both need only sums of samples over units, which a sweep keeps until `measure` has written
geometry.json; without them `measure` makes the samples again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
from jaxtyping import Float

from jaxsteer.directions import direction as directions
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.extraction import FromChats, contrast
from jaxsteer.directions.samples import Parts, gather, kept
from jaxsteer.errors import UserError
from jaxsteer.files import locked, write_json
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Layers
from jaxsteer.study import prepare, results
from jaxsteer.study.results import Count, Sha256
from jaxsteer.study.spec import StudySpec
from jaxsteer.words import Progress

FORMAT: Final = "jaxsteer-geometry-2"
FILE = "geometry.json"
Units = Mapping[str, Parts]
Gathered = dict[str, Units | str]  # by direction: its samples, or why it has none of its own
WELL_KNOWN = 0.5  # smallest split-half cosine of a direction that is not marked


class Halves(msgspec.Struct, frozen=True, kw_only=True):
    """Agreement of random halves of one kind of unit, by layer.

    Attributes:
      units: how many there are to halve.
      mean, low, high: of the cosine of two halves, with its 95 % range.
      growth: the mean of smaller halves, by the number of units that each has a side.
    """

    units: Count
    mean: list[float]
    low: list[float]
    high: list[float]
    growth: dict[int, list[float]] = {}


class Measured(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One direction.

    Attributes:
      sha256: of its vectors.
      recomputed_cosine: of the samples' difference of means with the direction, smallest over
        layers; below 1 the samples are not those of the direction.
      reliability: by unit.
      not_measured: why there are no samples, or "".
    """

    sha256: Sha256
    recomputed_cosine: float | None = None
    reliability: dict[str, Halves] = {}
    not_measured: str = ""


class Null(msgspec.Struct, frozen=True, kw_only=True):
    """The cosine of a pair under shuffled labels, by layer.

    Attributes:
      relabellings: how many different shuffles there are.
      low, high: 95 % range; of two ranges the widest.
      p: two-sided; of two the larger.
    """

    relabellings: float
    low: list[float]
    high: list[float]
    p: list[float]


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Two directions, their cosine by layer, and its null where one of them has samples."""

    first: str
    second: str
    cosine: list[float]
    null: Null | None


class Measurements(msgspec.Struct, frozen=True, kw_only=True):
    """geometry.json.

    Attributes:
      format: of this file.
      key: of the run whose directions were measured.
      model, weights_sha256: the model that made the samples.
      halves, draws, seed: how many halvings and shuffles, and the seed of both.
      directions, pairs: what was measured.
    """

    format: Literal["jaxsteer-geometry-2"]
    key: Sha256
    model: str
    weights_sha256: Sha256
    halves: Count
    draws: Count
    seed: int
    directions: dict[str, Measured]
    pairs: list[Pair]


def measure(
    folder: Path, model: ChatModel, *, halves: int = 100, draws: int = 1000, seed: int = 0
) -> Measurements:
    """Measure every direction of a results folder; writes and returns its geometry.json.

    Raises:
      UserError: no results, results of another model, or of a study without directions.
    """
    found = results.load(folder)
    if not found.spec.directions:
        raise UserError(f"{folder}: its study has no directions to measure")
    if found.run.model.weights_sha256 != model.weights_sha256:
        raise UserError(f"{folder} was run on another model than {model.name}; give its --model")
    named = {
        name: direction
        for name, direction in directions.load(folder / "directions.safetensors").items()
        # Not what `extract` added to the file.
        if name in found.run.directions and direction.provenance.get("kind") != "random"
    }
    gathered: Gathered = {}
    with Progress("samples of directions", len(named), unit="directions") as progress:
        for name in named:
            gathered[name] = _samples_of(folder, found.spec, model, name)
            progress.advance(1)
    made = Measurements(
        format=FORMAT,
        key=found.run.key,
        model=model.name,
        weights_sha256=model.weights_sha256,
        halves=halves,
        draws=draws,
        seed=seed,
        directions={
            name: _described(direction, gathered[name], halves, seed)
            for name, direction in named.items()
        },
        pairs=[
            _pair(named[a], named[b], gathered, draws, seed)
            for a, b in itertools.combinations(named, 2)
        ],
    )
    with locked(folder):
        write_json(folder / FILE, msgspec.to_builtins(made))
    return made


def load(folder: Path) -> Measurements | None:
    """geometry.json of a results folder, or None when it was not measured.

    Raises:
      UserError: unreadable, or of another format.
    """
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Measurements)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; run `jaxsteer geometry` again") from None


def _samples_of(folder: Path, spec: StudySpec, model: ChatModel, name: str) -> Units | str:
    """The samples behind one direction of a study, or why it has none of its own."""
    path, kind = folder / prepare.SAMPLES / f"{name}.safetensors", spec.directions.get(name)
    if path.is_file():
        return kept(path)
    if isinstance(kind, FromChats):
        found = gather(model, contrast(kind, prepare.extraction_settings(spec)))
        return {unit: found.parts(unit) for unit in found.units}
    return "made of other directions, which are measured instead"


def _labelled(units: Units) -> Parts:
    """The units that are on one side only, so that a null may shuffle their labels."""
    return next(parts for parts in units.values() if len(np.unique(parts.ids)) == len(parts.ids))


def _described(direction: Direction, units: Units | str, halves: int, seed: int) -> Measured:
    if isinstance(units, str):
        return Measured(sha256=direction.sha256, not_measured=units)
    whole = _labelled(units)
    every = whole.weights(whole.positive[None], np.ones((1, len(whole.ids)), bool))
    alike = cosines(np.einsum("p,pld->ld", every[0], whole.sums), direction.vectors)
    nonzero = np.linalg.norm(direction.vectors, axis=1) > 0
    reliability = {}
    for unit, parts in units.items():
        split = parts.split_half(halves=halves, seed=seed)
        if split is None:
            continue
        mean = split.mean(axis=0)
        low, high = np.quantile(split, [0.025, 0.975], axis=0)
        sizes = ((n, parts.split_half(halves=halves, seed=seed, size=n)) for n in _sizes(parts))
        reliability[unit] = Halves(
            units=len(np.unique(parts.ids)),
            mean=_rounded(mean),
            low=_rounded(low),
            high=_rounded(high),
            growth={n: _rounded(s.mean(axis=0)) for n, s in sizes if s is not None},
        )
    return Measured(
        sha256=direction.sha256,
        recomputed_cosine=round(float(alike[nonzero].min(initial=1.0)), 6),
        reliability=reliability,
    )


def _pair(first: Direction, second: Direction, gathered: Gathered, draws: int, seed: int) -> Pair:
    observed = cosines(first.vectors, second.vectors)
    sides = (gathered[first.name], second.vectors), (gathered[second.name], first.vectors)
    known = [(_labelled(units), other) for units, other in sides if not isinstance(units, str)]
    nulls = [permutation_null(parts, other, draws=draws, seed=seed) for parts, other in known]
    null = None
    if nulls:
        # The alignment must survive shuffling either direction's labels: widest range, larger p.
        bounds = np.stack([np.quantile(null, [0.025, 0.975], axis=0) for null in nulls])
        p = np.max([two_sided_p(observed, null) for null in nulls], axis=0)
        null = Null(
            relabellings=min(relabellings(parts) for parts, _ in known),
            low=_rounded(bounds[:, 0].min(axis=0)),
            high=_rounded(bounds[:, 1].max(axis=0)),
            p=_rounded(p),
        )
    return Pair(first=first.name, second=second.name, cosine=_rounded(observed), null=null)


def _sizes(parts: Parts) -> list[int]:
    """1, 2, 4 and so on, and the largest number of units a side that a half can have."""
    most = min(parts.positive.sum(), (~parts.positive).sum()) // 2
    return sorted({int(most)} | {2**k for k in range(int(most).bit_length())})


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]


def cosines(first: Layers, second: Layers) -> Float[np.ndarray, " layer"]:
    """Cosine per layer in float64; 0 where either vector is zero."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.einsum("ld,ld->l", a, b)
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)


def permutation_null(
    parts: Parts, other: Layers, *, draws: int = 1000, seed: int = 0
) -> Float[np.ndarray, "draw layer"]:
    """Cosines with `other` of directions made from shuffled labels.

    Labels move between whole units, so the null keeps the anisotropy and everything the samples
    share, and the number of positive units. A unit is on one side only.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = np.stack([generator.permutation(parts.positive) for _ in range(draws)])
    weights = parts.weights(shuffled, np.ones_like(shuffled))
    found = []
    for sums, wide in zip(parts.sums.transpose(1, 0, 2), other.astype(np.float64), strict=True):
        norms = np.einsum("rp,rp->r", weights @ (sums @ sums.T), weights)
        norms = np.sqrt(np.maximum(norms, 0)) * np.linalg.norm(wide)
        dots = weights @ (sums @ wide)
        found.append(np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 1e-12))
    return np.stack(found, axis=1)


def relabellings(parts: Parts) -> int:
    """Number of different labellings of the units, with the true one."""
    return math.comb(len(parts.ids), int(parts.positive.sum()))


def two_sided_p(
    observed: Float[np.ndarray, " layer"], null: Float[np.ndarray, "draw layer"]
) -> Float[np.ndarray, " layer"]:
    """(1 + draws at least as far from 0 as the observed) / (1 + draws), per layer."""
    # A relabelling that happens to be the true one equals the observed but for rounding.
    beyond = (np.abs(null) >= np.abs(observed) - 1e-12).sum(axis=0)
    return (1 + beyond) / (1 + len(null))
