"""How well directions are known, and whether two of them are more aligned than chance allows.

A direction is a difference of two means over samples. Samples share instructions and questions, so
they are not independent, and a null that forgets this calls everything significant. Here what is
halved or relabelled is always a whole *unit*: an instruction with all its questions, a question
with all its instructions, or a prompt.

    reliability  cosine of the directions of two random halves of the units, repeated
    null         cosine with another direction after the units' labels are shuffled
    isotropic    1 / sqrt(d_model), the spread of random vectors; shown for comparison only, since
                 the residual stream is far from isotropic

Both work on the samples' inner products per layer, so repeats cost next to nothing.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer import stats
from jaxsteer.directions import direction as directions
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.samples import Samples, contrast, of_direction
from jaxsteer.errors import UserError
from jaxsteer.files import write_json
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Layers
from jaxsteer.progress import Progress
from jaxsteer.study import results

FORMAT = "jaxsteer-geometry-1"
FILE = "geometry.json"


def cosines(first: Layers, second: Layers) -> Float[np.ndarray, " layer"]:
    """Cosine per layer in float64; 0 where either vector is zero."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.einsum("ld,ld->l", a, b)
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)


def split_half(
    samples: Samples, unit: str, *, halves: int = 100, seed: int = 0
) -> Float[np.ndarray, "half layer"]:
    """Cosines between the directions of two random halves of the units, for each repeat.

    A unit on both sides, such as a question, goes to the same half on both; units of one side are
    halved side by side.

    Raises:
      UserError: a side has fewer than two units.
    """
    ids = samples.units[unit]
    up, down = np.unique(ids[samples.positive]), np.unique(ids[~samples.positive])
    if min(len(up), len(down)) < 2:
        raise UserError(f"one {unit} a side cannot be halved; use another unit")
    sides = [up] if np.array_equal(up, down) else [up, down]
    generator = np.random.Generator(np.random.PCG64(seed))
    first = np.zeros((halves, len(ids)), bool)
    for repeat in range(halves):
        chosen = [generator.permutation(side)[: len(side) // 2] for side in sides]
        first[repeat] = np.isin(ids, np.concatenate(chosen))
    one, two = (contrast(np.broadcast_to(samples.positive, h.shape), h) for h in (first, ~first))
    found = np.zeros((halves, samples.values.shape[1]))
    for layer, gram in enumerate(_grams(samples)):
        dots, norms = _dots(one, gram, two), _dots(one, gram, one) * _dots(two, gram, two)
        found[:, layer] = _ratio(dots, np.sqrt(np.maximum(norms, 0)))
    return found


def permutation_null(
    samples: Samples, other: Layers, *, draws: int = 1000, seed: int = 0
) -> Float[np.ndarray, "draw layer"]:
    """Cosines with `other` of directions made from shuffled labels.

    The labels move between whole units, so anisotropy and everything the samples share stay in
    the null, and as many units are positive as before.
    """
    ids = samples.units[samples.labelled]
    units, index = np.unique(ids, return_inverse=True)
    label = np.zeros(len(units), bool)
    label[index] = samples.positive
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = np.stack([generator.permutation(label)[index] for _ in range(draws)])
    weights = contrast(shuffled)
    wide = other.astype(np.float64)
    found = np.zeros((draws, samples.values.shape[1]))
    for layer, gram in enumerate(_grams(samples)):
        dots = weights @ (samples.values[:, layer].astype(np.float64) @ wide[layer])
        norms = np.sqrt(np.maximum(_dots(weights, gram, weights), 0)) * np.linalg.norm(wide[layer])
        found[:, layer] = _ratio(dots, norms)
    return found


def relabellings(samples: Samples) -> int:
    """How many different labellings of the units there are, the true one included."""
    ids = samples.units[samples.labelled]
    return math.comb(len(np.unique(ids)), len(np.unique(ids[samples.positive])))


def two_sided_p(
    observed: Float[np.ndarray, " layer"], null: Float[np.ndarray, "draw layer"]
) -> Float[np.ndarray, " layer"]:
    """(1 + draws at least as far from 0 as the observed) / (1 + draws), per layer."""
    # A relabelling that happens to be the true one equals the observed but for rounding.
    beyond = (np.abs(null) >= np.abs(observed) - 1e-12).sum(axis=0)
    return (1 + beyond) / (1 + len(null))


def _grams(samples: Samples) -> Iterator[Float[np.ndarray, "sample sample"]]:
    # The common mean drops out of every difference; without it the products lose fewer digits.
    for layer in range(samples.values.shape[1]):
        values = samples.values[:, layer].astype(np.float64)
        values = values - values.mean(axis=0)
        yield values @ values.T


def _dots(
    a: Float[np.ndarray, "repeat sample"],
    gram: Float[np.ndarray, "sample sample"],
    b: Float[np.ndarray, "repeat sample"],
) -> Float[np.ndarray, " repeat"]:
    return np.einsum("rs,rs->r", a @ gram, b)


def _ratio(dots: np.ndarray, norms: np.ndarray) -> np.ndarray:
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 1e-12)


def measure(
    folder: Path, model: ChatModel, *, halves: int = 100, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Measure every direction of a results folder; writes and returns its geometry.json.

    Raises:
      UserError: no results, results of another model, or of a study without directions.
    """
    found = results.load(folder)
    if not found.spec.directions:
        raise UserError(f"{folder}: its study has no directions to measure")
    if found.run["model"]["weights_sha256"] != model.weights_sha256:
        raise UserError(f"{folder} was run on another model than {model.name}; give its --model")
    named = {
        name: direction
        for name, direction in directions.load(folder / "directions.safetensors").items()
        if direction.provenance.get("kind") != "random"
    }
    gathered: dict[str, Samples | str] = {}
    with Progress("samples of directions", len(named), unit="directions") as progress:
        for name, direction in named.items():
            gathered[name] = of_direction(found.spec, model, direction)
            progress.advance(1)
    value = {
        "format": FORMAT,
        "key": found.run.get("key"),
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "tap": "resid_post",
        "halves": halves,
        "draws": draws,
        "seed": seed,
        "isotropic_sd": model.config.d_model**-0.5,
        "directions": {
            name: _described(direction, gathered[name], halves, seed)
            for name, direction in named.items()
        },
        "pairs": [
            _pair(named[a], named[b], gathered[a], gathered[b], draws, seed)
            for a, b in itertools.combinations(named, 2)
        ],
    }
    write_json(folder / FILE, value)
    return value


def load(folder: Path) -> dict[str, Any] | None:
    """geometry.json of a results folder, or None when it was not measured.

    Raises:
      UserError: unreadable, or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); run `jaxsteer geometry` again") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path} is not {FORMAT}; run `jaxsteer geometry` again")
    return value


