"""What all notebooks begin with: a menu of results, one header, and a view kept in the address.

The address of a page holds the chosen results and the values of its controls, so that a copied
address opens the same view, and the links from one notebook to the next carry the results along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlencode

import altair as alt
import marimo as mo

from jaxsteer.errors import UserError
from jaxsteer.evidence.browse import Opened, finished, header
from jaxsteer.evidence.charts.marks import Panels, csv, escaped, markdown_table

DEFAULT = "results/smollm2-demo-smollm2-135m"
INERT = (
    "This page is a copy with its results inside. Menus, sliders, brushes and buttons need the "
    "running notebook (`make notebooks`) and do nothing here; values under the pointer still show."
)
STYLE = "<style>.js-head :is(td, th) { padding: 1px 10px 1px 0 !important }</style>"
T = TypeVar("T")


def results_menu(root: Path) -> mo.ui.dropdown:
    """The finished studies below `root`, and the folder that the address or `--results` names."""
    given = str(mo.cli_args().get("results") or DEFAULT)
    there = dict.fromkeys([given, *finished(root), str(mo.query_params().get("results", given))])
    return menu("results", {name: name for name in there}, label="results", full_width=True)


def menu(key: str, options: dict[str, Any], first: str = "", **shown: Any) -> mo.ui.dropdown:
    """A dropdown whose choice is kept in the address.

    Args:
      key: its name there.
      options: values by name.
      first: the name chosen at first, by default the first one.
      shown: further arguments of the dropdown.
    """
    names = {value: name for name, value in options.items()}
    bound = kept(key, first or next(iter(options)), options)
    write = bound.pop("on_change")
    return mo.ui.dropdown(options, on_change=lambda value: write(names[value]), **bound, **shown)


def kept(key: str, first: T, allowed: Iterable[T]) -> dict[str, Any]:
    """`value` and `on_change` of a control whose value is kept in the address.

    Args:
      key: its name there.
      first: the value where the address has none that is allowed.
      allowed: the possible values: texts or numbers.
    """
    address = mo.query_params()
    value = {_text(value): value for value in allowed}.get(str(address.get(key)), first)
    return {"value": value, "on_change": lambda now: address.set(key, _text(now))}


def _text(value: object) -> str:
    # A browser may send 4 for 4.0.
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def attempt(load: Callable[..., T], *given: Any) -> T:
    """What a function returns; where its input is at fault, the cell ends with the reason."""
    try:
        return load(*given)
    except UserError as error:
        if mo.app_meta().mode == "script":
            print(error)
        mo.stop(True, note(str(error)))
        raise


def note(*sentences: str, kind: Literal["warn", "info"] = "warn") -> mo.Html:
    """Sentences in one box, as plain text."""
    lines = [escaped(sentence) for sentence in sentences]
    return mo.callout(mo.md("\n".join(f"- {s}" for s in lines) if lines[1:] else lines[0]), kind)


def chart(drawn: alt.LayerChart | Panels) -> mo.Html:
    """A chart, or the panels of one finding, with a link that saves its data."""
    shown = mo.Html(drawn.html(mo.as_html)) if isinstance(drawn, Panels) else drawn
    return mo.vstack([shown, mo.Html(csv(drawn))])


def head(root: Path, here: str, results: str, opened: Opened | None = None) -> mo.Html:
    """The header of a notebook, or what is wrong with its results.

    Args:
      root: the repository, whose `notebooks` it links to.
      here: the notebook's file name.
      results: the results folder, absolute or relative to `root`.
      opened: the same folder, if its rows are open already.
    """
    found = attempt(header, root / results, opened)
    exported, file = mo.cli_args().get("exported"), mo.query_params().get("file")
    links = []
    for page in sorted((root / "notebooks").glob("[0-9]_*.py")):
        title = page.stem.replace("_", " ")
        asked = urlencode({"file": Path(str(file)).with_name(page.name), "results": results})
        link = f"?{asked}" if file else f"{page.stem}.html"
        links.append(f"**{title}**" if page.name == here else f"[{title}]({link})")
    # A notebook that is served alone has no neighbours.
    parts = [mo.md(" · ".join(links))] if file or exported else []
    parts += [note(INERT, kind="info")] if exported else []
    if found.facts:
        table = mo.md(markdown_table(["", "", "how it was chosen"], found.facts)).text
        parts.append(mo.Html(f'{STYLE}<div class="js-head">{table}</div>'))
    return mo.vstack([*parts, *([note(*found.warnings)] if found.warnings else [])])
