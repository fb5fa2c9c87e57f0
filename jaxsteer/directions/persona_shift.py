"""Persona modes in a vector's units: how far a system prompt moves the state along a direction.

For each mode and direction v with unit u, at each layer: the mean over prompts of
u . (h_mode - h_none) / |v|, where h is `resid_post` at the last prompt token and "none" the policy
alone on the same prompt. Adding v once there shifts by +1, so a mode made of words can be compared
with a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.data.prompts import Mode, Prompt
from jaxsteer.directions import activations
from jaxsteer.directions.direction import Direction
from jaxsteer.generation.prefix import shared_length
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.progress import Progress

Z95 = 1.959964


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shift:
    """One mode along one direction, in natural norms of the direction.

    Attributes:
      mode: the mode's name in the study: a shipped name, or the path of a file.
      direction: the direction's name.
      n: number of prompts, each its own pair.
      mean: per layer, the mean shift against the policy alone.
      half_width: per layer, half of its 95 % interval (normal, over prompts); infinite for one.
    """

    mode: str
    direction: str
    n: int
    mean: Float[np.ndarray, " n_layers"]
    half_width: Float[np.ndarray, " n_layers"]


def shifts(
    model: ChatModel,
    modes: Mapping[str, Mode],
    policy: str,
    prompts: Sequence[Prompt],
    directions: Mapping[str, Direction],
) -> list[Shift]:
    """Measure every mode along every direction; a mode without text is left out, as it is zero.

    Args:
      model: the model that reads the prompts.
      modes: by the name the study gives them.
      policy: the system prompt that follows a mode's text, and that the mode is compared with.
      prompts: the user's messages.
      directions: by name.
    """
    texts = {name: mode.with_policy(policy) for name, mode in modes.items() if mode.text}
    with Progress("modes", (1 + len(texts)) * len(prompts), unit="prompts") as progress:
        plain = _last_states(model, policy, prompts, progress)
        found = []
        for name, system in texts.items():
            moved = _last_states(model, system, prompts, progress) - plain
            found += [_shift(name, direction, moved) for direction in directions.values()]
    return found


def _shift(
    mode: str, direction: Direction, moved: Float[np.ndarray, "prompt n_layers d_model"]
) -> Shift:
    norms = np.maximum(np.linalg.norm(direction.vectors, axis=1), 1e-30)
    along, n = np.einsum("pld,ld->pl", moved, direction.unit()) / norms, len(moved)
    return Shift(
        mode=mode,
        direction=direction.name,
        n=n,
        mean=along.mean(axis=0),
        half_width=Z95 * along.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.inf * norms,
    )


def _last_states(
    model: ChatModel, system: str, prompts: Sequence[Prompt], progress: Progress
) -> Float[np.ndarray, "prompt n_layers d_model"]:
    ids = [model.tokenizer.chat(prompt.text, system) for prompt in prompts]
    shared = [shared_length(ids)] * len(ids)
    states = np.zeros((len(ids), model.config.n_layers, model.config.d_model), np.float64)
    for i, state in activations.capture(model, ids, None, ["prompt_end"], shared=shared):
        states[i] = state[:, 0]
        progress.advance(1)
    return states


def record(found: Sequence[Shift], layer: int) -> list[dict[str, Any]]:
    """The shifts in the form of modes.json: at one layer, and at each.

    JSON has no infinity, so the interval of a single prompt is null.
    """

    def finite(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    return [
        {
            "mode": s.mode,
            "direction": s.direction,
            "n": s.n,
            "at": f"resid_post.{layer}",
            "shift": float(s.mean[layer]),
            "low": finite(s.mean[layer] - s.half_width[layer]),
            "high": finite(s.mean[layer] + s.half_width[layer]),
            "by_layer": [round(float(value), 5) for value in s.mean],
        }
        for s in found
    ]
