"""How well directions are known, and whether two of them are more aligned than chance allows.

A direction is a difference of two means over samples. Samples share instructions and questions, so
they are not independent, and a null that ignores this finds nearly everything significant. So
halves and relabellings consist of whole *units*: an instruction with all its questions, a question
with all its instructions, or a prompt.

    reliability  cosine of the directions of two random halves of the units, repeated
    null         cosine with another direction after the units' labels are shuffled
    isotropic    1 / sqrt(d_model), the spread of random vectors; for comparison only, since the
                 residual stream is far from isotropic

The first two use the samples' inner products per layer, so repeats cost little. `measure` does all
this for a study, whose directions it makes again sample by sample: geometry.json of its results.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsteer import stats
from jaxsteer.directions import direction as directions
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.extraction import FromChats, contrast
from jaxsteer.directions.samples import Samples, gather
from jaxsteer.errors import UserError
from jaxsteer.files import locked, write_json
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Layers
from jaxsteer.study import prepare, results
from jaxsteer.study.record import Count, Sha256
from jaxsteer.study.spec import StudySpec
from jaxsteer.words import Progress

FORMAT: Final = "jaxsteer-geometry-1"
FILE = "geometry.json"
WELL_KNOWN = 0.5  # smallest split-half cosine of a direction that is not marked


class Halves(msgspec.Struct, frozen=True, kw_only=True):
    """Agreement of random halves of one kind of unit, by layer.

    Attributes:
      units: how many there are to halve.
      mean, low, high: of the cosine of two halves, with its 95 % range.
      spearman_brown: the mean, stepped up to the full number of units.
      growth: the mean of smaller halves, by the number of units that each has a side.
    """

    units: Count
    mean: list[float]
    low: list[float]
    high: list[float]
    spearman_brown: list[float]
    growth: dict[int, list[float]] = {}


class Measured(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One direction.

    Attributes:
      sha256: of its vectors.
      kind: trait, refusal and so on.
      norm: by layer.
      n_positive, n_negative: samples a side.
      recomputed_cosine: of the samples' difference of means with the direction, smallest over
        layers; below 1 the samples are not those of the direction.
      reliability: by unit.
      not_measured: why there are no samples, or "".
    """

    sha256: Sha256
    kind: str
    norm: list[float]
    n_positive: Count = 0
    n_negative: Count = 0
    recomputed_cosine: float | None = None
    reliability: dict[str, Halves] = {}
    not_measured: str = ""


