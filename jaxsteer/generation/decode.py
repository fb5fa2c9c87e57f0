"""Decode in slots: a fixed number of rows at a time; a row that ends frees its slot for another.

A row whose prompt was read (`prefill`) is put into a free slot and decodes there beside rows that
began earlier, so short replies never wait for long ones. All slots have one shape, so one program
serves a whole study.

Rows enter and leave between chunks of CHUNK steps. In a chunk the cache is only read. What the
steps write goes into a small cache, in which all rows are at the same column: one write for all. At
the end of the chunk it is copied to each row's own place. Chunks are always whole, so a token's
place follows from its row alone, and a row's result does not depend, to the last bit, on the other
rows. With chunks of 2, a row of 3 prompt tokens, while its fourth step runs:

    slot       0   1   2   3   4   5   6   7       0   1
    cache      a   b   c   .   w   x   .   .       y   z       start is 4, the reply is w x y z

The keys and values of a prefix are in a third cache, before these two, and neighbouring slots may
read them together (`engine.neighbours`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsteer.model import sharding
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.decoder import Cache, Decoder, Params, Past, Realised, Steering, bind
from jaxsteer.model.interventions import AnyArray, Interventions
from jaxsteer.model.layers import Visible, write_block

# Steps of a chunk. A cache is written this many slots at a time, so a reply starts at a multiple.
CHUNK = 8


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Rows that decode together; every leaf has a leading row axis, or is one row's.

    Attributes:
      live: rows that have not ended; the slots of the others are free.
      emitted: tokens chosen so far, an ending one included.
      last: the newest token, not yet read by the model.
      position: its rotary position.
      tokens: output buffer; entries from `emitted` on mean nothing.
      logits: output buffer of the logits, no column unless `Decoding.keep_logits`.
      cache: keys and values per layer: prompt, room for the reply.
      held: which slots, of the prefix and then of the cache, hold a real token of prefix or prompt.
      start: of these slots, that of the reply's first token.
      prompt: realised change over the prompt, per tap and layer.
      response: running sums of the realised change over the reply.
      interventions: one entry per row.
      ids: a stable number per row, for sampling.
    """

    live: Bool[Array, " *row"]
    emitted: Int[Array, " *row"]
    last: Int[Array, " *row"]
    position: Int[Array, " *row"]
    tokens: Int[Array, "*row new_token"]
    logits: Float[Array, "*row new_token kept"]
    cache: Cache = dataclasses.field(metadata=sharding.KEYS_AND_VALUES)
    held: Bool[Array, "*row seen"]
    start: Int[Array, " *row"]
    prompt: dict[str, Realised]
    response: dict[str, Realised]
    interventions: Interventions
    ids: UInt32[Array, " *row"]


# Unused arguments are kept, so that the slots are committed to the devices of the rows: otherwise
# `insert` would compile twice.
@functools.partial(jax.jit, static_argnames=("config", "size", "mesh"), keep_unused=True)
def empty(rows: DecodeState, config: ModelConfig, size: int, mesh: Mesh | None) -> DecodeState:
    """`size` free slots for rows such as `rows`, of which only the shapes are read.

    Args:
      rows: rows that are to enter.
      config: the model's configuration; static.
      size: number of slots; static.
      mesh: the devices to spread them over, static; None for one device.
    """
    zeros = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), rows)
    return sharding.constrain(zeros, config, mesh)


@functools.partial(jax.jit, donate_argnames=("old",))
def _put(old: Any, new: Any, at: Array) -> Any:
    return jax.tree.map(lambda slots, rows: slots.at[at].set(rows, mode="drop"), old, new)


def insert(state: DecodeState, rows: DecodeState, slots: Int[AnyArray, " entering"]) -> DecodeState:
    """Put rows into slots. All of a slot is written: nothing is left of the row that had it.

    Args:
      state: the slots; its memory is reused.
      rows: rows whose prompts were read.
      slots: where each goes; a number beyond the last slot leaves the row out, so the number of
        rows that enter compiles nothing. Of 4 slots and 3 rows, [4, 4, 1] puts the last row into
        slot 1.
    """
    at = jnp.asarray(slots)
    bare, entering = (dataclasses.replace(some, cache=[]) for some in (state, rows))
    # Layer by layer, all by one program: the whole model's would take ten times as long to compile.
    layers = zip(state.cache, rows.cache, strict=True)
    cache = [_put(old, new, at) for old, new in layers]
    return dataclasses.replace(_put(bare, entering, at), cache=cache)


