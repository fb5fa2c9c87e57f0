"""What steering costs on benign prompts, by condition: divergence, right answers, reply length.

`study.impact` measures the first two while the study runs. Each figure compares a condition with
the untouched model of the same mode, on the same prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import polars as pl

from jaxsteer import stats
from jaxsteer.errors import UserError
from jaxsteer.evidence.paired import Share
from jaxsteer.files import read_table
from jaxsteer.study.impact import FILE, SCHEMA, untouched
from jaxsteer.study.results import Count, Part, Results
from jaxsteer.words import points, signed

COLUMNS = (
    "condition", "divergence, nats a token", "right answers", "change, points",
    "reply length, tokens",
)  # fmt: skip
CAPTION = (
    "against the untouched model on the same benign prompts and questions, with 95 % intervals; "
    "divergence: KL of next-token distributions on its own replies"
)


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
    """A condition's line of the table under `COLUMNS`, each figure with its 95 % interval."""
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
