"""Choose the refusal direction's layer, and the persona's layer and strength, by stated rules.

Both rules read HarmBench and our harmless prompts only. What they choose is reported on
StrongREJECT and our benign prompts. Every candidate is one condition of one compiled program.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import msgspec
import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax, logsumexp

from jaxsteer.directions import activations
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.requests import shared_length
from jaxsteer.judges.rules import is_degenerate, is_refusal
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import (
    Add,
    Interventions,
    Operation,
    Scope,
    compile_conditions,
    everywhere,
)
from jaxsteer.words import Progress, percent


class RefusalCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """One layer's scores; the rule of Arditi et al. 2024, appendix C.

    Attributes:
      layer: the candidate is the direction's vector at `resid_post.layer`.
      bypass: mean refusal score on harmful prompts with it ablated everywhere; low is good.
      induce: mean refusal score on harmless prompts with it added at its layer; at least 0.
      kl: mean KL(plain || ablated) of next-token distributions on harmless prompts, in nats.
      reasons: why it is filtered; empty when it is eligible.
    """

    layer: int
    bypass: float
    induce: float
    kl: float
    reasons: tuple[str, ...]


class DoseCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """One (layer, strength) cell of the persona's selection grid, with rates over its prompts."""

    layer: int
    scale: float
    refusal: float
    degenerate: float


def refusal_score(
    logits: Float[np.ndarray, "row vocab"], opening: Sequence[int]
) -> Float[np.ndarray, " row"]:
    """log p - log(1 - p), p the probability that the reply opens with a refusal token; float64.

    Arditi et al. 2024, appendix C.1. The opening tokens belong to the model family.
    """
    wide, opens = logits.astype(np.float64), list(opening)
    return logsumexp(wide[:, opens], axis=1) - logsumexp(np.delete(wide, opens, axis=1), axis=1)


def kl(
    plain: Float[np.ndarray, "row vocab"], changed: Float[np.ndarray, "row vocab"]
) -> Float[np.ndarray, " row"]:
    """KL(plain || changed) of the two softmaxes, in nats, float64."""
    p, q = (log_softmax(logits.astype(np.float64), axis=1) for logits in (plain, changed))
    return (np.exp(p) * (p - q)).sum(axis=1)


def refusal_candidates(
    model: ChatModel,
    direction: Direction,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    layers: Sequence[int],
    opening: Sequence[int],
    *,
    kl_limit: float = 0.1,
) -> tuple[RefusalCandidate, ...]:
    """Score each layer's vector: ablate on harmful, ablate and add on harmless prompts.

    Prompts are token ids. A candidate is filtered for a layer in the last fifth of depth, a KL
    above `kl_limit`, an induced score below 0, or a score that is no number.

    Raises:
      UserError: a prompt longer than the model's context.
    """
    config, vectors = model.config, direction.vectors
    cells: list[list[Operation]] = [[], *(everywhere(vectors, layer) for layer in layers)]
    cells += [[Add(direction=vectors, layers=(layer,), scale=1.0)] for layer in layers]
    forward = functools.partial(activations.forward, model, interventions=_compiled(model, cells))
    total = len(harmless) + len(layers) * (len(harmful) + 2 * len(harmless))
    with Progress("refusal layer", total, unit="prompts") as progress:

        def logits(prompts: Sequence[Sequence[int]], cell: int) -> np.ndarray:
            """Next-token logits [prompt, vocab] under one cell's operations."""
            out = np.zeros((len(prompts), config.vocab_size), np.float32)
            shared = [shared_length(prompts)] * len(prompts)
            for i, _, last in forward(prompts, shared=shared, condition=cell):
                out[i] = last
                progress.advance(1)
            return out

        plain, candidates = logits(harmless, 0), []
        for ablated, layer in enumerate(layers, start=1):
            added = ablated + len(layers)
            bypass = float(refusal_score(logits(harmful, ablated), opening).mean())
            divergence = float(kl(plain, logits(harmless, ablated)).mean())
            induce = float(refusal_score(logits(harmless, added), opening).mean())
            reasons = {
                "in the last fifth": layer >= config.n_layers * 4 // 5,
                f"KL {divergence:.2f} > {kl_limit}": divergence > kl_limit,
                f"induced score {induce:.2f} < 0": induce < 0,
                "a score is not finite": not np.isfinite([bypass, divergence, induce]).all(),
            }
            held = tuple(reason for reason, holds in reasons.items() if holds)
            scores = {"bypass": bypass, "induce": induce, "kl": divergence}
            candidates.append(RefusalCandidate(layer=layer, reasons=held, **scores))
    return tuple(candidates)


