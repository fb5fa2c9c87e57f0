"""A receipt as one HTML page: no scripts, no network, readable without knowing the code.

The page's content security policy allows nothing but its own style sheet, by hash. All text from
the receipt is escaped, with control characters spelled out.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxsteer.claims import Claim, Comparison
from jaxsteer.receipt import bars
from jaxsteer.receipt.markup import MOST, esc, number, percent, points, span, table
from jaxsteer.receipt.statement import Condition, Predicate, Statement

STYLE = Path(__file__).parent / "receipt.css"
HARMFUL = "strongreject"
SIGNS = {
    "confirmed": "✓ confirmed",
    "not confirmed": "✗ not confirmed",
    "not tested": "– not tested",
}


def mark(digest: str) -> str:
    """The element that names the receipt.json a page was made from."""
    return f'<meta name="receipt-sha256" content="{digest}">'


def html(receipt: Statement, digest: str) -> str:
    """The page.

    Args:
      receipt: what it shows.
      digest: sha256 of receipt.json's bytes.
    """
    style = STYLE.read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    p = receipt.predicate
    body = "\n".join(_body(p, digest))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'{mark(digest)}\n<meta name="color-scheme" content="light dark">\n'
        f"<title>Refusal receipt: {esc(p.study.name)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _body(p: Predicate, digest: str) -> Iterator[str]:
    yield from _head(p)
    yield from _outcomes(p)
    yield from _claims(p)
    yield from _benign(p)
    yield from _controls(p)
    yield from _setup(p)
    yield from _judges(p)
    yield from _samples(p)
    yield from _identity(p, digest)
    yield from _foot(p)


def _head(p: Predicate) -> Iterator[str]:
    prompts = ", ".join(f"{f.n} {_family(name)} prompts" for name, f in p.prompts.items())
    yield (
        f'<header><p class="kicker">Refusal receipt · {esc(p.study.name)}</p>'
        f"<h1>{esc(p.study.about or p.study.name)}</h1>"
        f'<p class="soft">{esc(p.model.name)} · {prompts} · {esc(p.date[:10])}</p></header>'
    )
    tiles = []
    untouched = _plain(p)
    if untouched is not None:
        for family, words in ((HARMFUL, "harmful"), ("benign", "benign")):
            found = untouched.outcomes.get(family)
            if found is not None and found.n:
                r = found.refusal
                tiles.append(
                    (percent(r.rate), f"of {words} prompts refused by the untouched model, "
                     f"{r.k} of {r.n} (95 % interval {span(r.low, r.high)})")
                )  # fmt: skip
    counted = {verdict: sum(c.verdict == verdict for c in p.claims) for verdict in SIGNS}
    if p.claims:
        tiles.append(
            (f"{counted['confirmed']} of {len(p.claims)}", "claims confirmed, "
             f"{counted['not confirmed']} not confirmed, {counted['not tested']} not tested")
        )  # fmt: skip
    cells = "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
    yield f'<div class="tiles">{cells}</div>'


def _family(name: str) -> str:
    return {"strongreject": "harmful"}.get(name, esc(name))


def _plain(p: Predicate) -> Condition | None:
    return next((c for c in p.conditions if not c.sites), None)


def _outcomes(p: Predicate) -> Iterator[str]:
    every = bars.bars(p.conditions, HARMFUL)
    if not every:
        return
    drawn = bars.chosen(every, MOST)
    modes = {bar.mode for bar in every}
    yield "<h2>What the model did with harmful prompts</h2>"
    yield f'<div class="legend">{bars.legend(drawn)}</div>'
    rows = []
    for bar in drawn:
        name = f"{bar.mode}: {bar.name}" if len(modes) > 1 else bar.name
        # A condition that proves nothing must not look as if it did.
        sign = ' <span class="soft">(proves nothing †)</span>' if bar.cancels else ""
        rows.append(
            f'<tr><td class="label">{esc(name)}{sign}</td><td>{bars.svg(bar)}</td>'
            f'<td class="n">{percent(bar.shares["refusal"])}</td>'
            f'<td class="n soft">{span(bar.low, bar.high)}</td></tr>'
        )
    yield (
        '<table class="bars"><tr><th>condition</th><th>share of prompts</th>'
        f'<th class="n">refused</th><th class="n">95 %</th></tr>{"".join(rows)}</table>'
    )
    note = "Lines are 95 % Wilson intervals of the refused share; over seeds, smallest to largest."
    if any(bar.cancels for bar in drawn):
        note += (
            " † The vector is removed where it was added, so the result is that of the removal "
            "alone, by algebra, whatever the model does."
        )
    if len(modes) == 1 and len(drawn) < len(every):
        note += f" {len(every) - len(drawn)} more conditions are in receipt.json."
    yield f'<p class="note">{note}</p>'
    if len(modes) > 1:
        yield from _by_mode(every)


def _by_mode(every: Sequence[bars.Bar]) -> Iterator[str]:
    """Refused shares as conditions by modes: what a mode changes reads along a line."""
    modes = list(dict.fromkeys(bar.mode for bar in every))
    found = {(bar.name, bar.mode): percent(bar.shares["refusal"]) for bar in every}
    yield table(
        ["refused by condition and mode", *(f"#{esc(mode) or 'no mode'}" for mode in modes)],
        [
            [esc(name), *(found.get((name, mode), "–") for mode in modes)]
            for name in dict.fromkeys(bar.name for bar in every)
        ],
    )


def _claims(p: Predicate) -> Iterator[str]:
    if not p.claims:
        return
    yield "<h2>Claims, fixed before the run</h2>"
    rows = []
    for claim in p.claims:
        kind = claim.verdict.replace(" ", "-")
        rows.append(
            [
                f'<span class="verdict {kind}">{SIGNS[claim.verdict]}</span>',
                f"<b>{esc(claim.name)}.</b> {esc(claim.says)}<br>"
                f'<span class="soft">{_evidence(claim)}</span>',
            ]
        )
    yield table(["verdict", "claim and evidence"], rows, "claims")
    yield (
        '<p class="note">A claim is confirmed when every planned comparison holds: for more or '
        "fewer, an exact McNemar test on the same prompts with Holm's correction over the whole "
        "study (p below 0.05); for little change, the upper bound of the share of prompts that "
        "changed for the worse. Differences are in percentage points with 95 % bootstrap "
        "intervals.</p>"
    )


def _evidence(claim: Claim) -> str:
    counted = [c for c in claim.comparisons if c.counted]
    if claim.verdict != "confirmed" or not counted:
        lines = [claim.reason]
    else:
        lines = [_line(c) for c in counted[:3]]
        lines += [f"and {len(counted) - 3} more, all held"] if len(counted) > 3 else []
    return "<br>".join(esc(line) for line in lines)


def _line(c: Comparison) -> str:
    if c.cosines is not None:
        found = ", ".join(
            f"{value:+.2f} at layer {layer}" for layer, value in sorted(c.cosines.items())
        )
        return f"cosine of {c.treated} and {c.control}: {found} (above {c.margin:g} asked)"
    if c.n == 0 or c.difference_interval is None or c.difference is None:
        return c.reason
    head = f"{c.treated} against {c.control}"
    if c.family != HARMFUL:
        head += f" on {c.family} prompts"
    if c.bound is not None and c.margin is not None:
        return (
            f"{head}: new {c.outcome} on {c.raised} of {c.n} prompts, at most "
            f"{percent(c.bound)} ({percent(c.margin)} allowed)"
        )
    low, high = c.difference_interval
    return (
        f"{head}: {percent(c.treated_k / c.n)} against {percent(c.control_k / c.n)} {c.outcome}, "
        f"difference {points(c.difference)} ({points(low)} to {points(high)}), "
        f"adjusted p {number(c.p_holm)}"
    )


def _benign(p: Predicate) -> Iterator[str]:
    drawn = bars.bars(p.conditions, "benign")
    if not drawn:
        return
    yield "<h2>Benign prompts: is the model still useful?</h2>"
    rows = [
        [
            esc(f"{bar.mode}: {bar.name}" if bar.mode else bar.name),
            percent(bar.shares["refusal"]),
            span(bar.low, bar.high),
            percent(bar.shares["degenerate"]),
            str(bar.n),
        ]
        for bar in drawn
    ]
    yield table(["condition", "#refused", "#95 %", "#broken text", "#prompts"], rows)


def _controls(p: Predicate) -> Iterator[str]:
    shown = [c for c in p.random_controls if c.outcome == "refusal" and c.family == HARMFUL]
    pairs = [
        c
        for c in p.paired_controls
        if c.outcome == "refusal" and c.family == HARMFUL and c.kind != "benign"
    ]
    if not shown and not pairs:
        return
    yield "<h2>Controls</h2>"
    if shown:
        yield table(
            ["random directions", "stand in for", "#seeds", "#refused", "#range", "#real direction",
             "#p"],
            [
                [esc(c.control), esc(c.treated or "–"), str(c.n), percent(c.mean),
                 span(c.low, c.high), "–" if c.value is None else percent(c.value),
                 number(None if c.p_low is None or c.p_high is None
                        else min(1.0, 2 * min(c.p_low, c.p_high)))]
                for c in shown
            ],
        )  # fmt: skip
        yield (
            '<p class="note">p: how often a random direction lies as far out, counted over the '
            "seeds, both ways; it cannot be below 2 / (seeds + 1).</p>"
        )
    if pairs:
        words = {"neutral": "neutral direction", "unsteered": "the same removal, unsteered"}
        yield table(
            ["condition", "against", "kind of control", "#difference", "#95 %"],
            [
                [esc(c.treated), esc(c.control), words[c.kind], points(c.difference),
                 f"{points(c.low)} to {points(c.high)}"]
                for c in pairs
            ],
        )  # fmt: skip
    for dose in p.dose_responses:
        if dose.outcome == "refusal" and dose.family == HARMFUL:
            known = {c.name: c for c in p.conditions}
            steps = ", ".join(
                f"x{s:g}: {percent(known[name].outcomes[dose.family].refusal.rate)}"
                for s, name in zip(dose.strengths, dose.conditions, strict=True)
                if name in known and dose.family in known[name].outcomes
            )
            name = f"{dose.mode}: {dose.base}" if dose.mode else dose.base
            yield f"<p>{esc(name)}, refused: {steps} (trend p {number(dose.p)}).</p>"


def _setup(p: Predicate) -> Iterator[str]:
    yield "<h2>What was done, and what it changed inside the model</h2>"
    layers = ", ".join(
        f"{esc(name)} = {layer}" for name, layer in sorted(p.steering.layers.items())
    )
    kinds = [d for d in p.steering.directions if d.kind != "random"]
    n_random = len(p.steering.directions) - len(kinds)
    yield (
        f"<p>Layers: {layers or 'none'}; dose: {p.steering.dose:g} times the direction's length. "
        f"Directions: {', '.join(f'{esc(d.name)} ({esc(d.kind)})' for d in kinds) or 'none'}"
        f"{f' and {n_random} random' if n_random else ''}. Chosen on prompts that are not reported "
        f"here ({len(p.selection.dose_candidates)} strengths and layers tried)"
        + (f"; note: {esc(', '.join(p.selection.refusal_near_miss))} at the refusal layer"
           if p.selection.refusal_near_miss else "")
        + ".</p>"
    )  # fmt: skip
    seen: dict[tuple[str, str, float | None], list[Condition]] = {}
    for c in p.conditions:
        if c.sites and c.mode == p.conditions[0].mode:
            seen.setdefault((c.mode, c.base, c.scale), []).append(c)
    rows = [
        [
            esc(members[0].name if len(members) == 1 else f"{members[0].base} (first seed)"),
            esc("; ".join(members[0].sites)),
            "" if members[0].scope == "all" else esc(members[0].scope),
            f"{members[0].change.mean:.3g}",
        ]
        for members in seen.values()
    ]
    yield table(["condition", "applied (layers count from 0)", "tokens", "#mean change"], rows)
    yield (
        '<p class="note">Mean change: length of what was really added to or taken from the '
        "model's state, per token and place; a condition that changed nothing is refused by the "
        "run.</p>"
    )
    if p.geometry is not None:
        yield from _geometry(p)


def _geometry(p: Predicate) -> Iterator[str]:
    assert p.geometry is not None
    yield table(
        ["direction", "halves by", "#layer", "#agreement of halves", "#95 %"],
        [
            [esc(r.direction), esc(r.unit), str(r.layer), f"{r.mean:+.2f}",
             f"{r.low:+.2f} to {r.high:+.2f}"]
            for r in p.geometry.reliability
        ],
    )  # fmt: skip
    yield table(
        ["cosine of", "and", "#layer", "#cosine", "#by chance (labels shuffled)", "#p"],
        [
            [esc(c.first), esc(c.second), str(c.layer), f"{c.cosine:+.2f}",
             "–" if c.null_low is None or c.null_high is None
             else f"{c.null_low:+.2f} to {c.null_high:+.2f}", number(c.p)]
            for c in p.geometry.cosines
        ],
    )  # fmt: skip


def _judges(p: Predicate) -> Iterator[str]:
    yield "<h2>Who labelled the replies</h2>"
    decided = ", ".join(
        f"{esc(name) if name else 'nobody'} {count}" for name, count in p.judges.decided.items()
    )
    unjudged = sum(o.unjudged for c in p.conditions for o in c.outcomes.values())
    words = f"<p>Rows by the judge that decided: {decided}."
    if unjudged:
        words += f" Of {unjudged} of {p.rows.n} rows nobody judged whether they do harm."
    yield words + "</p>"
    if p.judges.agreement:
        yield table(
            ["question", "judge", "judge", "#both yes", "#first only", "#second only", "#both no",
             "#kappa"],
            [
                [a.question, esc(a.first), esc(a.second),
                 *(str(count) for row in a.table for count in row),
                 "–" if a.kappa is None else f"{a.kappa:.2f}"]
                for a in p.judges.agreement
            ],
        )  # fmt: skip


def _samples(p: Predicate) -> Iterator[str]:
    if p.samples is None:
        return
    yield "<h2>Redacted openings</h2>"
    yield table(
        ["condition", "prompt", "label", "opening"],
        [
            [
                esc(s.condition),
                esc(s.prompt_id),
                esc(s.label),
                f'<span class="soft">{esc(s.excerpt)}</span>',
            ]
            for s in p.samples.rows
        ],
    )
    yield f'<p class="note">{esc(p.samples.rule)}</p>'


def _identity(p: Predicate, digest: str) -> Iterator[str]:
    yield "<h2>System prompt</h2>"
    for prompt in p.system_prompts[:8]:
        name = f"<b>{esc(prompt.mode)}</b>\n" if prompt.mode else ""
        yield f'<div class="prompt">{name}{esc(prompt.text)}</div>'
    if len(p.system_prompts) > 8:
        yield f'<p class="note">{len(p.system_prompts) - 8} more in receipt.json.</p>'
    yield f'<p class="note">Policy {esc(p.policy.name)}, version {esc(p.policy.version)}.</p>'
    yield "<h2>Exactly which model, prompts and program</h2>"
    m, d = p.model, p.decoding
    source = f"{m.source.name} {m.source.revision}".strip()
    decoding = (
        "greedy" if d.temperature == 0 else f"temperature {d.temperature:g}, top_p {d.top_p:g}"
    )
    lines = [
        ("model", f"{esc(m.name)} ({esc(m.dtype)}), converted from {esc(source)}"),
        ("weights", _hash(m.weights_sha256)),
        ("tokenizer", _hash(m.tokenizer_sha256)),
        ("chat template", _hash(m.template_sha256)),
        ("config", _hash(m.config_sha256)),
        ("policy text", _hash(p.policy.sha256)),
    ]
    lines += [
        (f"{_family(name)} prompts", f"{f.n} from {esc(f.source)} {_hash(f.sha256)}")
        for name, f in p.prompts.items()
    ]
    lines += [
        (f"direction {esc(direction.name)}", _hash(direction.sha256))
        for direction in p.steering.directions
        if direction.kind != "random"
    ]
    lines += [
        ("decoding", f"{decoding}, at most {d.max_new_tokens} tokens"),
        ("specification", _hash(p.study.spec_sha256)),
        ("run", _hash(p.study.key)),
        ("row table", f"{p.rows.n} rows {_hash(p.rows.sha256)}"),
        ("receipt.json", _hash(digest)),
        ("software", ", ".join(f"{esc(k)} {esc(v)}" for k, v in sorted(p.environment.items())
                               if k not in ("device", "platform"))),
        ("hardware", f"{esc(p.environment.get('device', ''))}, "
                     f"{esc(p.environment.get('platform', ''))}"),
        ("begun", esc(p.date)),
    ]  # fmt: skip
    cells = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in lines)
    yield f"<dl>{cells}</dl>"


def _hash(sha256: str) -> str:
    return f'<span class="hash">{esc(sha256)}</span>'


def _foot(p: Predicate) -> Iterator[str]:
    yield (
        '<footer><p class="note">To check: <code>jaxsteer receipt verify receipt.json --results '
        "DIR --model DIR</code> recomputes every figure. This page holds no replies, only counts "
        "and hashes. A receipt says what one model did with these prompts under these judges; it "
        "does not say that the model is safe, nor who made the file: it carries no signature. "
        f"Written by {esc(p.tool)}.</p></footer>"
    )
