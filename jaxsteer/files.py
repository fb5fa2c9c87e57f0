"""Atomic writes, content hashes and Parquet tables: all that this package does to finished files.

Polars gets bytes, never paths: it would read `run[1]` as a pattern and refuses names that are not
UTF-8.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxsteer.errors import UserError, heed_stop, one_line

if TYPE_CHECKING:
    import polars as pl

T = TypeVar("T")


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in chunks.

    Raises:
      Stopped: a stop signal was heard: the files of a large model take minutes.
    """
    heed_stop()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stable_id(*parts: str) -> int:
    """A 32-bit number from text, the same in every run and process."""
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:4], "big")


def meant(folder: Path) -> str:
    """Which folder beside one that is not there is meant, for an error message; "" if none is."""
    if folder.is_dir() or not folder.parent.is_dir():
        return ""
    names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    near = difflib.get_close_matches(folder.name, names, n=1)
    return f" (did you mean {folder.parent / near[0]}?)" if near else ""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values have equal hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_json(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON."""
    return sha256_bytes(canonical_json(value).encode())


@contextlib.contextmanager
def writing(
    path: Path, mend: str = "free space or choose another --out", what: str = "write"
) -> Iterator[None]:
    """Say in one line that a file or folder cannot be written (or `what` else), and the mend.

    Raises:
      UserError: the system refused: a full disk, a read-only folder, a name too long.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot {what} {path}: {error.strerror or one_line(error)}; {mend}"
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success fsync it and rename it over `path`.

    On any error the temporary file is removed and `path` stays as it was.

    Raises:
      UserError: as `writing`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a results folder for this process; what a killed one left half-written is removed.

    The operating system drops the lock with the process, however it ends. On a mounted bucket it
    reaches one machine only.

    Raises:
      UserError: another process holds it, it cannot be written, or its file system has no locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", blocking=False)
    with writing(folder, "choose another --out", "write or lock"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire()
        except Timeout:
            raise UserError(
                f"{folder} is in use by another process; wait for it, or choose another --out"
            ) from None
    with held:
        for stale in (*folder.glob(".*.*"), *folder.glob("*/.*.*")):
            if stale.suffix != ".lock":
                stale.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process reads, changes and writes a file; for a moment, not for a run.

    Raises:
      UserError: the lock beside the file cannot be written.
      Stopped: a stop signal was heard while it waited.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    mend = "choose another --out, or set JAXSTEER_CACHE if it is in the cache"
    held = None
    while held is None:
        with writing(path, mend, "write or lock"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                held = lock.acquire(timeout=0.5)
            except Timeout:
                heed_stop()
    with held:
        yield


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work is done that it is to hold.

    Raises:
      UserError: a folder is there, or nothing can be written beside it.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; choose another --out")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: type[T], again: str) -> T:
    """Read a JSON file as a record (a struct or dataclass) or a builtin type.

    Args:
      path: the file.
      kind: what it holds.
      again: what to do about a damaged one, in words.

    Raises:
      UserError: the file is missing, unreadable or holds something else.
    """
    import msgspec

    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); {again}") from None


def read_table(path: Path, again: str) -> pl.DataFrame:
    """Read a Parquet file.

    Args:
      path: the file.
      again: what to do about a damaged one, in words.

    Raises:
      UserError: the file is missing, unreadable or damaged.
    """
    import polars as pl

    try:
        return pl.read_parquet(io.BytesIO(path.read_bytes()))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({first}); {again}") from None


def frame(lines: Sequence[Any], columns: str) -> pl.DataFrame:
    """A table of tuples or dicts that has its columns without lines too.

    Args:
      lines: tuples in the order of the columns, or dicts; their further keys are left out.
      columns: names with spaces between them, `NAME:TYPE` with str, int or bool, else of floats.
    """
    import polars as pl

    types = {"str": pl.String, "int": pl.Int64, "bool": pl.Boolean, "": pl.Float64}
    parts = (column.partition(":") for column in columns.split())
    schema = {name: types[kind] for name, _, kind in parts}
    return pl.DataFrame(lines, schema=schema, orient="row")


def table_bytes(table: pl.DataFrame, metadata: Mapping[str, str] | None = None) -> bytes:
    """A table as the bytes of a Parquet file.

    Args:
      table: its rows.
      metadata: text to keep in the file, by key.
    """
    buffer = io.BytesIO()
    table.write_parquet(buffer, metadata=None if metadata is None else dict(metadata))
    return buffer.getvalue()


def write_table(path: Path, table: pl.DataFrame, metadata: Mapping[str, str] | None = None) -> None:
    """Write a Parquet file atomically; arguments as `table_bytes`.

    Raises:
      UserError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(table_bytes(table, metadata))
