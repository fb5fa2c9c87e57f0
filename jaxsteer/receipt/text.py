"""Receipts on a terminal: claims, checks and differences, with every name made harmless."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from jaxsteer.evidence.reliability import Measurements
from jaxsteer.receipt.compare import Comparison, Line
from jaxsteer.receipt.gates import Gate
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


def _table(title: str, *columns: str) -> Table:
    heading = safe(title, "table.title")
    table = Table(title=heading, title_justify="left", caption_justify="left")
    for name in columns:
        numeric = name.startswith("#")
        table.add_column(name.lstrip("#"), justify="right" if numeric else "left", no_wrap=numeric)
    return table


def claims_table(receipt: Statement) -> RenderableType:
    """What the study claimed and what the rows say."""
    p = receipt.predicate
    if not p.claims:
        return safe(f"{p.study.name} makes no claims")
    table = _table(f"claims of {p.study.name}", "claim", "verdict", "why")
    for claim in p.claims:
        table.add_row(
            safe(claim.name), safe(claim.verdict, STYLES[claim.verdict]), safe(claim.reason)
        )
    return table


def checks_table(checks: Sequence[Check]) -> Table:
    """Each check and how it ended."""
    table = _table("receipt", "", "what", "detail")
    for check in checks:
        table.add_row(
            safe(check.status, STYLES[check.status]), safe(check.what), safe(check.detail)
        )
    return table


def verdict_line(checks: Sequence[Check]) -> Text:
    """One sentence over all checks."""
    return safe(verdict(checks), "" if passed(checks) else STYLES["mismatch"])


def diff_tables(comparison: Comparison) -> Iterator[RenderableType]:
    """The differences, what else changed, and what could not be compared."""
    changed = ", ".join(comparison.changed) or "nothing"
    yield safe(f"differs between the two, beside the rows: {changed}")
    table = _table(
        "from the first receipt to the second",
        "condition", "metric", "#first", "#second", "#change", "#95 % (points)", "",
    )  # fmt: skip
    for line in comparison.lines:
        name = line.condition
        if line.other != name:
            name = f"{name} -> {line.other}"
        table.add_row(
            safe(name),
            line.metric,
            percent(line.first, 1),
            percent(line.second, 1),
            points(line.difference, 1),
            f"{points(line.low, 1)} to {points(line.high, 1)}",
            Text(_way(line), style="bold") if line.moved else "",
        )
    table.caption = "intervals of independent rates (Newcombe); moved: the interval leaves out 0"
    yield table
    for words, names in (
        ("in the first receipt alone", comparison.only_first),
        ("in the second receipt alone", comparison.only_second),
        ("no longer measured", [f"{metric} in {name}" for name, metric in comparison.gone]),
    ):
        if names:
            yield safe(f"{words}: {'; '.join(names)}")


def _way(line: Line) -> str:
    return "moved up" if line.difference > 0 else "moved down"


def fired_text(fired: Sequence[tuple[Gate, Line]]) -> Iterator[Text]:
    """One line for each gate that fires and each condition that makes it."""
    for gate, line in fired:
        sure = "" if line.moved else ", though the interval holds 0"
        yield safe(
            f"gate fires: {gate.text}: {line.condition} went from {percent(line.first, 1)} to "
            f"{percent(line.second, 1)} (n {line.n_first} and {line.n_second}{sure})",
            "bold red",
        )


def geometry_table(found: Measurements) -> Table:
    """Reliability of each direction: the range over layers of the mean agreement of halves."""
    table = _table("agreement of random halves", "direction", "halves by", "#units", "#over layers")
    for name, measured in found.directions.items():
        for unit, halves in measured.reliability.items():
            span = f"{signed(min(halves.mean))} to {signed(max(halves.mean))}"
            table.add_row(safe(name), safe(unit), str(halves.units), span)
        if measured.not_measured:
            table.add_row(safe(name), safe(measured.not_measured), "", "")
    return table
