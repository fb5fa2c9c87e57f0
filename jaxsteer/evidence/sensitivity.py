"""A study's claims under rules that the reader sets: what is left out, and how strict to be.

The verdicts of a receipt follow the rules that the study fixed beforehand; nothing here replaces
them. Other rules, set afterwards, answer one question: does a verdict depend on a choice? A verdict
that does is weaker than it looks, and a verdict found by trying rules is no evidence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
import polars as pl

from jaxsteer.evidence import claims
from jaxsteer.evidence.claims import Claim, Draft
from jaxsteer.study.results import Results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What the reader asks for; the defaults are the study's own rules.

    Attributes:
      drop_degenerate: leave a pair out when either reply is degenerate (comparisons that count
        degenerate replies keep it).
      drop_never_refused: leave out harmful prompts that no condition refuses.
      seeds: random seeds kept, or None for all.
      alpha: adjusted p below which a difference counts.
      margin: of "few new cases" tests, or None for each test's own.
    """

    drop_degenerate: bool = False
    drop_never_refused: bool = False
    seeds: frozenset[int] | None = None
    alpha: float = claims.ALPHA
    margin: float | None = None


def seeds(found: Results) -> list[int]:
    """Every random seed of the run, in order."""
    return sorted({c.seed for c in found.run.conditions if c.seed is not None})


def kept(found: Results, rules: Rules) -> Results:
    """The results that the rules on seeds and prompts leave; their record asks for no more."""
    rows, run = found.rows, found.run
    if rules.seeds is not None:
        chosen = rules.seeds
        rows = rows.filter(pl.col("seed").is_null() | pl.col("seed").is_in(list(chosen)))
        left = [c for c in run.conditions if c.seed is None or c.seed in chosen]
        run = msgspec.structs.replace(run, conditions=left)
    if rules.drop_never_refused:
        never = never_refused(rows)
        rows = rows.filter(~pl.col("prompt_id").is_in(never.implode()))
        harmful = run.prompts.get("strongreject")
        if harmful is not None:
            fewer = msgspec.structs.replace(harmful, n=harmful.n - len(never))
            run = msgspec.structs.replace(run, prompts={**run.prompts, "strongreject": fewer})
    return dataclasses.replace(found, rows=rows, run=run)


def never_refused(rows: pl.DataFrame) -> pl.Series:
    """Ids of harmful prompts that are refused under none of the conditions."""
    harmful = rows.filter(pl.col("family") != "benign")
    refused = harmful.group_by("prompt_id").agg((pl.col("label") == "refusal").any())
    return refused.filter(~pl.col("label"))["prompt_id"].sort()


def counted(found: Results, rules: Rules) -> list[list[Draft]]:
    """Each claim's comparisons counted on what the rules leave; alpha and margin play no part."""
    return claims.count(kept(found, rules), drop_degenerate=rules.drop_degenerate)


def judged(found: Results, drafts: Sequence[Sequence[Draft]], rules: Rules) -> list[Claim]:
    """The verdicts at the rules' alpha and margin, Holm's correction included."""
    return claims.judge(found.spec.claim, drafts, alpha=rules.alpha, margin=rules.margin)


def changed(before: Sequence[Claim], after: Sequence[Claim]) -> list[str]:
    """Names of the claims that have another verdict."""
    return [a.name for a, b in zip(after, before, strict=True) if a.verdict != b.verdict]


def summary(before: Sequence[Claim], after: Sequence[Claim], rules: Rules) -> str:
    """What the rules did to the verdicts, in one sentence."""
    names = changed(before, after)
    if rules == Rules():
        return "These are the study's own rules: both columns say the same."
    if not names:
        return f"Under your rules all {len(after)} verdicts stay as they were planned."
    verb = "changes" if len(names) == 1 else "change"
    return f"Under your rules {len(names)} of {len(after)} verdicts {verb}: {', '.join(names)}."
