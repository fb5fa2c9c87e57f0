"""Padded lengths of prompts, and left-padding to them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxsteer.errors import UserError

BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


def bucket(length: int, limit: int) -> int:
    """The padded length of a prompt: the smallest bucket that holds it.

    A row's own length decides, never its neighbours', so padding is a property of the row.

    Raises:
      UserError: longer than `limit` tokens or than the largest bucket.
    """
    for size in BUCKETS:
        if length <= size and length <= limit:
            return size
    most = max(0, min(limit, BUCKETS[-1]))
    # A limit is the model's context, less what the reply may take.
    mend = "shorten it" if most else "max_new_tokens leaves no room for the prompt; lower it"
    raise UserError(f"a prompt has {length} tokens and at most {most} fit; {mend}")


def check_lengths(lengths: Iterable[int], limit: int) -> None:
    """Refuse what is too long before anything runs.

    Raises:
      UserError: as `bucket`.
    """
    for length in lengths:
        bucket(length, limit)


def left_pad(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-pad rows to `width`: int32 ids and the mask of real tokens, both [row, token].

    For width 4, [[7, 8], [5, 6, 9]] becomes
        ids  [[0, 0, 7, 8], [0, 5, 6, 9]]
        real [[F, F, T, T], [F, T, T, T]]
    The last column is every row's last prompt token. The filler id means nothing: only the mask
    says what is padding.
    """
    ids = np.zeros((len(rows), width), np.int32)
    real = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :] = row
            real[i, -len(row) :] = True
    return ids, real
