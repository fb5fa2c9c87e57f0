"""The page's second half: controls, what was done, who judged, and exactly which parts."""

from __future__ import annotations

from collections.abc import Iterator

from jaxsteer.receipt import bars
from jaxsteer.receipt.markup import HARMFUL, esc, family_words, table
from jaxsteer.receipt.statement import Condition, Predicate
from jaxsteer.words import p_value, percent, points, span


def benign(p: Predicate) -> Iterator[str]:
    """Refusals and broken replies on benign prompts."""
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


def controls(p: Predicate) -> Iterator[str]:
    """Random, neutral and unsteered controls, and strengths."""
    shown = [c for c in p.random_controls if c.outcome == "refusal" and c.family == HARMFUL]
    # Seeds have their range above, and what cancels its steering equals its twin by algebra.
    single = {c.name for c in p.conditions if c.seed is None and not c.cancels_steering}
    pairs = [
        c
        for c in p.paired_controls
        if c.outcome == "refusal" and c.family == HARMFUL and c.kind != "benign"
        if c.treated in single
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
                 p_value(None if c.p_low is None or c.p_high is None
                        else min(1.0, 2 * min(c.p_low, c.p_high)))]
                for c in shown
            ],
        )  # fmt: skip
        yield (
            '<p class="note">p: how often a random direction lies as far out, counted over the '
            "seeds, both ways; it cannot be below 2 / (seeds + 1).</p>"
        )
    if pairs:
        words = {"neutral": "a neutral direction", "unsteered": "the same removal, unsteered"}
        yield table(
            ["condition", "against", "#difference in refusals", "#95 %"],
            [
                [esc(c.treated), words[c.kind], points(c.difference),
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
            yield f"<p>{esc(name)}, refused: {steps} (trend p {p_value(dose.p)}).</p>"


def setup(p: Predicate) -> Iterator[str]:
    """Layers, dose, directions, and the change each condition made."""
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
        # A twin is its knockout without the addition, and modes differ in their words alone.
        if c.sites and c.mode == p.conditions[0].mode and not c.unsteered_twin_of:
            seen.setdefault((c.mode, c.base, c.scale), []).append(c)
    rows = []
    for members in seen.values():
        first = members[0]
        name = first.name if len(members) == 1 else f"{first.base} (first seed)"
        scope = "" if first.scope == "all" else f" ({first.scope} tokens only)"
        sites = "; ".join(first.sites).replace("resid_post.", "layer ") + scope
        rows.append([esc(name), esc(sites), f"{first.change.mean:.3g}"])
    yield table(["condition", "applied at block outputs, counted from 0", "#mean change"], rows)
    yield (
        '<p class="note">Mean change: length of what was really added to or taken from the '
        "model's state, per token and place; a condition that changed nothing is refused by the "
        "run.</p>"
    )
    if p.geometry is not None:
        yield from _geometry(p)


def _geometry(p: Predicate) -> Iterator[str]:
    assert p.geometry is not None
    halves: dict[tuple[str, str], dict[int, str]] = {}
    for r in p.geometry.reliability:
        halves.setdefault((r.direction, r.unit), {})[r.layer] = f"{r.mean:+.2f}"
    angles: dict[tuple[str, str], dict[int, str]] = {}
    for c in p.geometry.cosines:
        chance = "" if c.p is None else f" (p {p_value(c.p)})"
        angles.setdefault((c.first, c.second), {})[c.layer] = f"{c.cosine:+.2f}{chance}"
    layers = sorted({r.layer for r in p.geometry.reliability})
    layers = layers or sorted({c.layer for c in p.geometry.cosines})
    heads = [f"#layer {layer}" for layer in layers]
    for head, found in (
        ("direction, and what is halved: agreement of random halves", halves),
        ("two directions: cosine, with p against shuffled labels", angles),
    ):
        if found:
            yield table(
                [head, *heads],
                [
                    [esc(", ".join(names)), *(cells.get(layer, "–") for layer in layers)]
                    for names, cells in found.items()
                ],
            )


def judges(p: Predicate) -> Iterator[str]:
    """Which judge decided how many rows, and how far judges agree."""
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


def samples(p: Predicate) -> Iterator[str]:
    """Redacted openings, when they were asked for."""
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


def identity(p: Predicate, digest: str) -> Iterator[str]:
    """System prompts, and every hash."""
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
        (f"{family_words(name)} prompts", f"{f.n} from {esc(f.source)} {_hash(f.sha256)}")
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


def foot(p: Predicate) -> Iterator[str]:
    """How to check, and what a receipt does not say."""
    yield (
        '<footer><p class="note">To check: <code>jaxsteer receipt verify receipt.json --results '
        "DIR --model DIR</code> recomputes every figure. This page holds no replies, only counts "
        "and hashes. A receipt says what one model did with these prompts under these judges; it "
        "does not say that the model is safe, nor who made the file: it carries no signature. "
        f"Written by {esc(p.tool)}.</p></footer>"
    )
