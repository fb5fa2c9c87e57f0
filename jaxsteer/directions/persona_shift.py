"""Persona modes in a vector's units: how far a system prompt moves the state along a direction.

For each mode and direction v with unit u, at each layer: the mean over prompts of
u . (h_mode - h_none) / |v|, where h is `resid_post` at the last prompt token and "none" the policy
alone on the same prompt. A shift of +1 is what adding v once would do there, so a mode that ships
as words and a vector that is added can be compared.
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
      mode: the mode as the study names it, by a shipped name or the path of a file.
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
    """Measure every mode along every direction; `none` itself is left out, as it is zero.

    Args:
      model: what reads the prompts.
      modes: by what the study names them.
      policy: the system prompt that follows a mode's text, and that they are compared with.
      prompts: the user's turns.
      directions: by name.
    """
    texts = {name: mode.with_policy(policy) for name, mode in modes.items() if mode.text}
    with Progress("modes", (1 + len(texts)) * len(prompts), unit="prompts") as progress:
        plain = _last_states(model, policy, prompts, progress)
        found = []
        for name, system in texts.items():
            moved = _last_states(model, system, prompts, progress) - plain
            for direction in directions.values():
                norms = np.maximum(np.linalg.norm(direction.vectors, axis=1), 1e-30)
                along = np.einsum("pld,ld->pl", moved, direction.unit()) / norms
                spread = (
                    along.std(axis=0, ddof=1) if len(prompts) > 1 else np.full(len(norms), np.inf)
                )
                found.append(
                    Shift(
                        mode=name,
                        direction=direction.name,
                        n=len(prompts),
                        mean=along.mean(axis=0),
                        half_width=Z95 * spread / np.sqrt(len(prompts)),
                    )
                )
    return found


def _last_states(
    model: ChatModel, system: str, prompts: Sequence[Prompt], progress: Progress
) -> Float[np.ndarray, "prompt n_layers d_model"]:
    ids = [model.tokenizer.chat(prompt.text, system) for prompt in prompts]
    shared = [shared_length(ids)] * len(ids)
    states = np.zeros((len(ids), model.config.n_layers, model.config.d_model), np.float64)
    for i, captured in activations.capture(
        model, ids, [[]] * len(ids), ["prompt_end"], shared=shared
    ):
        states[i] = captured[:, 0]
        progress.advance(1)
    return states


def record(found: Sequence[Shift], layer: int) -> list[dict[str, Any]]:
    """The shifts as modes.json has them: every layer, and the study's layer picked out.

    JSON has no infinity: the interval of a single prompt is null.
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
