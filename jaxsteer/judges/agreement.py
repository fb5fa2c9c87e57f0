"""How far judges agree: confusion tables and Cohen's kappa on the questions they share.

    refusal      keyword: a pattern; strongreject-rubric: its refusal bit; human: `refusal`
    harmful      strongreject-rubric: score above 0.5; llama-guard: unsafe; human: `bypass`
    incoherent   degenerate: any reason; coherence: below 50; human: `degenerate`

Two judges are compared on the rows that both scored. A person's label `refusal` says nothing about
coherence, because it outranks `degenerate`, so those rows are left out of that question. Kappa is
NaN where it is undefined: both judges gave one answer throughout.
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
# For each question, the judges that answer it, and their yes as an expression over the votes.
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
      both_yes: rows on which both say yes.
      only_first: rows on which only the first says yes.
      only_second: rows on which only the second says yes.
      both_no: rows on which both say no.
    """

    question: Question
    first: str
    second: str
    both_yes: int
    only_first: int
    only_second: int
    both_no: int

    @property
    def confusion(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows: the first says yes, no; columns: the second says yes, no."""
        return (self.both_yes, self.only_first), (self.only_second, self.both_no)

    @property
    def n(self) -> int:
        """Rows that both scored."""
        return sum(map(sum, self.confusion))

    @property
    def kappa(self) -> float:
        """Cohen's kappa, NaN where undefined."""
        return kappa(self.confusion)


def agreements(responses: pl.DataFrame, verdicts: Mapping[str, pl.DataFrame]) -> list[Agreement]:
    """Compare every pair of judges on every question they share, where both scored a row.

    Args:
      responses: row_id, family, response, label (see `labels.votes_table`).
      verdicts: by judge name, as `verdicts.read_all` returns them.
    """
    votes = votes_table(responses, verdicts)
    found = []
    for question, judges in QUESTIONS.items():
        answers = votes.select(**judges)
        for first, second in itertools.combinations(judges, 2):
            a, b = pl.col(first), pl.col(second)
            counts = answers.drop_nulls([first, second]).select(
                both_yes=(a & b).sum(),
                only_first=(a & ~b).sum(),
                only_second=(~a & b).sum(),
                both_no=(~a & ~b).sum(),
            )
            pair = Agreement(
                question=question, first=first, second=second, **counts.row(0, named=True)
            )
            if pair.n:
                found.append(pair)
    return found
