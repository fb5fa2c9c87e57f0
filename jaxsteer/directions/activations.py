"""Read the residual stream at taps: states for directions, logits for selection and parity.

Only the asked taps and positions are copied from the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError, heed_stop
from jaxsteer.generation.layer_sharing import run_prefixes
from jaxsteer.generation.prefill import Prefix, take
from jaxsteer.generation.requests import bucket, grouped, left_pad, parts
from jaxsteer.model import sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.decoder import Capture, Decoder, Params, Steering, bind, empty_cache
from jaxsteer.model.interventions import Interventions
from jaxsteer.model.layers import causal_mask, positions

Position = Literal["prompt_end", "response_start", "response_avg"]
POSITIONS: tuple[Position, ...] = ("prompt_end", "response_start", "response_avg")
TAP = "resid_post"
# Rows that run together.
BATCH = 16
Captured = dict[str, Float[Array, "row layer position d_model"]]


@functools.partial(jax.jit, static_argnames=("definition", "taps", "last_only"))
def read(
    definition: nnx.GraphDef[Decoder],
    params: Params,
    tokens: Int[Array, "row token"],
    real: Bool[Array, "row token"],
    weights: Float[Array, "row position token"],
    taps: tuple[str, ...],
    interventions: Interventions | None = None,
    last_only: bool = True,
    prefix: Prefix | None = None,
) -> tuple[Captured, Float[Array, "row out vocab"]]:
    """One forward pass over left-padded rows: captured taps and logits.

    Args:
      definition: from `model.graph`; static.
      params: the model's parameters.
      tokens: left-padded ids.
      real: which are real.
      weights: token weights of each captured position (see `model.Capture`).
      taps: which taps to read; static.
      interventions: one entry per row, prompt scope; None runs the plain model.
      last_only: logits of the last token only ([row, 1, vocab]), else of every token.
      prefix: the leading tokens of each row, already run; `tokens` then holds the rest.

    Returns:
      Captures in float32 per tap, after interventions; logits in float32.
    """
    model = bind(definition, params)
    n_layers, d_model = model.config.n_layers, model.config.d_model
    dtype = model.embed.embedding[...].dtype

    def one(tokens, real, weights, interventions, prefix):
        cache = empty_cache(model.config, n_layers, tokens.shape[0], dtype)
        before, steering = jnp.zeros((0,), bool), None
        if prefix is not None:
            cache = jax.tree.map(lambda *kv: jnp.concatenate(kv, axis=1), prefix.cache, cache)
            before = jnp.asarray(prefix.real)
        if interventions is not None:
            steering = Steering(
                interventions=interventions,
                steered=real & interventions.on_prompt,
                real=real,
                probes=jnp.zeros((n_layers, 0, d_model)),
            )
        out = model(
            tokens,
            positions(real, before),
            causal_mask(real, before),
            cache,
            jnp.int32(before.shape[0]),
            steering=steering,
            capture=Capture(taps=taps, weights=weights) if taps else None,
        )
        return out.captured, model.logits(out.hidden[-1:] if last_only else out.hidden)

    return jax.vmap(one)(tokens, real, weights, interventions, prefix)


def batches(lengths: Sequence[int], limit: int, size: int) -> Iterator[tuple[int, list[int]]]:
    """Group row indices by bucket: yields (bucket width, at most `size` indices)."""
    by_width = grouped(range(len(lengths)), lambda i: bucket(lengths[i], limit))
    for width in sorted(by_width):
        for members in parts(by_width[width], size):
            yield width, members


def position_weights(
    prompt: Sequence[int], response: Sequence[int], width: int, asked: Sequence[Position]
) -> np.ndarray:
    """Capture weights [position, width] over the left-padded prompt + response.

    Prompt of 2 and response of 2 tokens in width 5, tokens [pad, p, p, r, r]:
        prompt_end      [0, 0, 1, 0, 0]    the last prompt token
        response_start  [0, 0, 0, 1, 0]    the first response token
        response_avg    [0, 0, 0, .5, .5]  every response token, without the ending token

    Raises:
      UserError: a response position asked of an empty response, or an unknown position.
    """
    weights = np.zeros((len(asked), width), np.float32)
    start = width - len(response)
    for i, position in enumerate(asked):
        if position not in POSITIONS:
            raise UserError(f"unknown position {position!r}; they are {', '.join(POSITIONS)}")
        if position == "prompt_end":
            weights[i, start - 1] = 1
        elif not response:
            raise UserError(f"position {position} needs a response; one row has none")
        elif position == "response_start":
            weights[i, start] = 1
        else:
            weights[i, start:] = 1 / len(response)
    return weights


def forward(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]] | None = None,
    asked: Sequence[Position] = (),
    *,
    shared: Sequence[int] | None = None,
    interventions: Interventions | None = None,
    condition: int = 0,
) -> Iterator[tuple[int, Float[np.ndarray, "layer position d_model"], Float[np.ndarray, " vocab"]]]:
    """Run every prompt with its response once, in batches of one padded width.

    Short batches are filled with rows of padding, so that each width compiles once.

    Args:
      model: the model; the rows of a batch are split over its mesh.
      prompts: token ids.
      responses: token ids that follow each prompt; None for none.
      asked: the token positions whose states at `resid_post` are captured.
      shared: the number of leading tokens of each prompt that are run once for all prompts that
        begin with the same ones.
      interventions: conditions, of which one is applied; None runs the plain model.
      condition: index of that one.

    Yields:
      A row's index, its float32 states at `resid_post` at the asked positions (none if nothing is
      asked), and the logits after its last token; in no set order.

    Raises:
      UserError: a row longer than the model's context, or as `position_weights`.
    """
    config = model.config
    responses = [[]] * len(prompts) if responses is None else responses
    for prompt, response in zip(prompts, responses, strict=True):
        bucket(len(prompt) + len(response), config.max_position)
    prefix, prefix_of = None, [0] * len(prompts)
    if shared is not None:
        asked_of = [(tuple(p[:n]), condition) for p, n in zip(prompts, shared, strict=True)]
        prefix, prefix_of = run_prefixes(model, asked_of, interventions)
        prompts = [p[n:] for p, n in zip(prompts, shared, strict=True)]
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    steered = None if interventions is None else interventions.rows(np.full(BATCH, condition))
    for width, members in batches([len(r) for r in rows], config.max_position, BATCH):
        heed_stop()
        filler = BATCH - len(members)
        tokens, real = left_pad([rows[i] for i in members] + [[]] * filler, width)
        weights = np.zeros((BATCH, len(asked), width), np.float32)
        for slot, i in enumerate(members):
            weights[slot] = position_weights(prompts[i], responses[i], width, asked)
        own = prefix and take(prefix, np.array([prefix_of[i] for i in members] + [0] * filler))
        placed = sharding.place((tokens, real, weights, steered, own), config, model.mesh)
        *given, steering, before = placed
        captured, logits = read(
            model.definition, model.params, *given, (TAP,), steering, prefix=before
        )
        states, last = np.asarray(captured[TAP]), np.asarray(logits[:, 0])
        for slot, i in enumerate(members):
            yield i, states[slot], last[slot]
