"""What became of a study's replies under each condition: their labels, and what steering cost.

`shares` gives each label's share with its interval. `flips` compares two conditions on the same
prompts: which prompts change their label, and what that shows.

`impacts` says what steering costs on benign prompts, by condition: divergence, right answers, reply
length. `study.impact` measures the first two while the study runs. Each figure compares a condition
with the untouched model of the same mode, on the same prompts.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import polars as pl
from msgspec import Meta

from jaxsteer import stats
from jaxsteer.data.prompts import Kind
from jaxsteer.errors import UserError
from jaxsteer.files import frame, read_table
from jaxsteer.judges.verdicts import votes_table
from jaxsteer.study.impact import FILE, SCHEMA, untouched
from jaxsteer.study.results import Count, Part, Results
from jaxsteer.words import counted, p_equals, points, signed

By = Literal["condition", "category"]
Share = Annotated[float, Meta(ge=0, le=1)]
Difference = Annotated[float, Meta(ge=-1, le=1)]
# Each label in words, in the order in which bars are stacked.
WORDS = {
    "refusal": "refused",
    "benign-answer": "answered without harm",
    "complied-unscored": "answered, harm not judged",
    "unfinished": "thinking not finished",
    "bypass": "harmful answer (bypass)",
    "degenerate": "broken text (degenerate)",
}
IMPACT_COLUMNS = (
    "condition", "divergence, nats a token", "right answers", "change, points",
    "reply length, tokens",
)  # fmt: skip
IMPACT_CAPTION = (
    "against the untouched model on the same benign prompts and questions, with 95 % intervals; "
    "divergence: KL of next-token distributions on its own replies"
)


# -- Labels ----------------------------------------------------------------------------------------


class Flips(Part, frozen=True, kw_only=True):
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

    n: Count
    both: Count
    raised: Count
    lowered: Count
    difference: Difference
    low: Difference
    high: Difference
    p: Share

    @property
    def neither(self) -> int:
        """Prompts without the outcome under either."""
        return self.n - self.both - self.raised - self.lowered


class Labels:
    """The labels of a study's rows by condition and prompt family.

    They are grouped once, because claims and controls compare the same conditions many times.
    """

    def __init__(self, rows: pl.DataFrame, verdicts: Mapping[str, pl.DataFrame]) -> None:
        votes = votes_table(rows, verdicts)
        scored = pl.col("harmful").is_not_null() | pl.col("harmless").is_not_null()
        known = votes.select(scored).to_series()
        known |= rows["label"].is_in(["refusal", "bypass", "unfinished"])
        columns = ("row_id", "condition", "family", "prompt_id", "category", "label")
        kept = rows.select(columns).with_columns(harm_known=known)
        self._none = kept.clear()
        self._families: dict[str, list[str]] = {}
        self._groups: dict[tuple[str, str], pl.DataFrame] = {}
        for key, group in kept.partition_by(
            "condition", "family", as_dict=True, maintain_order=True
        ).items():
            condition, family = map(str, key)
            self._families.setdefault(condition, []).append(family)
            self._groups[condition, family] = group

    def families(self, condition: str) -> list[str]:
        """Prompt families that a condition was run on."""
        return self._families.get(condition, [])

    def of(self, condition: str, family: str) -> pl.DataFrame:
        """One condition's rows of a family; no rows where it was not run.

        Columns row_id, condition, family, prompt_id, category, label and harm_known: whether it is
        known that the reply is a bypass or is none. A refusal, or thinking without an end, is none
        by the rule of labels; of another reply it is known only when a judge of harm scored it.
        """
        return self._groups.get((condition, family), self._none)

    def counts(self, condition: str, family: str) -> tuple[Counter[str], int]:
        """(rows by label, rows of which it is not known whether they are a bypass)."""
        rows = self.of(condition, family)
        return Counter(rows["label"].to_list()), int((~rows["harm_known"]).sum())

    def known(self, condition: str, family: str, outcome: str) -> bool:
        """Whether there are rows and it is known of each whether it has the outcome."""
        rows = self.of(condition, family)
        return bool(rows.height) and (outcome != "bypass" or bool(rows["harm_known"].all()))

    def rate(self, condition: str, family: str, outcome: str, like: str = "") -> float | None:
        """Share of rows with the outcome, or None where it is not known of every row.

        With `like`, only of the prompts that the condition of that name has too.
        """
        if not self.known(condition, family, outcome):
            return None
        rows = self.of(condition, family)
        if like:
            rows = rows.join(self.of(like, family), on="prompt_id", how="semi")
            if not rows.height:
                return None
        return int((rows["label"] == outcome).sum()) / rows.height

    def pair(self, treated: str, control: str, family: str) -> pl.DataFrame:
        """Labels side by side over the prompts that both conditions answered.

        Columns prompt_id, category, control, treated.
        """
        one = self.of(control, family).select("prompt_id", "category", control="label")
        other = self.of(treated, family).select("prompt_id", treated="label")
        return one.join(other, on="prompt_id", how="inner", maintain_order="left")

    def flips(self, treated: str, control: str, family: str, outcome: str) -> Flips | None:
        """Paired counts; None unless both ran on the same prompts and every outcome is known."""
        if not all(self.known(name, family, outcome) for name in (treated, control)):
            return None
        paired = self.pair(treated, control, family)
        heights = {self.of(name, family).height for name in (treated, control)}
        return flips(paired, outcome) if heights == {paired.height} else None


def at_risk(
    pairs: pl.DataFrame, outcome: str, kind: Kind, untouched: pl.DataFrame | None = None
) -> pl.DataFrame:
    """The pairs whose prompt could newly have the outcome under the treated condition.

    Of a benign prompt it is a loss to refuse it or to break, so those are at risk that the control
    answered. Of other prompts, those without the outcome under the control; and where `untouched`
    is given, only those that had it there, so that the control has taken it away:

        untouched  control     refusal may return
        refusal    bypass      at risk
        refusal    refusal     not: it never went away
        bypass     bypass      not: there was none to return

    Args:
      pairs: from `Labels.pair`.
      outcome: the label that is counted.
      kind: of the prompts.
      untouched: from `Labels.of`, for the model without interventions.
    """
    there = pl.col("control") == outcome
    if kind == "benign" and outcome != "bypass":
        there = pl.col("control").is_in(["refusal", "degenerate", "unfinished"])
    risk = pairs.filter(~there)
    if untouched is not None:
        had = untouched.filter(pl.col("label") == outcome)
        risk = risk.filter(pl.col("prompt_id").is_in(had["prompt_id"].implode()))
    return risk


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


def summary(found: Flips, outcome: str) -> str:
    """What the flips show, in one sentence.

    >>> table = pl.DataFrame({"control": ["refusal"] * 6, "treated": ["bypass"] * 6})
    >>> summary(flips(table, "refusal"), "refusal")
    'Of 6 prompts, 6 lose the outcome “refusal” and none gain it (exact McNemar p = 0.031)'
    """
    if not found.n:
        return "No prompt was answered under both conditions"
    lose, gain = found.lowered or "none", found.raised or "none"
    return (
        f"Of {counted(found.n, 'prompt')}, {lose} lose{'s' * (lose == 1)} the outcome “{outcome}” "
        f"and {gain} gain{'s' * (gain == 1)} it (exact McNemar {p_equals(found.p)})"
    )


def flip_table(paired: pl.DataFrame, outcome: str, most: int) -> pl.DataFrame:
    """Pairs with a column `flip`, sorted by it: lost, gained, kept or without the outcome.

    With more than `most` pairs, only those that flip, and of them the first `most`.
    """
    names = {(1, 0): "lost", (0, 1): "gained", (1, 1): "kept", (0, 0): "without"}
    sides = (paired["control"] == outcome, paired["treated"] == outcome)
    flip = pl.Series([names[side] for side in zip(*sides, strict=True)], dtype=pl.String)
    shown = paired.with_columns(flip=flip.cast(pl.Enum(list(names.values()))))
    if shown.height > most:
        shown = shown.filter(pl.col("flip").is_in(["lost", "gained"]))
    shown = shown.sort("flip", "control", "treated", "prompt_id")
    return shown.with_columns(pl.col("flip").cast(pl.String)).head(most)


def shares(rows: pl.DataFrame, by: By) -> pl.DataFrame:
    """Shares of every label per group, stacked from 0 to 1; most refusals first.

    Args:
      rows: of one prompt family; for `category`, of one condition.
      by: the column that makes the groups.

    Returns:
      One line per group and label that occurs in the table, with columns group, label, k, n,
      share, low, high (Wilson 95 %), start and end (of the stacked segment), and from and to: the
      interval's place on the bar. Refusals are stacked first, so theirs is drawn from the bar's
      start; that of the others is drawn backwards from the end of their segment.
    """
    there = [label for label in WORDS if label in set(rows["label"])]
    groups = rows.partition_by(by, maintain_order=True)
    groups.sort(key=lambda group: Counter(group["label"])["refusal"] / group.height, reverse=True)
    lines = []
    for group in groups:
        name, counts, n, end = group[by][0], Counter(group["label"]), group.height, 0
        for label in there:
            k = counts[label]
            start, end = end, end + k
            low, high = stats.wilson(k, n)
            place = (low, high) if label == "refusal" else (end / n - high, end / n - low)
            place = max(place[0], 0.0), min(place[1], 1.0)
            lines.append((name, label, k, n, k / n, low, high, start / n, end / n, *place))
    return frame(lines, "group:str label:str k:int n:int share low high start end from to")


# -- Benign impact ---------------------------------------------------------------------------------


class Mean(Part, frozen=True):
    """A mean over prompts, with its t interval at 95 %; null for a single prompt."""

    n: Count
    mean: float
    sd: float
    low: float | None
    high: float | None


class Answers(Part, frozen=True):
    """Right answers to questions that can be checked, k of n, with the Wilson 95 % interval.

    Attributes:
      only_untouched, only_condition: questions that one of the two alone answered right; 0 for the
        untouched model itself.
      change: of the share, with its paired bootstrap interval `change_low` to `change_high`.
    """

    k: Count
    n: Count
    rate: Share
    low: Share
    high: Share
    only_untouched: Count
    only_condition: Count
    change: float
    change_low: float
    change_high: float


class Impact(Part, frozen=True):
    """What one condition does where nothing should change.

    Attributes:
      divergence: of next-token distributions, KL(untouched || condition), in nats per token of the
        untouched model's own benign replies; null where it was not measured.
      answers: null where no question was asked.
      length: change of the length of benign replies, in tokens; null for the untouched model.
    """

    divergence: Mean | None
    answers: Answers | None
    length: Mean | None


def impacts(found: Results) -> dict[str, Impact]:
    """The impact of each condition that runs the benign prompts, by name; empty if not measured.

    Raises:
      UserError: a damaged impact.parquet.
    """
    path = found.folder / FILE
    if not path.is_file():
        return {}
    table = read_table(path, "remove it and run again")
    if dict(table.schema) != SCHEMA or not table["value"].is_finite().all():
        raise UserError(f"{path} has other columns or values; remove it and run again")
    benign = found.rows.filter(kind="benign").with_columns(measure=pl.lit("length"))
    lengths = benign.select("condition", "prompt_id", "measure", value="n_tokens")
    both = pl.concat([table.select(lengths.columns), lengths], how="vertical_relaxed")
    values: dict[tuple[str, str], dict[str, float]] = {}
    for condition, prompt, measure, value in both.iter_rows():
        values.setdefault((condition, measure), {})[prompt] = value
    made, plain = {}, untouched(found.run)
    for condition in found.run.conditions:
        base = plain.get(condition.mode)
        if condition.benign and base is not None:
            divergence, right, length = (
                values.get((condition.name, measure), {}) for measure in ("kl", "answer", "length")
            )
            before = values.get((base.name, "length"), {})
            longer = [length[prompt] - before[prompt] for prompt in length if prompt in before]
            made[condition.name] = Impact(
                divergence=_mean(list(divergence.values())),
                answers=_answers(right, values.get((base.name, "answer"), {})),
                length=_mean(longer) if condition.name != base.name else None,
            )
    return made


def _mean(values: Sequence[float]) -> Mean | None:
    if not values:
        return None
    mean, sd, (low, high) = stats.mean_interval(values)
    return Mean(n=len(values), mean=mean, sd=sd, low=low, high=high)


def _answers(right: dict[str, float], untouched: dict[str, float]) -> Answers | None:
    both = [(untouched[q] > 0, right[q] > 0) for q in right if q in untouched]
    if not both:
        return None
    k, lost = sum(mine for _, mine in both), both.count((True, False))
    return answers(k, len(both), lost, both.count((False, True)))


def answers(k: int, n: int, only_untouched: int, only_condition: int) -> Answers:
    """What follows from the counts of right answers; arguments as in `Answers`."""
    low, high = stats.wilson(k, n)
    change_low, change_high = stats.paired_bootstrap(only_condition, only_untouched, n)
    return Answers(
        k=k,
        n=n,
        rate=k / n,
        low=low,
        high=high,
        only_untouched=only_untouched,
        only_condition=only_condition,
        change=(only_condition - only_untouched) / n,
        change_low=change_low,
        change_high=change_high,
    )


def cells(name: str, impact: Impact) -> list[str]:
    """A condition's line under `IMPACT_COLUMNS`, each figure with its 95 % interval."""
    answers, shown, change = impact.answers, "", ""
    if answers is not None:
        shown = f"{answers.k} of {answers.n}"
    if answers is not None and impact.length is not None:
        ends = points(answers.change_low), points(answers.change_high)
        change = f"{points(answers.change)} ({ends[0]} to {ends[1]})"
    divergence = _shown(impact.divergence, "{:.3f}".format)
    length = _shown(impact.length, functools.partial(signed, digits=1))
    return [name, divergence, shown, change, length]


def _shown(mean: Mean | None, words: Callable[[float], str]) -> str:
    if mean is None:
        return ""
    if mean.low is None or mean.high is None:
        return words(mean.mean)
    half = words((mean.high - mean.low) / 2).removeprefix("+")
    return f"{words(mean.mean)} ± {half}"
