"""The command line's way to write an intervention: `compliant@21x4`, `compliant@22-29`.

`NAME@LAYERS` with layers `21` or `22-29`; a strength is `x4` (multiples of the direction's natural
norm) or `x0.2r` (share of the mean residual norm at that layer, from the direction's provenance).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxsteer.directions.direction import NAME, Direction
from jaxsteer.errors import UserError
from jaxsteer.model.interventions import Add, Operation, Project

# Of few digits: a window is written out before the model that must have its layers is there.
LAYERS = r"([0-9]{1,4})(?:-([0-9]{1,4}))?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """One parsed intervention.

    Attributes:
      name: direction name.
      layers: 0-based blocks, applied at `resid_post`.
      scale: strength of an addition; None is a projection.
      relative: whether `scale` is a share of the residual norm.
    """

    name: str
    layers: tuple[int, ...]
    scale: float | None = None
    relative: bool = False


def parse(steer: Sequence[str], project: Sequence[str]) -> list[Asked]:
    """Parse both options.

    Raises:
      UserError: text that is not of the form shown above.
    """
    asked = []
    for text in steer:
        match = re.fullmatch(rf"({NAME})@{LAYERS}x(-?[0-9]{{1,9}}(?:\.[0-9]+)?)(r?)", text)
        if not match:
            raise UserError(
                f"cannot read --steer {text!r}; write NAME@LAYERxSCALE, e.g. compliant@21x4"
            )
        name, first, last, scale, unit = match.groups()
        asked.append(
            Asked(name=name, layers=_layers(first, last), scale=float(scale), relative=unit == "r")
        )
    for text in project:
        match = re.fullmatch(rf"({NAME})@{LAYERS}", text)
        if not match:
            raise UserError(
                f"cannot read --project {text!r}; write NAME@LAYERS, e.g. compliant@22-29"
            )
        asked.append(Asked(name=match[1], layers=_layers(match[2], match[3])))
    return asked


def _layers(first: str, last: str | None) -> tuple[int, ...]:
    start, stop = int(first), int(last or first)
    if stop < start:
        raise UserError(f"layers {first}-{last} end before they start; swap them")
    return tuple(range(start, stop + 1))


def operations(asked: Sequence[Asked], found: Mapping[str, Direction]) -> list[Operation]:
    """The operations asked for, with directions looked up by name.

    Raises:
      UserError: an unknown direction, or a relative strength without recorded residual norms.
    """
    made: list[Operation] = []
    for item in asked:
        if item.name not in found:
            raise UserError(
                f"no direction {item.name!r} in the directions file; it has "
                f"{', '.join(found) or 'none'}; make one with `jaxsteer extract {item.name}`"
            )
        direction = found[item.name]
        if item.scale is None:
            made.append(Project(directions=(direction.vectors,), layers=item.layers))
            continue
        for layer in item.layers:
            scale = item.scale
            if item.relative:
                scale *= _norm_ratio(direction, layer)
            made.append(Add(direction=direction.vectors, layers=(layer,), scale=scale))
    return made


def _norm_ratio(direction: Direction, layer: int) -> float:
    norms = direction.provenance.get("residual_norm")
    if not norms or layer >= len(norms):
        raise UserError(
            f"direction {direction.name!r} records no residual norm at resid_post.{layer}; "
            "give the strength in natural norms, e.g. x4"
        )
    return float(norms[layer]) / float(np.linalg.norm(direction.vectors[layer]))
