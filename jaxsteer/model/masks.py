"""Attention masks and positions, from masks of real tokens and never from token ids."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def causal_mask(
    segment_ids: Bool[Array, " token"] | Int[Array, " token"],
    before: Bool[Array, " slot"] | None = None,
) -> Bool[Array, "token slots"]:
    """Which slots each token attends to: real ones of its own prompt, up to itself.

    Args:
      segment_ids: the prompt of each token in a packed sequence, 0 for padding; or the mask of the
        real tokens of one prompt.
      before: which slots of the prefix hold a real token; None without a prefix.

    [F, T, T] gives             with before = [F, T]       and [1, 1, 2] gives
        [[F, F, F],             [[F, T, F, F, F],          [[T, F, F],
         [F, T, F],              [F, T, F, T, F],           [T, T, F],
         [F, T, T]]              [F, T, F, T, T]]           [F, F, T]]
    """
    tokens = segment_ids.shape[0]
    same = segment_ids[None, :] == segment_ids[:, None]
    own = jnp.tril(same) & (segment_ids > 0)[None, :]
    if before is None:
        return own
    return jnp.concatenate([jnp.broadcast_to(before, (tokens, before.shape[0])), own], axis=1)


def positions(
    segment_ids: Bool[Array, " token"] | Int[Array, " token"],
    before: Bool[Array, " slot"] | None = None,
) -> Int[Array, " token"]:
    """Positions counted over a prompt's real tokens, prefix included; arguments as `causal_mask`.

    [F, T, T] gives [0, 0, 1], after [F, T] it gives [1, 1, 2]; [1, 1, 2] gives [0, 1, 0].
    """
    start = 0 if before is None else jnp.sum(before)
    return start + jnp.maximum(jnp.sum(causal_mask(segment_ids), axis=1) - 1, 0)


def visible_slots(
    held: Bool[Array, " slots"], start: Int[Array, ""], newest: Int[Array, ""]
) -> Bool[Array, " slots"]:
    """Which cache slots a generated token attends to: the prompt's real ones, and the reply's.

    Args:
      held: which slots hold a real token of the prompt.
      start: the slot of the reply's first token.
      newest: the slot of this token.

    held = [F, T, T, F, F, F] with start 3 and newest 4 gives [F, T, T, T, T, F].
    """
    index = jnp.arange(held.shape[0])
    return held | ((index >= start) & (index <= newest))
