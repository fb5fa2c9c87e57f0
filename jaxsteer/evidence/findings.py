"""Each claim of a study next to the controls that could break it.

A control asks whether something other than what the claim says would have had the same effect.
`controls` finds the controls of a condition:

random     the condition against its random controls, one per seed
unsteered  the projection of a knockout alone, against the untouched model
matched    a random vector subtracted, as long as the persona vector that was added
neutral    a persona whose negative side does not mention refusing, against the untouched model
benign     refusals and broken replies on harmless prompts, against the untouched model
swapped    the same two additions in the other order of depth

These comparisons are made to look for weak points. Their p-values are not corrected and confirm
nothing; what was planned is in the claims.

The second half judges the claims again under `Rules` that the reader sets: what is left out, and
how strict to be. That answers one question: does a verdict depend on a choice? A verdict that does
is weaker than it looks, and a verdict found by trying rules is no evidence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
import polars as pl

from jaxsteer import stats
from jaxsteer.evidence import claims, controls, outcomes
from jaxsteer.evidence.claims import ALPHA, Claim
from jaxsteer.evidence.comparisons import Counted, NotTested
from jaxsteer.evidence.controls import RandomControl, random_controls
from jaxsteer.evidence.outcomes import Flips, Labels
from jaxsteer.files import frame
from jaxsteer.study.conditions import unsteered_twin
from jaxsteer.study.results import Condition, Results, RunRecord
from jaxsteer.study.spec import ClaimSpec, TestSpec
from jaxsteer.words import counted, p_equals, percent, points

Kind = Literal["random", "unsteered", "matched", "neutral", "benign", "swapped"]
Status = Literal["holds", "fails", "undecided"]
Expect = Literal["higher", "lower", "no rise"]
MARGIN = 0.15  # share of the prompts at risk up to which new cases are few
KINDS: dict[Kind, str] = {
    "random": "random directions",
    "unsteered": "knockout without steering",
    "matched": "matched norm",
    "neutral": "neutral persona",
    "benign": "benign prompts",
    "swapped": "order swap",
}
QUESTIONS: dict[Kind, str] = {
    "random": "Would any direction of this length do the same?",
    "unsteered": "Does the projection raise refusal by itself, with no persona to remove?",
    "matched": "Does subtracting a random vector of the same length bring refusal back too?",
    "neutral": "Does a persona that does not mention refusing lower refusal as well?",
    "benign": "Does the model also fail on prompts that deserve an answer?",
    "swapped": "Does refusal return when it is added after the persona, and not before?",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One control of one claim, measured.

    Attributes:
      claim: the claim's name.
      kind: what sort of control.
      treated: condition of the claim.
      first, second: conditions compared; `second` is "" for random directions.
      family, outcome: prompts and label counted.
      expects: what the claim needs of first against second; of random directions, of the treated
        against them.
      n: prompts; of random directions, seeds.
      difference: rate of first minus rate of second; of random directions, treated minus their
        mean.
      low, high: its 95 % interval; of random directions, treated minus largest and smallest.
      p: McNemar, two-sided; of random directions, one-sided, at least 1 / (n + 1).
      status: whether the claim holds or fails against this control, or the rows cannot tell.
      why: the rule that decided, with its figures.
    """

    claim: str
    kind: Kind
    treated: str
    first: str
    second: str
    family: str
    outcome: str
    expects: Expect
    n: int
    difference: float
    low: float
    high: float
    p: float
    status: Status
    why: str


def evaluate(found: Results) -> list[Finding]:
    """Every control of every claim that the study ran, measured, in the order of the claims.

    Conditions without rows yet are left out.
    """
    labels = Labels(found.rows, found.verdicts)
    envelopes = list(random_controls(found.run, labels))
    made: list[Finding] = []
    for claim in found.spec.claim:
        made += _random(claim, envelopes, found.run)
        made += dict.fromkeys(_paired(claim, found.run, labels))
    return made


def alone(found: Results, made: Sequence[Finding]) -> list[str]:
    """Names of the claims on behaviour that have no control.

    A claim on random directions or on benign prompts is a control itself, and not listed.
    """
    random = {c.name for c in found.spec.condition if c.random_seeds}
    benign = found.spec.sets("benign")

    def about(test: TestSpec) -> bool:
        own_control = test.prompts in benign or test.treated in random
        return test.expect != "cosine-above" and not own_control

    return [
        claim.name
        for claim in found.spec.claim
        if any(map(about, claim.tests)) and not any(f.claim == claim.name for f in made)
    ]


def absent(made: Sequence[Finding]) -> list[str]:
    """Kinds of control that the study does not have at all, in words."""
    return [words for kind, words in KINDS.items() if not any(f.kind == kind for f in made)]


def headline(made: Sequence[Finding]) -> str:
    """What the controls show together, in one sentence.

    >>> headline([])
    'This study ran no control that could break a claim'
    """
    if not made:
        return "This study ran no control that could break a claim"
    n = Counter(f.status for f, _ in once(made))
    return (
        f"Of {counted(n.total(), 'control')}, the claims hold against {n['holds'] or 'none'} and "
        f"fail against {n['fails'] or 'none'}; undecided: {n['undecided'] or 'none'}"
    )


