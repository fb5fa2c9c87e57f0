"""Random directions for the conditions of a study, where only their shape matters."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from jaxsteer.directions.direction import Direction
from jaxsteer.study import conditions
from jaxsteer.study.results import Add, Condition
from jaxsteer.study.spec import CHOOSE, StudySpec


def directions(found: Sequence[Condition], n_layers: int) -> dict[str, Direction]:
    """A direction of width 8 for each name that the conditions use."""
    draw = np.random.default_rng(0)
    done = [op for condition in found for op in condition.operations]
    names = {op.direction for op in done} | {op.norm_of for op in done if isinstance(op, Add)}
    return {
        name: Direction(
            name=name, vectors=draw.standard_normal((n_layers, 8)).astype(np.float32), provenance={}
        )
        for name in sorted(names - {None})
    }


def compiled(study: StudySpec, n_layers: int = 32) -> list[Condition]:
    """A study's conditions as a run records them, steered at block 17."""
    if study.system == CHOOSE:
        study = msgspec.structs.replace(study, system="generic")
    chosen = {"steer": 17, "refusal": 14, "window": 18, "window_last": 19, "late_refusal": 26}
    named = chosen | {
        name: layer if isinstance(layer, int) else conditions.depth(layer, n_layers)
        for name, layer in study.layers.items()
    }
    found = conditions.conditions(study, named, study.dose or 1.0, n_layers)
    arrays = conditions.stacked(found, directions(found, n_layers), (n_layers, 8))
    return conditions.mark_cancelling(found, arrays)
