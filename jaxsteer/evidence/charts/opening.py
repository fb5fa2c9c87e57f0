"""What all notebooks begin with: a menu of results, one header, and a view kept in the address.

The address of a page holds the chosen results and the values of its controls, so that a copied
address opens the same view, and the links from one notebook to the next carry the results along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlencode

import altair as alt
import marimo as mo

from jaxsteer.errors import UserError
from jaxsteer.evidence.browse import finished, header
from jaxsteer.evidence.charts.marks import Panels, csv, escaped, markdown_table
from jaxsteer.study.results import Results

DEFAULT = "results/smollm2-demo-smollm2-135m"
INERT = (
    "This page is a copy with its results inside. Controls and brushes need the running notebook "
    "(`make notebooks`) and do nothing here{}. Values under the pointer still show, and charts and "
    "their data can still be saved."
)
COLUMNS = (
    "display: grid; gap: 0.5rem 1.5rem; align-items: start; overflow-x: auto; "
    "grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr))"
)
STYLE = "<style>.js-head :is(td, th) { padding: 1px 10px 1px 0 !important }</style>"
T = TypeVar("T")


def results_menu(root: Path) -> mo.ui.dropdown:
    """The finished studies below `root`, and the folder that the address or `--results` names."""
    given = str(mo.cli_args().get("results") or DEFAULT)
    address = mo.query_params()
    there = dict.fromkeys([given, *finished(root), str(address.get("results", given))])

    def forget(_: str) -> None:
        # The choices in the address are of the study that was shown.
        for key in {*address} - {"file", "results"}:
            address.remove(key)

    names = {name: name for name in there}
    return menu("results", names, also=forget, label="results", full_width=True)


def menu(key: str, options: dict[str, Any], first: str = "", **shown: Any) -> mo.ui.dropdown:
    """A dropdown whose choice is kept in the address.

    Args:
      key: its name there.
      options: values by name.
      first: the name chosen at first, by default the first one.
      shown: further arguments of the dropdown; `also` is called with a new choice.
    """
    names = {value: name for name, value in options.items()}
    bound, also = kept(key, first or next(iter(options)), options), shown.pop("also", bool)

    def chosen(value: Any) -> None:
        write(key, names[value])
        also(value)

    return mo.ui.dropdown(options, **{**bound, "on_change": chosen}, **shown)


def kept(key: str, first: T, allowed: Iterable[T]) -> dict[str, Any]:
    """`value` and `on_change` of a control whose value is kept in the address.

    Args:
      key: its name there.
      first: the value where the address has none that is allowed.
      allowed: the possible values: texts or numbers.
    """
    asked = str(mo.query_params().get(key))
    value = {_text(value): value for value in allowed}.get(asked, first)
    return {"value": value, "on_change": lambda now: write(key, now)}


def slider(
    label: str, values: Sequence[float], first: float, step: float = 1, key: str = ""
) -> mo.ui.slider:
    """A slider from the first to the last of the values; with a key it is kept in the address."""
    bound = kept(key, first, values) if key else {"value": first}
    shown: dict[str, Any] = {"label": label, "show_value": True, "debounce": True}
    return mo.ui.slider(values[0], values[-1], step, **shown, **bound)


def switch(key: str, label: str, first: bool = False) -> mo.ui.switch:
    """A switch whose value is kept in the address."""
    return mo.ui.switch(label=label, **kept(key, first, (False, True)))


def _text(value: object) -> str:
    # A browser may send 4 for 4.0.
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def kept_all(key: str, options: Sequence[str]) -> dict[str, Any]:
    """`options`, `value` and `on_change` of a control of several texts, all of them at first."""
    named = str(mo.query_params().get(key, ",".join(options))).split(",")
    return {
        "options": options,
        "value": [name for name in options if name in named],
        "on_change": lambda now: write(key, ",".join(now) or "none"),
    }


def recall(first: Any, allowed: Mapping[str, Iterable[Any]]) -> Any:
    """A dataclass, with the fields that the address names where it allows their values."""
    found = {key: kept(key, getattr(first, key), allowed[key])["value"] for key in allowed}
    return dataclasses.replace(first, **found)


def remember(now: Any, first: Any) -> None:
    """Write the fields of a dataclass that are not as at first into the address."""
    for key, value in vars(now).items():
        write(key, None if value == getattr(first, key) else value)


def write(key: str, value: object) -> None:
    """Keep a value in the address; None or "" takes it out."""
    address, text = mo.query_params(), "" if value is None else _text(value)
    if text != address.get(key, ""):
        address.set(key, text) if text else address.remove(key)


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


def chart(drawn: alt.Chart | alt.LayerChart | Panels, shown: object = None) -> mo.Html:
    """A chart, or the panels of one finding, with a link that saves its data.

    Args:
      drawn: the chart.
      shown: what draws it, such as `mo.ui.altair_chart` of it.
    """
    if shown is None:
        shown = mo.Html(drawn.html(mo.as_html)) if isinstance(drawn, Panels) else drawn
    return mo.vstack([shown, mo.Html(csv(drawn))])


def beside(*items: object) -> mo.Html:
    """Items beside each other, or below each other where the page is narrow."""
    cells = [f'<div style="min-width: 0">{mo.as_html(item).text}</div>' for item in items]
    return mo.Html(f'<div style="{COLUMNS}">{"".join(cells)}</div>')


def head(
    root: Path, here: str, results: str, opened: Results | None = None, alive: str = ""
) -> mo.Html:
    """The header of a notebook, or what is wrong with its results.

    Args:
      root: the repository, whose `notebooks` it links to.
      here: the notebook's file name.
      results: the results folder, absolute or relative to `root`.
      opened: the same folder, if its rows are open already.
      alive: what works in an exported page, besides what works in all of them.
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
    parts += [note(INERT.format(alive and f", except {alive}"), kind="info")] if exported else []
    if found.facts:
        table = mo.md(markdown_table(["", "", "how it was chosen"], found.facts)).text
        parts.append(mo.Html(f'{STYLE}<div class="js-head">{table}</div>'))
    return mo.vstack([*parts, *([note(*found.warnings)] if found.warnings else [])])
