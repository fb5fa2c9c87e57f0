"""What the engine is compared with: every row alone on the plain stepwise path, nothing shared.

`read` is the whole model in one program, which is what HF is compared with.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from jaxsteer.generation import stepwise
from jaxsteer.generation.decode import Decoding, Sampling
from jaxsteer.generation.engine import Request
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.decoder import Decoder, Params, Realised, Steering, bind, empty_cache
from jaxsteer.model.interventions import AnyArray, Interventions
from jaxsteer.model.layers import causal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """One row's result; fields as in `engine.Reply`."""

    tokens: list[int]
    stopped: bool
    prompt: dict[str, Realised]
    response: dict[str, Realised]
    logits: Float[np.ndarray, "chosen vocab"]


def replies(
    model: ChatModel,
    requests: Sequence[Request],
    interventions: Interventions,
    decoding: Decoding,
    *,
    probes: Float[np.ndarray, "layer probe d_model"] | None = None,
    sampling: Sampling | None = None,
) -> list[Expected]:
    """Each request's reply, in their order; arguments as for `engine.run`.

    Prompts are padded to the longest, so that one program reads all of them.
    """
    width = max(len(request.tokens) for request in requests)
    return [_reply(model, r, interventions, decoding, probes, sampling, width) for r in requests]


def _reply(
    model: ChatModel,
    request: Request,
    interventions: Interventions,
    decoding: Decoding,
    probes: np.ndarray | None,
    sampling: Sampling | None,
    width: int,
) -> Expected:
    prompt = read_one(
        model,
        request.tokens,
        only(interventions, request.condition),
        decoding,
        probes=probes,
        sampling=sampling,
        row_id=request.row_id,
        width=width,
    )
    steps = list(reply(model, prompt))
    stopped = [prompt, *steps][-1].next in decoding.eos and len(steps) < decoding.max_new_tokens
    # The engine does not read the last token of a full buffer: nothing follows it.
    read = steps if stopped else steps[:-1]
    nothing = jax.tree.map(np.zeros_like, prompt.realised)
    return Expected(
        tokens=[token for step in steps for token in step.tokens],
        stopped=stopped,
        prompt=prompt.realised,
        response=jax.tree.map(lambda *each: sum(each), nothing, *[s.realised for s in read]),
        logits=np.stack([prompt.logits, *[step.logits for step in read]]),
    )


def only(interventions: Interventions, condition: int) -> Interventions:
    """One condition of stacked interventions, its leading axis dropped."""
    return jax.tree.map(lambda a: np.asarray(a[condition]), interventions)


def read_one(
    model: ChatModel,
    prompt: Sequence[int],
    interventions: Interventions,
    decoding: Decoding,
    **options: Any,
) -> stepwise.Reading:
    """Read one prompt under one intervention (see `only`); options as for `stepwise.read_each`."""
    stacked = jax.tree.map(lambda a: np.asarray(a)[None], interventions)
    (reading,) = stepwise.read_each(model, prompt, stacked, decoding, **options)
    return reading


def reply(model: ChatModel, reading: stepwise.Reading) -> Iterator[stepwise.Reading]:
    """Yield the reply of a prompt that was read, token by token."""
    for step in stepwise.reply_each(model, [reading]):
        yield from filter(None, step)


@functools.partial(jax.jit, static_argnames=("definition", "taps", "last_only"))
def read(
    definition: nnx.GraphDef[Decoder],
    params: Params,
    tokens: Int[AnyArray, "row token"],
    real: Bool[AnyArray, "row token"],
    taps: tuple[str, ...] = (),
    interventions: Interventions | None = None,
    last_only: bool = False,
) -> tuple[dict[str, jax.Array], Float[jax.Array, "row out vocab"]]:
    """One forward pass over left-padded rows, in one program.

    Args:
      definition: from `decoder.graph`; static.
      params: the model's parameters.
      tokens: left-padded ids.
      real: which are real.
      taps: which taps to read; static.
      interventions: one entry per row; None runs the plain model.
      last_only: logits of the last token only; static.

    Returns:
      By tap the stream [row, layer, token, d_model], and the logits, both float32.
    """
    model = bind(definition, params)
    config, dtype = model.config, model.embed.embedding[...].dtype

    def one(tokens, real, interventions):
        steering = interventions and Steering(
            interventions=interventions,
            steered=real & interventions.on_prompt,
            real=real,
            probes=jnp.zeros((config.n_layers, 0, config.d_model)),
        )
        out = model(
            tokens,
            causal(real),
            empty_cache(config, config.n_layers, len(tokens), dtype),
            jnp.int32(0),
            steering=steering,
            capture=taps,
        )
        return out.captured, model.logits(out.hidden[-1:] if last_only else out.hidden)

    return jax.vmap(one)(jnp.asarray(tokens), jnp.asarray(real), interventions)