def once(made: Sequence[Finding]) -> list[tuple[Finding, list[str]]]:
    """Each control once, with the names of all claims that it serves."""
    served: dict[tuple[str, ...], tuple[Finding, list[str]]] = {}
    for f in made:
        key = (f.kind, f.first, f.second, f.family, f.outcome, f.expects)
        served.setdefault(key, (f, []))[1].append(f.claim)
    return list(served.values())


def _random(
    claim: ClaimSpec, envelopes: Sequence[RandomControl], run: RunRecord
) -> Iterator[Finding]:
    wanted: dict[tuple[str, str, str], str] = {
        (t.treated, t.prompts, t.outcome): t.expect
        for t in claim.tests
        if t.expect in ("lower", "higher")
    }
    for e in envelopes:
        expect = e.treated and wanted.get((run.named(e.treated).base, e.family, e.outcome))
        p = e.p(expect or None)
        if not expect or p is None or e.value is None:
            continue
        lower, seeds = expect == "lower", counted(e.n, "random seed")
        beyond = e.value < e.low if lower else e.value > e.high
        status: Status = "fails" if not beyond else "holds" if p <= ALPHA else "undecided"
        where = f"{'below' if lower else 'above'} all of {seeds}"
        yield Finding(
            claim=claim.name,
            kind="random",
            treated=e.treated,
            first=e.control,
            second="",
            family=e.family,
            outcome=e.outcome,
            expects="lower" if lower else "higher",
            n=e.n,
            difference=e.value - e.mean,
            low=e.value - e.high,
            high=e.value - e.low,
            p=p,
            status=status,
            why={
                "fails": f"not {where}",
                "holds": f"{where}, {p_equals(p)}",
                "undecided": f"{where}, which cannot show less than {p_equals(p)}",
            }[status],
        )


# Which claims a control is for, by what the claim expects of its condition.
_FOR: dict[Kind, tuple[str, ...]] = {
    "unsteered": ("higher",),
    "matched": ("higher",),
    "neutral": ("lower",),
    "swapped": ("few-raised",),
    "benign": ("lower", "higher", "few-raised"),
}


def _paired(claim: ClaimSpec, run: RunRecord, labels: Labels) -> Iterator[Finding]:
    benign = run.study.sets("benign")
    tests = [t for t in claim.tests if t.expect != "cosine-above" and t.prompts not in benign]
    for test, c in itertools.product(tests, run.conditions):
        if c.base != test.treated or c.seed is not None or c.unsteered_twin_of:
            continue
        for kind, first, second, expects in _controls(run, c):
            if test.expect not in _FOR[kind]:
                continue
            counted: list[tuple[str, str]] = [(test.prompts, test.outcome)]
            if kind == "benign":
                counted = list(itertools.product(benign, ("refusal", "degenerate")))
            for family, outcome in counted:
                pairs = labels.pair(first.name, second.name, family)
                if pairs.is_empty():
                    continue
                # A matched control subtracts from the persona: lost refusal may return.
                plain = controls.plain(run, second.mode) if kind == "matched" else None
                before = labels.of(plain.name, family) if plain else None
                got = outcomes.flips(pairs, outcome)
                risk = outcomes.at_risk(pairs, outcome, run.kind(family), before)
                status, why = _status(got, outcomes.flips(risk, outcome), expects)
                yield Finding(
                    claim=claim.name,
                    kind=kind,
                    treated=c.name,
                    first=first.name,
                    second=second.name,
                    family=family,
                    outcome=outcome,
                    expects=expects,
                    n=got.n,
                    difference=got.difference,
                    low=got.low,
                    high=got.high,
                    p=got.p,
                    status=status,
                    why=why,
                )


def _controls(run: RunRecord, c: Condition) -> Iterator[tuple[Kind, Condition, Condition, Expect]]:
    """(kind, first, second, what the claim expects of first) for one condition of a claim."""
    plain = controls.plain(run, c.mode)
    if plain is None:
        return
    twin = unsteered_twin(run.conditions, c)
    if twin is not None:
        yield "unsteered", twin, plain, "no rise"
    for control in run.conditions:
        if not control.unsteered_twin_of and controls.neutral_control_of(run, control) is c:
            yield "neutral", control, plain, "lower"
    for control in controls.swapped_controls(run, c):
        yield "swapped", control, c, "higher"
    for control, added_alone in controls.matched_controls(run, c):
        yield "matched", control, added_alone, "no rise"
    if c.benign and c.operations:
        yield "benign", c, plain, "no rise"


def _status(got: Flips, risk: Flips, expects: Expect) -> tuple[Status, str]:
    beyond = got.p < ALPHA
    chance = f"exact {p_equals(got.p)}"
    if expects == "no rise":
        bound = stats.wilson(risk.raised, risk.n)[1]
        new = f"new on {risk.raised} of {risk.n} prompts at risk, so up to {percent(bound)}"
        if bound <= MARGIN:
            return "holds", f"{new}, within {percent(MARGIN)}"
        if beyond and got.difference > 0:
            return "fails", f"{new}, and the rise is not chance ({chance})"
        return "undecided", f"{new}, over {percent(MARGIN)}"
    words = f"{points(got.difference)} points, {chance}"
    if not beyond:
        return "undecided", words
    right_way = got.difference > 0 if expects == "higher" else got.difference < 0
    return ("holds", words) if right_way else ("fails", f"{words}, the other way")


