"""Cells and tables of the page: every text that enters it is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from jaxsteer.terminal import plain

HARMFUL = "strongreject"
MOST = 40  # rows of any table; a page is read, receipt.json holds everything


def esc(text: object) -> str:
    """Text as text: markup escaped, control and direction characters spelled out."""
    return html.escape(plain(str(text)))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of ready-made cells; columns whose head begins with # are numbers."""
    classes = [' class="n"' if name.startswith("#") else "" for name in head]
    lines = [
        "".join(f"<th{c}>{name.lstrip('#')}</th>" for c, name in zip(classes, head, strict=True))
    ]
    body = list(rows)
    for row in body[:MOST]:
        lines.append("".join(f"<td{c}>{cell}</td>" for c, cell in zip(classes, row, strict=True)))
    more = (
        f'<p class="note">{len(body) - MOST} more in receipt.json.</p>' if len(body) > MOST else ""
    )
    cells = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="{kind}">\n{cells}\n</table>{more}'


def family_words(name: str) -> str:
    """A prompt family as readers call it."""
    return {HARMFUL: "harmful"}.get(name, esc(name))
