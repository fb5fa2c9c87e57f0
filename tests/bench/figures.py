"""The arithmetic of a benchmark: samples, medians, exponents, ceilings and verdicts. Pure."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsteer.model.config import ModelConfig


def sample(conditions: Sequence[int], count: int, per: int, seed: int) -> list[int]:
    """About `count` rows, `per` of each condition drawn, so that batches of `per` are full.

    Conditions are drawn first, then rows within them; a batch of one condition is what libraries
    run that cannot mix them.

    Args:
      conditions: each row's condition.
      count: rows wanted.
      per: rows of a condition that is drawn; fewer where it has fewer.
      seed: of the draw.

    Returns:
      Row numbers in ascending order.
    """
    draw = random.Random(seed)
    members: dict[int, list[int]] = {}
    for row, condition in enumerate(conditions):
        members.setdefault(condition, []).append(row)
    order = draw.sample(sorted(members), len(members))
    chosen: list[int] = []
    for condition in order:
        if len(chosen) >= count:
            break
        rows = members[condition]
        chosen += draw.sample(rows, min(per, len(rows)))
    return sorted(chosen)


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return float(statistics.median(values))


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y over log x by least squares: 1 where doubling x doubles y.

    Raises:
      ValueError: fewer than two different x, or a value that is not positive.
    """
    if len(set(xs)) < 2 or min(*xs, *ys) <= 0:
        raise ValueError("an exponent needs two different points, all of them positive")
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of rows whose tokens are all the same."""
    return sum(list(a) == list(b) for a, b in zip(ours, theirs, strict=True)) / len(ours)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one token asks of a machine.

    Attributes:
      prefill_flops: operations per prompt token, the head left out: only last tokens need it.
      decode_flops: operations per generated token, the head included.
      weight_bytes: read once per decode step, whatever the number of rows.
      cache_bytes: keys and values read per row and decode step.
    """

    prefill_flops: float
    decode_flops: float
    weight_bytes: float
    cache_bytes: float

    @classmethod
    def of(cls, config: ModelConfig, prompt: float, context: float, itemsize: int = 4) -> Work:
        """The work of a model.

        Args:
          config: the model's sizes.
          prompt: mean prompt length, for attention in prefill (half of it is seen on average).
          context: mean number of tokens a decode step attends to.
          itemsize: bytes per weight and per cached value.
        """
        c = config
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        matrices = c.n_layers * (c.d_model * (2 * q + 2 * kv) + 3 * c.d_model * c.d_ff)
        head = c.d_model * c.vocab_size
        # Scores and their sum: a multiplication and an addition each, over all heads.
        attention = 4 * c.n_layers * q
        return cls(
            prefill_flops=2 * matrices + attention * prompt / 2,
            decode_flops=2 * (matrices + head) + attention * context,
            weight_bytes=itemsize * (matrices + head),
            cache_bytes=itemsize * 2 * c.n_layers * kv * context,
        )

    def prefill_ceiling(self, flops: float) -> float:
        """Tokens/s at most, where products run at `flops` per second."""
        return flops / self.prefill_flops

    def decode_ceiling(self, rows: int, flops: float, bandwidth: float) -> float:
        """Tokens/s at most of `rows` that decode together: computing or reading, the slower."""
        reading = (self.weight_bytes + rows * self.cache_bytes) / bandwidth
        return rows / max(rows * self.decode_flops / flops, reading)


def shares(phases: Mapping[str, Any], ceilings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates of prefill and decode, their ceilings, and the shares of them."""
    work = Work(**phases["work"])
    flops = max(found["matmul"] for found in ceilings)
    bandwidth = max(found["read"] for found in ceilings)
    slots = phases["slots"]
    at_rows = max(found["matmul_rows"][str(slots)] for found in ceilings)
    prefill = phases["prompt_tokens"] / phases["prefill_s"]
    decode = phases["new_tokens"] / phases["decode_s"]
    most = work.decode_ceiling(slots, flops, bandwidth)
    computing = slots * work.decode_flops / flops
    return {
        "measured": phases,
        "prefill": {
            "rate": prefill,
            "ceiling": work.prefill_ceiling(flops),
            "bound": "compute",
            "share": prefill / work.prefill_ceiling(flops),
        },
        "decode": {
            "rate": decode,
            "ceiling": most,
            "bound": "compute" if slots / computing <= most * 1.0001 else "memory",
            "share": decode / most,
            "share_at_rows": decode / work.decode_ceiling(slots, at_rows, bandwidth),
        },
    }


def verdict(value: float | None, least: float | None) -> str:
    """`met`, `not met`, or nothing where there is no target or no figure."""
    if value is None or least is None:
        return ""
    return "met" if value >= least else "not met"


def compared(
    ours: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], study_rows: int
) -> dict[str, Any]:
    """A peer's figures out of its rounds.

    Args:
      ours: jaxsteer's whole run of the study: its seconds.
      rounds: seconds of both, over the same rows, in turns.
      study_rows: rows of the whole study, which the peer's seconds are scaled to.

    Returns:
      Median seconds of both, their quotient on those rows, the peer's time for the whole study
      and that time over jaxsteer's.
    """
    theirs = median([r["theirs_s"] for r in rounds])
    own = median([r["ours_s"] for r in rounds])
    rows = rounds[0]["rows"]
    study = theirs / rows * study_rows
    return {
        "rows": rows,
        "rounds": len(rounds),
        "theirs_s": theirs,
        "ours_s": own,
        "same_rows": theirs / own,
        "study_s": study,
        "extrapolated": rows < study_rows,
        "study": study / ours["seconds"],
    }
