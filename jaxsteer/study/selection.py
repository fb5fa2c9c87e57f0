"""Choose the refusal direction's layer, and the persona's layer and strength, by stated rules.

Both rules read HarmBench and our harmless prompts only. What they choose is reported on
StrongREJECT and our benign prompts. Every candidate is one condition of one compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax

from jaxsteer.directions import activations
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.generation import engine
from jaxsteer.generation.requests import shared_length
from jaxsteer.generation.sampling import Decoding
from jaxsteer.judges.rules import is_degenerate, is_refusal
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Add, Operation, compile_conditions, everywhere
from jaxsteer.terminal import Progress
from jaxsteer.words import percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusalCandidate:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoseCandidate:
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
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    mass = np.exp(wide)
    inside = mass[:, list(opening)].sum(axis=1)
    outside = np.delete(mass, list(opening), axis=1).sum(axis=1)
    return np.log(inside + 1e-300) - np.log(outside + 1e-300)


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
    conditions: list[list[Operation]] = [[], *(everywhere(vectors, layer) for layer in layers)]
    conditions += [[Add(direction=vectors, layers=(layer,), scale=1.0)] for layer in layers]
    interventions = compile_conditions(
        conditions, ["all"] * len(conditions), n_layers=config.n_layers, d_model=config.d_model
    )
    total = len(harmless) + len(layers) * (len(harmful) + 2 * len(harmless))
    with Progress("refusal layer", total, unit="prompts") as progress:

        def logits(prompts: Sequence[Sequence[int]], condition: int) -> np.ndarray:
            """Next-token logits [prompt, vocab] under one condition."""
            out = np.zeros((len(prompts), config.vocab_size), np.float32)
            for members, _, last in activations.forward(
                model,
                prompts,
                shared=[shared_length(prompts)] * len(prompts),
                interventions=interventions,
                condition=condition,
            ):
                out[members] = np.asarray(last[: len(members), 0])
                progress.advance(len(members))
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
            candidates.append(
                RefusalCandidate(
                    layer=layer, bypass=bypass, induce=induce, kl=divergence, reasons=held
                )
            )
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
    config = model.config
    cells = [(0, 0.0)] + [(layer, scale) for layer in layers for scale in scales]
    interventions = compile_conditions(
        [
            [Add(direction=direction.vectors, layers=(layer,), scale=scale)] if scale else []
            for layer, scale in cells
        ],
        ["all"] * len(cells),
        n_layers=config.n_layers,
        d_model=config.d_model,
    )
    shared = shared_length(prompts)
    requests = [
        engine.Request(tokens=prompt, condition=cell, shared=shared)
        for cell in range(len(cells))
        for prompt in prompts
    ]
    refused, degenerate = np.zeros(len(cells)), np.zeros(len(cells))
    decoding = Decoding(max_new_tokens=max_new_tokens, eos=model.eos)
    with Progress("persona layer and strength", len(requests)) as progress:
        for replies in engine.run(model, requests, interventions, decoding, batch=batch):
            for reply in replies:
                cell = requests[reply.index].condition
                refused[cell] += is_refusal(reply.text)
                degenerate[cell] += is_degenerate(reply.text)
            progress.advance(len(replies))
    n = len(prompts)
    return tuple(
        DoseCandidate(layer=layer, scale=scale, refusal=float(r / n), degenerate=float(d / n))
        for (layer, scale), r, d in zip(cells, refused, degenerate, strict=True)
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
