"""Prefill: programs that read a batch of packed prompts, a group of layers at a time.

    embed -> layers 0 to 2 -> layers 3 to 5 -> ... -> the first token of each reply

A program knows its layers only by its arguments: their parameters, what is done in them, and what
came out of the layers before. So all layer groups of a model are one compiled program, and rows
that have been the same so far can be one entry of a batch until they differ (`layer_sharing` says
which). An entry is a packed sequence (`packing`). From group to group a row may be part of other
entries: `parent` gives the entry of the previous group that each entry continues. At the end a
row's keys and values are gathered from all groups: those of its own tokens, and room for its reply.
With chunks of 4, a prompt of 5 that starts at 2 in its packed sequence:

    packed       p  q  a  b  c  d  e  x
    cache        a  b  c  d  e  x  0  0  0  0  0  0     the reply starts at 8

Its prefix stays where it is, since other rows read it too. Slots that hold a neighbouring prompt's
tokens are masked out.
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

from jaxsteer.generation.decode import CHUNK, DecodeState, Decoding, Sampling, choose, ends
from jaxsteer.generation.requests import MAX_SEGMENTS
from jaxsteer.model import decoder, sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.interventions import AnyArray, Interventions
from jaxsteer.model.layers import causal

TAP = "resid_post"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """Leading tokens that prompts share, run once; leaves lead with prefixes, or with rows.

    Attributes:
      cache: keys and values per layer, in the order of the left-padded tokens.
      real: which slots hold a real token.
      realised: realised change over the prefix, per tap and layer.
    """

    cache: decoder.Cache = dataclasses.field(metadata=sharding.KEYS_AND_VALUES)
    real: Bool[AnyArray, "*lead slot"]
    realised: dict[str, decoder.Realised]

    def layers(self, first: int, last: int) -> Prefix:
        """The keys and values of layers `first` to `last` - 1, without the realised change."""
        return dataclasses.replace(self, cache=self.cache[first:last], realised={})


@jax.jit
def take(prefix: Prefix, index: Int[AnyArray, " row"]) -> Prefix:
    """Each row's prefix, by index."""
    return jax.tree.map(lambda leaf: leaf[index], prefix)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Packed sequences to be run through some layers; every leaf has a leading axis of entries.

    Attributes:
      parent: the entry of the previous layers that each continues.
      segment_ids: the prompt of each token; 0 is padding.
      prefix: each entry's prefix in these layers; None for none.
      interventions: one entry each, of these layers (`Interventions.layers`).
    """

    parent: Int[AnyArray, " *entry"]
    segment_ids: Int[AnyArray, "*entry token"]
    prefix: Prefix | None
    interventions: Interventions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOutput:
    """What the embedding or a group of layers leaves; every leaf has a leading axis of entries.

    Attributes:
      stream: the residual stream after them.
      cache: keys and values of these layers, of the packed sequence's tokens.
      realised: realised change in these layers per tap, [entry, layer, segment, ...].
      captured: the stream at `resid_post` in these layers, float32; None unless asked for.
    """

    stream: Float[Array, "*entry token d_model"]
    cache: decoder.Cache = dataclasses.field(metadata=sharding.KEYS_AND_VALUES)
    realised: dict[str, decoder.Realised]
    captured: Float[Array, "*entry layer token d_model"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Rows whose prompts have been through all layers; leaves lead with rows, but for `outputs`.

    Attributes:
      outputs: of the embedding and of each layer group, in order; by their own entries.
      entry: the entry of each output that a row was part of.
      segment: the row's segment id, from 1.
      real: which tokens of the packed sequence are the row's.
      prefix: each row's prefix, without its keys and values; None for none.
      interventions: one entry per row.
      ids: a stable number per row, for sampling.
    """

    outputs: list[LayerOutput]
    entry: Int[AnyArray, "row output"]
    segment: Int[AnyArray, " row"]
    real: Bool[AnyArray, "row token"]
    prefix: Prefix | None
    interventions: Interventions
    ids: UInt32[AnyArray, " row"]


def _taps(
    interventions: Interventions, segment_ids: Array, probes: Array, capture: tuple[str, ...] = ()
) -> decoder.Taps:
    steering = decoder.Steering(
        interventions=interventions,
        steered=(segment_ids > 0) & interventions.on_prompt,
        real=segment_ids == jnp.arange(1, MAX_SEGMENTS + 1)[:, None],
        probes=probes,
    )
    return decoder.Taps(steering, capture)


@functools.partial(jax.jit, static_argnames=("definition",))
def embed(
    definition: nnx.GraphDef[decoder.Decoder],
    params: decoder.Params,
    tokens: Int[AnyArray, "entry token"],
    segment_ids: Int[AnyArray, "entry token"],
    interventions: Interventions,
) -> LayerOutput:
    """The residual stream before the first layer, after the tap `embed`.

    Args:
      definition: from `decoder.graph`; static.
      params: the model's parameters.
      tokens: ids, by packed sequence.
      segment_ids: the prompt of each token; 0 is padding.
      interventions: one entry per packed sequence.
    """
    model = decoder.bind(definition, params)

    def one(tokens: Array, segment_ids: Array, interventions: Interventions) -> LayerOutput:
        taps = _taps(interventions, segment_ids, jnp.zeros((1, 0, model.config.d_model)))
        stream = model.embedded(tokens, taps)
        return LayerOutput(stream=stream, cache=[], realised=taps.results()[1])

    return jax.vmap(one)(jnp.asarray(tokens), jnp.asarray(segment_ids), interventions)


