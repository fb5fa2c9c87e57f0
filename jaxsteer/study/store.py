"""A results folder on disk: who may write to it, and its finished rows.

Each batch of finished rows is one Parquet shard, written aside, synced and renamed, so a process
may be killed at any moment and loses the rows in flight. A lock held by the operating system keeps
a second run out, and is gone with the first however it ends.

Of several processes that share a run, the first holds the lock and all write shards: a name says
what is in it, so none can spoil another's. On a mounted bucket the lock reaches one host only; a
second run elsewhere would then do the same rows again, and change none.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import polars as pl

from jaxsteer import tables
from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path, sha256_bytes
from jaxsteer.generation.distributed import Hosts
from jaxsteer.study import record
from jaxsteer.study.record import RunRecord
from jaxsteer.study.spec import StudySpec, leaves


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process.

    Raises:
      UserError: another process has it, it cannot be written, or its file system has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use by another process; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot lock {folder}, which keeps a second run out: {error.strerror}; choose an "
                "--out on another file system"
            ) from None
        # What a killed process was writing has a dot in front and was never renamed.
        for stale in (*folder.glob(".*.*"), *(folder / "shards").glob(".*")):
            stale.unlink()
        yield


def write(folder: Path, key: str, rows: pl.DataFrame) -> None:
    """Add one shard of the run `key`; its name is its content, so writing it again is harmless."""
    data = tables.encoded(rows)
    with atomic_path(folder / f"{key[:16]}-{sha256_bytes(data)[:16]}.parquet") as temporary:
        temporary.write_bytes(data)


def read(folder: Path, key: str) -> list[pl.DataFrame]:
    """Every shard of the run `key`.

    Raises:
      UserError: a shard whose bytes are not what its name says, or that is no Parquet.
    """
    found = []
    for path in sorted(folder.glob(f"{key[:16]}-*.parquet")):
        try:
            data = path.read_bytes()
            if sha256_bytes(data)[:16] != path.stem[-16:]:
                raise OSError("its bytes have changed")
            found.append(pl.read_parquet(io.BytesIO(data)))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it, its rows run again") from None
    return found


def table(folder: Path, key: str, names: Sequence[str]) -> pl.DataFrame | None:
    """All rows of the run `key`, in the order of `names`; None while one is missing."""
    found = read(folder, key)
    if not found:
        return None
    # A row is there twice if a process of an earlier, broken run was still at it: both are equal.
    rows = pl.concat(found).unique("row_id")
    if set(names) - set(rows["row_id"]):
        return None
    order = pl.DataFrame({"row_id": names})
    return order.join(rows, on="row_id", how="left", maintain_order="left")


def count(folder: Path, key: str, known: dict[str, int]) -> int:
    """How many rows the shards of the run `key` hold; `known` remembers those counted before."""
    for path in folder.glob(f"{key[:16]}-*.parquet"):
        if path.name not in known:
            rows = pl.scan_parquet(io.BytesIO(path.read_bytes()))
            known[path.name] = rows.select(pl.len()).collect().item()
    return sum(known.values())


def claim(folder: Path, made: RunRecord) -> None:
    """Make the folder this run's, or refuse it as another's, saying what differs."""
    held = record.read(folder)
    if held is None:
        record.write(folder, made)
    elif held.key != made.key:
        parts = ("study", "model", "policy", "modes", "directions", "layers", "dose", "prompts")
        refuse(folder, differing(held, {part: getattr(made, part) for part in parts}), made.study)


def check_same(folder: Path, made: RunRecord, hosts: Hosts) -> None:
    """Refuse to help with another run than process 0's."""

    def same() -> bool | None:
        held = record.read(folder)
        return (held is not None and held.key == made.key) or None

    if not hosts.seen(same):
        raise UserError(
            f"process {hosts.process} was asked for another run than process 0 claims in "
            f"{folder / record.FILE}; give all processes the same command"
        )


def differing(held: RunRecord, asked: Mapping[str, Any]) -> list[str]:
    """Names of the record's fields that have another value than asked for."""
    return [part for part, value in asked.items() if getattr(held, part) != value]


def refuse(folder: Path, parts: Sequence[str], spec: StudySpec) -> NoReturn:
    """Refuse a folder that holds another run, with the names of the study's keys that differ."""
    held = record.read(folder)
    keys = _differing_keys(held.study, spec) if held is not None and "study" in parts else []
    raise UserError(
        f"{folder} holds another run ({', '.join(parts) or 'conditions'} differ)"
        + (f": {', '.join(keys[:3])}" if keys else "")
        + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        + "; choose another --out, or give --fresh to replace it"
    )


def _differing_keys(held: StudySpec, asked: StudySpec) -> list[str]:
    """Keys of the study that only one of two has, or whose values differ."""
    one, two = (dict(leaves(msgspec.to_builtins(spec), "study")) for spec in (held, asked))
    return [
        key for key in {**one, **two} if not (key in one and key in two and one[key] == two[key])
    ]
