"""Layer expressions of a study: `21`, `steer+2`, `22,24`, `22..29`, `steer+1..last`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from jaxsteer.directions.notation import ends, spelling
from jaxsteer.errors import UserError

# A pattern that takes as little as it can: in `late-2`, the name is `late` and -2 an offset.
LAYER_NAME = r"[^\W\d][\w-]*?"


def depth(fraction: float, n_layers: int) -> int:
    """The 0-based layer nearest to a fraction of depth: 0 is the first block, 1 the last."""
    return round(fraction * (n_layers - 1))


def windows(at: str) -> list[tuple[str, str]]:
    """First and last layer of each part of an expression, as they are written.

    >>> windows("21, steer+1..last")
    [('21', '21'), ('steer+1', 'last')]
    """
    return [ends(part) for part in at.replace(" ", "").split(",")]


def read_layer(text: str, names: Collection[str], where: str) -> tuple[str, int]:
    """A layer's number or name, and its offset; `last` is a name too.

    >>> read_layer("steer+2", ["steer"], "at")
    ('steer', 2)

    Raises:
      UserError: not such a text, or an unknown name.
    """
    match = re.fullmatch(rf"({LAYER_NAME}|[0-9]{{1,6}})([+-][0-9]{{1,6}})?", text)
    if not match or not (match[1].isdecimal() or match[1] in (*names, "last")):
        raise UserError(
            f"{where}: cannot read layer {text!r}; use a number, or one of "
            f"{', '.join([*names, 'last'])} with an offset such as steer+2"
        )
    return match[1], int(match[2] or 0)


def resolve_layers(at: str, named: Mapping[str, int], n_layers: int, where: str) -> tuple[int, ...]:
    """The 0-based layers of an expression, in order.

    Args:
      at: the expression.
      named: layers by name.
      n_layers: blocks of the model.
      where: begins the message of an error.

    Raises:
      UserError: not such an expression, an unknown name, or a layer the model does not have.
    """

    def one(text: str) -> int:
        base, offset = read_layer(text, named, where)
        layer = {**named, "last": n_layers - 1}.get(base)
        layer = (int(base) if layer is None else layer) + offset
        if not 0 <= layer < n_layers:
            raise UserError(
                f"{where}: unknown layer resid_post.{layer} (from {text!r}); this model has "
                f"resid_post.0 to resid_post.{n_layers - 1}{spelling(text)}"
            )
        return layer

    found: set[int] = set()
    for first, last in windows(at):
        start, stop = one(first), one(last)
        if stop < start:
            raise UserError(
                f"{where}: window {at!r} ends (layer {stop}) before it starts ({start})"
            )
        found |= set(range(start, stop + 1))
    return tuple(sorted(found))
