"""One prompt read once, then its reply a few tokens at a time: generation for people who watch.

`generate` serves studies: many rows, nothing comes back before all are done, and it keeps sums.
Here one row is run so that its next-token logits and the projections of every token at every layer
are there after the prompt's own forward pass, and the reply follows in chunks. Greedy only; the
tokens are those of `generate` (a test compares them), and so are the rules of padding: see there.

Two programs are compiled per prompt bucket, `read_prompt` and `write`. Static: model graph, room
for the reply, chunk length, end tokens. Dynamic: tokens, interventions, probes; so another
strength, layer or direction compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.generation import padding
from jaxsteer.model.arrays import AnyArray
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.decoder import (
    Cache,
    Capture,
    Decoder,
    Forward,
    Params,
    Steering,
    bind,
    empty_cache,
)
from jaxsteer.model.interventions import Interventions
from jaxsteer.model.masks import causal_mask, positions

TAP = "resid_post"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Where a reply has got to.

    Attributes:
      cache: keys and values per layer.
      real: which cache slots hold a real token of the prompt.
      token: the newest token, not yet read by the model.
      position: its rotary position.
      slot: the cache slot its keys and values will take.
      live: False from the end-of-sequence token on.
    """

    cache: Cache
    real: Bool[Array, " slot"]
    token: Int[Array, ""]
    position: Int[Array, ""]
    slot: Int[Array, ""]
    live: Bool[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What is known once the prompt has been read.

    Attributes:
      logits: next-token logits after the prompt, float32.
      projections: of the stream at `resid_post` after interventions onto the probes, one column
        per prompt token (padding left out), float32.
      state: where the reply starts.
    """

    logits: Float[np.ndarray, " vocab"]
    projections: Float[np.ndarray, "layer token probe"]
    state: State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A few more tokens of the reply.

    Attributes:
      tokens: ids, without the ending token; empty when the reply ends at once.
      projections: as in `Reading`, of these tokens, except that a reply's last token is not
        read by the model and so has none.
      ended: whether an end-of-sequence token came.
    """

    tokens: list[int]
    projections: Float[np.ndarray, "layer token probe"]
    ended: bool


def _forward(
    model: Decoder,
    interventions: Interventions,
    probes: Array,
    tokens: Array,
    at: Array,
    visible: Array,
    steered: Array,
    real: Array,
    cache: Cache,
    slot: Array,
) -> tuple[Forward, Array]:
    """One pass with every token's projections: [layer, token, probe]."""
    steering = Steering(
        interventions=interventions,
        steered=steered,
        real=real,
        probes=jnp.zeros((model.config.n_layers, 0, model.config.d_model)),
    )
    everything = Capture(taps=(TAP,), weights=jnp.eye(tokens.shape[0], dtype=jnp.float32))
    out = model(tokens, at, visible, cache, slot, steering=steering, capture=everything)
    highest = jax.lax.Precision.HIGHEST
    return out, jnp.einsum("ltd,lpd->ltp", out.captured[TAP], probes, precision=highest)


@functools.partial(jax.jit, static_argnames=("definition", "room"))
def read_prompt(
    definition: nnx.GraphDef[Decoder],
    room: int,
    params: Params,
    tokens: Int[AnyArray, " token"],
    real: Bool[AnyArray, " token"],
    interventions: Interventions,
    probes: Float[AnyArray, "layer probe d_model"],
) -> tuple[Float[Array, " vocab"], Float[Array, "layer token probe"], State]:
    """Read a left-padded prompt.

    Args:
      definition: from `model.graph`; static.
      room: cache slots kept for the reply; static.
      params: the model's parameters.
      tokens: left-padded ids of one row.
      real: which are real.
      interventions: one row's arrays (no leading axis).
      probes: unit directions per layer.

    Returns:
      Next-token logits, projections of every column (padding too), and the reply's start.
    """
    model = bind(definition, params)
    tokens, real = jnp.asarray(tokens), jnp.asarray(real)
    dtype = model.embed.embedding[...].dtype
    cache = empty_cache(model.config, model.config.n_layers, tokens.shape[0], dtype)
    out, projections = _forward(
        model,
        interventions,
        jnp.asarray(probes),
        tokens,
        positions(real),
        causal_mask(real),
        real & interventions.on_prompt,
        real,
        cache,
        jnp.int32(0),
    )
    logits = model.logits(out.hidden[-1:])[0]
    space = [(0, 0), (0, room), (0, 0)]
    state = State(
        cache=[(jnp.pad(k, space), jnp.pad(v, space)) for k, v in out.cache],
        real=jnp.pad(real, (0, room)),
        token=jnp.argmax(logits).astype(jnp.int32),
        position=jnp.sum(real).astype(jnp.int32),
        slot=jnp.int32(tokens.shape[0]),
        live=jnp.bool_(True),
    )
    return logits, projections, state


@functools.partial(jax.jit, static_argnames=("definition", "count", "eos", "room"))
def write(
    definition: nnx.GraphDef[Decoder],
    count: int,
    eos: tuple[int, ...],
    room: int,
    params: Params,
    state: State,
    interventions: Interventions,
    probes: Float[AnyArray, "layer probe d_model"],
) -> tuple[State, Int[Array, " new"], Bool[Array, " new"], Float[Array, "layer new probe"]]:
    """Emit `count` tokens: each is the state's token, read to find the next one.

    Returns:
      The new state, the tokens, which of them belong to the reply (False from the ending token
      on), and their projections.
    """
    model = bind(definition, params)
    index = jnp.arange(state.real.shape[0])
    start = state.real.shape[0] - room

    def step(state: State, _: None) -> tuple[State, tuple[Array, Array, Array]]:
        live = state.live & ~jnp.any(state.token == jnp.asarray(eos, jnp.int32))
        visible = state.real | ((index >= start) & (index <= state.slot))
        out, projections = _forward(
            model,
            interventions,
            jnp.asarray(probes),
            state.token[None],
            state.position[None],
            visible[None],
            (live & interventions.on_response)[None],
            live[None],
            state.cache,
            state.slot,
        )
        token = jnp.argmax(model.logits(out.hidden)[0]).astype(jnp.int32)
        following = dataclasses.replace(
            state,
            cache=out.cache,
            token=token,
            position=state.position + 1,
            slot=state.slot + 1,
            live=live,
        )
        return following, (state.token, live, projections[:, 0])

    state, (tokens, live, projections) = jax.lax.scan(step, state, None, length=count)
    return state, tokens, live, jnp.swapaxes(projections, 0, 1)


def only(interventions: Interventions, condition: int) -> Interventions:
    """One condition of a stacked intervention, its leading axis dropped."""
    return jax.tree.map(lambda a: np.asarray(a[condition]), interventions)


def read(
    model: ChatModel,
    prompt: Sequence[int],
    interventions: Interventions,
    probes: Float[np.ndarray, "layer probe d_model"],
    *,
    room: int,
    width: int = 0,
) -> Reading:
    """Read one prompt under one intervention.

    Args:
      model: a loaded model.
      prompt: token ids.
      interventions: one condition's arrays, see `only`.
      probes: unit directions per layer whose projections are wanted.
      room: most tokens the reply may have.
      width: pad to at least this many tokens, so that prompts shorter than it share a program.

    Raises:
      UserError: the prompt and its reply do not fit the model's context.
    """
    limit = model.config.max_position - room
    padded = padding.bucket(max(len(prompt), min(width, limit)), limit)
    tokens, real = padding.left_pad([list(prompt)], padded)
    logits, projections, state = read_prompt(
        model.definition, room, model.params, tokens[0], real[0], interventions, probes
    )
    return Reading(
        logits=np.asarray(logits),
        projections=np.asarray(projections)[:, padded - len(prompt) :],
        state=state,
    )


def reply(
    model: ChatModel,
    reading: Reading,
    interventions: Interventions,
    probes: Float[np.ndarray, "layer probe d_model"],
    *,
    room: int,
    chunk: int = 4,
) -> Iterator[Chunk]:
    """Yield the greedy reply in chunks, until an end token or until `room` is used up.

    `room` and the interventions are those the prompt was read with. A reply of `room` tokens comes
    in ceil(room / chunk) chunks; every chunk but a cut last one runs the same program.
    """
    state, done = reading.state, 0
    while done < room:
        count = min(chunk, room - done)
        state, tokens, live, projections = write(
            model.definition, count, model.eos, room, model.params, state, interventions, probes
        )
        kept = int(np.asarray(live).sum())
        done += count
        yield Chunk(
            tokens=[int(t) for t in np.asarray(tokens)[:kept]],
            projections=np.asarray(projections)[:, :kept],
            ended=kept < count,
        )
        if kept < count:
            return
