"""Two receipts side by side: which boundary moved, by how much, with which certainty.

A receipt holds counts and no rows, so the rates are compared as independent ones (Newcombe). Where
both receipts used the same prompts, outcomes on a prompt go together and the interval is wider than
it need be. Each line's interval is at 95 %; nothing is corrected for the number of lines.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

from jaxsteer import stats
from jaxsteer.errors import UserError
from jaxsteer.receipt.gates import METRICS, Gate, Metric
from jaxsteer.receipt.statement import Condition, Leakage, Predicate, Rate, Statement

FAMILIES: dict[Metric, str] = {
    "refusal": "strongreject",
    "bypass": "strongreject",
    "degenerate": "strongreject",
    "leakage": "strongreject",
    "benign-refusal": "benign",
}
Key = tuple[str, str, int | None, float | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One metric of one condition in both receipts.

    Attributes:
      condition: its name in the first receipt; `other` its name in the second.
      metric: what was measured.
      first, second: values in the two receipts.
      n_first, n_second: rows behind them.
      difference: second minus first, with its 95 % interval.
    """

    condition: str
    other: str
    metric: Metric
    first: float
    second: float
    n_first: int
    n_second: int
    difference: float
    low: float
    high: float

    @property
    def moved(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two receipts compared.

    Attributes:
      lines: every metric that both have, by condition.
      only_first, only_second: conditions that one receipt has alone.
      gone: (condition, metric) that the first has and the second lacks.
      changed: what else differs between the studies, in words.
    """

    lines: list[Line]
    only_first: list[str]
    only_second: list[str]
    gone: list[tuple[str, Metric]]
    changed: list[str]


def compare(
    first: Statement, second: Statement, *, mode_first: str = "", mode_second: str = ""
) -> Comparison:
    """Compare two receipts condition by condition.

    Conditions match by base, seed, strength and mode. Where each side has one mode, or one is
    picked on each, the modes are what is compared and need not be the same.

    Args:
      first, second: the receipts.
      mode_first, mode_second: look at one mode of a receipt only.

    Raises:
      UserError: a mode that a receipt does not have, or no condition in common.
    """
    one, two = _picked(first.predicate, mode_first), _picked(second.predicate, mode_second)
    across = len({c.mode for c in one}) == 1 == len({c.mode for c in two})
    found = {_key(c, across): c for c in one}
    other = {_key(c, across): c for c in two}
    shared = [key for key in found if key in other]
    if not shared:
        raise UserError("the two receipts have no condition in common; compare the same study")
    lines: list[Line] = []
    gone: list[tuple[str, Metric]] = []
    for key in shared:
        for metric in METRICS:
            a, b = value(found[key], metric), value(other[key], metric)
            if a is not None and b is not None:
                lines.append(_line(found[key].name, other[key].name, metric, a, b))
            elif a is not None:
                gone.append((found[key].name, metric))
    return Comparison(
        lines=lines,
        only_first=[c.name for key, c in found.items() if key not in other],
        only_second=[c.name for key, c in other.items() if key not in found],
        gone=gone,
        changed=_changed(first.predicate, second.predicate),
    )


def fired(comparison: Comparison, gates: Sequence[Gate]) -> list[tuple[Gate, Line]]:
    """The gates that fire, with every line that makes them.

    Raises:
      UserError: a gate watches something that the two receipts do not both have.
    """
    found = []
    for gate in gates:
        lines = [line for line in comparison.lines if line.metric == gate.metric]
        missing = [name for name, metric in comparison.gone if metric == gate.metric]
        missing += comparison.only_first
        if gate.condition:
            lines = [line for line in lines if line.condition == gate.condition]
            missing = [] if lines else [gate.condition]
        if missing or not lines:
            where = f"in {missing[0]!r} " if missing else ""
            watched = dict.fromkeys(
                x.condition for x in comparison.lines if x.metric == gate.metric
            )
            known = f"; it is known in {', '.join(map(repr, watched))}" if watched else ""
            raise UserError(
                f"gate {gate.text!r} cannot be evaluated: {gate.metric} {where}is not known in "
                f"both receipts{known}"
            )
        found += [(gate, line) for line in lines if gate.fires(line.difference)]
    return found


def value(condition: Condition, metric: Metric) -> Rate | Leakage | None:
    """A metric of a condition, or None where it was not measured."""
    outcomes = condition.outcomes.get(FAMILIES[metric])
    if outcomes is None:
        return None
    if metric == "leakage":
        return outcomes.leakage
    return {
        "refusal": outcomes.refusal,
        "benign-refusal": outcomes.refusal,
        "bypass": outcomes.bypass,
        "degenerate": outcomes.degenerate,
    }[metric]


def mean_difference(
    first: tuple[float, float, int], second: tuple[float, float, int], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of a difference of means, second minus first, each as (mean, sd, n).

    Unequal variances, normal quantiles.

    >>> low, high = mean_difference((0.2, 0.1, 50), (0.3, 0.2, 40))
    >>> round(low, 3), round(high, 3)
    (0.032, 0.168)
    """
    spread = math.sqrt(sum(sd * sd / n for _, sd, n in (first, second)))
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * spread
    middle = second[0] - first[0]
    return middle - half, middle + half


def _line(name: str, other: str, metric: Metric, a: Rate | Leakage, b: Rate | Leakage) -> Line:
    if isinstance(a, Rate) and isinstance(b, Rate):
        one, two = a.k / a.n if a.n else 0.0, b.k / b.n if b.n else 0.0
        low, high = stats.newcombe(b.k, b.n, a.k, a.n)
    else:
        assert isinstance(a, Leakage) and isinstance(b, Leakage)
        one, two = a.mean, b.mean
        low, high = -1.0, 1.0
        # One row has no spread to speak of: its sd of 0 would look like certainty.
        if min(a.n, b.n) > 1:
            low, high = mean_difference((a.mean, a.sd, a.n), (b.mean, b.sd, b.n))
    return Line(
        condition=name,
        other=other,
        metric=metric,
        first=one,
        second=two,
        n_first=a.n,
        n_second=b.n,
        difference=two - one,
        low=low,
        high=high,
    )


def _picked(receipt: Predicate, mode: str) -> list[Condition]:
    modes = dict.fromkeys(c.mode for c in receipt.conditions)
    if mode and mode not in modes:
        known = ", ".join(name or "(none)" for name in modes)
        raise UserError(f"receipt of {receipt.study.name} has no mode {mode!r}; it has {known}")
    return [c for c in receipt.conditions if not mode or c.mode == mode]


def _key(condition: Condition, across: bool) -> Key:
    mode = "" if across else condition.mode
    return condition.base, mode, condition.seed, condition.scale


def _changed(first: Predicate, second: Predicate) -> list[str]:
    pairs = {
        "the model's weights": (first.model.weights_sha256, second.model.weights_sha256),
        "the tokenizer": (first.model.tokenizer_sha256, second.model.tokenizer_sha256),
        "the chat template": (first.model.template_sha256, second.model.template_sha256),
        "the model's config": (first.model.config_sha256, second.model.config_sha256),
        "the model's dtype": (first.model.dtype, second.model.dtype),
        "the study's specification": (first.study.spec_sha256, second.study.spec_sha256),
        "the safety policy": (first.policy.sha256, second.policy.sha256),
        "the persona modes": ([m.sha256 for m in first.modes], [m.sha256 for m in second.modes]),
        "the layers or the dose": (
            (first.steering.layers, first.steering.dose),
            (second.steering.layers, second.steering.dose),
        ),
        "the directions": (_directions(first), _directions(second)),
        "the decoding": (first.decoding, second.decoding),
        "the prompts": (first.prompts, second.prompts),
        "the judges": (_judges(first), _judges(second)),
        "the version of jaxsteer": (first.tool, second.tool),
        "the machine or its software": (first.environment, second.environment),
    }
    changed = [name for name, (a, b) in pairs.items() if a != b]
    # A judge that decided no row is not named, so only versions of the same judge are compared.
    one, two = (dict(_versions(receipt)) for receipt in (first, second))
    changed += [f"the judge {name}" for name in one if name in two and one[name] != two[name]]
    return changed


def _versions(receipt: Predicate) -> list[tuple[str, str]]:
    split = [name.rpartition("-") for name in receipt.judges.decided if name]
    return [(stem, version) for stem, _, version in split]


def _directions(receipt: Predicate) -> dict[str, tuple[str, str]]:
    return {d.name: (d.sha256, d.source_sha256) for d in receipt.steering.directions}


def _judges(receipt: Predicate) -> dict[str, list[str]]:
    return {record.name: record.sha256 for record in receipt.judges.records}
