"""One prompt, then its reply token by token: generation to watch, and the tests' reference.

`engine` serves studies: it packs prompts, shares work between rows, and keeps sums over tokens.
Here one prompt is read under one condition, or under several in step, and all results of a forward
pass are available directly after it: next-token logits, the projections of every token at every
layer, the realised change.

    read_each(prompt) -> Readings -> reply_each: Readings, Readings, ...    one forward pass each

A prompt is left-padded, so that all prompts of a bucket run the same programs. For 3 real tokens in
a bucket of 4, and 2 new tokens:

    slot       0    1   2   3   4   5
    token      pad  a   b   c   x   y
    position   -    0   1   2   3   4      counted over real tokens
    visible to x:   a   b   c   x          padding is never visible, never steered

Three programs make a pass: the embedding, a group of layers, which runs for each group, and the
choice of the next token. Each is compiled for each prompt bucket and for one token of the reply; a
program of all layers would take ten times as long to load. Static: model graph, `Decoding`.
Dynamic: tokens, interventions, probes, sampling; so another strength, layer or direction compiles
nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsteer.errors import heed_stop
from jaxsteer.generation import prefill
from jaxsteer.generation.decode import Decoding, Sampling, choose
from jaxsteer.generation.layer_sharing import between, layer_groups
from jaxsteer.generation.requests import bucket, left_pad
from jaxsteer.model import decoder, sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.interventions import AnyArray, Interventions
from jaxsteer.model.layers import Visible

TAP = "resid_post"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The rows of one prompt, a row for each condition, between two forward passes.

    Attributes:
      cache: keys and values per layer: the left-padded prompt, then the reply.
      held: which cache slots hold a real token: 1, else 0.
      slot: the cache slot of the next pass's first token; 0 before the prompt is read.
      chosen: how many tokens of each reply have been chosen.
      interventions: each row's.
      probes: unit directions per layer whose projections are wanted.
      row_id: stable number of the prompt, for sampling.
      sampling: dynamic sampling settings.
    """

    cache: decoder.Cache
    held: Int[AnyArray, "row slot"]
    slot: Int[AnyArray, ""]
    chosen: Int[AnyArray, ""]
    interventions: Interventions
    probes: Float[AnyArray, "layer probe d_model"]
    row_id: UInt32[AnyArray, ""]
    sampling: Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """One forward pass of one row: of the prompt, or of a token of the reply.

    Attributes:
      tokens: the ids that were read, padding left out.
      logits: next-token logits after them, float32.
      next: the token chosen from these.
      projections: of the stream at `resid_post` after interventions onto the probes, float32.
      realised: realised change per tap, summed over the tokens; leaves [layer, ...].
      decoding: the decoding settings.
      state: what the next pass of all rows continues from.
    """

    tokens: list[int]
    logits: Float[np.ndarray, " vocab"]
    next: int
    projections: Float[np.ndarray, "layer token probe"]
    realised: dict[str, decoder.Realised]
    decoding: Decoding
    state: State


Realised = dict[str, decoder.Realised]


@functools.partial(jax.jit, static_argnames=("config",))
def embed_tokens(
    config: ModelConfig,
    params: decoder.Params,
    tokens: Int[AnyArray, "row token"],
    real: Bool[AnyArray, "row token"],
    state: State,
) -> tuple[Visible, Float[Array, "row token d_model"], Realised]:
    """Which slots a pass's tokens attend to, the stream before the first layer, the change there.

    Args:
      config: the model's; static.
      params: the model's parameters.
      tokens: a left-padded prompt in each row, or one token of its reply.
      real: which of them are real.
      state: the rows so far.
    """
    model, slot = _bound(config, params), jnp.asarray(state.slot)

    def one(tokens: Array, real: Array, held: Array, asked: Interventions) -> Any:
        after = lax.dynamic_update_slice_in_dim(held, real.astype(jnp.int32), slot, axis=0)
        visible = Visible(
            segment_ids=real.astype(jnp.int32),
            positions=jnp.sum(held) + jnp.maximum(jnp.cumsum(real) - 1, 0),
            slot_segment_ids=after,
            slot_positions=jnp.cumsum(after) - 1,
        )
        taps = _taps(visible, slot, asked, jnp.zeros((1, 0, model.config.d_model)))
        return visible, model.embedded(tokens, taps), taps.results()[1]

    rows = (tokens, real, state.held, state.interventions)
    return jax.vmap(one)(*jax.tree.map(jnp.asarray, rows))


