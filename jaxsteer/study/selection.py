"""Choose policy, layers, strengths and window by stated rules.

The rules read HarmBench and our harmless prompts only. What they choose is reported on
StrongREJECT and our benign prompts. Every candidate is one condition of one compiled program.

    policy        tells harmful from harmless prompts best
    refusal       the layer of Arditi et al. 2024 for the refusal direction
    steer, dose   the persona refuses least among candidates that do not break the model
    window        projecting the persona out there restores refusal most, and does little alone
    late_refusal  adding the refusal direction there restores refusal most, and does little alone
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from jaxtyping import Float
from msgspec import structs
from scipy.special import log_softmax, logsumexp

from jaxsteer.directions import samples
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.requests import Request, shared_length
from jaxsteer.judges.rules import is_degenerate, is_refusal
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import (
    Add,
    Interventions,
    Layers,
    Operation,
    Scope,
    compile_conditions,
    everywhere,
)
from jaxsteer.stats import newcombe
from jaxsteer.words import Progress, percent, signed

# Token ids of some prompts, and what is done to the model that answers them.
Prompts = Sequence[Sequence[int]]
Cell = tuple[Prompts, Sequence[Operation]]
# Candidate operations by first layer, width and strength.
Grid = Mapping[tuple[int, int, float], Sequence[Operation]]


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
    bypass: float | None
    induce: float | None
    kl: float | None
    reasons: tuple[str, ...]


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of replies, by the rules that need no model."""

    refusal: float
    degenerate: float


class DoseCandidate(Rates, frozen=True, kw_only=True):
    """One (layer, strength) cell of the persona's selection grid; strength 0 is the baseline."""

    layer: int
    scale: float


class PolicyCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """How the untouched model answers under one policy.

    Attributes:
      policy: its name.
      n: prompts a side.
      harmful, harmless: refusal rates.
      youden: harmful - harmless, which is Youden's J (1950, Cancer 3:32) of refusing.
      low, high: its 95 % interval (Newcombe).
    """

    policy: str
    n: int
    harmful: float
    harmless: float
    youden: float
    low: float
    high: float


class RestoringCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """An operation that may bring refusal back under the persona.

    Attributes:
      layer: first layer of the operation.
      width: number of its layers; 0 is no operation at all.
      scale: strength of the direction that it adds; 0 where it projects one out.
      steered: with the persona.
      alone: without it: the unsteered twin.
    """

    layer: int
    width: int
    scale: float
    steered: Rates
    alone: Rates


class Candidates(msgspec.Struct, frozen=True, kw_only=True):
    """What a study's choices were made from, with the scores of each candidate.

    Attributes:
      policies: how the untouched model answers; one entry where the study names its policy.
      refusals: layers of the refusal direction's vector; none if it is fixed.
      refusal_near_miss: why the chosen one did not pass, if it did not.
      doses: layers and strengths of the persona; none if both are fixed.
      windows: windows in which the persona is projected out; none if it is fixed or not used.
      window_near_miss: why the chosen one did not pass, if it did not.
      late: late layers and strengths of the refusal direction, likewise.
      late_near_miss: likewise.
    """

    policies: tuple[PolicyCandidate, ...] = ()
    refusals: tuple[RefusalCandidate, ...] = ()
    refusal_near_miss: tuple[str, ...] = ()
    doses: tuple[DoseCandidate, ...] = ()
    windows: tuple[RestoringCandidate, ...] = ()
    window_near_miss: tuple[str, ...] = ()
    late: tuple[RestoringCandidate, ...] = ()
    late_near_miss: tuple[str, ...] = ()


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
    forward = functools.partial(samples.forward, model, interventions=_compiled(model, cells))
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
            every = {"bypass": bypass, "induce": induce, "kl": divergence}
            scores = {name: score if np.isfinite(score) else None for name, score in every.items()}
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
        return min(eligible, key=lambda c: c.bypass or 0.0)
    nearest = sorted(candidates, key=lambda c: (c.kl is None, len(c.reasons), c.kl or 0.0))
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


class Rater(NamedTuple):
    """Decodes prompts greedily under operations, and rates the replies.

    Attributes:
      model: the model.
      max_new_tokens: length of the replies.
      batch: rows that decode together.
    """

    model: ChatModel
    max_new_tokens: int
    batch: int

    def rates(self, cells: Sequence[Cell], title: str) -> list[Rates]:
        """The rates of each cell's prompts under its operations."""
        requests = []
        for condition, (prompts, _) in enumerate(cells):
            shared = shared_length(prompts)
            requests += [Request(tokens=p, condition=condition, shared=shared) for p in prompts]
        counts, arrays = np.zeros((len(cells), 2)), _compiled(self.model, [ops for _, ops in cells])
        decoding = Decoding(max_new_tokens=self.max_new_tokens, eos=self.model.eos)
        with Progress(title, len(requests)) as progress:
            for replies in engine.run(self.model, requests, arrays, decoding, batch=self.batch):
                for reply in replies:
                    found = is_refusal(reply.text), is_degenerate(reply.text)
                    counts[requests[reply.index].condition] += found
                progress.advance(len(replies))
        shares = counts / [[len(prompts)] for prompts, _ in cells]
        return [Rates(refusal=refusal, degenerate=broken) for refusal, broken in shares.tolist()]


