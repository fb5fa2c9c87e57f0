"""Parquet tables read from disk, a damaged one refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from jaxsteer.errors import UserError


def read(path: Path, again: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read a Parquet file.

    Args:
      path: the file.
      again: what to do about a damaged one, in words.
      columns: the ones to read; None is all.

    Raises:
      UserError: unreadable, or damaged so that the reader gives up or panics.
    """
    wanted = None if columns is None else list(columns)
    try:
        # No pattern: of a folder run[1] polars would read its neighbour run1.
        return pl.read_parquet(path, columns=wanted, glob=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({first}); {again}") from None