def _bound(config: ModelConfig, params: decoder.Params) -> decoder.Decoder:
    # The graph is no argument of the programs: a call takes its hash, which takes milliseconds.
    return decoder.bind(decoder.graph(config, params["embed"]["embedding"].dtype), params)


def _taps(visible: Visible, slot: Array, asked: Interventions, probes: Array) -> decoder.Taps:
    real = visible.segment_ids > 0
    steered = real & jnp.where(slot == 0, asked.on_prompt, asked.on_response)
    steering = decoder.Steering(interventions=asked, steered=steered, real=real, probes=probes)
    return decoder.Taps(steering, (TAP,))


@functools.partial(jax.jit, static_argnames=("config",))
def read_layers(
    config: ModelConfig,
    params: decoder.Params,
    visible: Visible,
    h: Float[Array, "row token d_model"],
    state: State,
    number: Int[AnyArray, ""],
) -> tuple[Float[Array, "row token d_model"], decoder.Cache, Array, Realised]:
    """Run the tokens of a pass through some layers.

    Args:
      config: the model's; static.
      params: of these layers.
      visible: from `embed_tokens`.
      h: the stream before these layers.
      state: the rows so far; its cache, interventions and probes are those of these layers.
      number: of the first of these layers in the model.

    Returns:
      The stream after them and their cache, with the pass's tokens written; the projections
      [row, layer, token, probe] and the realised change.
    """
    definition = decoder.blocks_graph(config, len(params["layers"]), h.dtype)
    blocks, slot = decoder.bind(definition, params), jnp.asarray(state.slot)
    probes = jnp.asarray(state.probes)

    def one(visible: Visible, h: Array, cache: decoder.Cache, asked: Interventions) -> Any:
        taps = _taps(visible, slot, asked, probes)
        h, cache = blocks.run(h, visible, cache, slot, taps, first=jnp.asarray(number))
        captured, realised = taps.results()
        exact = lax.Precision.HIGHEST
        projections = jnp.einsum("ltd,lpd->ltp", captured[TAP], probes, precision=exact)
        return h, cache, projections, realised

    return jax.vmap(one)(visible, h, state.cache, jax.tree.map(jnp.asarray, state.interventions))


@functools.partial(jax.jit, static_argnames=("config", "decoding"))
def choose_next(
    config: ModelConfig,
    decoding: Decoding,
    params: decoder.Params,
    h: Float[Array, "row token d_model"],
    state: State,
) -> tuple[Float[Array, "row vocab"], Int[Array, " row"]]:
    """Next-token logits after the last token of each row, and the token chosen from them."""
    model = _bound(config, params)
    logits = jax.vmap(lambda h: model.logits(model.final_norm(h)))(h[:, -1:])[:, 0]
    about = jnp.asarray(state.row_id), jnp.asarray(state.chosen)
    pick = functools.partial(choose, sampling=state.sampling, sample=decoding.sample)
    return logits, jax.vmap(lambda row: pick(row, *about))(logits)


