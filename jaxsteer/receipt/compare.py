"""Two receipts side by side: which rates moved, by how much, and with what certainty.

A receipt holds counts and no rows, so rates are compared as independent ones (Newcombe). Where both
receipts used the same prompts, their outcomes are correlated and the interval is wider than needed.
Each line's interval is at 95 %; nothing is corrected for the number of lines.

A gate is a condition on a difference, for a CI job to fail on:

    METRIC drop|rise > THRESHOLD [in CONDITION]

METRIC is refusal, bypass, degenerate or leakage (on each set of harmful prompts), benign-refusal
(likewise), benign-accuracy (our questions) or benign-kl (benign replies). A drop is the first
receipt's value minus the second's, a rise the reverse; THRESHOLD is a share between 0 and 1, or a
percentage with %, and of benign-kl a number of nats per token. Without `in`, the gate watches every
condition of the first receipt that has the metric, and the second receipt must have it there too: a
gate that cannot be evaluated is an error, never a pass. It fires on the measured difference, not on
its interval.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, cast

from jaxsteer import stats
from jaxsteer.errors import UserError
from jaxsteer.evidence.outcomes import Answers, Mean
from jaxsteer.receipt.statement import Condition, Leakage, Predicate, Rate, Statement

# Each metric's kind of prompts, and its field of the outcomes on them, or of the impact.
METRICS = {
    "refusal": ("harmful", "refusal"),
    "bypass": ("harmful", "bypass"),
    "degenerate": ("harmful", "degenerate"),
    "leakage": ("harmful", "leakage"),
    "benign-refusal": ("benign", "refusal"),
    "benign-accuracy": ("impact", "answers"),
    "benign-kl": ("impact", "divergence"),
}
_GATE = re.compile(
    r"\s*(?P<metric>[a-z-]+)\s+(?P<way>drop|rise)\s*>\s*(?P<threshold>[0-9]*\.?[0-9]+)(?P<percent>%?)"
    r"(?:\s+in\s+(?P<condition>\S.*?))?\s*"
)
Key = tuple[str, str, int | None, float | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One metric of one condition in both receipts.

    Attributes:
      condition: its name in the first receipt; `other` its name in the second.
      metric: what was measured, a key of `METRICS`.
      prompts: the prompt set; "" for the impact.
      first, second: values in the two receipts.
      n_first, n_second: rows behind them.
      difference: second minus first, with its 95 % interval.
    """

    condition: str
    other: str
    metric: str
    prompts: str
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
      only_first, only_second: conditions that only one receipt has.
      gone: (condition, metric) that the first has and the second lacks.
      changed: what else differs between the studies, in words.
    """

    lines: list[Line]
    only_first: list[str]
    only_second: list[str]
    gone: list[tuple[str, str]]
    changed: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate.

    Attributes:
      text: as it was given.
      metric: what is watched, a key of `METRICS`.
      way: `drop` or `rise`.
      threshold: share above which it fires.
      condition: the one condition watched, or "" for all.
    """

    text: str
    metric: str
    way: Literal["drop", "rise"]
    threshold: float
    condition: str

    def fires(self, difference: float) -> bool:
        """Whether a difference, second minus first, is beyond the threshold."""
        # In floating point, 0.35 - 0.3 is slightly above 0.05.
        return (-difference if self.way == "drop" else difference) > self.threshold + 1e-9