def policy_candidates(
    rater: Rater, policies: Mapping[str, tuple[Prompts, Prompts]]
) -> tuple[PolicyCandidate, ...]:
    """Score policies, by name the harmful and as many harmless prompts under each."""
    cells: list[Cell] = [(prompts, []) for both in policies.values() for prompts in both]
    refused, found = iter([rates.refusal for rates in rater.rates(cells, "policies")]), []
    for name, (prompts, _) in policies.items():
        n, harmful, harmless = len(prompts), next(refused), next(refused)
        low, high = newcombe(round(harmful * n), n, round(harmless * n), n)
        rates = {"harmful": harmful, "harmless": harmless, "youden": harmful - harmless}
        found.append(PolicyCandidate(policy=name, n=n, low=low, high=high, **rates))
    return tuple(found)


def choose_policy(candidates: Sequence[PolicyCandidate]) -> PolicyCandidate:
    """The policy with the highest J; of equal ones the first."""
    return max(candidates, key=lambda c: c.youden)


def uninformative(chosen: PolicyCandidate, least: float) -> str:
    """Why a study under this policy would say nothing, in one sentence; "" if it may say something.

    Args:
      chosen: the policy.
      least: the smallest J that is informative.
    """
    if chosen.youden >= least - 1e-9:
        return ""
    mend = "it hardly tells them apart; choose a policy that says more clearly what to refuse"
    if min(chosen.harmful, chosen.harmless) > 0.9:
        mend = "nearly everything gets one label; choose a milder policy"
    elif max(chosen.harmful, chosen.harmless) < 0.1:
        mend = "nearly everything gets one label; choose a stricter policy, or another model"
    return (
        f"under policy {chosen.policy} the untouched model refuses {percent(chosen.harmful)} of "
        f"harmful and {percent(chosen.harmless)} of harmless prompts (J {signed(chosen.youden)}, "
        f"needed: {least:g}): {mend}"
    )


def additions(direction: Layers, layers: Sequence[int], scales: Sequence[float]) -> Grid:
    """A direction added at each layer with each strength."""
    return {
        (layer, 1, scale): [Add(direction=direction, layers=(layer,), scale=scale)]
        for layer, scale in itertools.product(layers, scales)
    }


def dose_candidates(rater: Rater, prompts: Prompts, grid: Grid) -> tuple[DoseCandidate, ...]:
    """Rates of each addition of the persona, and of the baseline."""
    every = {(0, 0, 0.0): [], **grid}
    found = rater.rates([(prompts, ops) for ops in every.values()], "persona layer and strength")
    return tuple(
        DoseCandidate(layer=layer, scale=scale, **structs.asdict(rates))
        for (layer, _, scale), rates in zip(every, found, strict=True)
    )


def restoring_candidates(
    rater: Rater,
    persona: Operation,
    prompts: Prompts,
    grid: Grid,
    title: str,
    *,
    plain: RestoringCandidate | None = None,
) -> tuple[RestoringCandidate, ...]:
    """Rates of operations with the persona and without it, those of no operation first.

    Args:
      rater: how to decode.
      persona: what suppresses refusal.
      prompts: harmful ones, as token ids.
      grid: the operations.
      title: of the progress bar.
      plain: the candidate of no operation, if an earlier stage rated it on these prompts.
    """
    every = grid if plain else {(0, 0, 0.0): [], **grid}
    cells: list[Cell] = []
    for made in every.values():
        cells += [(prompts, [persona, *made]), (prompts, made)]
    found = rater.rates(cells, title)
    rated = [
        RestoringCandidate(layer=layer, width=width, scale=scale, steered=steered, alone=alone)
        for (layer, width, scale), steered, alone in zip(
            every, found[::2], found[1::2], strict=True
        )
    ]
    return (plain, *rated) if plain else tuple(rated)


def choose_restoring(
    candidates: Sequence[RestoringCandidate],
    max_degenerate: float,
    max_change: float,
    *,
    allow_near_miss: bool,
) -> tuple[RestoringCandidate, tuple[str, ...]]:
    """The candidate with the most refusal under the persona, of those that do little by themselves.

    Of equal ones the narrowest, then the weakest, then the earliest.

    Args:
      candidates: the one without an operation included.
      max_degenerate: largest tolerated rise of the degenerate rate by the operation alone.
      max_change: largest tolerated change of the refusal rate by it, up or down.
      allow_near_miss: whether to take the one that does least by itself when none is eligible.

    Returns:
      The candidate, and why it is not eligible; nothing when it is.

    Raises:
      UserError: none is eligible; the message shows the nearest.
    """
    plain = next(c.alone for c in candidates if not c.width)

    def excess(c: RestoringCandidate) -> float:
        broken = c.alone.degenerate - plain.degenerate - max_degenerate
        moved = abs(c.alone.refusal - plain.refusal) - max_change
        return max(broken, 0.0) + max(moved, 0.0)

    def order(c: RestoringCandidate) -> tuple[float, ...]:
        return -c.steered.refusal, c.width, c.scale, c.layer

    cells = [c for c in candidates if c.width]
    if eligible := [c for c in cells if excess(c) < 1e-9]:
        return min(eligible, key=order), ()
    best = min(cells, key=lambda c: (excess(c), *order(c)))
    alone = (
        f"alone it moves refusal from {percent(plain.refusal)} to {percent(best.alone.refusal)}, "
        f"broken replies from {percent(plain.degenerate)} to {percent(best.alone.degenerate)}"
    )
    if allow_near_miss:
        return best, (alone,)
    raise UserError(
        f"no candidate leaves the unsteered model as it is; the nearest begins at "
        f"resid_post.{best.layer} and is {best.width} wide: {alone}. Raise max_change or "
        "max_degenerate, or set allow_near_miss = true to take and record it"
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