def _described(
    direction: Direction, samples: Samples | str, halves: int, seed: int
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "sha256": direction.sha256,
        "kind": direction.provenance.get("kind"),
        "norm": _rounded(np.linalg.norm(direction.vectors.astype(np.float64), axis=1)),
    }
    if isinstance(samples, str):
        return entry | {"not_measured": samples}
    entry["n_positive"] = int(samples.positive.sum())
    entry["n_negative"] = int((~samples.positive).sum())
    # That these samples make this direction: below 1 something differs from the extraction.
    alike = cosines(samples.direction(), direction.vectors)
    nonzero = np.linalg.norm(direction.vectors, axis=1) > 0
    entry["recomputed_cosine"] = round(float(alike[nonzero].min(initial=1.0)), 6)
    reliability = {}
    for unit in samples.units:
        try:
            split = split_half(samples, unit, halves=halves, seed=seed)
        except UserError:
            continue
        mean = split.mean(axis=0)
        low, high = np.quantile(split, [0.025, 0.975], axis=0)
        reliability[unit] = {
            "units": len(np.unique(samples.units[unit])),
            "mean": _rounded(mean),
            "low": _rounded(low),
            "high": _rounded(high),
            "spearman_brown": _rounded([stats.spearman_brown(float(r)) for r in mean]),
        }
    return entry | {"reliability": reliability}


def _pair(
    first: Direction,
    second: Direction,
    first_samples: Samples | str,
    second_samples: Samples | str,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    observed = cosines(first.vectors, second.vectors)
    entry: dict[str, Any] = {
        "first": first.name,
        "second": second.name,
        "cosine": _rounded(observed),
    }
    nulls = [
        (name, relabellings(samples), permutation_null(samples, other, draws=draws, seed=seed))
        for name, samples, other in (
            (first.name, first_samples, second.vectors),
            (second.name, second_samples, first.vectors),
        )
        if isinstance(samples, Samples)
    ]
    if not nulls:
        return entry | {"null": None}
    # The alignment must survive shuffling either direction's labels: widest range, larger p.
    bounds = np.stack([np.quantile(null, [0.025, 0.975], axis=0) for _, _, null in nulls])
    return entry | {
        "null": {
            "shuffled": [name for name, _, _ in nulls],
            "relabellings": min(count for _, count, _ in nulls),
            "low": _rounded(bounds[:, 0].min(axis=0)),
            "high": _rounded(bounds[:, 1].max(axis=0)),
            "p": _rounded(np.max([two_sided_p(observed, null) for _, _, null in nulls], axis=0)),
        }
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]
