"""Two conditions on the same prompts: which prompts change their label, and what that shows."""

from __future__ import annotations

import dataclasses

import polars as pl

from jaxsteer import stats
from jaxsteer.errors import UserError
from jaxsteer.words import p_equals


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flips:
    """Counts of one outcome over prompts that both conditions answered.

    Attributes:
      n: prompts.
      both: prompts with the outcome under both.
      raised: with it under the treated condition alone.
      lowered: with it under the control alone.
      difference: treated rate minus control rate.
      low, high: paired bootstrap 95 % interval of the difference.
      p: exact McNemar p, two-sided, not corrected for anything.
    """

    n: int
    both: int
    raised: int
    lowered: int
    difference: float
    low: float
    high: float
    p: float

    @property
    def neither(self) -> int:
        """Prompts without the outcome under either."""
        return self.n - self.both - self.raised - self.lowered


def pairs(rows: pl.DataFrame, treated: str, control: str, family: str) -> pl.DataFrame:
    """Labels side by side: columns prompt_id, category, control, treated; prompts both answered.

    Raises:
      UserError: a condition has two rows for one prompt.
    """
    asked = rows.filter(pl.col("family") == family)
    sides = []
    for name, side in ((control, "control"), (treated, "treated")):
        one = asked.filter(pl.col("condition") == name)
        if one["prompt_id"].is_duplicated().any():
            raise UserError(f"{name} has two rows for one prompt; run the study again")
        sides.append(one.select("prompt_id", "category", pl.col("label").alias(side)))
    return sides[0].join(
        sides[1].drop("category"), on="prompt_id", how="inner", maintain_order="left"
    )


def without_degenerate(paired: pl.DataFrame) -> pl.DataFrame:
    """The pairs in which neither reply is degenerate."""
    return paired.filter((pl.col("control") != "degenerate") & (pl.col("treated") != "degenerate"))


def flips(paired: pl.DataFrame, outcome: str) -> Flips:
    """Count an outcome over pairs.

    >>> table = pl.DataFrame({"control": ["refusal"] * 6, "treated": ["bypass"] * 6})
    >>> found = flips(table, "refusal")
    >>> found.lowered, found.difference, found.p
    (6, -1.0, 0.03125)
    """
    one, other = paired["treated"] == outcome, paired["control"] == outcome
    raised, lowered = int((one & ~other).sum()), int((other & ~one).sum())
    n = paired.height
    low, high = stats.paired_bootstrap(raised, lowered, n)
    return Flips(
        n=n,
        both=int((one & other).sum()),
        raised=raised,
        lowered=lowered,
        difference=(raised - lowered) / n if n else 0.0,
        low=low,
        high=high,
        p=stats.mcnemar(raised, lowered),
    )


def said(found: Flips, outcome: str) -> str:
    """What the flips show, in one sentence.

    >>> table = pl.DataFrame({"control": ["refusal"] * 6, "treated": ["bypass"] * 6})
    >>> said(flips(table, "refusal"), "refusal")
    '6 of 6 prompts lose their refusal, none gains one (exact McNemar p = 0.031)'
    """
    if not found.n:
        return "No prompt was answered under both conditions"
    if not found.raised and not found.lowered:
        return f"No prompt of {found.n} changes whether it is a {outcome}"
    lose = f"{found.lowered} of {found.n} prompts lose their {outcome}" if found.lowered else ""
    gain = f"{found.raised} gain one" if found.raised != 1 else "1 gains one"
    if not lose:
        lose, gain = f"None of {found.n} prompts loses its {outcome}", f"{found.raised} gain one"
    if not found.raised:
        gain = "none gains one"
    return f"{lose}, {gain} (exact McNemar {p_equals(found.p)})"
