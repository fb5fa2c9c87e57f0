"""The files of a results folder as typed records, so that a damaged one is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from jaxsteer.errors import UserError
from jaxsteer.evidence import reliability
from jaxsteer.study import prepare
from jaxsteer.study.record import Count, Sha256

T = TypeVar("T")


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """setup.json, as far as a receipt needs it."""

    dose_candidates: list[dict[str, Any]] = []
    refusal_candidates: list[dict[str, Any]] = []
    refusal_near_miss: list[str] = []


class Halves(msgspec.Struct, frozen=True, kw_only=True):
    """Reliability over one kind of unit, by layer."""

    units: Count
    mean: list[float]
    low: list[float]
    high: list[float]
    spearman_brown: list[float]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of geometry.json."""

    sha256: Sha256
    reliability: dict[str, Halves] = {}


class Null(msgspec.Struct, frozen=True, kw_only=True):
    """The null of one pair, by layer."""

    low: list[float]
    high: list[float]
    p: list[float]


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One pair of geometry.json."""

    first: str
    second: str
    cosine: list[float]
    null: Null | None


class Measurements(msgspec.Struct, frozen=True, kw_only=True):
    """geometry.json, as far as a receipt needs it."""

    isotropic_sd: float
    directions: dict[str, Measured]
    pairs: list[Pair]


def read_setup(folder: Path) -> Setup:
    """setup.json as a record.

    Raises:
      UserError: missing, unreadable, or of another shape.
    """
    path = folder / "setup.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; run the study again")
    return _convert(prepare.read_record(path), Setup, path)


def read_geometry(folder: Path) -> Measurements | None:
    """geometry.json as a record, or None when it was not measured.

    Raises:
      UserError: unreadable, or of another shape.
    """
    value = reliability.load(folder)
    return None if value is None else _convert(value, Measurements, folder / reliability.FILE)


def _convert(value: Any, kind: type[T], path: Path) -> T:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: {error}; run the study again") from None
