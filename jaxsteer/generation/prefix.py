"""Shared prefixes: the leading tokens that many prompts have in common, run once.

All prompts of a condition start with the same system prompt, so its keys and values (steered as the
condition asks) are computed once (`layer_sharing.run_prefixes`) and copied into each row, which
then adds only its own tokens. The result is that of whole prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax
from jaxtyping import Bool, Int

from jaxsteer.model import sharding
from jaxsteer.model.decoder import Cache, Realised
from jaxsteer.model.interventions import AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """Prefixes that have been run; every leaf has a leading axis of prefixes, or of rows.

    Attributes:
      cache: keys and values per layer, in the order of the left-padded tokens.
      real: which slots hold a real token.
      realised: realised change over the prefix, per tap and layer.
    """

    cache: Cache = dataclasses.field(metadata=sharding.KEYS_AND_VALUES)
    real: Bool[AnyArray, "*lead slot"]
    realised: dict[str, Realised]

    def layers(self, first: int, last: int) -> Prefix:
        """The keys and values of layers `first` to `last` - 1, without the realised change."""
        return dataclasses.replace(self, cache=self.cache[first:last], realised={})


@jax.jit
def take(prefix: Prefix, index: Int[AnyArray, " row"]) -> Prefix:
    """Each row's prefix, by index."""
    return jax.tree.map(lambda leaf: leaf[index], prefix)


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, of each at most all but the last.

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
