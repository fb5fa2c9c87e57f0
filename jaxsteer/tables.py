"""Parquet tables on disk: written atomically, a damaged one refused in one line.

Polars gets bytes, never paths: it would read `run[1]` as a pattern and refuses names that are not
UTF-8.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path


def read(path: Path, again: str) -> pl.DataFrame:
    """Read a Parquet file.

    Args:
      path: the file.
      again: what to do about a damaged one, in words.

    Raises:
      UserError: the file is missing, unreadable or damaged.
    """
    try:
        return pl.read_parquet(io.BytesIO(path.read_bytes()))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({first}); {again}") from None


def encoded(table: pl.DataFrame, metadata: Mapping[str, str] | None = None) -> bytes:
    """A table as the bytes of a Parquet file.

    Args:
      table: its rows.
      metadata: text to keep in the file, by key.
    """
    buffer = io.BytesIO()
    table.write_parquet(buffer, metadata=None if metadata is None else dict(metadata))
    return buffer.getvalue()


def write(path: Path, table: pl.DataFrame, metadata: Mapping[str, str] | None = None) -> None:
    """Write a Parquet file atomically; arguments as `encoded`.

    Raises:
      UserError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded(table, metadata))
