"""The beginning that rows share, run once: a system prompt's cache under each condition.

All prompts of a condition begin with the same system prompt, so its keys and values (steered as
the condition asks) are computed once (`depth.fill`) and copied into each row, which then brings
only its own tokens. What comes out is what the whole prompts give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from jaxsteer.model.arrays import AnyArray
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.decoder import Cache, Realised, empty_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """Beginnings of prompts, run; every leaf has a leading axis of beginnings, or of rows.

    Attributes:
      cache: keys and values per layer, in the order of the left-padded tokens.
      real: which slots hold a real token.
      realised: what was changed there, per tap and layer.
    """

    cache: Cache
    real: Bool[AnyArray, "*lead slot"]
    realised: dict[str, Realised]


@jax.jit
def take(prefix: Prefix, index: Int[AnyArray, " row"]) -> Prefix:
    """Each row's beginning, by number."""
    return jax.tree.map(lambda leaf: leaf[index], prefix)


def opened(
    config: ModelConfig, n_layers: int, prefix: Prefix | None, tokens: int, dtype: DTypeLike
) -> tuple[Cache, Bool[Array, " held"]]:
    """One row's cache, its beginning in it and room for `tokens` more; which slots are held.

    Without a prefix there is only the room, and no slot before it.
    """
    cache = empty_cache(config, n_layers, tokens, dtype)
    if prefix is None:
        return cache, jnp.zeros((0,), bool)
    joined = jax.tree.map(lambda *kv: jnp.concatenate(kv, axis=1), prefix.cache, cache)
    return joined, jnp.asarray(prefix.real)


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, each keeping at least its last for itself.

    [1, 2, 3, 4] and [1, 2, 5] share 2; [1, 2] and [1, 2] share 1.
    """
    if not prompts:
        return 0
    first, limit = prompts[0], min(map(len, prompts)) - 1
    for i in range(limit):
        if any(prompt[i] != first[i] for prompt in prompts):
            return i
    return max(limit, 0)


def shared_lengths(prompts: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> list[int]:
    """`shared_length` of each prompt's group: prompts of one system prompt, say."""
    members: dict[Hashable, list[Sequence[int]]] = {}
    for prompt, group in zip(prompts, groups, strict=True):
        members.setdefault(group, []).append(prompt)
    lengths = {group: shared_length(some) for group, some in members.items()}
    return [lengths[group] for group in groups]
