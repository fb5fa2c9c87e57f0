"""What the engine is compared with: every row on the plain stepwise path, nothing shared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from jaxsteer.generation import stepwise
from jaxsteer.generation.decode import Decoding, Sampling
from jaxsteer.generation.engine import Request
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.decoder import Realised
from jaxsteer.model.interventions import Interventions


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
    prompt = stepwise.read(
        model,
        request.tokens,
        stepwise.only(interventions, request.condition),
        decoding,
        probes=probes,
        sampling=sampling,
        row_id=request.row_id,
        width=width,
    )
    steps = list(stepwise.reply(model, prompt))
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
