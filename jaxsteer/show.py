"""Show results on a terminal: tables, and model text with its control characters defused."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text


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
            f"{row['refusal']:.0%}",
            f"{row['refusal_low']:.0%} to {row['refusal_high']:.0%}",
            f"{row['degenerate']:.0%}",
            f"{row['complied']:.0%}",
        )
    return table
