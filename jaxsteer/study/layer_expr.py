"""Layer expressions of a study: `21`, `steer+2`, `22,24`, `22..29`, `steer+1..last`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jaxsteer.directions.notation import ends, spelling
from jaxsteer.errors import UserError

# A pattern that takes as little as it can: in `late-2`, the name is `late` and -2 an offset.
LAYER_NAME = r"[^\W\d][\w-]*?"


def depth(fraction: float, n_layers: int) -> int:
    """The 0-based layer nearest to a fraction of depth: 0 is the first block, 1 the last."""
    return round(fraction * (n_layers - 1))


def resolve_layers(at: str, named: Mapping[str, int], n_layers: int, where: str) -> tuple[int, ...]:
    """The 0-based layers of an expression, in ascending order.

    >>> resolve_layers("2, steer+1..last", {"steer": 5}, 9, "at")
    (2, 6, 7, 8)

    Args:
      at: the expression.
      named: layers by name; `last` is the last one.
      n_layers: blocks of the model.
      where: begins the message of an error.

    Raises:
      UserError: not such an expression, an unknown name, or a layer the model does not have.
    """
    found: set[int] = set()
    for part in at.replace(" ", "").split(","):
        start, stop = (_resolve_layer(end, named, n_layers, where) for end in ends(part))
        if stop < start:
            raise UserError(
                f"{where}: window {at!r} ends (layer {stop}) before it starts ({start})"
            )
        found |= set(range(start, stop + 1))
    return tuple(sorted(found))


def _resolve_layer(at: str, named: Mapping[str, int], n_layers: int, where: str) -> int:
    """One layer: a number, or a name with or without an offset."""
    if mend := spelling(at):
        raise UserError(f"{where}: cannot read layers {at!r}{mend}")
    layers = {**named, "last": n_layers - 1}
    match = re.fullmatch(rf"([0-9]{{1,6}})|({LAYER_NAME})([+-][0-9]{{1,6}})?", at)
    if not match or (match[2] and match[2] not in layers):
        raise UserError(
            f"{where}: cannot read layer {at!r}; use a number, or one of {', '.join(layers)} with "
            "an offset such as steer+2"
        )
    layer = int(match[1]) if match[1] else layers[match[2]] + int(match[3] or 0)
    if not 0 <= layer < n_layers:
        raise UserError(
            f"{where}: unknown layer resid_post.{layer} (from {at!r}); this model has "
            f"resid_post.0 to resid_post.{n_layers - 1}"
        )
    return layer
