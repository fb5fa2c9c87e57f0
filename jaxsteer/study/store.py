"""The finished rows of a run on disk, and the check that a folder belongs to a run.

Each batch of finished rows is one Parquet shard, which is written aside, synced and renamed. So a
process that is killed loses only the rows it had not finished. A shard's name holds the hash of its
content, so several processes can write to one folder.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import polars as pl

from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path, sha256_bytes, table_bytes
from jaxsteer.generation.distributed import Hosts
from jaxsteer.study import record
from jaxsteer.study.record import RunRecord
from jaxsteer.study.spec import StudySpec


def write(folder: Path, key: str, rows: pl.DataFrame) -> None:
    """Add one shard of the run `key`; its name is its content, so writing it again is harmless."""
    data = table_bytes(rows)
    with atomic_path(folder / f"{key[:16]}-{sha256_bytes(data)[:16]}.parquet") as temporary:
        temporary.write_bytes(data)


def read(folder: Path, key: str) -> list[pl.DataFrame]:
    """Every shard of the run `key`.

    Raises:
      UserError: a shard is not Parquet, or its content does not match its name.
    """
    found = []
    for path in sorted(folder.glob(f"{key[:16]}-*.parquet")):
        try:
            data = path.read_bytes()
            if sha256_bytes(data)[:16] != path.stem[-16:]:
                raise OSError("its content does not match its name")
            found.append(pl.read_parquet(io.BytesIO(data)))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it and run again") from None
    return found


def table(folder: Path, key: str, names: Sequence[str]) -> pl.DataFrame | None:
    """All rows of the run `key`, in the order of `names`; None while one is missing."""
    found = read(folder, key)
    if not found:
        return None
    # A row may have been run twice, by a process of an interrupted run; both are equal.
    rows = pl.concat(found).unique("row_id")
    if set(names) - set(rows["row_id"]):
        return None
    order = pl.DataFrame({"row_id": names})
    return order.join(rows, on="row_id", how="left", maintain_order="left")


def claim(folder: Path, run: RunRecord, hosts: Hosts) -> None:
    """Write a run's record to its folder, or check the one that is there.

    Raises:
      UserError: the folder holds another run, or process 0 did not ask for this one.
    """
    if hosts.first:
        fields = msgspec.structs.asdict(run)
        check(folder, {k: v for k, v in fields.items() if k not in ("key", "environment")})
        if record.read(folder) is None:
            record.write(folder, run)
        return

    def same() -> bool | None:
        held = record.read(folder)
        return (held is not None and held.key == run.key) or None

    if not hosts.seen(same):
        raise UserError(
            f"process {hosts.process} was started for another run than process 0 recorded in "
            f"{folder / record.FILE}; give all processes the same command"
        )


def check(folder: Path, asked: Mapping[str, Any]) -> None:
    """Refuse a folder whose record has other values; a folder without a record passes.

    Args:
      folder: the results folder.
      asked: fields of the record.

    Raises:
      UserError: naming the fields that differ, and the keys of the study.
    """
    held = record.read(folder)
    if held is None:
        return
    differ = [name for name, value in asked.items() if getattr(held, name) != value]
    if differ:
        refuse(folder, differ, _differing_keys(held.study, asked["study"]))


def refuse(folder: Path, parts: Sequence[str], keys: Sequence[str] = ()) -> NoReturn:
    """Refuse a folder that holds another run.

    Args:
      folder: the results folder.
      parts: what differs, by field of the record.
      keys: what differs, by key of the study.
    """
    raise UserError(
        f"{folder} holds another run ({', '.join(parts)} differ)"
        + (f": {', '.join(keys[:3])}" if keys else "")
        + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        + "; choose another --out, or give --fresh to replace it"
    )


def _differing_keys(held: StudySpec, asked: StudySpec) -> list[str]:
    """Keys of the study that only one of two has, or whose values differ."""
    one, two = (dict(_leaves(msgspec.to_builtins(spec), "study")) for spec in (held, asked))
    return [key for key in {**one, **two} if one.get(key, ...) != two.get(key, ...)]


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value in a study's plain form, with its key: `condition['persona'].ops[0].scale`."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            name = item["name"] if isinstance(item, dict) and "name" in item else i
            yield from _leaves(item, f"{key}[{name!r}]")
    else:
        yield key, value
