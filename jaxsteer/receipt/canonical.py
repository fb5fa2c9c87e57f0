"""A receipt's bytes: one canonical text per value, so that any changed byte shows.

The file must equal the canonical text of its value. A changed byte therefore either breaks the
JSON, or keeps the value and breaks this equality, or changes the value and with it the digest,
which is taken over the canonical text without the digest. The digest shows damage and careless
edits. It is not a signature: it can be computed again after an edit. To sign a receipt, put the
file, which is an in-toto Statement, into a DSSE envelope.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from jaxsteer.errors import UserError
from jaxsteer.files import sha256_bytes
from jaxsteer.receipt.statement import PREDICATE, STATEMENT, Statement

LARGEST = 64 * 2**20


def text(value: Any) -> str:
    """The canonical text: indented, keys sorted, ASCII only, one newline at the end.

    ASCII only, so that no name in it can change a terminal's colours or text direction.

    Raises:
      ValueError: a number that is not finite.
    """
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"


def digest(value: dict[str, Any]) -> str:
    """sha256 of the canonical text with `predicate.digest` left out."""
    predicate = {k: v for k, v in value["predicate"].items() if k != "digest"}
    return sha256_bytes(text({**value, "predicate": predicate}).encode())


def rounded(value: Any) -> Any:
    """The value with every float at six significant digits.

    Raises:
      UserError: a number that is not finite.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError("a number in these results is not finite; run the study again")
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON value of a receipt file; its shape and digest are not checked here.

    Raises:
      UserError: not JSON, or JSON of something else.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where} is not JSON ({first}); give an undamaged receipt.json") from None
    if not isinstance(value, dict) or value.get("_type") != STATEMENT:
        raise UserError(f"{where} is not an in-toto Statement v1; give a receipt.json")
    kind, ours = str(value.get("predicateType")), PREDICATE.rpartition(":")[0]
    if kind.startswith(f"{ours}:") and kind != PREDICATE:
        raise UserError(
            f"{where} is a receipt of another version ({kind[:60]!r}); verify it with the jaxsteer "
            "that wrote it, or run the study again"
        )
    if kind != PREDICATE or not isinstance(value.get("predicate"), dict):
        raise UserError(f"{where} is a statement of another kind; give a receipt.json")
    return value


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"the number {number[:20]} is not finite")
    return float(number)


def read_bytes(path: Path) -> bytes:
    """The file's bytes.

    Raises:
      UserError: missing, unreadable, or far too large.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than any receipt; give a receipt.json")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def problems(raw: bytes, value: dict[str, Any]) -> list[str]:
    """What is wrong with a receipt's own bytes; nothing for a file as it was written."""
    try:
        same, actual = text(value).encode() == raw, {"sha256": digest(value)}
    except RecursionError:
        return ["the content is nested too deeply for a receipt"]
    found = [] if same else ["the file is not the canonical text of its content"]
    if value["predicate"].get("digest") != actual:
        found.append("the content does not match its digest")
    return found


def convert(value: dict[str, Any]) -> Statement:
    """The value as structs.

    Raises:
      UserError: it is not shaped like a receipt, naming the place.
    """
    try:
        return msgspec.convert(value, Statement, str_keys=True)
    except (msgspec.ValidationError, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise UserError(f"not shaped like a receipt: {error}") from None


def load(path: Path) -> Statement:
    """An undamaged receipt.

    Raises:
      UserError: it cannot be read, or was changed since it was written.
    """
    raw = read_bytes(path)
    value = parse(raw, str(path))
    for problem in problems(raw, value):
        raise UserError(f"{path}: {problem}; it was changed, build it again")
    return convert(value)
