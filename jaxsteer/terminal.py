"""Show results on a terminal: tables, and model text with its control characters defused."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from jaxsteer.words import percent, signed, span

if TYPE_CHECKING:
    # Typing only: it would have every command import JAX, --help among them.
    from jaxsteer.study.cost import Plan


def plain(text: str) -> str:
    """Model text that cannot drive a terminal: control and format characters become visible."""
    return "".join(
        c if c == "\n" or unicodedata.category(c)[0] != "C" else f"\\x{ord(c):02x}" for c in text
    )


def summary_table(summary: Sequence[dict[str, Any]], title: str) -> Table:
    """The study's table: one line per condition and prompt family."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "refused with Wilson 95 % interval; complied = neither, and not scored for harm"
    for name in ("condition", "prompts"):
        table.add_column(name)
    for name in ("n", "refused", "95 %", "degenerate", "complied"):
        table.add_column(name, justify="right")
    for row in summary:
        mark = " (cancels steering)" if row["cancels_steering"] else ""
        table.add_row(
            Text(plain(row["condition"]) + mark),
            row["family"],
            str(row["n"]),
            percent(row["refusal"]),
            span(row["refusal_low"], row["refusal_high"]),
            percent(row["degenerate"]),
            percent(row["complied"]),
        )
    return table


def plan_table(plan: Plan, title: str) -> Table:
    """A study's cost, one line a figure."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    megabytes = 1 / 2**20
    for name, value in (
        ("conditions (controls included)", f"{plan.conditions}"),
        ("rows", f"{plan.rows}"),
        ("prompt tokens", f"{plan.prompt_tokens:,} ({plan.own_tokens:,} not in a shared prefix)"),
        ("new tokens, at most", f"{plan.new_tokens:,}"),
        ("weights", f"{plan.weights_bytes * megabytes:,.0f} MiB"),
        ("cache of a batch", f"{plan.cache_bytes * megabytes:,.0f} MiB"),
        ("time of the rows here, rough", f"{plan.seconds / 60:,.1f} min"),
        ("still to choose", ", ".join(plan.open_choices) or "nothing"),
    ):
        table.add_row(name, value)
    return table


def modes_table(shifts: Sequence[dict[str, Any]], title: str) -> RenderableType:
    """How far each persona mode moves the last prompt token along each direction."""
    if not shifts:
        return Text(f"{title}: no shift by mode, for want of a direction or of a mode with a text")
    table = Table(title=f"{title}: shift by mode at {shifts[0]['at']}", title_justify="left")
    table.caption = (
        "in natural norms of the direction, against the policy alone, with 95 % interval"
    )
    names = list(dict.fromkeys(shift["direction"] for shift in shifts))
    table.add_column("mode")
    for name in names:
        table.add_column(name, justify="right")
    cells = {(shift["mode"], shift["direction"]): shift for shift in shifts}
    for mode in dict.fromkeys(shift["mode"] for shift in shifts):
        table.add_row(Text(plain(mode)), *(_shift(cells[mode, name]) for name in names))
    return table


def _shift(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{signed(found['shift'])} (one prompt)"
    return f"{signed(found['shift'])} ({signed(found['low'])} to {signed(found['high'])})"
