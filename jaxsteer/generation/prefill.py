"""Prefill in segments: a few layers at a time over a batch of prompts, each from a parent's stream.

    embed -> segment (layers 0 to 2) -> segment (3 to 5) -> ... -> finish (logits, first token)

A segment is a program that knows its layers only by what it is given: their parameters, what is
done in them, what came out of the layers before. So all segments of a model are one compiled
program, and prompts that have been the same so far can be one entry of a batch until they part
(`depth` says which). An entry is a lane of prompts side by side (`lanes`). On its way a row passes
through other batches at other places: `parent` says where each entry goes on from, and `finish`
puts together what a row left behind: its own tokens right after its beginning, and its reply right
after them. With parts of 4, a beginning of 3 tokens and a prompt of 5 that its lane has at 2:

    lane         p  q  a  b  c  d  e  x
    cache        .  h  i  j  a  b  c  d  e  x  0  0  0  0  0  0     the reply begins at 12

What is there of its neighbours is not held, so that nobody sees it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsteer.generation.generate import Decoding, Sampling, choose, ends
from jaxsteer.generation.packing import MEMBERS
from jaxsteer.generation.prefix import Prefix
from jaxsteer.model.arrays import AnyArray
from jaxsteer.model.decoder import (
    Blocks,
    Cache,
    Decoder,
    Params,
    Past,
    Realised,
    Steering,
    Taps,
    bind,
    empty_cache,
    run_blocks,
)
from jaxsteer.model.interventions import Interventions
from jaxsteer.model.masks import causal_mask, positions

# A cache is written in parts this long (`slots`): a reply begins with one.
PART = 8


def stages(n_layers: int) -> list[tuple[int, int]]:
    """First and last + 1 of each segment's layers: at most ten segments, of one size if it goes.

    More would share more layers, and cost more calls than that saves.

    >>> stages(32)[:2], len(stages(32)), len(stages(30))
    ([(0, 4), (4, 8)], 8, 10)
    >>> stages(31)[-2:]
    [(24, 28), (28, 31)]
    """
    least = -(-n_layers // 10)
    size = next((s for s in range(least, 2 * least) if n_layers % s == 0), least)
    return [(first, min(first + size, n_layers)) for first in range(0, n_layers, size)]


def part(params: Params, first: int, last: int) -> Params:
    """The parameters of layers `first` to `last` - 1, which then count from 0."""
    return {"layers": {str(i - first): params["layers"][str(i)] for i in range(first, last)}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """What one segment leaves; every leaf has a leading axis of entries, or is one entry's.

    Attributes:
      stream: the residual stream after its layers.
      cache: keys and values of its layers, of the prompt's own tokens.
      realised: what was changed in its layers, [entry, layer, prompt of the lane, ...].
    """

    stream: Float[Array, "*entry token d_model"]
    cache: Cache
    realised: dict[str, Realised]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefilled:
    """Rows whose prompts have been read; every leaf has a leading row axis, or is one row's.

    Attributes:
      token: the first token of the reply.
      live: whether the reply goes on, so that token is part of it.
      stopped: whether that token ended it.
      logits: what it was chosen from; no column unless `Decoding.keep_logits`.
      cache: keys and values per layer, shared beginning first, with room for the reply.
      held: which cache slots hold a real token.
      start: the cache slot of the reply's first token.
      realised: change over the prompt, per tap and layer.
      interventions: one entry per row.
      ids: a stable number per row.
    """

    token: Int[Array, " *row"]
    live: Bool[Array, " *row"]
    stopped: Bool[Array, " *row"]
    logits: Float[Array, "*row kept"]
    cache: Cache
    held: Bool[Array, "*row slot"]
    start: Int[Array, " *row"]
    realised: dict[str, Realised]
    interventions: Interventions
    ids: UInt32[Array, " *row"]


def _steering(interventions: Interventions, owner: Array, probes: Array) -> Steering:
    return Steering(
        interventions=interventions,
        steered=(owner > 0) & interventions.on_prompt,
        real=owner == jnp.arange(1, MEMBERS + 1)[:, None],
        probes=probes,
    )


@functools.partial(jax.jit, static_argnames=("definition",))
def embed(
    definition: nnx.GraphDef[Decoder],
    params: Params,
    tokens: Int[AnyArray, "entry token"],
    owner: Int[AnyArray, "entry token"],
    interventions: Interventions,
) -> Level:
    """The residual stream where it begins, steered there if a condition asks.

    Args:
      definition: from `model.graph`; static.
      params: the model's parameters.
      tokens: ids of the prompts' own tokens.
      owner: which of a lane's prompts each is of; 0 is padding.
      interventions: one entry per lane.
    """
    model = bind(definition, params)

    def one(tokens: Array, owner: Array, interventions: Interventions) -> Level:
        nothing = jnp.zeros((1, 0, model.config.d_model))
        taps = Taps(_steering(interventions, owner, nothing), None)
        stream = model.embedded(tokens, taps)
        return Level(stream=stream, cache=[], realised=taps.results()[1])

    return jax.vmap(one)(jnp.asarray(tokens), jnp.asarray(owner), interventions)


@functools.partial(jax.jit, static_argnames=("definition",))
def segment(
    definition: nnx.GraphDef[Blocks],
    params: Params,
    stream: Float[Array, "above token d_model"],
    parent: Int[AnyArray, " entry"],
    owner: Int[AnyArray, "entry token"],
    prefix: Prefix | None,
    interventions: Interventions,
    probes: Float[AnyArray, "layer probe d_model"],
) -> Level:
    """Run some layers over prompts.

    Args:
      definition: from `model.blocks_graph`; static.
      params: of these layers (`part`).
      stream: what came out of the layers before, by their own entries.
      parent: which of those each entry goes on from.
      owner: which of a lane's prompts each token is of; 0 is padding.
      prefix: each entry's beginning, already run, of these layers; None for none.
      interventions: one entry per lane, of these layers (`Interventions.layers`).
      probes: unit directions whose projections are recorded, of these layers.
    """
    blocks = bind(definition, params)

    def one(
        stream: Array, owner: Array, prefix: Prefix | None, interventions: Interventions
    ) -> Level:
        before = jnp.zeros((0,), bool) if prefix is None else jnp.asarray(prefix.real)
        taps = Taps(_steering(interventions, owner, jnp.asarray(probes)), None)
        after, written = run_blocks(
            blocks.config,
            blocks.layers,
            stream,
            positions(owner, before),
            causal_mask(owner, before),
            empty_cache(blocks.config, len(blocks.layers), owner.shape[0], stream.dtype),
            jnp.int32(0),
            taps,
            None if prefix is None else prefix.cache,
        )
        return Level(stream=after, cache=written, realised=taps.results()[1])

    from_parents = stream[jnp.asarray(parent)]
    return jax.vmap(one)(from_parents, jnp.asarray(owner), prefix, interventions)


@functools.partial(jax.jit, static_argnames=("slots",))
def gather(
    level: Level,
    at: Int[AnyArray, " row"],
    member: Int[AnyArray, " row"],
    real: Bool[AnyArray, "row token"],
    begun: Past | None,
    slots: int,
) -> tuple[Cache, dict[str, Realised]]:
    """What rows left at one level: keys and values of its layers, and what was changed there.

    One level is one program, as a segment is: the whole model's would take ten times as long to
    compile.

    Args:
      level: of `embed` or a segment.
      at: the entry of each row's lane.
      member: which of the lane's prompts each row's is, from 1.
      real: which tokens of the lane are each row's; its cache takes the lane from there on.
      begun: keys and values of each row's beginning in these layers; None for none.
      slots: how long the cache is to be; static.
    """
    realised = jax.tree.map(lambda leaf: leaf[at, :, jnp.asarray(member) - 1], level.realised)
    # Of [F, T, T, F] it is 1.
    first = jnp.argmax(jnp.asarray(real), axis=1)

    def own(kv: Array, before: Array | None) -> Array:
        lanes = kv[jnp.asarray(at)]
        count, heads, _, width = lanes.shape
        room = slots - (0 if before is None else before.shape[2])
        # Zeros, joined: XLA on a CPU pads several times slower.
        longer = jnp.concatenate([lanes, jnp.zeros((count, heads, room, width), kv.dtype)], axis=2)
        # Lane first, then its part: both at once take a TPU longer.
        rows = jax.vmap(lambda lane, first: lax.dynamic_slice_in_dim(lane, first, room, axis=1))(
            longer, first
        )
        return rows if before is None else jnp.concatenate([before, rows], axis=2)

    if begun is None:
        return jax.tree.map(lambda kv: own(kv, None), level.cache), realised
    return jax.tree.map(own, level.cache, begun), realised


def _gathered(
    levels: Sequence[Level],
    places: Int[AnyArray, "level row"],
    member: Int[AnyArray, " row"],
    real: Bool[AnyArray, "row token"],
    prefix: Prefix | None,
    slots: int,
) -> tuple[Cache, list[dict[str, Realised]]]:
    """The cache of all layers, and the changes of every level, by row."""
    cache: Cache = []
    changes = []
    for level, at in zip(levels, places, strict=True):
        layers = slice(len(cache), len(cache) + len(level.cache))
        begun = None if prefix is None else prefix.cache[layers]
        some, changed = gather(level, at, member, real, begun, slots)
        cache += some
        changes.append(changed)
    return cache, changes


@jax.jit
def _stacked(changes: Sequence[dict[str, Realised]]) -> dict[str, Realised]:
    """Changes of all levels, by tap, layers in order."""
    found = {}
    for tap in dict.fromkeys(tap for changed in changes for tap in changed):
        layers = [changed[tap] for changed in changes if tap in changed]
        found[tap] = jax.tree.map(lambda *some: jnp.concatenate(some, axis=1), *layers)
    return found


def beginnings(
    levels: Sequence[Level],
    places: Int[AnyArray, "level row"],
    member: Int[AnyArray, " row"],
    real: Bool[AnyArray, "row token"],
) -> Prefix:
    """Prompts that have been read, as the beginnings of other prompts; arguments as `finish`."""
    # Lanes of their own, taken whole.
    whole = np.ones(real.shape, bool)
    cache, changes = _gathered(levels, places, member, whole, None, real.shape[1])
    return Prefix(cache=cache, real=jnp.asarray(real), realised=_stacked(changes))


@functools.partial(jax.jit, static_argnames=("definition", "decoding", "slots"))
def first_token(
    definition: nnx.GraphDef[Decoder],
    decoding: Decoding,
    slots: int,
    params: Params,
    stream: Float[Array, "entry token d_model"],
    at: Int[AnyArray, " row"],
    real: Bool[AnyArray, "row token"],
    begun: tuple[Bool[Array, "row slot"], dict[str, Realised]] | None,
    changes: Sequence[dict[str, Realised]],
    interventions: Interventions,
    ids: UInt32[AnyArray, " row"],
    sampling: Sampling,
) -> Prefilled:
    """Choose the first tokens of replies: rows put together, all but their cache.

    Args:
      definition: from `model.graph`; static.
      decoding: static decoding settings.
      slots: cache slots of each row; static.
      params: the model's parameters.
      stream: what came out of the last layer.
      at: the entry of each row's lane.
      real: which tokens of the lane are each row's.
      begun: which tokens of each row's beginning are real, and what was changed there.
      changes: what was changed at every level, by row.
      interventions: one entry per row.
      ids: a stable number per row.
      sampling: dynamic sampling settings, unread when greedy.
    """
    model = bind(definition, params)
    kept = model.config.vocab_size if decoding.keep_logits else 0
    real = jnp.asarray(real)
    realised = _stacked(changes)
    before = jnp.zeros((real.shape[0], 0), bool)
    if begun is not None:
        before = begun[0]
        realised = jax.tree.map(jnp.add, realised, begun[1])
    length = jnp.sum(real, axis=1)
    own = jnp.arange(slots - before.shape[1]) < length[:, None]
    # The prompt's last token: of [F, T, T, F] it is 2.
    last = jnp.max(real * jnp.arange(real.shape[1]), axis=1)
    read = stream[jnp.asarray(at), last][:, None]
    logits = jax.vmap(lambda h: model.logits(model.final_norm(h)))(read)[:, 0]
    pick = functools.partial(choose, sampling=sampling, sample=decoding.sample)
    token = jax.vmap(pick, in_axes=(0, 0, None))(logits, jnp.asarray(ids), jnp.int32(0))
    is_real = jnp.any(real, axis=1)
    stopped = is_real & ends(token, decoding)
    return Prefilled(
        token=token,
        live=is_real & ~stopped,
        stopped=stopped,
        logits=logits[:, :kept],
        cache=[],
        held=jnp.concatenate([before, own], axis=1),
        start=before.shape[1] + -(-length // PART) * PART,
        realised=realised,
        interventions=jax.tree.map(jnp.asarray, interventions),
        ids=jnp.asarray(ids),
    )


def finish(
    definition: nnx.GraphDef[Decoder],
    decoding: Decoding,
    slots: int,
    params: Params,
    levels: Sequence[Level],
    places: Int[AnyArray, "level row"],
    member: Int[AnyArray, " row"],
    real: Bool[AnyArray, "row token"],
    prefix: Prefix | None,
    interventions: Interventions,
    ids: UInt32[AnyArray, " row"],
    sampling: Sampling,
) -> Prefilled:
    """Put rows together from what they left at every level, and choose their first tokens.

    Args:
      definition: from `model.graph`.
      decoding: decoding settings.
      slots: cache slots of each row: the longest prompt and a reply.
      params: the model's parameters.
      levels: of `embed` and every segment, in order.
      places: the entry of each row's lane at each level.
      member: which of the lane's prompts each row's is, from 1.
      real: which tokens of the lane are it.
      prefix: each row's beginning, already run; None for none.
      interventions: one entry per row.
      ids: a stable number per row.
      sampling: sampling settings, unread when greedy.
    """
    cache, changes = _gathered(levels, places, member, real, prefix, slots)
    begun = None if prefix is None else (prefix.real, prefix.realised)
    rest = first_token(
        definition,
        decoding,
        slots,
        params,
        levels[-1].stream,
        places[-1],
        real,
        begun,
        changes,
        interventions,
        ids,
        sampling,
    )
    return dataclasses.replace(rest, cache=cache)
