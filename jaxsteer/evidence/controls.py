"""The controls of a study, measured: random envelopes, paired differences, and strengths.

`pairing` says which condition is a control of which; the receipt shows what is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool
from msgspec import Meta

from jaxsteer import stats
from jaxsteer.evidence import pairing
from jaxsteer.evidence.paired import Labels
from jaxsteer.study.conditions import unsteered_twin
from jaxsteer.study.record import Condition, Count, Part, RunRecord

Outcome = Literal["refusal", "bypass", "degenerate"]
PairKind = Literal["neutral", "unsteered", "benign"]
Share = Annotated[float, Meta(ge=0, le=1)]
Difference = Annotated[float, Meta(ge=-1, le=1)]
OUTCOMES: tuple[Outcome, ...] = ("refusal", "bypass", "degenerate")


class RandomControl(Part, frozen=True):
    """A condition against the same condition with random directions, one per seed.

    Attributes:
      control: name in the specification of the random condition.
      treated: name of the condition compared, or "" when the study has none of the same shape.
      n: seeds; low, mean, high: the rate under them.
      value: the rate of the treated condition.
      p_low, p_high: empirical one-sided p, at least 1 / (n + 1).
    """

    control: str
    treated: str
    family: str
    outcome: Outcome
    n: Count
    low: Share
    mean: Share
    high: Share
    value: Share | None
    p_low: Share | None
    p_high: Share | None


class PairedControl(Part, frozen=True):
    """Two conditions on the same prompts, compared row by row.

    Attributes:
      kind: `neutral` the same steering with a direction that has nothing to do with refusal;
        `unsteered` a knockout and its twin without steering; `benign` a condition and the
        untouched model on benign prompts.
      raised, lowered: prompts with the outcome under `treated` alone, under `control` alone.
      difference: treated rate minus control rate, with the paired bootstrap 95 % interval.
    """

    kind: PairKind
    treated: str
    control: str
    family: str
    outcome: Outcome
    n: Count
    raised: Count
    lowered: Count
    difference: Difference
    low: Difference
    high: Difference


class DoseResponse(Part, frozen=True):
    """One condition over its strengths, on the same prompts.

    Attributes:
      conditions: names, in order of strength.
      strengths: in natural norms.
      z, p: trend test within prompts (Cochran-Mantel-Haenszel correlation).
    """

    base: str
    mode: str
    family: str
    outcome: Outcome
    conditions: list[str]
    strengths: list[float]
    z: float
    p: Share


def random_controls(run: RunRecord, labels: Labels) -> list[RandomControl]:
    """Each condition with random seeds as an envelope, against the condition it controls."""
    groups: dict[tuple[str, str, float | None], list[Condition]] = {}
    for c in run.conditions:
        if c.seed is not None and not c.unsteered_twin_of:
            groups.setdefault((c.base, c.mode, c.scale), []).append(c)
    found = []
    for (base, _, _), seeds in groups.items():
        treated = pairing.random_control_of(run, seeds[0])
        for family in labels.families(seeds[0].name):
            for outcome in OUTCOMES:
                rates = [labels.rate(c.name, family, outcome) for c in seeds]
                known = [rate for rate in rates if rate is not None]
                if len(known) == len(seeds):
                    value = labels.rate(treated.name, family, outcome) if treated else None
                    envelope = stats.envelope(known, 0.0 if value is None else value)
                    found.append(
                        RandomControl(
                            control=base,
                            treated=treated.name if treated else "",
                            family=family,
                            outcome=outcome,
                            n=envelope.n,
                            low=envelope.low,
                            mean=envelope.mean,
                            high=envelope.high,
                            value=value,
                            p_low=None if value is None else envelope.p_low,
                            p_high=None if value is None else envelope.p_high,
                        )
                    )
    return found


def paired_controls(run: RunRecord, labels: Labels) -> list[PairedControl]:
    """Neutral directions, unsteered twins, and benign prompts against the untouched model."""
    found = []
    for kind, treated, control in _pairs(run):
        for family in ["benign"] if kind == "benign" else labels.families(control.name):
            for outcome in OUTCOMES:
                flips = labels.flips(treated.name, control.name, family, outcome)
                if flips is not None:
                    found.append(
                        PairedControl(
                            kind=kind,
                            treated=treated.name,
                            control=control.name,
                            family=family,
                            outcome=outcome,
                            n=flips.n,
                            raised=flips.raised,
                            lowered=flips.lowered,
                            difference=flips.difference,
                            low=flips.low,
                            high=flips.high,
                        )
                    )
    return found


def _pairs(run: RunRecord) -> Iterator[tuple[PairKind, Condition, Condition]]:
    for c in run.conditions:
        treated = None if c.unsteered_twin_of else pairing.neutral_control_of(run, c)
        if treated is not None:
            yield "neutral", treated, c
    for c in run.conditions:
        twin = unsteered_twin(run.conditions, c)
        if twin is not None:
            yield "unsteered", c, twin
    for c in run.conditions:
        untouched = pairing.plain(run, c.mode)
        if untouched is not None and c.operations:
            yield "benign", c, untouched


def dose_responses(run: RunRecord, labels: Labels) -> list[DoseResponse]:
    """Each condition that is repeated over strengths, with a trend test within prompts."""
    groups: dict[tuple[str, str, int | None], list[tuple[float, str]]] = {}
    for c in run.conditions:
        if c.scale is not None:
            groups.setdefault((c.base, c.mode, c.seed), []).append((c.scale, c.name))
    found = []
    for (base, mode, _), repeats in groups.items():
        repeats.sort()
        strengths, names = [scale for scale, _ in repeats], [name for _, name in repeats]
        for family in labels.families(names[0]):
            for outcome in OUTCOMES:
                table = _outcomes(labels, names, family, outcome)
                if table is not None:
                    z, p = stats.paired_trend(table, strengths)
                    found.append(
                        DoseResponse(
                            base=base,
                            mode=mode,
                            family=family,
                            outcome=outcome,
                            conditions=names,
                            strengths=strengths,
                            z=z,
                            p=p,
                        )
                    )
    return found


def _outcomes(
    labels: Labels, names: list[str], family: str, outcome: str
) -> Bool[np.ndarray, "prompt strength"] | None:
    """Which prompts have the outcome under which condition, if that is known of all of them."""
    rows = [labels.of(name, family).sort("prompt_id") for name in names]
    same = all(r["prompt_id"].equals(rows[0]["prompt_id"]) for r in rows)
    if len(names) < 2 or not same or not all(labels.known(n, family, outcome) for n in names):
        return None
    return np.stack([(r["label"] == outcome).to_numpy() for r in rows], axis=1)
