"""A receipt as one HTML page: no scripts, no network, readable without knowing the code.

This module computes what the page shows, as plain values (numbers, words, rows); the template
`page.html.jinja` makes the HTML and escapes every text, with control characters spelled out. The
page's content security policy allows nothing but its own style sheet, by hash.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxsteer.evidence import outcomes
from jaxsteer.evidence.claims import Claim, could_show, in_order
from jaxsteer.evidence.comparisons import (
    BeyondRandom,
    Comparison,
    CosineAbove,
    Different,
    FewRaised,
    NotTested,
)
from jaxsteer.evidence.outcomes import WORDS
from jaxsteer.evidence.reliability import WELL_KNOWN
from jaxsteer.receipt.statement import (
    Condition,
    DoseResponse,
    Outcomes,
    PairedControl,
    Predicate,
    RandomControl,
    Rate,
    Statement,
    known,
    poorly_known,
)
from jaxsteer.study.results import describe, set_words
from jaxsteer.words import counted, p_equals, p_value, percent, plain, points, signed, span

FOLDER = Path(__file__).parent
STYLE = FOLDER / "receipt.css"
MOST = 40  # rows of any table: the page is for reading, receipt.json holds everything
MOST_PROMPTS = 8
Row = tuple[str, list[str]]  # name, cells


def html(receipt: Statement, digest: str) -> str:
    """The page, a pure function of the receipt.

    Args:
      receipt: what it shows.
      digest: sha256 of receipt.json's bytes.
    """
    p = receipt.predicate
    style = STYLE.read_text(encoding="utf-8")
    return _environment().get_template("page.html.jinja").render(
        p=p,
        digest=digest,
        style=style,
        style_sha256=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        most=MOST,
        well_known=WELL_KNOWN,
        most_prompts=MOST_PROMPTS,
        prompts=[f"{f.n} {family_words(p, name)} prompts" for name, f in p.prompts.items()],
        untouched=list(_untouched(p)),
        second_labels=_second_labels(p),
        verdicts=Counter(claim.verdict for claim in p.claims),
        sets=list(_drawn(p)),
        claims=[(claim, _evidence(p, claim)) for claim in in_order(p.claims)],
        power=list(dict.fromkeys(f"{found.claim}: {could_show(found)}" for found in p.power)),
        benign=[(name, bar) for name in _sets(p, "benign") for bar in bars(p.conditions, name)],
        impacts=[outcomes.cells(c.name, c.impact) for c in p.conditions if c.impact],
        impact_columns=outcomes.IMPACT_COLUMNS,
        impact_caption=outcomes.IMPACT_CAPTION,
        random_controls=[(c, one_sided(p, c)) for c in p.random_controls if _about_refusal(p, c)],
        paired_controls=_paired_controls(p),
        trends=list(_trends(p)),
        layers=[f"{name} = {layer}" for name, layer in sorted(p.steering.layers.items())],
        directions=[f"{d.name} ({d.kind})" for d in p.steering.directions if d.kind != "random"],
        n_random=sum(d.kind == "random" for d in p.steering.directions),
        applied=_applied(p),
        geometry=list(_geometry(p)),
        decided=[f"{name or 'no judge'} {count}" for name, count in p.judges.decided.items()],
        n_unjudged=sum(o.unjudged for c in p.conditions for o in c.outcomes.values()),
        software=[
            f"{name} {version}"
            for name, version in sorted(p.environment.items())
            if name not in ("device", "platform")
        ],
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Runs on every value before it is escaped, so that no template line can forget it.
        finalize=visible,
    )
    shared = (percent, span, points, p_value, family_words, on_set)
    made.globals |= {function.__name__: function for function in shared}
    return made


def visible(value: object) -> object:
    """A text with its control and direction characters spelled out; anything else as it is."""
    # The type itself: HTML that the template has already escaped is a subclass of str.
    return plain(value) if type(value) is str else value


def family_words(p: Predicate, name: str) -> str:
    """A prompt set in words, such as `harmful strongreject`."""
    return set_words(name, p.prompts[name].kind) if name in p.prompts else name


def on_set(p: Predicate, name: str) -> str:
    """Names the prompts of a figure; nothing where the study has only these harmful ones."""
    return "" if _sets(p, "harmful") == [name] else f" on {family_words(p, name)} prompts"


def _sets(p: Predicate, *kinds: str) -> list[str]:
    return [name for kind in kinds for name, known in p.prompts.items() if known.kind == kind]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: a condition, or all seeds of one.

    Attributes:
      condition: the condition; of several seeds the first.
      name: its base, with strength and number of seeds.
      shares: of each label that occurs.
      low, high: of the refusal rate: the Wilson interval, or the range over seeds.
      n: prompts.
    """

    condition: Condition
    name: str
    shares: dict[str, float]
    low: float
    high: float
    n: int

    @property
    def segments(self) -> Iterator[tuple[str, str, float, float]]:
        """(label, its words, start, share) of each label that occurs, from left to right."""
        start = 0.0
        for label, share in self.shares.items():
            yield label, WORDS[label], start, share
            start += share


