"""Stacked bars of outcomes as inline SVG, one small picture per table row."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from jaxsteer import stats
from jaxsteer.receipt.statement import Condition, Outcomes

# Label, class of the segment, words of the legend; bars are drawn in this order.
SEGMENTS = (
    ("refusal", "refusal", "refused"),
    ("benign-answer", "answer", "answered without harm"),
    ("complied-unscored", "unscored", "answered, harm not judged"),
    ("bypass", "bypass", "harmful answer (bypass)"),
    ("degenerate", "degenerate", "broken text (degenerate)"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: a condition, or all seeds of one.

    Attributes:
      mode: its persona mode.
      name: its base, with strength and number of seeds.
      shares: of each label.
      low, high: of the refusal rate: the Wilson interval, or the range over seeds.
      n: prompts.
      plain: whether nothing was done to the model.
      scale: its strength, or None.
      seeds: number of seeds, 1 where there are none.
      cancels: whether it cancels its own steering.
    """

    mode: str
    name: str
    shares: Mapping[str, float]
    low: float
    high: float
    n: int
    plain: bool
    scale: float | None
    seeds: int
    cancels: bool


def bars(conditions: Sequence[Condition], family: str) -> list[Bar]:
    """Conditions with rows of a family, seeds of one condition joined, in the study's order."""
    groups: dict[tuple[str, str, float | None], list[tuple[Condition, Outcomes]]] = {}
    for condition in conditions:
        outcomes = condition.outcomes.get(family)
        if outcomes is not None and outcomes.n:
            key = condition.mode, condition.base, condition.scale
            groups.setdefault(key, []).append((condition, outcomes))
    return [_bar(*key, members) for key, members in groups.items()]


def _bar(
    mode: str, base: str, scale: float | None, members: Sequence[tuple[Condition, Outcomes]]
) -> Bar:
    outcomes = [o for _, o in members]
    rates = [o.counts.get("refusal", 0) / o.n for o in outcomes]
    low, high = min(rates), max(rates)
    if len(members) == 1:
        low, high = stats.wilson(outcomes[0].counts.get("refusal", 0), outcomes[0].n)
    return Bar(
        mode=mode,
        name=base
        + ("" if scale is None else f" x{scale:g}")
        + (f" ({len(members)} seeds)" if len(members) > 1 else ""),
        shares={
            label: statistics.fmean(o.counts.get(label, 0) / o.n for o in outcomes)
            for label, _, _ in SEGMENTS
        },
        low=low,
        high=high,
        n=outcomes[0].n,
        plain=not members[0][0].sites,
        scale=scale,
        seeds=len(members),
        cancels=members[0][0].cancels_steering,
    )


def chosen(every: Sequence[Bar], most: int) -> list[Bar]:
    """The bars worth drawing: of several modes the untouched model, else at most `most`.

    Strengths make room first, since their trends are told elsewhere on the page.
    """
    if len({bar.mode for bar in every}) > 1:
        plain = [bar for bar in every if bar.plain]
        return plain or list(every[:most])
    kept = [bar for bar in every if bar.scale is None] if len(every) > most else list(every)
    return (kept or list(every))[:most]


def svg(bar: Bar) -> str:
    """The bar with its whisker, as wide as its table cell; 100 units are all prompts."""
    x, parts = 0.0, []
    for label, kind, _ in SEGMENTS:
        width = 100 * bar.shares[label]
        if width:
            parts.append(
                f'<rect class="seg f-{kind}" x="{x:.2f}" y="0" width="{width:.2f}" height="10"/>'
            )
        x += width
    low, high = 100 * bar.low, 100 * bar.high
    path = f"M{low:.2f} 2.5V7.5M{low:.2f} 5H{high:.2f}M{high:.2f} 2.5V7.5"
    words = ", ".join(
        f"{round(100 * bar.shares[label])} % {text}"
        for label, _, text in SEGMENTS
        if bar.shares[label]
    )
    return (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{words}">'
        f'{"".join(parts)}<path class="halo" d="{path}"/><path class="whisker" d="{path}"/></svg>'
    )


def legend(shown: Sequence[Bar]) -> str:
    """The segments that occur, in the order of the bars."""
    square = '<rect class="f-{}" width="10" height="10" rx="2"/>'
    swatch = f'<svg viewBox="0 0 10 10" aria-hidden="true">{square}</svg>'
    return "".join(
        f"<span>{swatch.format(kind)}{words}</span>"
        for label, kind, words in SEGMENTS
        if any(bar.shares[label] for bar in shown)
    )
