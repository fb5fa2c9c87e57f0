"""How the next token of a reply is chosen, greedily or by sampling, and which tokens end it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsteer.model.interventions import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How to decode; static, so changing it compiles again.

    Attributes:
      max_new_tokens: length of the output buffer.
      eos: token ids that end a reply (the ending token itself is not part of the reply).
      sample: draw from the distribution; False is greedy and ignores temperature and top_p.
      keep_logits: return every step's logits too: rows x new tokens x vocabulary x 4 bytes.
    """

    max_new_tokens: int
    eos: tuple[int, ...]
    sample: bool = False
    keep_logits: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Dynamic settings of sampling.

    Attributes:
      seed: the run's seed.
      temperature: divides the logits, > 0.
      top_p: keep the smallest set of tokens whose probability reaches this (Holtzman 2020).
    """

    seed: int | Int[AnyArray, ""] = 0
    temperature: float | Float[AnyArray, ""] = 1.0
    top_p: float | Float[AnyArray, ""] = 1.0


def choose(
    logits: Float[Array, " vocab"],
    row_id: UInt32[Array, ""],
    index: Int[Array, ""],
    sampling: Sampling,
    sample: bool,
) -> Int[Array, ""]:
    """Token `index` of one row's reply; its randomness depends on (seed, row id, index) only."""
    if not sample:
        return highest(logits)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row_id), index)
    scaled = logits / sampling.temperature
    order = jnp.argsort(-scaled)
    probability = jax.nn.softmax(scaled[order])
    # A token is kept while the mass before it is short of top_p: [.5, .3, .2] at .7 keeps two.
    before = jnp.cumsum(probability) - probability
    kept = jnp.where(before < sampling.top_p, scaled[order], -jnp.inf)
    return order[jax.random.categorical(key, kept)].astype(jnp.int32)


def highest(logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    """The first index of the largest value, or of a NaN, as `argmax`: [1, 3, 3] gives 1.

    In two plain reductions: XLA on a CPU runs `argmax` itself on one core, value by value.
    """
    top = (logits == jnp.max(logits)) | jnp.isnan(logits)
    return jnp.min(jnp.where(top, jnp.arange(logits.shape[0]), logits.shape[0])).astype(jnp.int32)


def ends(token: Int[Array, "*rows"], decoding: Decoding) -> Bool[Array, "*rows"]:
    """Whether a token ends a reply."""
    return jnp.any(token[..., None] == jnp.asarray(decoding.eos, jnp.int32), axis=-1)
