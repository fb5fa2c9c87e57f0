"""The files of a results folder as typed records, so that a damaged one is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from jaxsteer.errors import UserError
from jaxsteer.evidence import reliability
from jaxsteer.receipt.statement import Count, Model, Prompts, Sha256, Source, Text
from jaxsteer.study import prepare
from jaxsteer.study.results import Results

T = TypeVar("T")


class RunCondition(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of run.json's conditions; fields as in `conditions.Condition`."""

    name: str
    base: str
    seed: int | None = None
    scale: float | None = None
    mode: str
    sites: list[str]
    scope: str
    cancels_steering: bool
    unsteered_twin_of: str
    system_sha256: Sha256


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """run.json, as far as a receipt needs it."""

    key: Sha256
    study: dict[str, Any]
    model: Model
    policy: Text
    modes: list[Text]
    layers: dict[str, Count]
    dose: float
    directions: dict[str, Sha256]
    conditions: list[RunCondition]
    prompts: dict[str, Prompts]
    environment: dict[str, str]


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


def run(found: Results) -> Run:
    """run.json as a record; fields it may grow later are left out.

    Raises:
      UserError: a field is missing or of another type.
    """
    value = dict(found.run)
    value["policy"], model = _known(value.get("policy"), Text), _known(value.get("model"), Model)
    if isinstance(model, dict):
        model["source"] = _known(model.get("source"), Source)
    value["model"] = model
    if isinstance(value.get("modes"), list):
        value["modes"] = [_known(mode, Text) for mode in value["modes"]]
    if isinstance(value.get("prompts"), dict):
        value["prompts"] = {k: _known(v, Prompts) for k, v in value["prompts"].items()}
    return _convert(value, Run, found.folder / "run.json")


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


def _known(value: Any, kind: type[msgspec.Struct]) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: item for key, item in value.items() if key in kind.__struct_fields__}


def _convert(value: Any, kind: type[T], path: Path) -> T:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: {error}; run the study again") from None


def check_rows(found: Results, known: Run) -> None:
    """Refuse rows of conditions or prompt families that run.json does not have.

    Raises:
      UserError: naming the condition or family.
    """
    names = [condition.name for condition in known.conditions]
    if len(set(names)) < len(names):
        raise UserError(f"{found.folder}/run.json: a condition is there twice; run again")
    for column, there in (("condition", names), ("family", list(known.prompts))):
        foreign = set(found.rows[column].unique()) - set(there)
        if foreign:
            raise UserError(
                f"{found.folder}/responses.parquet: {column} {sorted(foreign)[0]!r} is not in "
                "run.json; run the study again"
            )