def comparisons(
    found: Results, judged: Sequence[Claim], made: Sequence[Finding]
) -> dict[str, tuple[str, str, str, str]]:
    """Every pair of conditions that a claim or a control compares, by a name to choose it by.

    Returns:
      (treated, control, family, outcome) of pairs that have rows; the claims' own first.
    """
    asked = [
        (c.treated, c.control, c.family, c.outcome)
        for claim in judged
        for c in claim.comparisons
        if isinstance(c, Counted | NotTested) and c.outcome
    ]
    asked += [(f.first, f.second, f.family, f.outcome) for f in made if f.second]
    there = set(found.rows.select("condition", "family").unique().iter_rows())
    return {
        f"{key[0]} against {key[1]} ({key[3]}, {key[2]})": key
        for key in dict.fromkeys(asked)
        if {(key[0], key[2]), (key[1], key[2])} <= there
    }


def envelope_table(found: Results, made: Sequence[Finding]) -> pl.DataFrame:
    """Rates behind the random controls of some findings: one line per treated condition and seed.

    A row is named by its treated condition, and by outcome and prompts where the rows differ in it.

    Returns:
      Columns row (what is compared), outcome, kind (`treated` or `random`), name, slot (place in
      the row), n, rate, low, high (Wilson 95 %).
    """
    compared: dict[tuple[str, str, str], Finding] = {}
    for f in made:
        if f.kind == "random":
            compared.setdefault((f.treated, f.family, f.outcome), f)
    outcomes = {f.outcome for f in compared.values()}
    families = {f.family for f in compared.values()}
    labels = Labels(found.rows, found.verdicts)
    lines = []
    for f in compared.values():
        row = f.treated
        row += f" · {f.outcome}" if len(outcomes) > 1 else ""
        row += f" · {f.family} prompts" if len(families) > 1 else ""
        treated = found.run.named(f.treated)
        shape = (f.first, treated.mode, treated.scale)
        seeds = [
            c
            for c in found.run.conditions
            if (c.base, c.mode, c.scale) == shape and not c.unsteered_twin_of
        ]
        for slot, condition in enumerate([treated, *seeds]):
            # The seeds may have run on a part of the prompts; the treated condition is cut to it.
            table = labels.of(condition.name, f.family)
            others = labels.of(seeds[0].name, f.family) if seeds else table
            if others.height:
                table = table.join(others, on="prompt_id", how="semi")
            k, n = int((table["label"] == f.outcome).sum()), table.height
            if n:
                kind = "random" if slot else "treated"
                line = (row, f.outcome, kind, condition.name, slot, n, k / n)
                lines.append((*line, *stats.wilson(k, n)))
    columns = "row:str outcome:str kind:str name:str slot:int n:int rate low high"
    return frame(lines, columns)


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
        never = rows["prompt_id"].is_in(never_refused(rows).implode())
        gone = dict(rows.filter(never).group_by("family").agg(pl.n_unique("prompt_id")).iter_rows())
        rows, prompts = rows.filter(~never), dict(run.prompts)
        for name, n in gone.items():
            prompts[name] = msgspec.structs.replace(prompts[name], n=prompts[name].n - n)
        run = msgspec.structs.replace(run, prompts=prompts)
    return dataclasses.replace(found, rows=rows, run=run)


def never_refused(rows: pl.DataFrame) -> pl.Series:
    """Ids of harmful prompts that are refused under none of the conditions."""
    harmful = rows.filter(pl.col("kind") == "harmful")
    refused = harmful.group_by("prompt_id").agg((pl.col("label") == "refusal").any())
    return refused.filter(~pl.col("label"))["prompt_id"].sort()


def count(found: Results, rules: Rules) -> list[Claim]:
    """Each claim's comparisons counted on what the rules leave; alpha and margin play no part."""
    return claims.count(kept(found, rules), drop_degenerate=rules.drop_degenerate)


def judged(counts: Sequence[Claim], rules: Rules) -> list[Claim]:
    """The verdicts at the rules' alpha and margin, Holm's correction included."""
    return claims.judge(counts, alpha=rules.alpha, margin=rules.margin)


def changed(before: Sequence[Claim], after: Sequence[Claim]) -> list[str]:
    """Names of the claims that have another verdict."""
    return [a.name for a, b in zip(after, before, strict=True) if a.verdict != b.verdict]


def effect_of_rules(before: Sequence[Claim], after: Sequence[Claim], rules: Rules) -> str:
    """What the rules did to the verdicts, in one sentence."""
    names = changed(before, after)
    if rules == Rules():
        return "These are the study's own rules: both columns say the same."
    listed = f": {', '.join(names)}" if names else ""
    return f"Verdicts that your rules change: {len(names) or 'none'} of {len(after)}{listed}."
