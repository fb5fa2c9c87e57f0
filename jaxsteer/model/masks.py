"""Who sees whom, and where each token stands: from masks of real tokens, never from token ids."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def causal_mask(
    real: Bool[Array, " token"] | Int[Array, " token"], before: Bool[Array, " slot"] | None = None
) -> Bool[Array, "token slots"]:
    """Which slots each token of a row sees: real ones of its own prompt, and none after itself.

    Args:
      real: which tokens are real; or, of a row that holds several prompts (`lanes`), the number of
        the prompt that each is of, 0 for padding.
      before: which slots before them are real (a prefix that was run earlier).

    real = [F, T, T] gives      with before = [F, T]       and real = [1, 1, 2] gives
        [[F, F, F],             [[F, T, F, F, F],          [[T, F, F],
         [F, T, F],              [F, T, F, T, F],           [T, T, F],
         [F, T, T]]              [F, T, F, T, T]]           [F, F, T]]
    """
    tokens = real.shape[0]
    own = jnp.tril(real[None, :] == real[:, None]) & (real > 0)[None, :]
    if before is None:
        return own
    return jnp.concatenate([jnp.broadcast_to(before, (tokens, before.shape[0])), own], axis=1)


def positions(
    real: Bool[Array, " token"] | Int[Array, " token"], before: Bool[Array, " slot"] | None = None
) -> Int[Array, " token"]:
    """Positions counted over a prompt's real tokens; arguments as for `causal_mask`.

    [F, T, T] gives [0, 0, 1], after [F, T] it gives [1, 1, 2]; [1, 1, 2] gives [0, 1, 0].
    """
    start = 0 if before is None else jnp.sum(before)
    return start + jnp.maximum(jnp.sum(causal_mask(real), axis=1) - 1, 0)


def visible_slots(
    held: Bool[Array, " slots"], start: Int[Array, ""], newest: Int[Array, ""]
) -> Bool[Array, " slots"]:
    """Which cache slots a generated token sees: the prompt's real ones, and replies up to itself.

    Args:
      held: which slots hold a real token of the prompt.
      start: the slot of the first generated token.
      newest: the slot of this one.

    held = [F, T, T, F, F, F] with start 3 and newest 4 gives [F, T, T, T, T, F].
    """
    index = jnp.arange(held.shape[0])
    return held | ((index >= start) & (index <= newest))
