"""One prompt, then its reply token by token: generation to watch, and the tests' reference.

`engine` serves studies: it packs prompts, shares work between rows, and keeps sums over tokens.
Here one row runs alone, and all results of a forward pass are available directly after it:
next-token logits, the projections of every token at every layer, the realised change.

    read(prompt) -> Reading -> reply: Reading, Reading, ...     one forward pass each

A prompt is left-padded, so that all prompts of a bucket run the same program. For 3 real tokens in
a bucket of 4, and 2 new tokens:

    slot       0    1   2   3   4   5
    token      pad  a   b   c   x   y
    position   -    0   1   2   3   4      counted over real tokens
    visible to x:   a   b   c   x          padding is never visible, never steered

One program is compiled for each prompt bucket and one for a token of its reply. Static: model
graph, `Decoding`. Dynamic: tokens, interventions, probes, sampling; so another strength, layer or
direction compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsteer.generation import prefill
from jaxsteer.generation.decode import Decoding, Sampling, choose
from jaxsteer.generation.requests import bucket, left_pad
from jaxsteer.model import decoder
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import AnyArray, Interventions
from jaxsteer.model.layers import causal_mask, positions

TAP = "resid_post"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """One row between two forward passes.

    Attributes:
      cache: keys and values per layer: the left-padded prompt, then the reply.
      held: which cache slots hold a real token.
      slot: the cache slot of the next pass's first token; 0 before the prompt is read.
      chosen: how many tokens of the reply have been chosen.
      interventions: the row's.
      probes: unit directions per layer whose projections are wanted.
      row_id: stable number of the row, for sampling.
      sampling: dynamic sampling settings.
    """

    cache: decoder.Cache
    held: Bool[AnyArray, " slot"]
    slot: Int[AnyArray, ""]
    chosen: Int[AnyArray, ""]
    interventions: Interventions
    probes: Float[AnyArray, "layer probe d_model"]
    row_id: UInt32[AnyArray, ""]
    sampling: Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """One forward pass: of the prompt, or of a token of the reply.

    Attributes:
      tokens: the ids that were read, padding left out.
      logits: next-token logits after them, float32.
      next: the token chosen from these.
      projections: of the stream at `resid_post` after interventions onto the probes, float32.
      realised: realised change per tap, summed over the tokens; leaves [layer, ...].
      decoding: the decoding settings.
      state: what the next pass continues from.
    """

    tokens: list[int]
    logits: Float[np.ndarray, " vocab"]
    next: int
    projections: Float[np.ndarray, "layer token probe"]
    realised: dict[str, decoder.Realised]
    decoding: Decoding
    state: State


@functools.partial(jax.jit, static_argnames=("definition", "decoding"))
def forward(
    definition: nnx.GraphDef[decoder.Decoder],
    decoding: Decoding,
    params: decoder.Params,
    tokens: Int[AnyArray, " token"],
    real: Bool[AnyArray, " token"],
    state: State,
) -> tuple[State, tuple[Array, Array, Array, dict[str, decoder.Realised]]]:
    """Read some tokens and choose the next.

    Args:
      definition: from `decoder.graph`; static.
      decoding: static decoding settings.
      params: the model's parameters.
      tokens: a left-padded prompt, or one token of its reply.
      real: which of them are real.
      state: the row so far.

    Returns:
      The row's new state; then next-token logits, the chosen token, projections of all tokens
      (padding too) and the realised change.
    """
    model = decoder.bind(definition, params)
    tokens, real, held, slot = map(jnp.asarray, (tokens, real, state.held, state.slot))
    earlier = jnp.broadcast_to(held, (tokens.shape[0], held.shape[0]))
    asked, probes = state.interventions, jnp.asarray(state.probes)
    out = model(
        tokens,
        positions(real, held),
        lax.dynamic_update_slice_in_dim(earlier, causal_mask(real), slot, axis=1),
        state.cache,
        slot,
        steering=decoder.Steering(
            interventions=asked,
            steered=real & jnp.where(slot == 0, asked.on_prompt, asked.on_response),
            real=real,
            probes=probes,
        ),
        capture=decoder.Capture(taps=(TAP,), weights=jnp.eye(tokens.shape[0])),
    )
    projections = jnp.einsum(
        "ltd,lpd->ltp", out.captured[TAP], probes, precision=lax.Precision.HIGHEST
    )
    logits = model.logits(out.hidden[-1:])[0]
    chosen, row_id = jnp.asarray(state.chosen), jnp.asarray(state.row_id)
    token = choose(logits, row_id, chosen, state.sampling, decoding.sample)
    after = dataclasses.replace(
        state,
        cache=out.cache,
        held=lax.dynamic_update_slice_in_dim(held, real, slot, axis=0),
        slot=slot + tokens.shape[0],
        chosen=chosen + 1,
    )
    return after, (logits, token, projections, out.realised)


def _read(
    model: ChatModel, decoding: Decoding, tokens: Sequence[int], width: int, state: State
) -> Reading:
    """Read tokens, left-padded to a width."""
    padded, real = left_pad([list(tokens)], width)
    after, found = forward(model.definition, decoding, model.params, padded[0], real[0], state)
    logits, token, projections, realised = jax.device_get(found)
    return Reading(
        tokens=list(tokens),
        logits=logits,
        next=int(token),
        projections=projections[:, width - len(tokens) :],
        realised=realised,
        decoding=decoding,
        state=after,
    )


def only(interventions: Interventions, condition: int) -> Interventions:
    """One condition of stacked interventions, its leading axis dropped."""
    return jax.tree.map(lambda a: np.asarray(a[condition]), interventions)


def read(
    model: ChatModel,
    prompt: Sequence[int],
    interventions: Interventions,
    decoding: Decoding,
    *,
    probes: Float[np.ndarray, "layer probe d_model"] | None = None,
    sampling: Sampling | None = None,
    row_id: int = 0,
    width: int = 0,
) -> Reading:
    """Read one prompt under one intervention.

    Args:
      model: a loaded model.
      prompt: token ids.
      interventions: one condition's arrays, see `only`.
      decoding: decoding settings, of the reply too.
      probes: unit directions whose projections are wanted; None for none.
      sampling: sampling settings, unread when greedy.
      row_id: stable number of the row, folded into the sampling seed.
      width: pad to at least this many tokens, so that prompts shorter than it share a program.

    Raises:
      UserError: the prompt and its reply do not fit the model's context.
    """
    config, room = model.config, decoding.max_new_tokens
    limit = config.max_position - room
    padded = bucket(max(len(prompt), min(width, limit)), limit)
    dtype = model.params["embed"]["embedding"].dtype
    begin = State(
        cache=decoder.empty_cache(config, config.n_layers, padded + room, dtype),
        held=np.zeros(padded + room, bool),
        slot=np.array(0, np.int32),
        chosen=np.array(0, np.int32),
        interventions=interventions,
        probes=prefill.no_probes(config) if probes is None else probes,
        row_id=np.array(row_id, np.uint32),
        sampling=sampling or Sampling(),
    )
    return _read(model, decoding, prompt, padded, begin)


def reply(model: ChatModel, reading: Reading) -> Iterator[Reading]:
    """Yield the reply of a prompt that was read, until an end token or `max_new_tokens` tokens.

    Every token is read, the last one too, so each has its projections.
    """
    decoding = reading.decoding
    for _ in range(decoding.max_new_tokens):
        if reading.next in decoding.eos:
            return
        reading = _read(model, decoding, [reading.next], 1, reading.state)
        yield reading
