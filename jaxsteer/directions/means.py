"""Means of the residual stream over groups of prompts, and the sampled replies they may need.

Sums run in float64 and take a row at a time, so memory does not grow with the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxsteer.directions import activations
from jaxsteer.directions.activations import Position
from jaxsteer.errors import UserError
from jaxsteer.files import stable_id
from jaxsteer.generation import engine
from jaxsteer.generation.generate import Decoding, Sampling
from jaxsteer.generation.prefix import shared_lengths
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import compile_conditions

# How replies are sampled, as in the study that is reimplemented.
SAMPLED = {"temperature": 1.0, "top_p": 0.95}


class Mean:
    """A streamed mean in float64: add rows in any order, memory of one row."""

    def __init__(self) -> None:
        self.total: np.ndarray | None = None
        self.count = 0

    def add(self, value: np.ndarray) -> None:
        """Take one sample in."""
        wide = np.asarray(value, np.float64)
        self.total = wide.copy() if self.total is None else self.total + wide
        self.count += 1

    def value(self) -> np.ndarray:
        """The mean of what was added; at least one sample must have been."""
        assert self.total is not None
        return self.total / self.count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Means:
    """Means over the rows of one group, in float64.

    Attributes:
      stream: mean `resid_post` at each asked position.
      norm: mean of its norm.
      count: rows in the group.
    """

    stream: Float[np.ndarray, "position n_layers d_model"]
    norm: Float[np.ndarray, "position n_layers"]
    count: int


def group_means(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    groups: Sequence[int],
    asked: Sequence[Position],
    shared: Sequence[int] | None = None,
) -> list[Means]:
    """Means of `resid_post` and of its norm over each group of rows.

    Args:
      model: the model to read.
      prompts: token ids.
      responses: token ids of the replies; empty ones will do for `prompt_end`.
      groups: each row's group, 0 to the number of groups - 1, none of them empty.
      asked: positions.
      shared: how many leading tokens of each prompt to run once (see `prefix`).
    """
    streams = [Mean() for _ in range(max(groups) + 1)]
    norms = [Mean() for _ in streams]
    for i, captured in activations.capture(model, prompts, responses, asked, shared=shared):
        streams[groups[i]].add(captured)
        norms[groups[i]].add(np.linalg.norm(captured.astype(np.float64), axis=-1))
    return [
        Means(
            stream=np.swapaxes(stream.value(), 0, 1),
            norm=np.swapaxes(norm.value(), 0, 1),
            count=stream.count,
        )
        for stream, norm in zip(streams, norms, strict=True)
    ]


def sample_replies(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    max_new_tokens: int,
    shared: Sequence[int] | None = None,
) -> list[list[int]]:
    """Unsteered replies, sampled by `SAMPLED`; each depends on its prompt and the seed only.

    `shared` is how many leading tokens of each prompt to run once (see `prefix`).
    """
    plain = compile_conditions(
        [[]], ["all"], n_layers=model.config.n_layers, d_model=model.config.d_model
    )
    shared = [0] * len(prompts) if shared is None else shared
    requests = [
        engine.Request(tokens=p, row_id=stable_id(*map(str, p)), shared=n)
        for p, n in zip(prompts, shared, strict=True)
    ]
    decoding = Decoding(max_new_tokens=max_new_tokens, eos=model.eos, sample=True)
    replies: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(seed=seed, **SAMPLED)
    for batch in engine.run(model, requests, plain, decoding, sampling=sampling):
        for reply in batch:
            replies[reply.index] = [int(t) for t in reply.tokens]
    return replies


def chat_means(
    model: ChatModel,
    groups: Sequence[Sequence[tuple[str, str]]],
    asked: Sequence[Position],
    *,
    seed: int,
    max_new_tokens: int,
) -> list[Means]:
    """`group_means` over groups of (system, user) chats, whose replies are sampled if needed.

    All groups run together, so their number compiles nothing and fills the batches.
    """
    chats = [chat for group in groups for chat in group]
    numbers = [number for number, group in enumerate(groups) for _ in group]
    prompts = [model.tokenizer.chat(user, system) for system, user in chats]
    shared = shared_lengths(prompts, [system for system, _ in chats])
    responses: list[list[int]] = [[] for _ in prompts]
    if any(position != "prompt_end" for position in asked):
        responses = sample_replies(
            model, prompts, seed=seed, max_new_tokens=max_new_tokens, shared=shared
        )
        kept = [i for i, response in enumerate(responses) if response]
        silent = set(numbers) - {numbers[i] for i in kept}
        if silent:
            system = groups[min(silent)][0][0]
            raise UserError(
                f"every sampled reply under {system[:60]!r} was empty, so response positions have "
                "no tokens; take prompt_end, or another --seed"
            )
        prompts, responses = [prompts[i] for i in kept], [responses[i] for i in kept]
        shared, numbers = [shared[i] for i in kept], [numbers[i] for i in kept]
    return group_means(model, prompts, responses, numbers, asked, shared)