@functools.partial(jax.jit, static_argnames=("definition", "decoding"), donate_argnames=("state",))
def advance(
    definition: nnx.GraphDef[Decoder],
    decoding: Decoding,
    params: Params,
    state: DecodeState,
    probes: Float[AnyArray, "layer probe d_model"],
    sampling: Sampling,
    prefixes: Past | None = None,
) -> DecodeState:
    """Run CHUNK steps, or as many as it takes until every row has ended.

    Args:
      definition: from `decoder.graph`; static.
      decoding: static decoding settings.
      params: the model's parameters.
      state: the slots; its memory is reused.
      probes: unit directions whose projections are recorded.
      sampling: dynamic sampling settings, unread when greedy.
      prefixes: keys and values per layer, one entry for each group of neighbouring slots; None for
        rows without a prefix. Two entries for 8 slots: one of slots 0 to 3, one of 4 to 7.
    """
    model = bind(definition, params)
    count = len(state.live)
    group = count // len(prefixes[0][0]) if prefixes else 1
    index = jnp.arange(count)
    # The slot, of prefix and cache, of the token that each row reads first in this chunk.
    first = state.start + state.emitted - 1
    slot = jnp.arange(state.held.shape[1])
    before = state.held | ((slot >= state.start[:, None]) & (slot < first[:, None]))
    # A token sees the slots of the chunk up to its own, since they hold the positions that follow.
    chunk = state.position[:, None] + jnp.arange(CHUNK)
    slots = (
        jnp.concatenate([before, jnp.ones_like(chunk)], axis=1, dtype=jnp.int32),
        jnp.concatenate([jnp.cumsum(before, axis=1) - 1, chunk], axis=1),
    )
    choose_rows = jax.vmap(functools.partial(choose, sampling=sampling, sample=decoding.sample))

    def read_token(
        slot: Array,
        prefix: Past | None,
        row: DecodeState,
        slots: tuple[Array, Array],
        recent: Cache,
        past: Past,
    ) -> tuple[Array, Cache, dict[str, Realised]]:
        # A row that has ended is neither steered nor counted.
        steering = Steering(
            interventions=row.interventions,
            steered=(row.live & row.interventions.on_response)[None],
            real=row.live[None],
            probes=jnp.asarray(probes),
        )
        visible = Visible(jnp.ones(1, jnp.int32), row.position[None], *slots)
        earlier = [past] if prefix is None else [prefix, past]
        out = model(row.last[None], visible, recent, slot, past=earlier, steering=steering)
        return model.logits(out.hidden)[0], out.cache, out.realised

    # Group by group, so that the rows of one read its prefix in one product.
    read_group = jax.vmap(read_token, in_axes=(None, None, 0, 0, 0, 0))
    read_groups = jax.vmap(read_group, in_axes=(None, 0, 0, 0, 0, 0))

    def read_tokens(slot: Array, *rows: Any) -> Any:
        grouped = jax.tree.map(
            lambda leaf: leaf.reshape(count // group, group, *leaf.shape[1:]), rows
        )
        found = read_groups(slot, prefixes, *grouped)
        return jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), found)

    def body(carry: tuple[Array, Cache, DecodeState]) -> tuple[Array, Cache, DecodeState]:
        done, recent, s = carry
        logits, recent, realised = read_tokens(done, s, slots, recent, state.cache)
        token = choose_rows(logits, s.ids, s.emitted)
        # A row that has ended writes beyond its buffer, which writes nothing.
        at = jnp.where(s.live, s.emitted, decoding.max_new_tokens)
        emitted = s.emitted + s.live
        after = dataclasses.replace(
            s,
            live=s.live & ~ends(token, decoding) & (emitted < decoding.max_new_tokens),
            emitted=emitted,
            last=jnp.where(s.live, token, s.last),
            position=s.position + s.live,
            tokens=s.tokens.at[index, at].set(token, mode="drop"),
            logits=s.logits.at[index, at].set(logits[:, : s.logits.shape[2]], mode="drop"),
            response=jax.tree.map(jnp.add, s.response, realised),
        )
        return done + 1, recent, after

    def more(carry: tuple[Array, Cache, DecodeState]) -> Array:
        done, _, s = carry
        return (done < CHUNK) & jnp.any(s.live)

    recent = jax.tree.map(lambda kv: jnp.zeros_like(kv[:, :, :CHUNK]), state.cache)
    # The cache stays outside the loop: what a loop only reads is neither carried nor copied.
    begin = (jnp.int32(0), recent, dataclasses.replace(state, cache=[]))
    _, recent, after = jax.lax.while_loop(more, body, begin)
    write_rows = jax.vmap(write_block)
    # `first` counts the slots of the prefix too.
    at = first - (state.held.shape[1] - state.cache[0][0].shape[2])
    cache = jax.tree.map(lambda old, new: write_rows(old, new, at), state.cache, recent)
    return dataclasses.replace(after, cache=cache)
