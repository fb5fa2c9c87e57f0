"""Read the residual stream at taps: captures for directions, logits for selection and parity.

Only the taps and positions asked for leave the device; nothing is kept for the others.
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

from jaxsteer.errors import UserError
from jaxsteer.generation import padding
from jaxsteer.generation.layer_sharing import fill
from jaxsteer.generation.prefix import Prefix, opened, take
from jaxsteer.model import sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.decoder import Capture, Decoder, Params, Steering, bind
from jaxsteer.model.interventions import Interventions
from jaxsteer.model.masks import causal_mask, positions

Position = Literal["prompt_end", "response_start", "response_avg"]
POSITIONS: tuple[Position, ...] = ("prompt_end", "response_start", "response_avg")


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
) -> tuple[dict[str, Float[Array, "row layer position d_model"]], Float[Array, "row out vocab"]]:
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
      prefix: each row's beginning, already run; `tokens` then holds the rest.

    Returns:
      Captures in float32 per tap, after interventions; logits in float32.
    """
    model = bind(definition, params)
    n_layers, d_model = model.config.n_layers, model.config.d_model
    dtype = model.embed.embedding[...].dtype

    def one(tokens, real, weights, interventions, prefix):
        cache, before = opened(model.config, n_layers, prefix, tokens.shape[0], dtype)
        steering = None
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
    by_width: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_width.setdefault(padding.bucket(length, limit), []).append(index)
    for width in sorted(by_width):
        members = by_width[width]
        for start in range(0, len(members), size):
            yield width, members[start : start + size]


def position_weights(
    prompt: Sequence[int], response: Sequence[int], width: int, asked: Sequence[Position]
) -> np.ndarray:
    """Capture weights [position, width] over the left-padded prompt + response.

    Prompt of 2 and response of 2 tokens in width 5, tokens [pad, p, p, r, r]:
        prompt_end      [0, 0, 1, 0, 0]    the last prompt token
        response_start  [0, 0, 0, 1, 0]    the first response token
        response_avg    [0, 0, 0, .5, .5]  every response token, the ending token not counted

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
            raise UserError(f"position {position} needs a response, and one row's is empty")
        elif position == "response_start":
            weights[i, start] = 1
        else:
            weights[i, start:] = 1 / len(response)
    return weights


def capture(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    asked: Sequence[Position],
    *,
    tap: str = "resid_post",
    batch: int = 16,
    shared: Sequence[int] | None = None,
) -> Iterator[tuple[int, Float[np.ndarray, "layer position d_model"]]]:
    """Yield (row index, float32 captures at the asked positions), in no set order.

    Rows run in batches of one bucket, spread over the data axis if the parameters lie on a mesh;
    short batches are filled with rows that are all padding so that each bucket compiles once.
    `shared` says how many leading tokens of each prompt to run once for all rows that begin with
    the same ones.

    Raises:
      UserError: a row that does not fit the model's context, or as `position_weights`.
    """
    config = model.config
    lengths = (len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    padding.check_lengths(lengths, config.max_position)
    prefix, beginning = None, [0] * len(prompts)
    if shared is not None:
        beginnings = [tuple(p[:n]) for p, n in zip(prompts, shared, strict=True)]
        numbers = {tokens: number for number, tokens in enumerate(dict.fromkeys(beginnings))}
        beginning = [numbers[tokens] for tokens in beginnings]
        unprobed = np.zeros((config.n_layers, 0, config.d_model), np.float32)
        prefix = fill(
            model.definition,
            config,
            model.params,
            list(numbers),
            [0] * len(numbers),
            None,
            unprobed,
        )
        prompts = [p[n:] for p, n in zip(prompts, shared, strict=True)]
    rows = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
    for width, members in batches([len(r) for r in rows], config.max_position, batch):
        filler = batch - len(members)
        tokens, real = padding.left_pad([rows[i] for i in members] + [[]] * filler, width)
        weights = np.zeros((batch, len(asked), width), np.float32)
        for slot, i in enumerate(members):
            weights[slot] = position_weights(prompts[i], responses[i], width, asked)
        begun = prefix and take(prefix, np.array([beginning[i] for i in members] + [0] * filler))
        placed = sharding.place((tokens, real, weights, begun), config, model.mesh)
        captured, _ = read(model.definition, model.params, *placed[:3], (tap,), prefix=placed[3])
        found = np.asarray(captured[tap])
        for slot, i in enumerate(members):
            yield i, found[slot]
