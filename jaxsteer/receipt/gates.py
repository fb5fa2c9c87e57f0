"""Gates: conditions on the difference of two receipts that fail a CI job.

    METRIC drop|rise > THRESHOLD [in CONDITION]

METRIC is refusal, bypass, degenerate or leakage (harmful prompts), or benign-refusal. A drop is
the first receipt's value minus the second's, a rise the reverse; THRESHOLD is a share between 0
and 1, a percentage when it ends in %. Without `in`, the gate watches every condition of the first
receipt that has the metric, and the second receipt must have it there too: a gate that cannot be
evaluated is an error, never a pass. It fires on the measured difference, not on its interval.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal, cast

from jaxsteer.errors import UserError

Metric = Literal["refusal", "bypass", "degenerate", "leakage", "benign-refusal"]
METRICS: tuple[Metric, ...] = ("refusal", "bypass", "degenerate", "leakage", "benign-refusal")
_GATE = re.compile(
    r"\s*(?P<metric>[a-z-]+)\s+(?P<way>[a-z]+)\s*>\s*(?P<threshold>[0-9.]+)(?P<percent>%?)"
    r"(?:\s+in\s+(?P<condition>\S.*?))?\s*"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate.

    Attributes:
      text: as it was given.
      metric: what is watched.
      way: `drop` or `rise`.
      threshold: share above which it fires.
      condition: the one condition watched, or "" for all.
    """

    text: str
    metric: Metric
    way: Literal["drop", "rise"]
    threshold: float
    condition: str

    def fires(self, difference: float) -> bool:
        """Whether a difference, second minus first, is beyond the threshold."""
        # A rate of 0.35 less one of 0.3 is a hair above 0.05 in floating point.
        return (-difference if self.way == "drop" else difference) > self.threshold + 1e-9


def parse(text: str) -> Gate:
    """Read a gate.

    >>> parse("refusal drop > 5% in persona, out late").condition
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
    if match["way"] not in ("drop", "rise"):
        raise UserError(f"gate {text!r}: {match['way']!r} is neither drop nor rise; write {form}")
    try:
        threshold = float(match["threshold"]) / (100 if match["percent"] else 1)
    except ValueError:
        raise UserError(f"gate {text!r}: {match['threshold']!r} is no number") from None
    if threshold > 1:
        raise UserError(f"gate {text!r}: a threshold is a share, at most 1; write 5 % as 0.05")
    return Gate(
        text=text,
        metric=cast(Metric, match["metric"]),
        way=cast(Literal["drop", "rise"], match["way"]),
        threshold=threshold,
        condition=match["condition"] or "",
    )


def parse_all(texts: Sequence[str]) -> list[Gate]:
    """Read several, before anything else is done."""
    return [parse(text) for text in texts]
