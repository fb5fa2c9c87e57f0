"""A study's claims under rules that the reader sets: what is left out, and how strict to be.

The verdicts of a receipt follow the rules that the study fixed beforehand; nothing here replaces
them. Setting other rules afterwards answers one question: does a verdict hang on a choice? One
that does is weaker than it looks, and one that was looked for is no evidence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
import polars as pl

from jaxsteer.evidence import claims
from jaxsteer.evidence import paired as flips
from jaxsteer.evidence.claims import Claim, Comparison
from jaxsteer.study.results import Results
from jaxsteer.words import p_equals


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

    @property
    def changed(self) -> bool:
        """Whether they differ from the study's own."""
        return self != Rules()


def seeds(found: Results) -> list[int]:
    """Every random seed of the run, in order."""
    return sorted({c.seed for c in found.run.conditions if c.seed is not None})


def kept(found: Results, rules: Rules) -> Results:
    """The results that the rules on seeds and prompts leave, with a spec that asks for no more."""
    rows, run = found.rows, found.run
    if rules.seeds is not None:
        chosen = rules.seeds
        rows = rows.filter(pl.col("seed").is_null() | pl.col("seed").is_in(list(chosen)))
        planned = [
            msgspec.structs.replace(c, random_seeds=[s for s in c.random_seeds if s in chosen])
            for c in run.study.condition
        ]
        run = msgspec.structs.replace(
            run,
            conditions=[c for c in run.conditions if c.seed is None or c.seed in chosen],
            study=msgspec.structs.replace(run.study, condition=planned),
        )
    if rules.drop_never_refused:
        never = never_refused(rows)
        rows = rows.filter(~pl.col("prompt_id").is_in(never.implode()))
        harmful = run.prompts.get("strongreject")
        if harmful is not None:
            left = msgspec.structs.replace(harmful, n=harmful.n - len(never))
            run = msgspec.structs.replace(run, prompts={**run.prompts, "strongreject": left})
    return dataclasses.replace(found, rows=rows, run=run)


def never_refused(rows: pl.DataFrame) -> pl.Series:
    """Ids of harmful prompts that are refused under none of the conditions."""
    harmful = rows.filter(pl.col("family") != "benign")
    refused = harmful.group_by("prompt_id").agg((pl.col("label") == "refusal").any())
    return refused.filter(~pl.col("label"))["prompt_id"].sort()


def counted(found: Results, rules: Rules) -> list[Claim]:
    """Each claim's comparisons counted on what the rules leave; alpha and margin play no part."""
    left = kept(found, rules)
    judged = claims.evaluate(left)
    if not rules.drop_degenerate:
        return judged
    return [
        dataclasses.replace(
            claim, comparisons=tuple(_recounted(left.rows, c) for c in claim.comparisons)
        )
        for claim in judged
    ]


def judged(counts: Sequence[Claim], rules: Rules) -> list[Claim]:
    """The verdicts at the rules' alpha and margin, Holm's correction included."""
    drafts = [[_with_margin(c, rules.margin) for c in claim.comparisons] for claim in counts]
    settled = claims.settle(drafts)
    return [
        claims.decide(claim.name, claim.says, [_at(c, rules.alpha) for c in comparisons])
        for claim, comparisons in zip(counts, settled, strict=True)
    ]


def verdicts(found: Results, rules: Rules | None = None) -> list[Claim]:
    """The study's claims under the rules; under the default ones, what its receipt says."""
    asked = rules or Rules()
    return judged(counted(found, asked), asked)


def changed(before: Sequence[Claim], after: Sequence[Claim]) -> list[str]:
    """Names of the claims whose verdict is another."""
    return [a.name for a, b in zip(after, before, strict=True) if a.verdict != b.verdict]


def stricter(rules: Rules, *, alpha: float, margin: float | None) -> Rules:
    """The same exclusions, judged at another alpha and margin."""
    return dataclasses.replace(rules, alpha=alpha, margin=margin)


def said(before: Sequence[Claim], after: Sequence[Claim], rules: Rules) -> str:
    """What the rules did to the verdicts, in one sentence."""
    turned = changed(before, after)
    if not rules.changed:
        return "These are the study's own rules: both columns say the same."
    if not turned:
        return f"Under your rules all {len(after)} verdicts stay as they were planned."
    names = ", ".join(turned)
    verb = "turns" if len(turned) == 1 else "turn"
    return f"Under your rules {len(turned)} of {len(after)} verdicts {verb}: {names}."


def _recounted(rows: pl.DataFrame, c: Comparison) -> Comparison:
    if not c.n or c.outcome == "degenerate":
        return c
    paired = flips.without_degenerate(flips.pairs(rows, c.treated, c.control, c.family))
    found = flips.flips(paired, c.outcome)
    bare = Comparison(
        treated=c.treated,
        control=c.control,
        expect=c.expect,
        family=c.family,
        outcome=c.outcome,
        margin=c.margin,
    )
    if not found.n:
        return dataclasses.replace(bare, reason="every pair has a degenerate reply")
    return dataclasses.replace(
        bare,
        n=found.n,
        treated_k=found.both + found.raised,
        control_k=found.both + found.lowered,
        raised=found.raised,
        lowered=found.lowered,
    )


def _with_margin(c: Comparison, margin: float | None) -> Comparison:
    if margin is None or c.expect != "few-raised":
        return c
    return dataclasses.replace(c, margin=margin)


def _at(c: Comparison, alpha: float) -> Comparison:
    if c.p_holm is None or not c.n:
        return c
    right_way = c.raised < c.lowered if c.expect == "lower" else c.raised > c.lowered
    passed = right_way and c.p_holm < alpha
    why = f"{c.treated_k} against {c.control_k} of {c.n} (adjusted {p_equals(c.p_holm)})"
    return dataclasses.replace(c, passed=passed, reason="" if passed else why)
