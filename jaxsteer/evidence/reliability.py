"""How well a study's directions are known: geometry.json of its results folder.

Every direction is made again sample by sample, for `directions.geometry` to halve and relabel.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer import stats
from jaxsteer.directions import direction as directions
from jaxsteer.directions import geometry
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.extraction import FromChats, contrast
from jaxsteer.directions.samples import Samples, gather
from jaxsteer.errors import UserError
from jaxsteer.files import write_json
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.progress import Progress
from jaxsteer.study import prepare, results
from jaxsteer.study.spec import StudySpec

FORMAT = "jaxsteer-geometry-1"
FILE = "geometry.json"


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
    value = {
        "format": FORMAT,
        "key": found.run.key,
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


def _samples_of(spec: StudySpec, model: ChatModel, name: str) -> Samples | str:
    """The samples behind one direction of a study, or why it has none of its own."""
    kind = spec.directions.get(name)
    if isinstance(kind, FromChats):
        return gather(model, contrast(kind, prepare.extraction_settings(spec)))
    if kind is None:
        return "not made by this study's spec"
    return "made of other directions, which are measured instead"


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
    alike = geometry.cosines(samples.direction(), direction.vectors)
    nonzero = np.linalg.norm(direction.vectors, axis=1) > 0
    entry["recomputed_cosine"] = round(float(alike[nonzero].min(initial=1.0)), 6)
    reliability = {}
    for unit in samples.units:
        try:
            split = geometry.split_half(samples, unit, halves=halves, seed=seed)
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
    observed = geometry.cosines(first.vectors, second.vectors)
    entry: dict[str, Any] = {
        "first": first.name,
        "second": second.name,
        "cosine": _rounded(observed),
    }
    nulls = [
        (
            name,
            geometry.relabellings(samples),
            geometry.permutation_null(samples, other, draws=draws, seed=seed),
        )
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
            "p": _rounded(
                np.max([geometry.two_sided_p(observed, null) for _, _, null in nulls], axis=0)
            ),
        }
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]
