"""Read the residual stream at chosen tokens: states for directions, logits for selection.

Only what is asked for is copied from the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxsteer.errors import UserError
from jaxsteer.generation import layer_sharing, prefill
from jaxsteer.generation.layer_sharing import Prompts
from jaxsteer.generation.requests import Request, check_lengths, grouped, pack
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Interventions

Position = Literal["prompt_end", "response_start", "response_avg"]
POSITIONS: tuple[Position, ...] = ("prompt_end", "response_start", "response_avg")


def position_weights(
    real: Bool[np.ndarray, " token"], response: int, asked: Sequence[Position]
) -> Float[np.ndarray, "position token"]:
    """Weights over the tokens of a packed sequence: which of a row's states are averaged.

    Args:
      real: which of them are the row's, its response last.
      response: number of response tokens.
      asked: positions.

    A prompt of 2 and a response of 2 tokens, [., p, p, r, r, .] with real [F, T, T, T, T, F]:
        prompt_end      [0, 0, 1, 0, 0, 0]      the last prompt token
        response_start  [0, 0, 0, 1, 0, 0]      the first response token
        response_avg    [0, 0, 0, .5, .5, 0]    every response token, without the ending token

    Raises:
      UserError: a response position asked of an empty response.
    """
    weights = np.zeros((len(asked), len(real)), np.float32)
    end = int(np.flatnonzero(real)[-1]) + 1
    start = end - response
    for i, position in enumerate(asked):
        if position == "prompt_end":
            weights[i, start - 1] = 1
        elif not response:
            raise UserError(f"position {position} needs a response; one row has none")
        elif position == "response_start":
            weights[i, start] = 1
        else:
            weights[i, start:end] = 1 / response
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
    """Run every prompt with its response once, packed and in batches as a study's prompts.

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
      A row's index, its float32 states at `resid_post` at the asked positions, and the logits after
      its last token; in no set order.

    Raises:
      UserError: a row longer than the model's context, or as `position_weights`.
    """
    responses = [[]] * len(prompts) if responses is None else responses
    shared = [0] * len(prompts) if shared is None else shared
    requests = [
        Request(tokens=[*prompt, *response], condition=condition, shared=n)
        for prompt, response, n in zip(prompts, responses, shared, strict=True)
    ]
    arrays = interventions or layer_sharing.untouched(model.config)
    for some, batch in batches(model, requests, arrays, capture=True):
        real = np.asarray(batch.real)
        weights = np.zeros((len(real), len(asked), real.shape[1]), np.float32)
        for i, row in enumerate(some):
            weights[i] = position_weights(real[i], len(responses[row]), asked)
        found = prefill.states(model.definition, model.params, batch, weights)
        states, logits = jax.device_get(found)
        yield from zip(some, states, logits, strict=False)


def batches(
    model: ChatModel,
    requests: Sequence[Request],
    interventions: Interventions,
    *,
    capture: bool = False,
) -> Iterator[tuple[list[int], prefill.PromptBatch]]:
    """Read requests in batches of one width; yields the rows of each batch, and what was read.

    With `capture`, the stream at every `resid_post` is kept.

    Raises:
      UserError: a request longer than the model's context.
    """
    limit = model.config.max_position
    check_lengths((len(request.tokens) for request in requests), limit)
    given = layer_sharing.with_prefixes(
        Prompts(
            model=model,
            requests=requests,
            interventions=interventions,
            probes=prefill.no_probes(model.config),
            packed=pack(requests, limit),
        )
    )
    given = dataclasses.replace(given, capture=capture)
    for rows in grouped(range(len(requests)), given.packed.width).values():
        yield from layer_sharing.read(given, rows)
