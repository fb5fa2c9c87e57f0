"""How good the two judges that need no model are, on our own labelled replies.

The examples (`calibration.toml`) come in two parts: patterns and thresholds were
chosen on `tune`, and nothing was changed after the first look at `held-out`. They were written to
be hard (repetition in verse, refusals in a story, salad made of real words), not drawn from what a
model says, so the figures say where a judge is blind and not how often that matters.

    python -m tests.judges.calibration

prints the table that docs/judges.md shows, and every example that is judged wrongly.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from jaxsteer.judges import rules
from jaxsteer.judges.verdicts import DEGENERATE, KEYWORD
from jaxsteer.stats import wilson

Part = Literal["tune", "held-out"]
PARTS: tuple[Part, ...] = ("tune", "held-out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One labelled reply.

    Attributes:
      id: its name.
      kind: what it is an example of.
      part: `tune` or `held-out`.
      text: the reply.
      degenerate: whether the text is broken.
      refusal: whether it declines to help, in its own voice.
    """

    id: str
    kind: str
    part: Part
    text: str
    degenerate: bool = False
    refusal: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """How a judge's yes compares with the labels.

    Attributes:
      right: both say yes.
      false_alarms: only the judge says yes.
      missed: only the label says yes.
      total: examples looked at.
    """

    right: int
    false_alarms: int
    missed: int
    total: int

    @property
    def precision(self) -> tuple[float, float, float]:
        """Share of the judge's yes that is right, with its Wilson 95 % interval."""
        return _rate(self.right, self.right + self.false_alarms)

    @property
    def recall(self) -> tuple[float, float, float]:
        """Share of the label's yes that the judge finds, with its Wilson 95 % interval."""
        return _rate(self.right, self.right + self.missed)


def _rate(k: int, n: int) -> tuple[float, float, float]:
    return (k / n if n else 0.0, *wilson(k, n))


def examples() -> list[Example]:
    """All labelled replies, in the order of the file."""
    path = Path(__file__).with_name("calibration.toml")
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["example"]
    return [Example(**entry) for entry in entries]


def measure(
    judge: Callable[[str], bool], truth: Callable[[Example], bool], among: Sequence[Example]
) -> Figures:
    """Count how a yes-or-no judge of text agrees with the labels."""
    pairs = [(judge(example.text), truth(example)) for example in among]
    return Figures(
        right=sum(said and true for said, true in pairs),
        false_alarms=sum(said and not true for said, true in pairs),
        missed=sum(true and not said for said, true in pairs),
        total=len(pairs),
    )


def measured() -> dict[tuple[str, Part], Figures]:
    """Figures of both judges on both parts."""
    judges: dict[str, tuple[Callable[[str], bool], Callable[[Example], bool]]] = {
        KEYWORD.label: (rules.is_refusal, lambda example: example.refusal),
        DEGENERATE.label: (rules.is_degenerate, lambda example: example.degenerate),
    }
    return {
        (name, part): measure(judge, truth, [e for e in examples() if e.part == part])
        for name, (judge, truth) in judges.items()
        for part in PARTS
    }


def table() -> str:
    """The figures as a Markdown table."""
    lines = [
        "| judge | examples | said / right / missed | precision (95 %) | recall (95 %) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (name, part), found in measured().items():
        precision, recall = (
            f"{rate:.2f} ({low:.2f} to {high:.2f})"
            for rate, low, high in (found.precision, found.recall)
        )
        said = found.right + found.false_alarms
        counts = f"{said} / {found.right} / {found.missed}"
        lines.append(f"| {name} | {found.total} {part} | {counts} | {precision} | {recall} |")
    return "\n".join(lines)


def wrong() -> list[str]:
    """Every example that a judge gets wrong, as `judge: id (part): what it said`."""
    found = []
    for example in examples():
        refused, broken = rules.is_refusal(example.text), rules.is_degenerate(example.text)
        for name, said, true in (
            (KEYWORD.label, refused, example.refusal),
            (DEGENERATE.label, broken, example.degenerate),
        ):
            if said != true:
                what = "false alarm" if said else "missed"
                found.append(f"{name}: {example.id} ({example.part}): {what}")
    return sorted(found)


if __name__ == "__main__":
    print(table())
    print("\n".join(["", *wrong()]))