def choose_refusal(
    candidates: Sequence[RefusalCandidate], *, allow_near_miss: bool
) -> RefusalCandidate:
    """The eligible candidate with the lowest bypass score.

    With none eligible and `allow_near_miss`, the one with the fewest reasons against it, then
    the lowest KL: the caller records its reasons.

    Raises:
      UserError: none is eligible; the message shows the three nearest.
    """
    eligible = [c for c in candidates if not c.reasons]
    if eligible:
        return min(eligible, key=lambda c: c.bypass)
    nearest = sorted(candidates, key=lambda c: (not np.isfinite(c.kl), len(c.reasons), c.kl))
    if allow_near_miss:
        return nearest[0]
    shown = "; ".join(f"resid_post.{c.layer}: {', '.join(c.reasons)}" for c in nearest[:3])
    raise UserError(
        f"no refusal direction passes the selection; the nearest are {shown}. "
        "Raise kl_limit, or set allow_near_miss = true to take and record the first"
    )


def _compiled(model: ChatModel, cells: Sequence[Sequence[Operation]]) -> Interventions:
    """The operations of all cells as arrays; they steer all tokens."""
    config = model.config
    scopes: list[Scope] = ["all"] * len(cells)
    return compile_conditions(cells, scopes, n_layers=config.n_layers, d_model=config.d_model)


def rates(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    cells: Sequence[Sequence[Operation]],
    title: str,
    *,
    max_new_tokens: int,
    batch: int,
) -> list[tuple[float, float]]:
    """Refusal and degenerate rate of the prompts under each cell's operations, decoded greedily."""
    shared, n = shared_length(prompts), len(prompts)
    requests = [
        engine.Request(tokens=prompt, condition=cell, shared=shared)
        for cell, prompt in itertools.product(range(len(cells)), prompts)
    ]
    counts = np.zeros((len(cells), 2))
    decoding = Decoding(max_new_tokens=max_new_tokens, eos=model.eos)
    with Progress(title, len(requests)) as progress:
        for replies in engine.run(model, requests, _compiled(model, cells), decoding, batch=batch):
            for reply in replies:
                found = is_refusal(reply.text), is_degenerate(reply.text)
                counts[requests[reply.index].condition] += found
            progress.advance(len(replies))
    return [(float(refused / n), float(broken / n)) for refused, broken in counts]


def dose_candidates(
    model: ChatModel,
    direction: Direction,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    scales: Sequence[float],
    *,
    max_new_tokens: int,
    batch: int,
) -> tuple[DoseCandidate, ...]:
    """Refusal and degenerate rates over the (layer, strength) grid; strength 0 is the baseline."""
    grid, v = [(0, 0.0), *itertools.product(layers, scales)], direction.vectors
    cells = [
        [Add(direction=v, layers=(layer,), scale=scale)] if scale else [] for layer, scale in grid
    ]
    title = "persona layer and strength"
    found = rates(model, prompts, cells, title, max_new_tokens=max_new_tokens, batch=batch)
    return tuple(
        DoseCandidate(layer=layer, scale=scale, refusal=refusal, degenerate=degenerate)
        for (layer, scale), (refusal, degenerate) in zip(grid, found, strict=True)
    )


def choose_dose(candidates: Sequence[DoseCandidate], max_degenerate: float) -> DoseCandidate:
    """The cell with the lowest refusal rate among those that do not break the model.

    Of equal ones the least degenerate, then the weakest, then the earliest layer.

    Args:
      candidates: the grid, its baseline (strength 0) included.
      max_degenerate: largest tolerated rise of the degenerate rate over the baseline's.

    Raises:
      UserError: every cell breaks the model.
    """
    limit = max_degenerate + max(c.degenerate for c in candidates if not c.scale)
    steered = [c for c in candidates if c.scale and c.degenerate <= limit + 1e-9]
    if not steered:
        raise UserError(
            f"at every layer and strength more than {percent(limit)} of replies are degenerate; "
            "add weaker strengths to [selection] scales"
        )
    return min(steered, key=lambda c: (c.refusal, c.degenerate, c.scale, c.layer))
