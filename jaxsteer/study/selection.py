"""Choose the refusal direction's layer, and the persona's layer and strength, by stated rules.

Both rules see HarmBench and our harmless prompts only; what they choose is reported on StrongREJECT
and our benign prompts, which they never see. Every candidate is one condition of one compiled
program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from jaxsteer.directions import activations
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.generation import engine
from jaxsteer.generation.generate import Decoding
from jaxsteer.generation.prefix import shared_length
from jaxsteer.judges.degenerate import is_degenerate
from jaxsteer.judges.keyword import is_refusal
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import (
    Add,
    Interventions,
    Operation,
    compile_conditions,
    everywhere,
)
from jaxsteer.words import percent

Report = Callable[[int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusalCandidate:
    """One layer's scores; the rule of Arditi et al. 2024, appendix C.

    Attributes:
      layer: the candidate is the direction's vector at `resid_post.layer`.
      bypass: mean refusal score on harmful prompts with it ablated everywhere; low is good.
      induce: mean refusal score on harmless prompts with it added at its layer; above 0 is asked.
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

    def log_softmax(x: np.ndarray) -> np.ndarray:
        wide = x.astype(np.float64)
        wide = wide - wide.max(axis=1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))

    p, q = log_softmax(plain), log_softmax(changed)
    return (np.exp(p) * (p - q)).sum(axis=1)


def last_logits(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    interventions: Interventions,
    condition: int,
    *,
    batch: int = 16,
    report: Report = lambda done: None,
) -> Float[np.ndarray, "prompt vocab"]:
    """Next-token logits after each prompt under one condition, float32.

    Raises:
      UserError: a prompt that does not fit the model's context.
    """
    out = np.zeros((len(prompts), model.config.vocab_size), np.float32)
    for members, _, logits in activations.forward(
        model,
        prompts,
        shared=[shared_length(prompts)] * len(prompts),
        batch=batch,
        interventions=interventions,
        condition=condition,
    ):
        out[members] = np.asarray(logits[: len(members), 0])
        report(len(members))
    return out


def refusal_candidates(
    model: ChatModel,
    direction: Direction,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    layers: Sequence[int],
    opening: Sequence[int],
    *,
    kl_limit: float = 0.1,
    report: Report = lambda done: None,
) -> list[RefusalCandidate]:
    """Score each layer's vector: ablate on harmful, ablate and add on harmless prompts.

    Prompts are token ids. Layers in the last fifth of depth are filtered, as are candidates
    with KL above `kl_limit`, an induced score below 0, or a score that is no number.
    """
    config = model.config
    conditions: list[list[Operation]] = [[]]
    for layer in layers:
        conditions.append(everywhere(direction.vectors, layer))
        conditions.append([Add(direction=direction.vectors, layers=(layer,), scale=1.0)])
    stacked = compile_conditions(
        conditions, ["all"] * len(conditions), n_layers=config.n_layers, d_model=config.d_model
    )

    def score(prompts: Sequence[Sequence[int]], condition: int) -> np.ndarray:
        return last_logits(model, prompts, stacked, condition, report=report)

    plain = score(harmless, 0)
    found = []
    for i, layer in enumerate(layers):
        bypass = refusal_score(score(harmful, 1 + 2 * i), opening).mean()
        divergence = kl(plain, score(harmless, 1 + 2 * i)).mean()
        induce = refusal_score(score(harmless, 2 + 2 * i), opening).mean()
        reasons = []
        if layer >= config.n_layers * 4 // 5:
            reasons.append("in the last fifth")
        if divergence > kl_limit:
            reasons.append(f"KL {divergence:.2f} > {kl_limit}")
        if induce < 0:
            reasons.append(f"induced score {induce:.2f} < 0")
        if not np.isfinite([bypass, divergence, induce]).all():
            reasons.append("a score is not finite")
        found.append(
            RefusalCandidate(
                layer=layer,
                bypass=float(bypass),
                induce=float(induce),
                kl=float(divergence),
                reasons=tuple(reasons),
            )
        )
    return found


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
        "Raise kl_limit, or set allow_near_miss = true to take the first and have it recorded"
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
    report: Report = lambda done: None,
) -> list[DoseCandidate]:
    """Refusal and degenerate rates over the (layer, strength) grid; strength 0 is the baseline."""
    config = model.config
    cells = [(0, 0.0)] + [(layer, scale) for layer in layers for scale in scales]
    stacked = compile_conditions(
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
    refused, broken = np.zeros(len(cells)), np.zeros(len(cells))
    decoding = Decoding(max_new_tokens=max_new_tokens, eos=model.eos)
    for replies in engine.run(model, requests, stacked, decoding, batch=batch):
        for reply in replies:
            cell = requests[reply.index].condition
            refused[cell] += is_refusal(reply.text)
            broken[cell] += is_degenerate(reply.text)
        report(len(replies))
    return [
        DoseCandidate(
            layer=layer,
            scale=scale,
            refusal=refused[i] / len(prompts),
            degenerate=broken[i] / len(prompts),
        )
        for i, (layer, scale) in enumerate(cells)
    ]


def choose_dose(candidates: Sequence[DoseCandidate], max_degenerate: float) -> DoseCandidate:
    """Lowest refusal among cells that do not break the model; then the least degenerate, the
    weakest, the earliest.

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