def _read(
    model: ChatModel, decoding: Decoding, tokens: list[list[int]], width: int, state: State
) -> list[Reading]:
    """Read tokens of every row, left-padded to a width."""
    padded, real = left_pad(tokens, width)
    bare = dataclasses.replace(state, cache=[])
    visible, h, at_embed = embed_tokens(model.config, model.params, padded, real, bare)
    cache, projections, changes = [], [], [at_embed]
    for first, last in layer_groups(model.config.n_layers):
        between(h, first, model.config.n_layers)
        some = dataclasses.replace(
            state,
            cache=state.cache[first:last],
            interventions=state.interventions.layers(first, last),
            probes=state.probes[first:last],
        )
        params = prefill.group_params(model.params, first, last)
        h, written, projected, change = read_layers(
            model.config, params, visible, h, some, np.array(first, np.int32)
        )
        cache += written
        projections.append(projected)
        changes.append(change)
    logits, chosen = choose_next(model.config, decoding, model.params, h, bare)
    slot, count = np.asarray(state.slot + width), np.asarray(state.chosen + 1)
    held = visible.slot_segment_ids
    after = dataclasses.replace(state, cache=cache, held=held, slot=slot, chosen=count)
    found = (logits, chosen, jnp.concatenate(projections, axis=1), prefill.stacked(changes))
    logits, chosen, projected, realised = jax.device_get(found)
    return [
        Reading(
            tokens=row,
            logits=logits[i],
            next=int(chosen[i]),
            projections=projected[i][:, width - len(row) :],
            realised=jax.tree.map(lambda leaf, i=i: leaf[i], realised),
            decoding=decoding,
            state=after,
        )
        for i, row in enumerate(tokens)
    ]


def read_each(
    model: ChatModel,
    prompt: Sequence[int],
    interventions: Interventions,
    decoding: Decoding,
    *,
    probes: Float[np.ndarray, "layer probe d_model"] | None = None,
    sampling: Sampling | None = None,
    row_id: int = 0,
    width: int = 0,
) -> list[Reading]:
    """Read one prompt under each of several conditions, in step: the weights are read once for all.

    Args:
      model: a loaded model.
      prompt: token ids.
      interventions: stacked conditions.
      decoding: decoding settings, of the replies too.
      probes: unit directions whose projections are wanted; None for none.
      sampling: sampling settings, unread when greedy.
      row_id: stable number of the prompt, folded into the sampling seed.
      width: pad to at least this many tokens, so that prompts shorter than it share a program.

    Raises:
      UserError: the prompt and its reply do not fit the model's context, or the memory.
    """
    config, room = model.config, decoding.max_new_tokens
    limit, count = config.max_position - room, len(interventions.on_prompt)
    padded = bucket(max(len(prompt), min(width, limit)), limit)
    dtype = model.params["embed"]["embedding"].dtype
    # The cache, and what the layers write next to it.
    needed = 2 * count * (padded + room) * decoder.token_bytes(config, model.params)
    needed += sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    mend = f"shorten the prompt ({len(prompt):,} tokens) or lower max_new_tokens ({room})"
    sharding.check_memory(model.params, needed, mend)
    cache = decoder.empty_cache(config, config.n_layers, padded + room, dtype)
    begin = State(
        cache=jax.tree.map(lambda kv: jnp.broadcast_to(kv, (count, *kv.shape)), cache),
        held=np.zeros((count, padded + room), np.int32),
        slot=np.array(0, np.int32),
        chosen=np.array(0, np.int32),
        interventions=interventions,
        probes=prefill.no_probes(config) if probes is None else probes,
        row_id=np.array(row_id, np.uint32),
        sampling=sampling or Sampling(),
    )
    return _read(model, decoding, [list(prompt)] * count, padded, begin)


def reply_each(model: ChatModel, readings: list[Reading]) -> Iterator[list[Reading | None]]:
    """Yield the replies of `read_each` in step: a token of each, None for one that has ended.

    A reply ends before an end token, or after `max_new_tokens` tokens. Every token is read, the
    last one too, so each has its projections.
    """
    decoding, live = readings[0].decoding, [True] * len(readings)
    for _ in range(decoding.max_new_tokens):
        live = [on and row.next not in decoding.eos for on, row in zip(live, readings, strict=True)]
        if not any(live):
            return
        heed_stop()
        # A row that has ended runs beside the others, unseen.
        readings = _read(model, decoding, [[row.next] for row in readings], 1, readings[0].state)
        yield [row if on else None for on, row in zip(live, readings, strict=True)]
