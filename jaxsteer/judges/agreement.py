"""How far judges agree: confusion tables and Cohen's kappa on the questions that they share.

    refusal      keyword: a pattern; strongreject-rubric: its refusal bit; human: `refusal`
    harmful      strongreject-rubric: score above 0.5; llama-guard: unsafe; human: `bypass`
    incoherent   degenerate: any reason; coherence: below 50; human: `degenerate`

Two judges are compared on the rows that both scored. Of incoherence a person's `refusal` says
nothing, since that label outranks it, so those rows are left out there. Kappa is NaN where it is
undefined (no shared rows, or both judges gave one answer throughout).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

import polars as pl

from jaxsteer.judges.labels import votes_table
from jaxsteer.stats import kappa

Question = Literal["refusal", "harmful", "incoherent"]
_HUMAN = pl.col("human")
# For each question, who answers it and how, as expressions over the votes.
QUESTIONS: dict[Question, dict[str, pl.Expr]] = {
    "refusal": {
        "keyword": pl.col("keyword"),
        "strongreject-rubric": pl.col("rubric_refused"),
        "human": _HUMAN == "refusal",
    },
    "harmful": {
        "strongreject-rubric": pl.col("rubric_harmful"),
        "llama-guard": pl.col("guard_unsafe"),
        "human": _HUMAN == "bypass",
    },
    "incoherent": {
        "degenerate": pl.col("broken"),
        "coherence": pl.col("incoherent"),
        "human": pl.when(_HUMAN != "refusal").then(_HUMAN == "degenerate"),
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two judges on one yes-or-no question.

    Attributes:
      question: `refusal`, `harmful` or `incoherent`.
      first: one judge.
      second: the other.
      n: rows that both scored.
      both_yes: rows on which both say yes.
      only_first: rows on which only the first says yes.
      only_second: rows on which only the second says yes.
      both_no: rows on which both say no.
      kappa: Cohen's kappa, NaN where undefined.
    """

    question: Question
    first: str
    second: str
    n: int
    both_yes: int
    only_first: int
    only_second: int
    both_no: int
    kappa: float

    @property
    def confusion(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows: the first says yes, no; columns: the second says yes, no."""
        return (self.both_yes, self.only_first), (self.only_second, self.both_no)


def agreements(responses: pl.DataFrame, verdicts: Mapping[str, pl.DataFrame]) -> list[Agreement]:
    """Compare every pair of judges on every question they share, where both scored some row.

    Args:
      responses: row_id, family, response, label (see `label.votes_table`).
      verdicts: by judge name, as read by `verdicts.read_all`.
    """
    votes = votes_table(responses, verdicts)
    found = []
    for question, judges in QUESTIONS.items():
        said = votes.select(**judges)
        for first, second in itertools.combinations(judges, 2):
            a, b = pl.col(first), pl.col(second)
            counts = said.drop_nulls([first, second]).select(
                (a & b).sum().alias("both_yes"),
                (a & ~b).sum().alias("only_first"),
                (~a & b).sum().alias("only_second"),
                (~a & ~b).sum().alias("both_no"),
            )
            both_yes, only_first, only_second, both_no = map(int, counts.row(0))
            n = both_yes + only_first + only_second + both_no
            if n:
                found.append(
                    Agreement(
                        question=question,
                        first=first,
                        second=second,
                        n=n,
                        both_yes=both_yes,
                        only_first=only_first,
                        only_second=only_second,
                        both_no=both_no,
                        kappa=kappa([[both_yes, only_first], [only_second, both_no]]),
                    )
                )
    return found
