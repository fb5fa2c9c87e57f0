"""Receipts on a terminal: claims, checks and differences, with control characters spelled out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from jaxsteer.evidence.reliability import Measurements
from jaxsteer.receipt.compare import Comparison, Gate, Line
from jaxsteer.receipt.statement import Statement
from jaxsteer.receipt.verify import Check, passed, verdict
from jaxsteer.terminal import plain
from jaxsteer.words import percent, points, signed

STYLES = {
    "confirmed": "green",
    "not confirmed": "red",
    "not tested": "dim",
    "ok": "green",
    "mismatch": "bold red",
    "unchecked": "dim",
}


def safe(text: object, style: str = "") -> Text:
    """Text that can neither drive the terminal nor be read as markup, on one line."""
    return Text(plain(str(text)).replace("\n", " "), style=style)


def _table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    numbers: Sequence[str] = (),
) -> Table:
    """A table whose every cell goes through `safe`; `numbers` names the right-aligned columns."""
    table = Table(title=safe(title, "table.title"), title_justify="left", caption_justify="left")
    for name in columns:
        table.add_column(
            name, justify="right" if name in numbers else "left", no_wrap=name in numbers
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else safe(cell) for cell in row))
    return table


def claims_table(receipt: Statement) -> RenderableType:
    """The study's claims with their verdicts."""
    p = receipt.predicate
    if not p.claims:
        return safe(f"{p.study.name} makes no claims")
    rows = [(c.name, safe(c.verdict, STYLES[c.verdict]), c.reason) for c in p.claims]
    return _table(f"claims of {p.study.name}", ("claim", "verdict", "why"), rows)


def checks_table(checks: Sequence[Check]) -> Table:
    """Each check and how it ended."""
    rows = [(safe(c.status, STYLES[c.status]), c.what, c.detail) for c in checks]
    return _table("receipt", ("", "what", "detail"), rows)


def verdict_line(checks: Sequence[Check]) -> Text:
    """The verdict over all checks."""
    return safe(verdict(checks), "" if passed(checks) else STYLES["mismatch"])


def diff_tables(comparison: Comparison) -> Iterator[RenderableType]:
    """What else changed, the differences, and what could not be compared."""
    yield safe(f"other differences between the two: {', '.join(comparison.changed) or 'none'}")
    numbers = ("first", "second", "change", "95 % (points)")
    table = _table(
        "from the first receipt to the second",
        ("condition", "metric", *numbers, ""),
        [_difference(line) for line in comparison.lines],
        numbers,
    )
    table.caption = "intervals of independent rates (Newcombe); moved: the interval excludes 0"
    yield table
    for words, names in (
        ("only in the first receipt", comparison.only_first),
        ("only in the second receipt", comparison.only_second),
        ("no longer measured", [f"{metric} in {name}" for name, metric in comparison.gone]),
    ):
        if names:
            yield safe(f"{words}: {'; '.join(names)}")


def _difference(line: Line) -> tuple[str | Text, ...]:
    way = "moved up" if line.difference > 0 else "moved down"
    return (
        line.condition if line.other == line.condition else f"{line.condition} -> {line.other}",
        line.metric,
        percent(line.first, 1),
        percent(line.second, 1),
        points(line.difference, 1),
        f"{points(line.low, 1)} to {points(line.high, 1)}",
        safe(way, "bold") if line.moved else "",
    )


def fired_text(fired: Sequence[tuple[Gate, Line]]) -> Iterator[Text]:
    """One line for each gate that fires and each condition beyond its threshold."""
    for gate, line in fired:
        unsure = "" if line.moved else ", although the interval includes 0"
        yield safe(
            f"gate fires: {gate.text}: {line.condition} went from {percent(line.first, 1)} to "
            f"{percent(line.second, 1)} (n {line.n_first} and {line.n_second}{unsure})",
            "bold red",
        )


def geometry_table(found: Measurements) -> Table:
    """Reliability of each direction: the range over layers of the mean agreement of halves."""
    rows = []
    for name, measured in found.directions.items():
        for unit, halves in measured.reliability.items():
            over_layers = f"{signed(min(halves.mean))} to {signed(max(halves.mean))}"
            rows.append((name, unit, str(halves.units), over_layers))
        if measured.not_measured:
            rows.append((name, measured.not_measured, "", ""))
    numbers = ("units", "over layers")
    return _table("agreement of random halves", ("direction", "halves by", *numbers), rows, numbers)
