"""The samples behind a direction: which states were averaged on which side, and what they share.

`directions` streams means and forgets the samples; this gathers the same states, with the same
seeds, one by one, for `geometry` to halve and relabel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsteer.data.prompts import Trait
from jaxsteer.directions import activations
from jaxsteer.directions.activations import Position
from jaxsteer.directions.means import sample_replies
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Layers


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """The states whose two means make a direction.

    Attributes:
      values: `resid_post` at the direction's position.
      positive: which side a sample is on.
      units: by name, the number of the unit each sample belongs to.
      labelled: the unit that carries the label, which a null may shuffle.
    """

    values: Float[np.ndarray, "sample layer d_model"]
    positive: Bool[np.ndarray, " sample"]
    units: Mapping[str, Int[np.ndarray, " sample"]]
    labelled: str

    def direction(self) -> Layers:
        """mean(positive) - mean(negative), float32, one vector per layer."""
        weights = contrast(self.positive[None])[0]
        return np.einsum("s,sld->ld", weights, self.values.astype(np.float64)).astype(np.float32)


def contrast(
    positive: Bool[np.ndarray, "repeat sample"],
    kept: Bool[np.ndarray, "repeat sample"] | None = None,
) -> Float[np.ndarray, "repeat sample"]:
    """Weights of a difference of means over the kept samples."""
    kept = np.ones_like(positive) if kept is None else kept
    up, down = (positive & kept).astype(np.float64), (~positive & kept).astype(np.float64)
    return up / up.sum(axis=1, keepdims=True) - down / down.sum(axis=1, keepdims=True)


def trait_samples(
    model: ChatModel,
    trait: Trait,
    position: Position = "prompt_end",
    *,
    seed: int = 0,
    max_new_tokens: int = 64,
) -> Samples:
    """The states behind `directions.extract_trait`, sample by sample, with the same seed."""
    n = len(trait.positive)
    return _gather(
        model,
        [
            _Side(list(trait.positive), 0),
            _Side(list(trait.negative), n),
        ],
        trait.questions,
        position,
        seed,
        max_new_tokens,
    )


def axis_samples(
    model: ChatModel,
    default: Sequence[str],
    roles: Sequence[str],
    questions: Sequence[str],
    position: Position = "response_avg",
    *,
    seed: int = 0,
    max_new_tokens: int = 48,
) -> Samples:
    """The states behind `directions.extract_assistant_axis`: default prompts against roles."""
    parts = [_Side(list(default), 0)]
    parts += [_Side([role], len(default) + i) for i, role in enumerate(roles)]
    return _gather(model, parts, questions, position, seed, max_new_tokens)


def contrast_samples(
    model: ChatModel,
    positive: Sequence[str],
    negative: Sequence[str],
    system: str | None,
) -> Samples:
    """The states behind `directions.extract_contrast`: one sample per prompt."""
    prompts = [model.tokenizer.chat(text, system) for text in (*positive, *negative)]
    values = _states(model, prompts, [[] for _ in prompts], "prompt_end")
    return Samples(
        values=values,
        positive=np.arange(len(prompts)) < len(positive),
        units={"prompt": np.arange(len(prompts))},
        labelled="prompt",
    )


@dataclasses.dataclass(frozen=True)
class _Side:
    """Instructions that count as one: their texts and first unit number."""

    instructions: list[str]
    first: int


def _gather(
    model: ChatModel,
    sides: Sequence[_Side],
    questions: Sequence[str],
    position: Position,
    seed: int,
    max_new_tokens: int,
) -> Samples:
    """Samples of instruction x question, the first side positive and all others negative."""
    chats = [(i, q) for side in sides for i in side.instructions for q in questions]
    prompts = [model.tokenizer.chat(question, instruction) for instruction, question in chats]
    responses: list[list[int]] = [[] for _ in prompts]
    if position != "prompt_end":
        responses = sample_replies(model, prompts, seed=seed, max_new_tokens=max_new_tokens)
    labels = [
        (number == 0, side.first + unit, question)
        for number, side in enumerate(sides)
        for unit in range(len(side.instructions))
        for question in range(len(questions))
    ]
    # An empty reply has no response positions; extraction leaves it out too.
    kept = [i for i, reply in enumerate(responses) if reply or position == "prompt_end"]
    prompts, responses = [prompts[i] for i in kept], [responses[i] for i in kept]
    labels = [labels[i] for i in kept]
    positive, instruction, question_of = (np.array(column) for column in zip(*labels, strict=True))
    return Samples(
        values=_states(model, prompts, responses, position),
        positive=positive,
        units={"instruction": instruction, "question": question_of},
        labelled="instruction",
    )


def _states(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    position: Position,
) -> Float[np.ndarray, "sample layer d_model"]:
    shape = (len(prompts), model.config.n_layers, model.config.d_model)
    values = np.zeros(shape, np.float32)
    for i, captured in activations.capture(model, prompts, responses, [position]):
        values[i] = captured[:, 0]
    return values
