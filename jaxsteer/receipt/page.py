"""A receipt as one HTML page: no scripts, no network, readable without knowing the code.

The page's content security policy allows nothing but its own style sheet, by hash. All text from
the receipt is escaped, with control characters spelled out.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxsteer.evidence.claims import Claim, Comparison
from jaxsteer.receipt import bars, details
from jaxsteer.receipt.markup import HARMFUL, MOST, esc, family_words, table
from jaxsteer.receipt.statement import Condition, Predicate, Statement
from jaxsteer.words import p_value, percent, points, span

STYLE = Path(__file__).parent / "receipt.css"

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
    yield from details.benign(p)
    yield from details.controls(p)
    yield from details.setup(p)
    yield from details.judges(p)
    yield from details.samples(p)
    yield from details.identity(p, digest)
    yield from details.foot(p)


def _head(p: Predicate) -> Iterator[str]:
    prompts = ", ".join(f"{f.n} {family_words(name)} prompts" for name, f in p.prompts.items())
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
        f"adjusted p {p_value(c.p_holm)}"
    )
