"""Decode in slots: a fixed number of rows at a time, each leaving when it ends.

A row that was read (`prefill`) is put into a free slot and decodes there beside rows that began
earlier, so that short replies never wait for long ones. All slots have one shape, so one program
serves a whole study.

Rows enter and leave between chunks of CHUNK steps. In a chunk the cache is only read, and what the
steps write goes into a small cache where all rows are at the same column: one write for all. At the
chunk's end it is written into each row's own place. Chunks are always whole, so a token's place
follows from its row alone, and what a row comes to depends, to the last bit, on nobody beside it.
With chunks of 2, a row of 3 prompt tokens, while its fourth step runs:

    slot       0   1   2   3   4   5   6   7       0   1
    cache      a   b   c   .   w   x   .   .       y   z       start is 4, the reply is w x y z
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

from jaxsteer.generation.generate import Decoding, Sampling, choose, ends, step
from jaxsteer.generation.prefill import PART, Prefilled
from jaxsteer.model import sharding
from jaxsteer.model.arrays import AnyArray
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.decoder import Cache, Decoder, Params, Realised, bind
from jaxsteer.model.interventions import Interventions
from jaxsteer.model.layers import write_block
from jaxsteer.model.masks import visible_slots

# Steps between looks at the host.
CHUNK = PART


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """The rows that decode together; every leaf has a leading row axis.

    Attributes:
      live: slots whose row has not ended; the others are free.
      stopped: whether an end-of-sequence token ended the row.
      emitted: tokens chosen so far, an ending one included.
      length: tokens of the reply so far.
      last: the newest token, not yet read by the model.
      position: its rotary position.
      tokens: output buffer; entries from `length` on mean nothing.
      logits: output buffer of the logits, no column unless `Decoding.keep_logits`.
      cache: keys and values per layer.
      held: which cache slots hold a real token of the prompt.
      start: the cache slot of the reply's first token.
      response: running sums of the realised change.
      interventions: one entry per row.
      ids: a stable number per row, for sampling.
    """

    live: Bool[Array, " row"]
    stopped: Bool[Array, " row"]
    emitted: Int[Array, " row"]
    length: Int[Array, " row"]
    last: Int[Array, " row"]
    position: Int[Array, " row"]
    tokens: Int[Array, "row new_token"]
    logits: Float[Array, "row new_token kept"]
    cache: Cache
    held: Bool[Array, "row slot"]
    start: Int[Array, " row"]
    response: dict[str, Realised]
    interventions: Interventions
    ids: UInt32[Array, " row"]


def _opening(decoding: Decoding, prefilled: Prefilled) -> Slots:
    """Prefilled rows as they enter their slots, the first token of the reply chosen."""
    count = len(prefilled.token)
    tokens = jnp.zeros((count, decoding.max_new_tokens), jnp.int32)
    logits = jnp.zeros((count, decoding.max_new_tokens, prefilled.logits.shape[1]))
    return Slots(
        live=prefilled.live & (decoding.max_new_tokens > 1),
        stopped=prefilled.stopped,
        emitted=jnp.ones((count,), jnp.int32),
        length=prefilled.live.astype(jnp.int32),
        last=prefilled.token,
        position=jnp.sum(prefilled.held, axis=1).astype(jnp.int32),
        tokens=tokens.at[:, 0].set(prefilled.token),
        logits=logits.at[:, 0].set(prefilled.logits),
        # All of a slot is written, so nothing of the row that had it before is left.
        cache=prefilled.cache,
        held=prefilled.held,
        start=prefilled.start,
        response=jax.tree.map(jnp.zeros_like, prefilled.realised),
        interventions=prefilled.interventions,
        ids=prefilled.ids,
    )


# What is not used is kept, so that the slots lie where the rows lie: `insert` compiles once.
@functools.partial(
    jax.jit, static_argnames=("config", "decoding", "batch", "mesh"), keep_unused=True
)
def empty(
    config: ModelConfig,
    decoding: Decoding,
    batch: int,
    prefilled: Prefilled,
    mesh: Mesh | None = None,
) -> Slots:
    """Slots without rows, shaped for those of `prefilled`.

    Args:
      config: the model's configuration; static.
      decoding: static decoding settings.
      batch: number of slots; static.
      prefilled: read for its shapes only.
      mesh: the devices to lie on; None for one device.
    """
    opening = _opening(decoding, prefilled)
    zeros = jax.tree.map(lambda leaf: jnp.zeros((batch, *leaf.shape[1:]), leaf.dtype), opening)
    return sharding.keep(zeros, config, mesh)


@functools.partial(jax.jit, donate_argnames=("old",))
def _put(old: Any, new: Any, at: Array) -> Any:
    return jax.tree.map(lambda slots, rows: slots.at[at].set(rows, mode="drop"), old, new)


@functools.partial(jax.jit, static_argnames=("decoding",), donate_argnames=("state",))
def _put_opening(decoding: Decoding, state: Slots, prefilled: Prefilled, at: Array) -> Slots:
    return _put(state, _opening(decoding, prefilled), at)


def insert(
    decoding: Decoding,
    state: Slots,
    prefilled: Prefilled,
    put: Int[AnyArray, " prefilled_row"],
) -> Slots:
    """Put rows of `prefilled` into slots.

    A slot beyond the last puts nothing, so how many rows enter compiles nothing. Of 4 slots and 3
    rows, [4, 4, 1] fills slot 1 with the last row.

    Args:
      decoding: decoding settings.
      state: the slots; its memory is taken over.
      prefilled: rows ready to decode.
      put: slot of each.
    """
    at = jnp.asarray(put)
    bare = dataclasses.replace(prefilled, cache=[])
    rest = _put_opening(decoding, dataclasses.replace(state, cache=[]), bare, at)
    # Layer by layer, all by one program: the whole model's would take ten times as long to compile.
    layers = zip(state.cache, prefilled.cache, strict=True)
    cache = [_put(old, new, at) for old, new in layers]
    return dataclasses.replace(rest, cache=cache)


@functools.partial(jax.jit, static_argnames=("definition", "decoding"), donate_argnames=("state",))
def advance(
    definition: nnx.GraphDef[Decoder],
    decoding: Decoding,
    params: Params,
    state: Slots,
    probes: Float[AnyArray, "layer probe d_model"],
    sampling: Sampling,
) -> Slots:
    """Decode a chunk of steps, or until no row is live.

    Args:
      definition: from `model.graph`; static.
      decoding: static decoding settings.
      params: the model's parameters.
      state: the slots; its memory is taken over.
      probes: unit directions whose projections are recorded.
      sampling: dynamic sampling settings, unread when greedy.
    """
    model = bind(definition, params)
    count = len(state.live)
    index = jnp.arange(count)
    # Where the token goes that a row reads first in this chunk.
    first = state.start + state.emitted - 1
    before = jax.vmap(visible_slots)(state.held, state.start, first - 1)
    step_rows = jax.vmap(functools.partial(step, model), in_axes=(0, 0, 0, 0, None, 0, 0, 0, None))
    choose_rows = jax.vmap(
        functools.partial(choose, sampling=sampling, sample=decoding.sample), in_axes=(0, 0, 0)
    )

    def body(carry: tuple[Array, Cache, Slots]) -> tuple[Array, Cache, Slots]:
        done, recent, s = carry
        of_chunk = jnp.broadcast_to(jnp.arange(CHUNK) <= done, (count, CHUNK))
        logits, recent, realised = step_rows(
            s.last,
            s.position,
            s.live,
            jnp.concatenate([before, of_chunk], axis=1),
            done,
            recent,
            state.cache,
            s.interventions,
            jnp.asarray(probes),
        )
        token = choose_rows(logits, s.ids, s.emitted)
        ended = s.live & ends(token, decoding)
        going = s.live & ~ended
        # A row that has ended writes beyond its buffer, which writes nothing.
        at = jnp.where(s.live, s.emitted, decoding.max_new_tokens)
        emitted = s.emitted + s.live
        after = dataclasses.replace(
            s,
            live=going & (emitted < decoding.max_new_tokens),
            stopped=s.stopped | ended,
            emitted=emitted,
            length=s.length + going,
            last=jnp.where(s.live, token, s.last),
            position=s.position + s.live,
            tokens=s.tokens.at[index, at].set(token, mode="drop"),
            logits=s.logits.at[index, at].set(logits[:, : s.logits.shape[2]], mode="drop"),
            response=jax.tree.map(jnp.add, s.response, realised),
        )
        return done + 1, recent, after

    def more(carry: tuple[Array, Cache, Slots]) -> Array:
        done, _, s = carry
        return (done < CHUNK) & jnp.any(s.live)

    recent = jax.tree.map(lambda kv: jnp.zeros_like(kv[:, :, :CHUNK]), state.cache)
    # The cache stays outside the loop: what a loop only reads is neither carried nor copied.
    begin = (jnp.int32(0), recent, dataclasses.replace(state, cache=[]))
    _, recent, after = jax.lax.while_loop(more, body, begin)
    place = jax.vmap(write_block)
    cache = jax.tree.map(lambda old, new: place(old, new, first), state.cache, recent)
    return dataclasses.replace(after, cache=cache)
