"""The beginning that rows share, run once: a system prompt's cache under each condition.

All prompts of a condition begin with the same system prompt, so its keys and values (steered as
the condition asks) are computed once and copied into each row, which then brings only its own
tokens. What comes out is what the whole prompts give.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxsteer import chat
from jaxsteer.arrays import AnyArray
from jaxsteer.interventions import Interventions
from jaxsteer.masks import causal_mask, positions
from jaxsteer.model import Cache, Decoder, Params, Realised, Steering, bind, empty_cache

CHUNK = 8
STEP = 16


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


@functools.partial(jax.jit, static_argnames=("definition",))
def _fill(
    definition: nnx.GraphDef[Decoder],
    params: Params,
    tokens: Int[AnyArray, "row slot"],
    real: Bool[AnyArray, "row slot"],
    interventions: Interventions | None,
    probes: Float[AnyArray, "layer probe d_model"],
) -> Prefix:
    model = bind(definition, params)

    def one(tokens: Array, real: Array, interventions: Interventions | None) -> Prefix:
        steering = None
        if interventions is not None:
            steering = Steering(
                interventions=interventions,
                touched=real & interventions.on_prompt,
                real=real,
                probes=jnp.asarray(probes),
            )
        cache, _ = opened(model, None, tokens.shape[0])
        out = model(
            tokens, positions(real), causal_mask(real), cache, jnp.int32(0), steering=steering
        )
        return Prefix(cache=out.cache, real=real, realised=out.realised)

    return jax.vmap(one)(jnp.asarray(tokens), jnp.asarray(real), interventions)


def fill(
    definition: nnx.GraphDef[Decoder],
    params: Params,
    beginnings: Sequence[Sequence[int]],
    conditions: Sequence[int],
    interventions: Interventions | None,
    probes: Float[AnyArray, "layer probe d_model"],
) -> Prefix:
    """Run beginnings, each under one condition; an empty one is all padding.

    Args:
      definition: from `model.graph`.
      params: the model's parameters.
      beginnings: token ids.
      conditions: index into `interventions` of each.
      interventions: stacked conditions; None runs the plain model.
      probes: unit directions whose projections are recorded.

    Returns:
      One entry per beginning, all in one width: the longest, rounded up to a multiple of 16.
    """
    width = -(-max(map(len, beginnings)) // STEP) * STEP
    parts = []
    # A fixed number at a time: another condition then compiles nothing.
    for start in range(0, len(beginnings), CHUNK):
        some = [list(b) for b in beginnings[start : start + CHUNK]]
        index = np.array([*conditions[start : start + CHUNK]] + [0] * (CHUNK - len(some)))
        tokens, real = chat.left_pad(some + [[]] * (CHUNK - len(some)), width)
        rows = None if interventions is None else interventions.rows(index)
        parts.append(_fill(definition, params, tokens, real, rows, probes))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@jax.jit
def take(prefix: Prefix, index: Int[AnyArray, " row"]) -> Prefix:
    """Each row's beginning, by number."""
    return jax.tree.map(lambda leaf: leaf[index], prefix)


def opened(
    model: Decoder, prefix: Prefix | None, tokens: int
) -> tuple[Cache, Bool[Array, " held"]]:
    """One row's cache, its beginning in it and room for `tokens` more; which slots are held.

    Without a prefix there is only the room, and no slot before it.
    """
    cache = empty_cache(model.config, tokens, model.embed.embedding[...].dtype)
    if prefix is None:
        return cache, jnp.zeros((0,), bool)
    joined = [
        (jnp.concatenate([first_k, k]), jnp.concatenate([first_v, v]))
        for (first_k, first_v), (k, v) in zip(prefix.cache, cache, strict=True)
    ]
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
