"""A direction in the residual stream: its vectors, arithmetic, provenance and file.

A direction is float32 [n_layers, d_model], one vector per block at `resid_post`, with the natural
norm of a difference of means. `extraction` makes directions.

Layers are written `21`, `22..29` or `22,24`, and in a study also `steer+1..last`. On the command
line an intervention is `NAME@LAYERS` with one layer or window, such as `compliant@21x4` or
`compliant@22..29`. A strength
is `x4` (multiples of the direction's natural norm) or `x0.2r` (share of the mean residual norm at
that layer, from the direction's provenance).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path, canonical_json, one_at_a_time, sha256_bytes
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Add, Layers, Operation, Project

FORMAT = "jaxsteer-directions-1"
# Names that `--steer NAME@LAYERxSCALE` can hold.
NAME = r"[\w.-]+"
# Few digits, because windows are written out before any model says how many layers it has.
LAYERS = r"[0-9]{1,4}(?:(?:\.\.|-)[0-9]{1,4})?"
# A pattern that takes as little as it can: in `late-2`, the name is `late` and -2 an offset.
LAYER_NAME = r"[^\W\d][\w-]*?"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """One direction and its provenance.

    Attributes:
      name: how studies and the command line call it.
      vectors: float32, one vector per block, natural norm.
      provenance: JSON-able record: kind, tap, position, model hash, prompt hashes, counts.
    """

    name: str
    vectors: Layers
    provenance: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Identity of the vectors (shape and little-endian float32 bytes)."""
        return sha256_bytes(str(self.vectors.shape).encode() + self.vectors.astype("<f4").tobytes())

    def unit(self) -> Layers:
        """Unit vectors per layer, float32; a zero vector stays zero."""
        norms = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        return np.divide(self.vectors, norms, out=np.zeros_like(self.vectors), where=norms > 0)


def minus(name: str, first: Direction, second: Direction) -> Direction:
    """first - second, layer by layer; both from the same model."""
    return _derived(name, "minus", first, second, first.vectors - second.vectors)


def without(name: str, first: Direction, second: Direction) -> Direction:
    """`first` with its component along `second` removed at each layer, natural norm kept."""
    unit = second.unit().astype(np.float64)
    along = np.einsum("ld,ld->l", first.vectors.astype(np.float64), unit)
    return _derived(name, "without", first, second, first.vectors - along[:, None] * unit)


def _derived(
    name: str, kind: str, first: Direction, second: Direction, vectors: np.ndarray
) -> Direction:
    kept = ("tap", "model", "weights_sha256", "tokenizer_sha256", "residual_norm")
    provenance = {key: first.provenance[key] for key in kept if key in first.provenance}
    of = {direction.name: direction.sha256 for direction in (first, second)}
    return Direction(
        name=name,
        vectors=vectors.astype(np.float32),
        provenance=provenance | {"kind": kind, "of": of},
    )


def random_like(direction: Direction, seed: int) -> Direction:
    """An isotropic random direction with the same norm as `direction` at every layer."""
    generator = np.random.Generator(np.random.PCG64(seed))
    raw = generator.standard_normal(direction.vectors.shape)
    norms = np.linalg.norm(direction.vectors.astype(np.float64), axis=1, keepdims=True)
    vectors = raw / np.linalg.norm(raw, axis=1, keepdims=True) * norms
    provenance = {
        "kind": "random",
        "tap": "resid_post",
        "seed": seed,
        "norm_of": direction.name,
        "norm_of_sha256": direction.sha256,
        "weights_sha256": direction.provenance["weights_sha256"],
        "residual_norm": direction.provenance.get("residual_norm"),
    }
    return Direction(
        name=f"random-{seed}", vectors=vectors.astype(np.float32), provenance=provenance
    )


def save(path: Path, directions: Sequence[Direction]) -> None:
    """Write directions to one safetensors file, provenance in its header, atomically."""
    metadata = {
        "format": FORMAT,
        "layers": "tensor row l is resid_post[l], the output of block l counted from 0",
        "provenance": canonical_json({d.name: d.provenance for d in directions}),
    }
    with atomic_path(path) as temporary:
        try:
            save_file({d.name: d.vectors for d in directions}, temporary, metadata=metadata)
        except SafetensorError as error:
            # Its own errors for the file system's: a full disk, for one.
            raise OSError(0, str(error).rsplit(": ", 1)[-1]) from None


def add(path: Path, made: Direction, model: ChatModel) -> dict[str, Direction]:
    """Add a direction to a file, which other processes may change at the same time.

    Args:
      path: the directions file, which need not exist; one of the same name is replaced.
      made: the direction.
      model: the model that all directions of the file belong to.

    Returns:
      All directions of the file as it now is.

    Raises:
      UserError: a file of another model, or one that cannot be read or written.
    """
    with one_at_a_time(path):
        found = of_model(path, model) | {made.name: made}
        save(path, list(found.values()))
    return found