class Null(msgspec.Struct, frozen=True, kw_only=True):
    """The cosine of a pair under shuffled labels, by layer.

    Attributes:
      shuffled: directions whose labels were shuffled, each by itself.
      relabellings: how many different shuffles there are.
      low, high: 95 % range; of two ranges the widest.
      p: two-sided; of two the larger.
    """

    shuffled: list[str]
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
      tap: where in the residual stream.
      halves, draws, seed: how many halvings and shuffles, and the seed of both.
      isotropic_sd: standard deviation of the cosine of two random directions of this width.
      directions, pairs: what was measured.
    """

    format: Literal["jaxsteer-geometry-1"]
    key: Sha256
    model: str
    weights_sha256: Sha256
    tap: str
    halves: Count
    draws: Count
    seed: int
    isotropic_sd: float
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
        if direction.provenance.get("kind") != "random"
    }
    gathered: dict[str, Samples | str] = {}
    with Progress("samples of directions", len(named), unit="directions") as progress:
        for name in named:
            gathered[name] = _samples_of(found.spec, model, name)
            progress.advance(1)
    made = Measurements(
        format=FORMAT,
        key=found.run.key,
        model=model.name,
        weights_sha256=model.weights_sha256,
        tap="resid_post",
        halves=halves,
        draws=draws,
        seed=seed,
        isotropic_sd=model.config.d_model**-0.5,
        directions={
            name: _described(direction, gathered[name], halves, seed)
            for name, direction in named.items()
        },
        pairs=[
            _pair(named[a], named[b], gathered[a], gathered[b], draws, seed)
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


def _samples_of(spec: StudySpec, model: ChatModel, name: str) -> Samples | str:
    """The samples behind one direction of a study, or why it has none of its own."""
    kind = spec.directions.get(name)
    if isinstance(kind, FromChats):
        return gather(model, contrast(kind, prepare.extraction_settings(spec)))
    if kind is None:
        return "not made by this study's spec"
    return "made of other directions, which are measured instead"


def _described(direction: Direction, samples: Samples | str, halves: int, seed: int) -> Measured:
    entry = Measured(
        sha256=direction.sha256,
        kind=str(direction.provenance.get("kind")),
        norm=_rounded(np.linalg.norm(direction.vectors.astype(np.float64), axis=1)),
    )
    if isinstance(samples, str):
        return msgspec.structs.replace(entry, not_measured=samples)
    alike = cosines(samples.direction(), direction.vectors)
    nonzero = np.linalg.norm(direction.vectors, axis=1) > 0
    reliability = {}
    for unit in samples.units:
        try:
            split = split_half(samples, unit, halves=halves, seed=seed)
        except UserError:
            continue
        mean = split.mean(axis=0)
        low, high = np.quantile(split, [0.025, 0.975], axis=0)
        reliability[unit] = Halves(
            units=len(np.unique(samples.units[unit])),
            mean=_rounded(mean),
            low=_rounded(low),
            high=_rounded(high),
            spearman_brown=_rounded([stats.spearman_brown(float(r)) for r in mean]),
            growth={
                n: _rounded(
                    split_half(samples, unit, halves=halves, seed=seed, size=n).mean(axis=0)
                )
                for n in _sizes(samples, unit)
            },
        )
    return msgspec.structs.replace(
        entry,
        n_positive=int(samples.positive.sum()),
        n_negative=int((~samples.positive).sum()),
        recomputed_cosine=round(float(alike[nonzero].min(initial=1.0)), 6),
        reliability=reliability,
    )


def _pair(
    first: Direction,
    second: Direction,
    first_samples: Samples | str,
    second_samples: Samples | str,
    draws: int,
    seed: int,
) -> Pair:
    observed = cosines(first.vectors, second.vectors)
    nulls = [
        (
            name,
            relabellings(samples),
            permutation_null(samples, other, draws=draws, seed=seed),
        )
        for name, samples, other in (
            (first.name, first_samples, second.vectors),
            (second.name, second_samples, first.vectors),
        )
        if isinstance(samples, Samples)
    ]
    null = None
    if nulls:
        # The alignment must survive shuffling either direction's labels: widest range, larger p.
        bounds = np.stack([np.quantile(null, [0.025, 0.975], axis=0) for _, _, null in nulls])
        p = np.max([two_sided_p(observed, null) for _, _, null in nulls], axis=0)
        null = Null(
            shuffled=[name for name, _, _ in nulls],
            relabellings=min(count for _, count, _ in nulls),
            low=_rounded(bounds[:, 0].min(axis=0)),
            high=_rounded(bounds[:, 1].max(axis=0)),
            p=_rounded(p),
        )
    return Pair(first=first.name, second=second.name, cosine=_rounded(observed), null=null)


def _sizes(samples: Samples, unit: str) -> list[int]:
    """1, 2, 4 and so on, and the largest number of units a side that a half can have."""
    ids = samples.units[unit]
    each = (np.unique(ids[side]) for side in (samples.positive, ~samples.positive))
    most = min(map(len, each)) // 2
    return sorted({most} | {2**k for k in range(most.bit_length())})


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]


def cosines(first: Layers, second: Layers) -> Float[np.ndarray, " layer"]:
    """Cosine per layer in float64; 0 where either vector is zero."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.einsum("ld,ld->l", a, b)
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Parts:
    """Samples summed by unit and side. Halves and relabellings take whole units, so that inner
    products of these few sums are all they need.

    Attributes:
      ids: the unit of each part.
      positive: whether its samples are on the positive side.
      counts: its number of samples.
      order, starts: the samples part by part, and where each part begins.
    """

    ids: Int[np.ndarray, " part"]
    positive: Bool[np.ndarray, " part"]
    counts: Int[np.ndarray, " part"]
    order: Int[np.ndarray, " sample"]
    starts: Int[np.ndarray, " part"]

    def sums(self, samples: Samples) -> Iterator[Float[np.ndarray, "part d_model"]]:
        """The sums of one layer after the other, in float64."""
        for layer in range(samples.values.shape[1]):
            values = samples.values[self.order, layer].astype(np.float64)
            # The common mean drops out of differences; without it they lose fewer digits.
            yield np.add.reduceat(values - values.mean(axis=0), self.starts, axis=0)

    def weights(
        self, positive: Bool[np.ndarray, "repeat part"], kept: Bool[np.ndarray, "repeat part"]
    ) -> Float[np.ndarray, "repeat part"]:
        """Weights of the sums in a difference of means over the samples of the kept parts."""
        up, down = positive & kept, ~positive & kept
        return up / (up @ self.counts)[:, None] - down / (down @ self.counts)[:, None]


