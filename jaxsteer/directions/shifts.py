"""Persona modes in a vector's units: how far a system prompt moves the state along a direction.

For each mode and direction v with unit u, at each layer: the mean over prompts of
u . (h_mode - h_none) / |v|, where h is `resid_post` at the last prompt token and "none" the policy
alone on the same prompt. Adding v once there shifts by +1, so a mode made of words can be compared
with a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from jaxtyping import Float

from jaxsteer.data.prompts import Mode, Prompt
from jaxsteer.directions import activations
from jaxsteer.directions.direction import Direction
from jaxsteer.generation.requests import shared_length
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.words import Progress

Z95 = 1.959964


class Shift(msgspec.Struct, frozen=True, kw_only=True):
    """One mode along one direction, in natural norms of the direction: an entry of modes.json.

    Attributes:
      mode: the mode's name.
      direction: the direction's name.
      n: number of prompts.
      at: the layer of the next three, such as `resid_post.21`.
      shift: the mean over prompts.
      low, high: its 95 % interval (normal, over prompts); None for a single prompt.
      by_layer: the mean at every layer.
    """

    mode: str
    direction: str
    n: int
    at: str
    shift: float
    low: float | None
    high: float | None
    by_layer: list[float]


def shifts(
    model: ChatModel,
    modes: Mapping[str, Mode],
    policy: str,
    prompts: Sequence[Prompt],
    directions: Mapping[str, Direction],
    layer: int,
) -> list[Shift]:
    """Measure every mode along every direction; a mode without text is left out, as it is zero.

    Args:
      model: the model that reads the prompts.
      modes: by the name the study gives them.
      policy: the system prompt that follows a mode's text, and that the mode is compared with.
      prompts: the user's messages.
      directions: by name.
      layer: the layer to give with its interval.
    """
    texts = {name: mode.with_policy(policy) for name, mode in modes.items() if mode.text}
    with Progress("modes", (1 + len(texts)) * len(prompts), unit="prompts") as progress:
        plain = _last_states(model, policy, prompts, progress)
        found = []
        for name, system in texts.items():
            moved = _last_states(model, system, prompts, progress) - plain
            found += [_shift(name, direction, moved, layer) for direction in directions.values()]
    return found


def _shift(
    mode: str, direction: Direction, moved: Float[np.ndarray, "prompt n_layers d_model"], layer: int
) -> Shift:
    norms, n = np.maximum(np.linalg.norm(direction.vectors, axis=1), 1e-30), len(moved)
    along = np.einsum("pld,ld->pl", moved, direction.unit()) / norms
    mean = along.mean(axis=0)
    half = Z95 * along.std(axis=0, ddof=1)[layer] / np.sqrt(n) if n > 1 else None
    return Shift(
        mode=mode,
        direction=direction.name,
        n=n,
        at=f"resid_post.{layer}",
        shift=float(mean[layer]),
        low=None if half is None else float(mean[layer] - half),
        high=None if half is None else float(mean[layer] + half),
        by_layer=[round(float(value), 5) for value in mean],
    )


def _last_states(
    model: ChatModel, system: str, prompts: Sequence[Prompt], progress: Progress
) -> Float[np.ndarray, "prompt n_layers d_model"]:
    ids = [model.tokenizer.chat(prompt.asked, system) for prompt in prompts]
    shared = [shared_length(ids)] * len(ids)
    states = np.zeros((len(ids), model.config.n_layers, model.config.d_model), np.float64)
    for i, state, _ in activations.forward(model, ids, None, ["prompt_end"], shared=shared):
        states[i] = state[:, 0]
        progress.advance(1)
    return states