def _drawn(p: Predicate) -> Iterator[dict[str, Any]]:
    """What the page draws of each set that is not benign; `hidden` counts bars left out."""
    for name in _sets(p, "harmful", "other"):
        every = bars(p.conditions, name)
        drawn = chosen(every, MOST)
        if every:
            yield {
                "words": family_words(p, name),
                "bars": drawn,
                "hidden": len(every) - len(drawn),
                "legend": [(k, w) for k, w in WORDS.items() if any(k in b.shares for b in drawn)],
                "modes": list(dict.fromkeys(bar.condition.mode for bar in every)),
                "by_mode": _by_mode(every),
            }


def bars(conditions: Sequence[Condition], family: str) -> list[Bar]:
    """Conditions with rows of a family, seeds of one condition joined, in the study's order."""
    groups: dict[tuple[str, str, float | None], list[tuple[Condition, Outcomes]]] = {}
    for condition in conditions:
        outcomes = condition.outcomes.get(family)
        if outcomes is not None and outcomes.n:
            key = condition.mode, condition.base, condition.scale
            groups.setdefault(key, []).append((condition, outcomes))
    return [_bar(repeats) for repeats in groups.values()]


def _bar(repeats: Sequence[tuple[Condition, Outcomes]]) -> Bar:
    condition, outcomes = repeats[0][0], [o for _, o in repeats]
    rates = [o.counts.get("refusal", 0) / o.n for o in outcomes]
    one, strength = outcomes[0].refusal, condition.scale
    shares = {
        label: statistics.fmean(o.counts.get(label, 0) / o.n for o in outcomes) for label in WORDS
    }
    return Bar(
        condition=condition,
        name=condition.base
        + ("" if strength is None else f" x{strength:g}")
        + (f" ({len(repeats)} seeds)" if len(repeats) > 1 else ""),
        shares={label: share for label, share in shares.items() if share},
        low=min(rates) if len(repeats) > 1 else one.low,
        high=max(rates) if len(repeats) > 1 else one.high,
        n=outcomes[0].n,
    )


def chosen(every: Sequence[Bar], most: int) -> list[Bar]:
    """The bars worth drawing: of several modes the untouched model, else at most `most`.

    When there are too many, strengths are left out first, since the page shows their trends.
    """
    if len({bar.condition.mode for bar in every}) > 1:
        untouched = [bar for bar in every if not bar.condition.operations]
        return untouched or list(every[:most])
    kept = [bar for bar in every if bar.condition.scale is None or len(every) <= most]
    return (kept or list(every))[:most]


def _by_mode(every: Sequence[Bar]) -> list[tuple[str, list[float | None]]]:
    """Refused shares as conditions by modes, so that one line shows what a mode changes."""
    modes = dict.fromkeys(bar.condition.mode for bar in every)
    found = {(bar.name, bar.condition.mode): bar.shares.get("refusal", 0.0) for bar in every}
    return [
        (name, [found.get((name, mode)) for mode in modes])
        for name in dict.fromkeys(bar.name for bar in every)
    ]


def _untouched(p: Predicate) -> Iterator[tuple[str, Rate]]:
    """(prompt family in words, refusal rate) of the first condition without operations."""
    run = next((c.outcomes for c in p.conditions if not c.operations), {})
    for family in _sets(p, "harmful", "other", "benign"):
        outcomes = run.get(family)
        if outcomes is not None and outcomes.n:
            yield family_words(p, family), outcomes.refusal


def _second_labels(p: Predicate) -> str:
    """How far the judges of refusals agree, with each other and with a person."""
    pairs = [a for a in p.judges.agreement if a.question == "refusal"]
    said = []
    for a in pairs:
        same = percent((a.both_yes + a.both_no) / max(a.n, 1))
        kappa = "" if a.kappa is None else f", kappa {a.kappa:.2f}"
        said.append(f"{a.first} and {a.second} agree on {same} of {a.n}{kappa}")
    if not any("human" in (a.first, a.second) for a in pairs):
        said.append("no sample was labelled by hand")
    if not any({a.first, a.second} - {"keyword", "human"} for a in pairs):
        said.append("no model has judged these replies a second time")
    return "; ".join(said)


def _evidence(p: Predicate, claim: Claim) -> list[str]:
    """The comparisons that decided a claim, and how well its directions are known, in words."""
    lines, shown = [claim.reason], claim.comparisons
    if claim.verdict == "confirmed":
        more = [f"and {len(shown) - 3} more, all held"] if len(shown) > 3 else []
        lines = [*(_line(p, c) for c in shown[:3]), *more]
    halves = [
        f"{name} at layer {layer} {'not measured' if cosine is None else signed(cosine)}"
        + (" (poorly known)" if poorly_known(cosine) else "")
        for (name, layer), cosine in known(p, claim).items()
    ]
    return [*lines, f"agreement of halves: {', '.join(halves)}"] if halves else lines