def _parts(samples: Samples, unit: str) -> _Parts:
    key = 2 * samples.units[unit].astype(np.int64) + samples.positive
    order = np.argsort(key, kind="stable")
    parts, starts, counts = np.unique(key[order], return_index=True, return_counts=True)
    return _Parts(ids=parts // 2, positive=parts % 2 > 0, counts=counts, order=order, starts=starts)


def split_half(
    samples: Samples, unit: str, *, halves: int = 100, seed: int = 0, size: int | None = None
) -> Float[np.ndarray, "half layer"]:
    """Cosines between the directions of two random halves of the units, for each repeat.

    A unit of both sides, such as a question, is in the same half on both. Units of one side are
    halved on each side. With `size`, each half has that many units a side; the rest is left out.

    Raises:
      UserError: a side has fewer than two units.
    """
    parts = _parts(samples, unit)
    up, down = parts.ids[parts.positive], parts.ids[~parts.positive]
    if min(len(up), len(down)) < 2:
        raise UserError(f"one {unit} on each side cannot be halved; use another unit")
    sides = [up] if np.array_equal(up, down) else [up, down]
    generator = np.random.Generator(np.random.PCG64(seed))
    kept = np.zeros((2, halves, len(parts.ids)), bool)
    for repeat in range(halves):
        for side in sides:
            order, n = generator.permutation(side), len(side) // 2 if size is None else size
            kept[0, repeat] |= np.isin(parts.ids, order[:n])
            kept[1, repeat] |= np.isin(parts.ids, order[n : None if size is None else 2 * n])
    one, two = (parts.weights(np.broadcast_to(parts.positive, half.shape), half) for half in kept)
    found = []
    for sums in parts.sums(samples):
        first, second = one @ sums, two @ sums
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        found.append(_ratio(np.einsum("rd,rd->r", first, second), norms))
    return np.stack(found, axis=1)


def permutation_null(
    samples: Samples, other: Layers, *, draws: int = 1000, seed: int = 0
) -> Float[np.ndarray, "draw layer"]:
    """Cosines with `other` of directions made from shuffled labels.

    Labels move between whole units, so the null keeps the anisotropy and everything the samples
    share, and the number of positive units.
    """
    parts = _parts(samples, samples.labelled)
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = np.stack([generator.permutation(parts.positive) for _ in range(draws)])
    weights = parts.weights(shuffled, np.ones_like(shuffled))
    found = []
    for sums, wide in zip(parts.sums(samples), other.astype(np.float64), strict=True):
        norms = np.einsum("rp,rp->r", weights @ (sums @ sums.T), weights)
        norms = np.sqrt(np.maximum(norms, 0)) * np.linalg.norm(wide)
        found.append(_ratio(weights @ (sums @ wide), norms))
    return np.stack(found, axis=1)


def relabellings(samples: Samples) -> int:
    """Number of different labellings of the units, with the true one."""
    ids = samples.units[samples.labelled]
    return math.comb(len(np.unique(ids)), len(np.unique(ids[samples.positive])))


def two_sided_p(
    observed: Float[np.ndarray, " layer"], null: Float[np.ndarray, "draw layer"]
) -> Float[np.ndarray, " layer"]:
    """(1 + draws at least as far from 0 as the observed) / (1 + draws), per layer."""
    # A relabelling that happens to be the true one equals the observed but for rounding.
    beyond = (np.abs(null) >= np.abs(observed) - 1e-12).sum(axis=0)
    return (1 + beyond) / (1 + len(null))


def _ratio(dots: np.ndarray, norms: np.ndarray) -> np.ndarray:
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 1e-12)
