"""What each planned comparison could show, from the size of a study alone.

`sweep --plan` says it before the run and the receipt after it: the smallest change that would be
confirmed, or that no outcome could decide the comparison. Holm is taken at its strictest, as if no
other test had a smaller p.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from jaxsteer import stats
from jaxsteer.evidence.comparisons import paired_repeats
from jaxsteer.study.record import Condition, Count, Part
from jaxsteer.study.spec import StudySpec, TestSpec
from jaxsteer.words import counted, percent

ALPHA = 0.05
Kind = Literal["different", "few-raised", "beyond-random"]


class Power(Part, frozen=True, kw_only=True):
    """What one planned comparison could show.

    Attributes:
      claim: name of its claim.
      treated, control: as planned, by their names in the specification.
      kind: as in `comparisons`.
      n: prompts compared; for `beyond-random`, seeds.
      limit: `different`: the fewest prompts that must change in the expected direction, if none
        changes in the other; `few-raised`: the most that may newly have the outcome, if all are at
        risk; `beyond-random`: the most seeds that may be as extreme. Null: no outcome confirms it.
      at_risk: `few-raised`: the fewest prompts at risk with which it can be confirmed.
    """

    claim: str
    treated: str
    control: str
    kind: Kind
    n: Count
    limit: Count | None
    at_risk: Count | None = None


def powers(
    spec: StudySpec, conditions: Sequence[Condition], sizes: Mapping[str, int]
) -> list[Power]:
    """The power of each comparison on behaviour that a study plans.

    Args:
      spec: the study.
      conditions: all that it runs.
      sizes: number of prompts by set.
    """
    planned = [
        (claim.name, test, *repeat)
        for claim in spec.claim
        for test in claim.tests
        for repeat in _repeats(test, conditions)
    ]
    tests = sum(kind == "different" for _, _, kind, *_ in planned)
    found = []
    for claim, test, kind, prompts, seeds in planned:
        n = sizes.get(test.prompts, 0)
        n = seeds or (min(n, prompts or n) if test.prompts in spec.sets("harmful") else n)
        made = {"claim": claim, "treated": test.treated, "control": test.control}
        limit = _limit(kind, n, tests, test.margin)
        enough = (k for k in range(1, n + 1) if stats.wilson(0, k)[1] <= test.margin)
        at_risk = next(enough, None) if kind == "few-raised" else None
        found.append(Power(**made, kind=kind, n=n, limit=limit, at_risk=at_risk))
    return list(dict.fromkeys(found))


def _repeats(
    test: TestSpec, conditions: Sequence[Condition]
) -> Iterator[tuple[Kind, int | None, int]]:
    """Kind, prompts if not all, and seeds of each comparison that a test stands for."""
    if test.expect == "cosine-above":
        return
    sides = [[c for c in conditions if c.base == name] for name in (test.treated, test.control)]
    beyond: dict[tuple[str, float | None], int] = {}
    for treated, control in paired_repeats(*sides):
        prompts = min((c.prompts for c in (treated, control) if c.prompts), default=None)
        if test.expect == "few-raised":
            yield "few-raised", prompts, 0
        elif treated.seed is not None or control.seed is None:
            yield "different", prompts, 0
        else:
            key = treated.name, control.scale
            beyond[key] = beyond.get(key, 0) + 1
    yield from (("beyond-random", None, seeds) for seeds in beyond.values())


def _limit(kind: Kind, n: int, tests: int, margin: float) -> int | None:
    """The limit of `Power`; `tests` share Holm's correction."""
    if kind == "different":
        fits = (k for k in range(n + 1) if stats.mcnemar(0, k) * tests < ALPHA)
    elif kind == "few-raised":
        fits = (k for k in range(n, -1, -1) if stats.wilson(k, n)[1] <= margin)
    else:
        fits = (k for k in range(n, -1, -1) if (1 + k) / (1 + n) <= ALPHA)
    return next(fits, None)


def words(found: Power) -> str:
    """A power in words.

    >>> made = {"claim": "c", "treated": "a", "control": "b"}
    >>> words(Power(**made, kind="different", n=96, limit=8))
    'at least 8 of 96 prompts (8 %) must change, and none the other way'
    >>> words(Power(**made, kind="beyond-random", n=3, limit=None))
    'no outcome can confirm it with 3 seeds'
    """
    if found.limit is None:
        unit = "seed" if found.kind == "beyond-random" else "prompt"
        return f"no outcome can confirm it with {counted(found.n, unit)}"
    if found.kind == "different":
        share = percent(found.limit / found.n)
        least = f"at least {found.limit} of {counted(found.n, 'prompt')} ({share})"
        return f"{least} must change, and none the other way"
    if found.kind == "few-raised":
        return (
            f"at least {found.at_risk} of {found.n} prompts must be at risk; if all are, at most "
            f"{found.limit} may newly have the outcome"
        )
    return f"at most {found.limit} of {counted(found.n, 'random seed')} may be as extreme"