@functools.partial(jax.jit, static_argnames=("definition", "capture"))
def run_layers(
    definition: nnx.GraphDef[decoder.Blocks],
    params: decoder.Params,
    stream: Float[Array, "above token d_model"],
    batch: SequenceBatch,
    probes: Float[AnyArray, "layer probe d_model"],
    first: Int[AnyArray, ""],
    capture: bool = False,
) -> LayerOutput:
    """Run packed sequences through some layers.

    Args:
      definition: from `decoder.blocks_graph`; static.
      params: of these layers (`group_params`).
      stream: what came out of the layers before, by their own entries.
      batch: the packed sequences.
      probes: unit directions whose projections are recorded, of these layers.
      first: number of the first of these layers in the model.
      capture: keep the stream at `resid_post`; static.
    """
    blocks = decoder.bind(definition, params)

    def one(stream: Array, entry: SequenceBatch) -> LayerOutput:
        segment_ids, prefix = jnp.asarray(entry.segment_ids), entry.prefix
        before = jnp.zeros((0,), bool) if prefix is None else jnp.asarray(prefix.real)
        asked = (TAP,) if capture else ()
        taps = _taps(entry.interventions, segment_ids, jnp.asarray(probes), asked)
        slots = len(segment_ids)
        cache = decoder.empty_cache(blocks.config, len(blocks.layers), slots, stream.dtype)
        visible = causal(segment_ids, before)
        past = () if prefix is None else (prefix.cache,)
        after, written = blocks.run(
            stream, visible, cache, jnp.int32(0), taps, past, jnp.asarray(first)
        )
        captured, realised = taps.results()
        return LayerOutput(
            stream=after, cache=written, realised=realised, captured=captured.get(TAP)
        )

    return jax.vmap(one)(stream[jnp.asarray(batch.parent)], batch)


def no_probes(config: ModelConfig) -> Float[np.ndarray, "layer probe d_model"]:
    """The empty set of probe directions."""
    return np.zeros((config.n_layers, 0, config.d_model), np.float32)


def group_params(params: decoder.Params, first: int, last: int) -> decoder.Params:
    """The parameters of layers `first` to `last` - 1, which then count from 0."""
    return {"layers": {str(i - first): params["layers"][str(i)] for i in range(first, last)}}


@functools.partial(jax.jit, static_argnames=("slots",))
def gather(
    output: LayerOutput,
    entry: Int[AnyArray, " row"],
    segment: Int[AnyArray, " row"],
    real: Bool[AnyArray, "row token"],
    slots: int,
) -> tuple[decoder.Cache, dict[str, decoder.Realised]]:
    """What some layers left of each row: keys and values, and the realised change.

    One program per layer group: one of the whole model would take ten times as long to compile.

    Args:
      output: of the embedding or of a layer group.
      entry: the entry of the output that each row was part of.
      segment: the row's segment id, from 1.
      real: which tokens of the packed sequence are the row's; its cache takes the packed sequence
        from the first of them on.
      slots: length of the row's cache; static.
    """
    realised = jax.tree.map(lambda leaf: leaf[entry, :, jnp.asarray(segment) - 1], output.realised)
    # Of [F, T, T, F] it is 1.
    first = jnp.argmax(jnp.asarray(real), axis=1)

    def row_cache(kv: Array) -> Array:
        packed = kv[jnp.asarray(entry)]
        zeros = jnp.zeros((*packed.shape[:2], slots, packed.shape[3]), kv.dtype)
        # Zeros, joined: XLA on a CPU pads several times slower.
        longer = jnp.concatenate([packed, zeros], axis=2)
        # The entry first, then a slice of it: both in one step take a TPU longer.
        return jax.vmap(lambda kv, first: lax.dynamic_slice_in_dim(kv, first, slots, axis=1))(
            longer, first
        )

    return jax.tree.map(row_cache, output.cache), realised


def _gather_all(
    batch: PromptBatch, slots: int
) -> tuple[decoder.Cache, list[dict[str, decoder.Realised]]]:
    """The rows' cache of all layers, and the realised change of every output."""
    cache: decoder.Cache = []
    changes = []
    for i, output in enumerate(batch.outputs):
        some, change = gather(output, batch.entry[:, i], batch.segment, batch.real, slots)
        cache += some
        changes.append(change)
    return cache, changes


@jax.jit
def stacked(changes: Sequence[dict[str, decoder.Realised]]) -> dict[str, decoder.Realised]:
    """The realised change of all layers in order, by tap."""
    found = {}
    for tap in dict.fromkeys(tap for change in changes for tap in change):
        layers = [change[tap] for change in changes if tap in change]
        found[tap] = jax.tree.map(lambda *some: jnp.concatenate(some, axis=1), *layers)
    return found


