"""Steered generation, plainly: prefill and decode of a batch of rows as one compiled program.

One row's program is written once (`_prefill`, `step`) and lifted over rows with `jax.vmap`; the
decode loop runs on the device and stops when every row has. Each row brings its own intervention
as data, so all conditions of a study share one program per prompt-length bucket. Studies run
their rows in `slots`, which gives these tokens sooner; this is what it is compared with.

Rows are left-padded, so every prompt ends in the same column and every decode step writes the
same cache slot for all rows. For a row of 3 real tokens in a bucket of 4 and 2 new tokens:

    slot       0    1   2   3   4   5
    token      pad  a   b   c   x   y
    position   -    0   1   2   3   4      counted over real tokens
    visible to x:   a   b   c   x          padding is never visible, never steered

A beginning that rows share (`prefix`) takes the first slots, left-padded in its own width.

Static (part of the compiled program): model graph, `Decoding`, taps, and the shapes. Dynamic:
parameters, tokens, interventions, probes, seeds, temperature.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsteer.generation.prefix import Prefix, opened
from jaxsteer.model.arrays import AnyArray
from jaxsteer.model.decoder import Cache, Decoder, Params, Past, Realised, Steering, bind
from jaxsteer.model.interventions import Interventions
from jaxsteer.model.masks import causal_mask, positions, visible_slots


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Prompts ready to run; every field has a leading row axis, or is one row's.

    Attributes:
      tokens: left-padded prompt ids.
      real: which of them are not padding. A row with no real token is a filler: it is never live.
      interventions: one entry per row.
      ids: a stable number per row, folded into the seed: the order and the batch do not matter.
      prefix: the beginning of each row's prompt, already run; `tokens` then holds the rest.
    """

    tokens: Int[AnyArray, "*row token"]
    real: Bool[AnyArray, "*row token"]
    interventions: Interventions
    ids: UInt32[AnyArray, " *row"]
    prefix: Prefix | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies:
    """What came out; every field has a leading row axis.

    Attributes:
      tokens: generated ids; entries from `length` on mean nothing.
      length: tokens before the end-of-sequence token, or the whole buffer.
      stopped: whether an end-of-sequence token ended it.
      prompt: realised change over prompt tokens, per tap and layer.
      response: the same over generated tokens that a forward pass read.
      logits: what each token was chosen from, float32; no column unless `keep_logits`.
    """

    tokens: Int[AnyArray, "row new_token"]
    length: Int[AnyArray, " row"]
    stopped: Bool[AnyArray, " row"]
    prompt: dict[str, Realised]
    response: dict[str, Realised]
    logits: Float[AnyArray, "row new_token kept"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """Everything the decode loop carries, rows leading where there are rows.

    Attributes:
      step: number of tokens emitted so far; the next pass writes slot prompt_width + step - 1.
      last: the newest token of each row, not yet read by the model.
      live: rows that have not ended.
      tokens: output buffer.
      length: tokens emitted before the end.
      cache: keys and values per layer.
      position: rotary position of `last`.
      response: running sums of the realised change.
      logits: output buffer of the logits, no wider than what is kept.
    """

    step: Int[Array, ""]
    last: Int[Array, " row"]
    live: Bool[Array, " row"]
    tokens: Int[Array, "row new_token"]
    length: Int[Array, " row"]
    cache: Cache
    position: Int[Array, " row"]
    response: dict[str, Realised]
    logits: Float[Array, "row new_token kept"]


def _prefill(
    model: Decoder,
    tokens: Array,
    real: Array,
    interventions: Interventions,
    prefix: Prefix | None,
    probes: Array,
    new_tokens: int,
) -> tuple[Array, Cache, dict[str, Realised]]:
    dtype = model.embed.embedding[...].dtype
    cache, before = opened(model.config, model.config.n_layers, prefix, tokens.shape[0], dtype)
    steering = Steering(
        interventions=interventions,
        steered=real & interventions.on_prompt,
        real=real,
        probes=probes,
    )
    out = model(
        tokens,
        positions(real, before),
        causal_mask(real, before),
        cache,
        jnp.int32(before.shape[0]),
        steering=steering,
    )
    room = [(0, 0), (0, new_tokens), (0, 0)]
    grown = [(jnp.pad(k, room), jnp.pad(v, room)) for k, v in out.cache]
    return model.logits(out.hidden[-1:])[0], grown, out.realised


def step(
    model: Decoder,
    token: Int[Array, ""],
    position: Int[Array, ""],
    live: Bool[Array, ""],
    visible: Bool[Array, " seen"],
    slot: Int[Array, ""],
    cache: Cache,
    past: Past | None,
    interventions: Interventions,
    probes: Float[Array, "layer probe d_model"],
) -> tuple[Float[Array, " vocab"], Cache, dict[str, Realised]]:
    """Read one row's newest token: the logits of the next, the cache, the realised change.

    Args:
      model: with its parameters.
      token: the newest token.
      position: its rotary position.
      live: whether the row still runs; one that does not is neither steered nor counted.
      visible: which slots, of `past` and of `cache`, it sees, its own included.
      slot: the slot of `cache` that it takes.
      cache: keys and values per layer.
      past: those of tokens before, only read; None if `cache` has all.
      interventions: this row's.
      probes: unit directions whose projections are recorded.
    """
    steering = Steering(
        interventions=interventions,
        steered=(live & interventions.on_response)[None],
        real=live[None],
        probes=probes,
    )
    out = model(
        token[None], position[None], visible[None], cache, slot, past=past, steering=steering
    )
    return model.logits(out.hidden)[0], out.cache, out.realised


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


@functools.partial(jax.jit, static_argnames=("definition", "decoding"))
def generate(
    definition: nnx.GraphDef[Decoder],
    decoding: Decoding,
    params: Params,
    rows: Rows,
    probes: Float[Array, "layer probe d_model"],
    sampling: Sampling,
) -> Replies:
    """Generate replies for a batch of rows, each under its own intervention.

    Args:
      definition: from `model.graph`; static.
      decoding: static decoding settings.
      params: the model's parameters.
      rows: prompts and interventions.
      probes: unit directions whose projections are recorded; [layer, 0, d_model] for none.
      sampling: dynamic sampling settings, unread when greedy.

    Returns:
      Replies and the realised change of each row.
    """
    model = bind(definition, params)
    # Host arrays are welcome as arguments; from here on they are the program's own.
    prompt_ids, real, row_ids = map(jnp.asarray, (rows.tokens, rows.real, rows.ids))
    count = len(prompt_ids)
    # Prompt slots of the cache: the shared prefix first, then each row's own tokens.
    held = real if rows.prefix is None else jnp.concatenate([rows.prefix.real, real], axis=1)
    width = held.shape[1]
    kept = model.config.vocab_size if decoding.keep_logits else 0
    prefill = jax.vmap(functools.partial(_prefill, model), in_axes=(0, 0, 0, 0, None, None))
    step_rows = jax.vmap(
        functools.partial(step, model), in_axes=(0, 0, 0, 0, None, 0, None, 0, None)
    )
    choose_rows = jax.vmap(
        functools.partial(choose, sampling=sampling, sample=decoding.sample),
        in_axes=(0, 0, None),
    )
    room = jnp.zeros((count, decoding.max_new_tokens), bool)
    held_slots = jnp.concatenate([held, room], axis=1)

    def emit(state: _State, logits: Array) -> _State:
        """Choose and write one new token per live row, and retire the rows that it ends."""
        token = choose_rows(logits, row_ids, state.step)
        live = state.live & ~ends(token, decoding)
        tokens = state.tokens.at[:, state.step].set(jnp.where(live, token, 0))
        return dataclasses.replace(
            state,
            step=state.step + 1,
            last=token,
            live=live,
            tokens=tokens,
            length=state.length + live,
            logits=state.logits.at[:, state.step].set(logits[:, :kept]),
        )

    def body(state: _State) -> _State:
        newest = width + state.step - 1
        visible = jax.vmap(visible_slots, in_axes=(0, None, None))
        logits, cache, realised = step_rows(
            state.last,
            state.position,
            state.live,
            visible(held_slots, jnp.int32(width), newest),
            newest,
            state.cache,
            None,
            rows.interventions,
            probes,
        )
        state = dataclasses.replace(
            state,
            cache=cache,
            position=state.position + 1,
            response=jax.tree.map(jnp.add, state.response, realised),
        )
        return emit(state, logits)

    def going(state: _State) -> Array:
        return (state.step < decoding.max_new_tokens) & jnp.any(state.live)

    logits, cache, prompt = prefill(
        prompt_ids, real, rows.interventions, rows.prefix, probes, decoding.max_new_tokens
    )
    if rows.prefix is not None:
        prompt = jax.tree.map(jnp.add, prompt, rows.prefix.realised)
    start = _State(
        step=jnp.int32(0),
        last=jnp.zeros((count,), jnp.int32),
        live=jnp.any(real, axis=1),
        tokens=jnp.zeros((count, decoding.max_new_tokens), jnp.int32),
        length=jnp.zeros((count,), jnp.int32),
        cache=cache,
        position=jnp.sum(held, axis=1).astype(jnp.int32),
        response=jax.tree.map(jnp.zeros_like, prompt),
        logits=jnp.zeros((count, decoding.max_new_tokens, kept)),
    )
    state = jax.lax.while_loop(going, body, emit(start, logits))
    return Replies(
        tokens=state.tokens,
        length=state.length,
        stopped=~state.live & jnp.any(real, axis=1),
        prompt=prompt,
        response=state.response,
        logits=state.logits,
    )


def no_probes(n_layers: int, d_model: int) -> np.ndarray:
    """The empty set of probe directions."""
    return np.zeros((n_layers, 0, d_model), np.float32)
