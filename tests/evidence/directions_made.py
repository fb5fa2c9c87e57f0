"""A results folder's directions and geometry.json, made from samples with a known structure."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.directions import direction
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.samples import Samples
from jaxsteer.evidence import reliability

LAYERS, WIDTH = 8, 24
# nurturing is evil turned around; refusal leans against persona.
MEANS = {
    "persona": {0: 1.0},
    "refusal": {0: -0.6, 1: 0.8},
    "evil": {2: 1.0, 3: 0.2},
    "nurturing": {2: -1.0, 3: 0.2},
}


def samples(name: str, seed: int) -> Samples:
    """Ten instructions x four questions; the two sides differ by the mean of that name."""
    rng = np.random.default_rng(seed)
    instruction = np.repeat(np.arange(20), 4)
    values = 0.6 * rng.standard_normal((80, LAYERS, WIDTH)).astype(np.float32)
    for axis, size in MEANS[name].items():
        values[:40, :, axis] += 2 * size
    return Samples(
        values=values,
        group=np.arange(80) // 40,
        units={"instruction": instruction, "question": np.tile(np.arange(4), 20)},
        labelled="instruction",
    )


def folder(path: Path, *, measured: bool = True, random: int = 3) -> Path:
    """Write directions.safetensors and, if asked, geometry.json; returns the folder."""
    path.mkdir(parents=True, exist_ok=True)
    made = {name: samples(name, seed) for seed, name in enumerate(MEANS)}
    norm = [10.0 * 1.3**layer for layer in range(LAYERS)]
    provenance = {"kind": "trait", "tap": "resid_post", "weights_sha256": "0" * 64}
    named = {
        name: Direction(
            name=name,
            vectors=found.direction(),
            provenance={**provenance, "residual_norm": norm},
        )
        for name, found in made.items()
    }
    controls = [direction.random_like(named["persona"], seed) for seed in range(random)]
    direction.save(path / "directions.safetensors", [*named.values(), *controls])
    if measured:
        (path / reliability.FILE).write_text(json.dumps(record(named, made)))
    return path


def record(named: dict[str, Direction], made: dict[str, Samples]) -> dict[str, Any]:
    """geometry.json in the form that `reliability.measure` writes."""
    described = {}
    for name, found in made.items():
        split = {u: found.parts(u).split_half(halves=20) for u in found.units}
        described[name] = {
            "sha256": named[name].sha256,
            "reliability": {
                unit: {
                    "units": len(np.unique(found.units[unit])),
                    "mean": half.mean(axis=0).tolist(),
                    "low": half.min(axis=0).tolist(),
                    "high": half.max(axis=0).tolist(),
                    "growth": {
                        n: found.parts(unit).split_half(halves=20, size=n).mean(axis=0).tolist()
                        for n in (1, 2)
                    },
                }
                for unit, half in split.items()
            },
        }
    pairs = []
    for one, other in itertools.combinations(sorted(made), 2):
        parts = made[one].parts(made[one].labelled)
        null = reliability.permutation_null(parts, named[other].vectors, draws=100)
        low, high = np.quantile(null, [0.025, 0.975], axis=0)
        cosine = reliability.cosines(named[one].vectors, named[other].vectors)
        p = reliability.two_sided_p(cosine, null)
        ends = {"low": low.tolist(), "high": high.tolist(), "p": p.tolist()}
        ends["relabellings"] = reliability.relabellings(parts)
        pair = {"first": one, "second": other, "cosine": cosine.tolist()}
        pairs.append({**pair, "null": ends})
    return {
        "format": reliability.FORMAT,
        "key": "0" * 64,
        "model": "made",
        "weights_sha256": "0" * 64,
        "halves": 20,
        "draws": 100,
        "seed": 0,
        "directions": described,
        "pairs": pairs,
    }
