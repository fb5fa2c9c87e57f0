"""How layers and interventions are written: `21`, `22..29`, `compliant@21x4`, `compliant@22..29`.

On the command line an intervention is `NAME@LAYERS`. A strength is `x4` (multiples of the
direction's natural norm) or `x0.2r` (share of the mean residual norm at that layer, from the
direction's provenance).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxsteer.directions.direction import NAME, Direction
from jaxsteer.errors import UserError
from jaxsteer.model.interventions import Add, Operation, Project

# Few digits, because windows are written out before any model says how many layers it has.
LAYERS = r"[0-9]{1,4}(?:(?:\.\.|-)[0-9]{1,4})?"


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


def ends(window: str) -> tuple[str, str]:
    """First and last layer of a window, as they are written; a single layer is both.

    >>> ends("22..29"), ends("steer+1")
    (('22', '29'), ('steer+1', 'steer+1'))
    """
    first, dots, last = window.partition("..")
    return first, last if dots else first


def spelling(text: str) -> str:
    """The end of a message about layers: how to spell a window that is written with a hyphen.

    >>> spelling("22-29")
    '; write a window as 22..29'
    """
    match = re.fullmatch(r"([0-9]+)-([0-9]+)", text)
    return f"; write a window as {match[1]}..{match[2]}" if match else ""


def layers(at: int | str) -> tuple[int, ...]:
    """The 0-based layers of `21`, or of the window `22..29` with both ends.

    Raises:
      UserError: another text, or a window that ends before it starts.
    """
    text = str(at)
    if not re.fullmatch(LAYERS, text) or "-" in text:
        mend = spelling(text) or "; write one layer as 21, a window as 22..29"
        raise UserError(f"cannot read layers {text!r}{mend}")
    first, last = map(int, ends(text))
    if last < first:
        raise UserError(f"layers {text} end before they start; swap them")
    return tuple(range(first, last + 1))


def parse(steer: Sequence[str], project: Sequence[str]) -> list[Asked]:
    """Parse both options.

    Raises:
      UserError: text that is not of the form shown above.
    """
    asked = []
    for text in steer:
        match = re.fullmatch(rf"({NAME})@({LAYERS})x(-?[0-9]{{1,9}}(?:\.[0-9]+)?)(r?)", text)
        if not match:
            raise UserError(
                f"cannot read --steer {text!r}; write NAME@LAYERxSCALE, e.g. compliant@21x4"
            )
        name, at, scale, unit = match.groups()
        asked.append(Asked(name=name, layers=layers(at), scale=float(scale), relative=unit == "r"))
    for text in project:
        match = re.fullmatch(rf"({NAME})@({LAYERS})", text)
        if not match:
            raise UserError(
                f"cannot read --project {text!r}; write NAME@LAYERS, e.g. compliant@22..29"
            )
        asked.append(Asked(name=match[1], layers=layers(match[2])))
    return asked


def operations(asked: Sequence[Asked], found: Mapping[str, Direction]) -> list[Operation]:
    """The asked operations, with directions looked up by name.

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