def compare(
    first: Statement, second: Statement, *, mode_first: str = "", mode_second: str = ""
) -> Comparison:
    """Compare two receipts condition by condition.

    Conditions match by base, seed, strength and mode. Where each side has one mode, or one is
    picked on each, the two modes are compared with each other and may differ.

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
    gone: list[tuple[str, str]] = []
    for key in shared:
        for metric in METRICS:
            there = _values(second.predicate, other[key], metric)
            for prompts, a in _values(first.predicate, found[key], metric).items():
                if (b := there.get(prompts)) is not None:
                    lines.append(_line(found[key].name, other[key].name, metric, prompts, a, b))
                else:
                    gone.append((found[key].name, metric))
    return Comparison(
        lines=lines,
        only_first=[c.name for key, c in found.items() if key not in other],
        only_second=[c.name for key, c in other.items() if key not in found],
        gone=gone,
        changed=_changed(first.predicate, second.predicate),
    )


def parse_gate(text: str) -> Gate:
    """Read a gate.

    >>> parse_gate("refusal drop > 5% in persona, out late").condition
    'persona, out late'

    Raises:
      UserError: not in the grammar, naming what is wrong.
    """
    match = _GATE.fullmatch(text)
    form = 'METRIC drop|rise > THRESHOLD [in CONDITION], as "refusal drop > 0.05"'
    if not match:
        raise UserError(f"cannot read the gate {text!r}; write {form}")
    if match["metric"] not in METRICS:
        raise UserError(f"gate {text!r}: no metric {match['metric']!r}; use {', '.join(METRICS)}")
    threshold = float(match["threshold"]) / (100 if match["percent"] else 1)
    if threshold > 1 and match["metric"] != "benign-kl":
        raise UserError(f"gate {text!r}: a threshold is a share, at most 1; write 5 % as 0.05")
    return Gate(
        text=text,
        metric=match["metric"],
        way=cast(Literal["drop", "rise"], match["way"]),
        threshold=threshold,
        condition=match["condition"] or "",
    )


def fired(comparison: Comparison, gates: Sequence[Gate]) -> list[tuple[Gate, Line]]:
    """The gates that fire, each with every line beyond its threshold.

    Raises:
      UserError: a gate watches something that the two receipts do not both have.
    """
    found = []
    for gate in gates:
        lines = [line for line in comparison.lines if line.metric == gate.metric]
        watched = dict.fromkeys(line.condition for line in lines)
        missing = [name for name, metric in comparison.gone if metric == gate.metric]
        missing += comparison.only_first
        if gate.condition:
            lines = [line for line in lines if line.condition == gate.condition]
            missing = [] if lines else [gate.condition]
        if missing or not lines:
            where = f"in {missing[0]!r} " if missing else ""
            known = f"; it is known in {', '.join(map(repr, watched))}" if watched else ""
            raise UserError(
                f"gate {gate.text!r} cannot be evaluated: {gate.metric} {where}is not known in "
                f"both receipts{known}"
            )
        found += [(gate, line) for line in lines if gate.fires(line.difference)]
    return found


def mean_difference(
    first: tuple[float, float, int], second: tuple[float, float, int]
) -> tuple[float, float]:
    """95 % interval of a difference of means, second minus first, each as (mean, sd, n).

    Unequal variances, normal quantiles.

    >>> low, high = mean_difference((0.2, 0.1, 50), (0.3, 0.2, 40))
    >>> round(low, 3), round(high, 3)
    (0.032, 0.168)
    """
    spread = math.sqrt(sum(sd * sd / n for _, sd, n in (first, second)))
    half, middle = NormalDist().inv_cdf(0.975) * spread, second[0] - first[0]
    return middle - half, middle + half


Value = Rate | Answers | Leakage | Mean


def _values(p: Predicate, condition: Condition, metric: str) -> dict[str, Value]:
    """By prompt set the values of a metric that are known; of the impact by ""."""
    kind, field = METRICS[metric]
    outcomes = {n: o for n, o in condition.outcomes.items() if p.prompts[n].kind == kind}
    there = {"": condition.impact} if kind == "impact" else outcomes
    found = {name: getattr(each, field, None) for name, each in there.items()}
    return {name: value for name, value in found.items() if value is not None}


def _line(name: str, other: str, metric: str, prompts: str, a: Value, b: Value) -> Line:
    if isinstance(a, Rate | Answers) and isinstance(b, Rate | Answers):
        one, two = a.k / a.n if a.n else 0.0, b.k / b.n if b.n else 0.0
        low, high = stats.newcombe(b.k, b.n, a.k, a.n)
    else:
        assert isinstance(a, Leakage | Mean) and isinstance(b, Leakage | Mean)
        one, two = a.mean, b.mean
        # One row has an sd of 0, which would look like certainty.
        low, high = -1.0, 1.0
        if min(a.n, b.n) > 1:
            low, high = mean_difference((a.mean, a.sd, a.n), (b.mean, b.sd, b.n))
    return Line(
        condition=name,
        other=other,
        metric=metric,
        prompts=prompts,
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
    """What differs between two studies, in words; judges' versions by the name of the judge."""
    one, two = _facts(first), _facts(second)
    return [name for name in one if name in two and one[name] != two[name]]


def _facts(p: Predicate) -> dict[str, object]:
    # A judge that decided no row is not named, so only judges that decided in both are compared.
    decided = (name.rpartition("-") for name in p.judges.decided if name)
    return {
        "the model's weights": p.model.weights_sha256,
        "the tokenizer": p.model.tokenizer_sha256,
        "the chat template": p.model.template_sha256,
        "the model's config": p.model.config_sha256,
        "the model's dtype": p.model.dtype,
        "the study's specification": p.study.spec_sha256,
        "the safety policy": p.policy.sha256,
        "the persona modes": [m.sha256 for m in p.modes],
        "the layers or the dose": (p.steering.layers, p.steering.dose),
        "the directions": {d.name: (d.sha256, d.source_sha256) for d in p.steering.directions},
        "the decoding": p.decoding,
        "the prompts": p.prompts,
        "the judges": {record.name: record.sha256 for record in p.judges.records},
        "the version of jaxsteer": p.tool,
        "the machine or its software": p.environment,
        **{f"the judge {name}": version for name, _, version in decided},
    }