def of_model(path: Path, model: ChatModel) -> dict[str, Direction]:
    """The directions of a file; none if there is no such file.

    Raises:
      UserError: as `load`, or directions of another model.
    """
    found = load(path) if path.is_file() else {}
    for known in found.values():
        check_model(known, model, str(path))
    return found


def load(path: Path) -> dict[str, Direction]:
    """Read a directions file.

    Raises:
      UserError: missing, not safetensors, without jaxsteer's provenance, or with a tensor that is
        no float32 [layer, width].
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a {FORMAT} file; make one with `jaxsteer extract`")
            provenance = json.loads(metadata["provenance"])
            found = {}
            # keys() is a method of the safetensors handle, which is no mapping.
            for name in list(file.keys()):
                vectors = file.get_tensor(name)
                if vectors.ndim != 2 or vectors.dtype != np.float32:
                    raise UserError(
                        f"{path}: {name!r} is {vectors.dtype.name} {vectors.shape}, a direction is "
                        "float32 (layers, width); extract it again"
                    )
                of = provenance[name]
                found[name] = Direction(name=name, vectors=vectors, provenance=of)
            return found
    except FileNotFoundError:
        raise UserError(f"no directions file {path}; make one with `jaxsteer extract`") from None
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"cannot read directions from {path}: {error}") from error


def check_model(direction: Direction, model: ChatModel, where: str) -> None:
    """Refuse a direction that was extracted from other weights or has another width.

    Raises:
      UserError: naming the direction and both shapes or hashes.
    """
    expected = (model.config.n_layers, model.config.d_model)
    if direction.vectors.shape != expected:
        raise UserError(
            f"{where}: direction {direction.name!r} has shape {direction.vectors.shape}, "
            f"model {model.name} needs {expected}; extract it on this model"
        )
    made_on = direction.provenance.get("weights_sha256")
    if made_on != model.weights_sha256:
        raise UserError(
            f"{where}: direction {direction.name!r} was extracted from other weights "
            f"({str(made_on)[:12]}, this model is {model.weights_sha256[:12]}); extract it again"
        )


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


def layers(
    at: int | str, named: Mapping[str, int] | None = None, where: str = ""
) -> tuple[int, ...]:
    """The 0-based layers of an expression, in ascending order.

    >>> layers(21), layers("22..24"), layers("2, steer+1..last", {"steer": 5, "last": 8})
    ((21,), (22, 23, 24), (2, 6, 7, 8))

    Args:
      at: the expression; a window has both ends.
      named: layers by name; `window` goes on to `window_last`.
      where: begins the message of an error.

    Raises:
      UserError: not such an expression, an unknown name, or a window that ends before it starts.
    """
    named, found = named or {}, set[int]()
    for part in str(at).replace(" ", "").split(","):
        if part == "window" and "window_last" in named:
            part = "window..window_last"
        first, dots, last = part.partition("..")
        start, stop = (_layer(end, named, where) for end in (first, last if dots else first))
        if stop < start:
            raise UserError(
                f"{where}layers {at} end ({stop}) before they start ({start}); swap them"
            )
        found |= set(range(start, stop + 1))
    return tuple(sorted(found))


def _layer(at: str, named: Mapping[str, int], where: str) -> int:
    """One layer: a number, or a name with or without an offset."""
    match = re.fullmatch(rf"([0-9]{{1,4}})|({LAYER_NAME})([+-][0-9]{{1,4}})?", at)
    if match and match[1]:
        return int(match[1])
    if match and match[2] in named:
        return named[match[2]] + int(match[3] or 0)
    mend = "write one layer as 21, a window as 22..29"
    if hyphen := re.fullmatch("([0-9]+)-([0-9]+)", at):
        mend = f"write a window as {hyphen[1]}..{hyphen[2]}"
    elif named:
        mend += f", or use one of {', '.join(named)} with an offset such as steer+2"
    raise UserError(f"{where}cannot read layers {at!r}; {mend}")


def parse(steer: Sequence[str], project: Sequence[str]) -> list[Asked]:
    """Parse both options.

    Raises:
      UserError: text that is not of the form shown above.
    """
    where, strength = rf"({NAME})@({LAYERS})", r"x(-?[0-9]{1,9}(?:\.[0-9]+)?)(r?)"
    asked = []
    for option, form, example, pattern, texts in (
        ("--steer", "NAME@LAYERxSCALE", "compliant@21x4", where + strength, steer),
        ("--project", "NAME@LAYERS", "compliant@22..29", where, project),
    ):
        for text in texts:
            match = re.fullmatch(pattern, text)
            if not match:
                raise UserError(f"cannot read {option} {text!r}; write {form}, e.g. {example}")
            name, at, *amount = match.groups()
            scale, relative = (float(amount[0]), amount[1] == "r") if amount else (None, False)
            asked.append(Asked(name=name, layers=layers(at), scale=scale, relative=relative))
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