def as_prefix(batch: PromptBatch) -> Prefix:
    """Prompts that have been read, as the prefixes of other prompts; one to a packed sequence."""
    whole = dataclasses.replace(batch, real=np.ones(batch.real.shape, bool))
    cache, changes = _gather_all(whole, batch.real.shape[1])
    return Prefix(cache=cache, real=jnp.asarray(batch.real), realised=stacked(changes))


def _last_logits(
    model: decoder.Decoder, stream: Float[Array, "entry token d_model"], batch: PromptBatch
) -> Float[Array, "row vocab"]:
    real = jnp.asarray(batch.real)
    # The prompt's last token: of [F, T, T, F] it is 2.
    last = jnp.max(real * jnp.arange(real.shape[1]), axis=1)
    read = stream[jnp.asarray(batch.entry)[:, -1], last][:, None]
    return jax.vmap(lambda h: model.logits(model.final_norm(h)))(read)[:, 0]


@functools.partial(jax.jit, static_argnames=("definition",))
def states(
    definition: nnx.GraphDef[decoder.Decoder],
    params: decoder.Params,
    batch: PromptBatch,
    weights: Float[AnyArray, "row position token"],
) -> tuple[Float[Array, "row layer position d_model"], Float[Array, "row vocab"]]:
    """The captured stream of each row, and the logits after its last token.

    Args:
      definition: from `decoder.graph`; static.
      params: the model's parameters.
      batch: rows whose prompts were read with `capture`.
      weights: of the packed sequence's tokens at each position: a row of zeros and a one picks a
        token, a row of 1/n averages n of them.
    """
    model = decoder.bind(definition, params)
    found = [
        jnp.einsum(
            "rpt,rltd->rlpd",
            weights,
            output.captured[jnp.asarray(batch.entry)[:, number]],
            precision=lax.Precision.HIGHEST,
        )
        for number, output in enumerate(batch.outputs)
        if output.captured is not None
    ]
    return jnp.concatenate(found, axis=1), _last_logits(model, batch.outputs[-1].stream, batch)


@functools.partial(jax.jit, static_argnames=("definition", "decoding", "slots"))
def first_token(
    definition: nnx.GraphDef[decoder.Decoder],
    decoding: Decoding,
    params: decoder.Params,
    stream: Float[Array, "entry token d_model"],
    batch: PromptBatch,
    changes: Sequence[dict[str, decoder.Realised]],
    sampling: Sampling,
    slots: int,
) -> DecodeState:
    """Choose the first token of each reply: rows ready to decode, all but their cache.

    Args:
      definition: from `decoder.graph`; static.
      decoding: static decoding settings.
      params: the model's parameters.
      stream: what came out of the last layers.
      batch: the rows; its outputs are not read.
      changes: the realised change of every output, by row.
      sampling: dynamic sampling settings, unread when greedy.
      slots: length of each row's cache; static.
    """
    model = decoder.bind(definition, params)
    kept = model.config.vocab_size if decoding.keep_logits else 0
    real, ids = jnp.asarray(batch.real), jnp.asarray(batch.ids)
    count = real.shape[0]
    realised, before = stacked(changes), jnp.zeros((count, 0), bool)
    if batch.prefix is not None:
        before = jnp.asarray(batch.prefix.real)
        realised = jax.tree.map(jnp.add, realised, batch.prefix.realised)
    length = jnp.sum(real, axis=1)
    own = jnp.arange(slots) < length[:, None]
    held = jnp.concatenate([before, own], axis=1)
    logits = _last_logits(model, stream, batch)
    pick = functools.partial(choose, sampling=sampling, sample=decoding.sample)
    token = jax.vmap(pick, in_axes=(0, 0, None))(logits, ids, jnp.int32(0))
    tokens = jnp.zeros((count, decoding.max_new_tokens), jnp.int32)
    kept_logits = jnp.zeros((*tokens.shape, kept))
    return DecodeState(
        live=~ends(token, decoding) & (decoding.max_new_tokens > 1),
        emitted=jnp.ones((count,), jnp.int32),
        last=token,
        position=jnp.sum(held, axis=1).astype(jnp.int32),
        tokens=tokens.at[:, 0].set(token),
        logits=kept_logits.at[:, 0].set(logits[:, :kept]),
        cache=[],
        held=held,
        start=before.shape[1] + -(-length // CHUNK) * CHUNK,
        prompt=realised,
        response=jax.tree.map(jnp.zeros_like, realised),
        interventions=jax.tree.map(jnp.asarray, batch.interventions),
        ids=ids,
    )


def finish(
    model: ChatModel, decoding: Decoding, batch: PromptBatch, sampling: Sampling, slots: int
) -> DecodeState:
    """Gather what each row left in all layers, and choose the first token of its reply.

    Arguments as for `first_token`; the outputs of `batch` are read.
    """
    cache, changes = _gather_all(batch, slots)
    bare = dataclasses.replace(batch, outputs=[])
    static, given = (model.definition, decoding), (model.params, batch.outputs[-1].stream)
    state = first_token(*static, *given, bare, changes, sampling, slots)
    return dataclasses.replace(state, cache=cache)
