"""How well directions are known, and whether two of them are more aligned than chance allows.

A direction is a difference of two means over samples. Samples share instructions and questions, so
they are not independent, and a null that ignores this finds nearly everything significant. So
halves and relabellings consist of whole *units*: an instruction with all its questions, a question
with all its instructions, or a prompt.

    reliability  cosine of the directions of two random halves of the units, repeated
    null         cosine with another direction after the units' labels are shuffled
    isotropic    1 / sqrt(d_model), the spread of random vectors; for comparison only, since the
                 residual stream is far from isotropic

The first two use the samples' inner products per layer, so repeats cost little.

`shifts` measures persona modes in a vector's units: how far a system prompt moves the state along a
direction. For each mode and direction v with unit u, at each layer: the mean over prompts of
u . (h_mode - h_none) / |v|, where h is `resid_post` at the last prompt token and "none" the policy
alone on the same prompt. Adding v once there shifts by +1, so a mode made of words can be compared
with a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
from jaxtyping import Float

from jaxsteer.data.prompts import Mode, Prompt
from jaxsteer.directions import activations
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.samples import Samples, difference_weights
from jaxsteer.errors import UserError
from jaxsteer.generation.requests import shared_length
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Layers
from jaxsteer.words import Progress

Z95 = 1.959964


def cosines(first: Layers, second: Layers) -> Float[np.ndarray, " layer"]:
    """Cosine per layer in float64; 0 where either vector is zero."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.einsum("ld,ld->l", a, b)
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)


def split_half(
    samples: Samples, unit: str, *, halves: int = 100, seed: int = 0
) -> Float[np.ndarray, "half layer"]:
    """Cosines between the directions of two random halves of the units, for each repeat.

    A unit of both sides, such as a question, is in the same half on both. Units of one side are
    halved on each side.

    Raises:
      UserError: a side has fewer than two units.
    """
    ids = samples.units[unit]
    up, down = np.unique(ids[samples.positive]), np.unique(ids[~samples.positive])
    if min(len(up), len(down)) < 2:
        raise UserError(f"one {unit} on each side cannot be halved; use another unit")
    sides = [up] if np.array_equal(up, down) else [up, down]
    generator = np.random.Generator(np.random.PCG64(seed))
    first = np.zeros((halves, len(ids)), bool)
    for repeat in range(halves):
        chosen = [generator.permutation(side)[: len(side) // 2] for side in sides]
        first[repeat] = np.isin(ids, np.concatenate(chosen))
    one, two = (
        difference_weights(np.broadcast_to(samples.positive, h.shape), h) for h in (first, ~first)
    )
    found = np.zeros((halves, samples.values.shape[1]))
    for layer, gram in enumerate(_grams(samples)):
        dots, norms = _dots(one, gram, two), _dots(one, gram, one) * _dots(two, gram, two)
        found[:, layer] = _ratio(dots, np.sqrt(np.maximum(norms, 0)))
    return found


def permutation_null(
    samples: Samples, other: Layers, *, draws: int = 1000, seed: int = 0
) -> Float[np.ndarray, "draw layer"]:
    """Cosines with `other` of directions made from shuffled labels.

    Labels move between whole units, so the null keeps the anisotropy and everything the samples
    share, and the number of positive units.
    """
    ids = samples.units[samples.labelled]
    units, index = np.unique(ids, return_inverse=True)
    label = np.zeros(len(units), bool)
    label[index] = samples.positive
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = np.stack([generator.permutation(label)[index] for _ in range(draws)])
    weights = difference_weights(shuffled)
    wide = other.astype(np.float64)
    found = np.zeros((draws, samples.values.shape[1]))
    for layer, gram in enumerate(_grams(samples)):
        dots = weights @ (samples.values[:, layer].astype(np.float64) @ wide[layer])
        norms = np.sqrt(np.maximum(_dots(weights, gram, weights), 0)) * np.linalg.norm(wide[layer])
        found[:, layer] = _ratio(dots, norms)
    return found


def relabellings(samples: Samples) -> int:
    """Number of different labellings of the units, with the true one."""
    ids = samples.units[samples.labelled]
    return math.comb(len(np.unique(ids)), len(np.unique(ids[samples.positive])))


def two_sided_p(
    observed: Float[np.ndarray, " layer"], null: Float[np.ndarray, "draw layer"]
) -> Float[np.ndarray, " layer"]:
    """(1 + draws at least as far from 0 as the observed) / (1 + draws), per layer."""
    # A relabelling that happens to be the true one equals the observed but for rounding.
    beyond = (np.abs(null) >= np.abs(observed) - 1e-12).sum(axis=0)
    return (1 + beyond) / (1 + len(null))


def _grams(samples: Samples) -> Iterator[Float[np.ndarray, "sample sample"]]:
    # The common mean drops out of every difference; without it the products lose fewer digits.
    for layer in range(samples.values.shape[1]):
        values = samples.values[:, layer].astype(np.float64)
        values = values - values.mean(axis=0)
        yield values @ values.T


def _dots(
    a: Float[np.ndarray, "repeat sample"],
    gram: Float[np.ndarray, "sample sample"],
    b: Float[np.ndarray, "repeat sample"],
) -> Float[np.ndarray, " repeat"]:
    return np.einsum("rs,rs->r", a @ gram, b)


def _ratio(dots: np.ndarray, norms: np.ndarray) -> np.ndarray:
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 1e-12)


class Shift(msgspec.Struct, frozen=True, kw_only=True):
    """One mode along one direction, in natural norms of the direction: an entry of modes.json.

    Attributes:
      mode: the mode's name in the study: a shipped name, or the path of a file.
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
    ids = [model.tokenizer.chat(prompt.text, system) for prompt in prompts]
    shared = [shared_length(ids)] * len(ids)
    states = np.zeros((len(ids), model.config.n_layers, model.config.d_model), np.float64)
    for i, state, _ in activations.forward(model, ids, None, ["prompt_end"], shared=shared):
        states[i] = state[:, 0]
        progress.advance(1)
    return states