def _line(p: Predicate, c: Comparison) -> str:
    match c:
        case NotTested():
            return c.reason
        case CosineAbove():
            found = ", ".join(f"{signed(v)} at layer {k}" for k, v in sorted(c.cosines.items()))
            return (
                f"cosine of {c.treated} and {c.control}: {found} (above {signed(c.margin)} asked)"
            )
    head = f"{c.treated} against {c.control}{on_set(p, c.family)}"
    if isinstance(c, FewRaised):
        return (
            f"{head}: new {c.outcome} on {c.raised_at_risk} of {c.at_risk} prompts at risk, at "
            f"most {percent(c.bound)} ({percent(c.margin)} allowed)"
        )
    if isinstance(c, BeyondRandom):
        low, high = min(c.control_k) / c.n, max(c.control_k) / c.n
        return (
            f"{head}: {percent(c.treated_k / c.n)} {c.outcome}, and {span(low, high)} under "
            f"{counted(len(c.control_k), 'random seed')}, {p_equals(c.p)}"
        )
    low, high = c.difference_interval
    return (
        f"{head}: {percent(c.treated_k / c.n)} against {percent(c.control_k / c.n)} {c.outcome}, "
        f"difference {points(c.difference)} ({points(low)} to {points(high)}), "
        f"adjusted {p_equals(c.p_holm)}"
    )


def _about_refusal(p: Predicate, control: RandomControl | PairedControl | DoseResponse) -> bool:
    return control.outcome == "refusal" and control.family in _sets(p, "harmful", "other")


def one_sided(p: Predicate, control: RandomControl) -> float | None:
    """The p of a random control on the side that a claim of its condition expects."""
    wanted = (
        c.expect
        for claim in p.claims
        for c in claim.comparisons
        if isinstance(c, Different | BeyondRandom | NotTested) and c.expect in ("lower", "higher")
        if (c.treated, c.family, c.outcome) == (control.treated, control.family, control.outcome)
    )
    return control.p(next(wanted, None))


def _paired_controls(p: Predicate) -> list[PairedControl]:
    # Seeds have their range above, and what cancels its steering equals its control by algebra.
    single = {c.name for c in p.conditions if c.seed is None and not c.cancels_steering}
    return [
        c
        for c in p.paired_controls
        if _about_refusal(p, c) and c.kind != "benign" and c.treated in single
    ]


def _trends(p: Predicate) -> Iterator[tuple[DoseResponse, list[str]]]:
    """Each condition of several strengths, and its refused share at each."""
    rates = {
        (c.name, name): found.refusal.rate
        for c in p.conditions
        for name, found in c.outcomes.items()
    }
    for dose in p.dose_responses:
        if _about_refusal(p, dose):
            keys = [(name, dose.family) for name in dose.conditions]
            steps = zip(dose.strengths, keys, strict=False)
            yield dose, [f"x{s:g}: {percent(rates[key])}" for s, key in steps if key in rates]


def _applied(p: Predicate) -> list[tuple[str, str, str]]:
    """(condition, its operations, mean change), one line for all seeds, of the first mode.

    The change is a share of the residual norm at the layers of the operations.
    """
    groups: dict[tuple[str, float | None], list[Condition]] = {}
    for c in p.conditions:
        # An unsteered control has the operations of its knockout without the addition, and modes
        # differ only in their texts.
        if c.operations and c.mode == p.conditions[0].mode and not c.unsteered_twin_of:
            groups.setdefault((c.base, c.scale), []).append(c)
    lines = []
    for first, *others in groups.values():
        name = f"{first.base} (first seed)" if others else first.name
        scope = "" if first.scope == "all" else f" ({first.scope} tokens only)"
        operations = (
            "; ".join(map(describe, first.operations)).replace("resid_post.", "layer ") + scope
        )
        # The norms are those after each layer, and the change that of all taps.
        known, at = p.steering.residual_norm, {k for op in first.operations for k in op.layers}
        there = all(op.tap == "resid_post" for op in first.operations) and max(at) < len(known)
        norms = [known[layer] for layer in at] if there else []
        share = percent(first.change.mean / statistics.fmean(norms), 1) if norms else "–"
        lines.append((name, operations, share))
    return lines


def _geometry(p: Predicate) -> Iterator[tuple[str, list[int], list[Row]]]:
    """(head, layers, rows): the agreement of halves, then the cosines, where they were measured."""
    if p.geometry is None:
        return
    layers = sorted(set(p.steering.layers.values()))

    def shown(name: str, values: Sequence[float], chance: Sequence[float] | None = None) -> Row:
        notes = [f" (p {p_value(p)})" for p in chance] if chance else [""] * len(values)
        known = [signed(value) + note for value, note in zip(values, notes, strict=False)]
        return name, [known[k] if k < len(known) else "–" for k in layers]

    halves = [
        shown(f"{name}, {unit}", found.mean)
        for name, direction in p.geometry.directions.items()
        for unit, found in direction.reliability.items()
    ]
    cosines = [
        shown(f"{pair.first}, {pair.second}", pair.cosine, pair.null.p if pair.null else None)
        for pair in p.geometry.pairs
    ]
    if halves:
        yield "direction, and what is halved: agreement of random halves", layers, halves
    if cosines:
        yield "two directions: cosine, with p against shuffled labels", layers, cosines
