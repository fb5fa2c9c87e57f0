"""Model text in a page: escaped, its control characters visible, blurred where it may be harmful.

Model output and prompts are hostile text. These functions are the only way a notebook shows them:
the result is HTML in which nothing of the text is markup, markdown or a formula.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from jaxsteer.evidence.charts.theme import PALETTE, Role
from jaxsteer.terminal import plain

STYLE = """<style>
.js-cards { display: flex; flex-wrap: wrap; gap: 14px; }
.js-card { flex: 1 1 260px; min-width: 0; border-left: 4px solid var(--role);
  padding: 2px 14px; color: inherit; }
.js-card h4 { margin: 0 0 4px; font-size: 0.85rem; font-weight: 700; color: var(--role); }
.js-card p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 4.5em; }
.js-veil { filter: blur(7px); user-select: none; }
.js-note { opacity: 0.75; font-size: 0.85rem; margin: 6px 0 0 18px; }
</style>"""


def escaped(text: str) -> str:
    """Text as HTML that shows exactly its characters.

    Markdown and formula marks are escaped too, so that the result may stand in `mo.md`.

    >>> escaped("<b>*x*</b>")
    '&lt;b&gt;&#42;x&#42;&lt;/b&gt;'
    """
    marks = "*_`$\\[]|~#:+-"
    return "".join(f"&#{ord(c)};" if c in marks else html.escape(c) for c in plain(text))


def card(title: str, text: str, role: Role, *, veiled: bool = False) -> str:
    """One reply as an HTML card in its role's colour; a veiled one is blurred and not selectable.

    A veil is for the eyes: the text is in the page. Ask the reader before lifting it.
    """
    veil = ' class="js-veil" aria-hidden="true"' if veiled else ""
    return (
        f'<div class="js-card" style="--role: {PALETTE[role]}" data-role="{role}">'
        f"<h4>{html.escape(plain(title))}</h4><p{veil}>{html.escape(plain(text))}</p></div>"
    )


def cards(*made: str, note: str = "") -> str:
    """Cards side by side, with a note below; they wrap under each other on a narrow page."""
    below = f'<p class="js-note">{html.escape(plain(note))}</p>' if note else ""
    return f'{STYLE}<div class="js-cards">{"".join(made)}</div>{below}'


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose cells are plain text, whatever they hold.

    >>> print(markdown_table(["a"], [["<b>|"]]))
    | a |
    | :--- |
    | &lt;b&gt;&#124; |
    """
    lines = [f"| {' | '.join(head)} |", f"|{' :--- |' * len(head)}"]
    for row in rows:
        cells = [escaped(str(cell).replace("\n", " ")) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
