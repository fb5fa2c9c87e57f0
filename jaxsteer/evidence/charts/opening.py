"""What all notebooks begin with: a menu of results, one header, and a view kept in the address.

The address of a page holds the chosen results and the values of its controls, so that a copied
address opens the same view, and the links from one notebook to the next carry the results along.

A results folder is opened whether it is finished or not. `results.load` refuses an unfinished one,
because receipts and judges need all rows. A notebook may show the rows so far, page by page, with a
banner that says what is missing. `header` says what was run, how each choice was made, and what to
read with care.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlencode

import altair as alt
import marimo as mo
import polars as pl

from jaxsteer.directions import direction as directions
from jaxsteer.errors import UserError
from jaxsteer.evidence import claims
from jaxsteer.evidence.charts.marks import Panels, csv, escaped, markdown_table
from jaxsteer.evidence.reliability import WELL_KNOWN
from jaxsteer.files import meant
from jaxsteer.judges.human import agreements
from jaxsteer.stats import mcnemar
from jaxsteer.study import prepare, results, selection
from jaxsteer.study.results import Results, RunRecord, set_words
from jaxsteer.words import layer_list, signed

ALL = "all"
UNKNOWN = "(this prompt's text is in none of the data sets on this machine)"
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


# -- Results ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a page on a results folder begins with.

    Attributes:
      facts: what, its value, and how it was chosen.
      warnings: what to read with care, one sentence each.
    """

    facts: tuple[tuple[str, str, str], ...]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """One page of rows.

    Attributes:
      rows: the rows of this page, at most as many as asked for.
      number: which page, from 1; the last one when a later one was asked for.
      pages: how many there are, at least 1.
      total: rows that match the choice.
    """

    rows: pl.DataFrame
    number: int
    pages: int
    total: int


def open_results(folder: Path) -> Results:
    """Open a results folder, finished or not: of an unfinished run, the rows so far.

    Raises:
      UserError: there are no rows yet, or the folder is damaged; says what to run.
    """
    run = results.read_run(folder)
    if run is None:
        raise UserError(
            f"There are no results in {folder}{meant(folder)}: run `make demo` once (or "
            "`jaxsteer sweep STUDY`), then open this page again."
        )
    finished = (folder / "responses.parquet").is_file()
    found = results.load(folder) if finished else _so_far(folder, run)
    if found.rows.is_empty():
        raise UserError(
            f"{folder} holds no rows yet: run the same `jaxsteer sweep` again to continue, then "
            "open this page again."
        )
    return found


def _so_far(folder: Path, run: RunRecord) -> Results:
    done = results.read_shards(folder / "shards", run.key)
    rows = pl.concat(done) if done else pl.DataFrame(schema=results.SCHEMA)
    # Shards are in the order of their hashes; a finished table is in that of its conditions.
    order = {c.name: i for i, c in enumerate(run.conditions)}
    rank = pl.col("condition").replace_strict(order, default=len(order), return_dtype=pl.Int64)
    return Results(folder=folder, run=run, rows=rows.sort(rank, "family"), verdicts={})


def banner(found: Results) -> Iterator[str]:
    """What is missing, one sentence each; nothing for a complete, judged study."""
    run = found.run
    wanted = {c.name: sum(run.size(c, family) for family in run.prompts) for c in run.conditions}
    there = dict(found.rows.group_by("condition").len().iter_rows())
    short = [name for name, n in wanted.items() if there.get(name, 0) < n]
    if short:
        yield (
            f"Partial results: {found.rows.height:,} of {sum(wanted.values()):,} rows, "
            f"{len(short)} of {len(wanted)} conditions incomplete. Claims on those are not tested; "
            "the same `jaxsteer sweep` again runs the rest."
        )
    unscored = int((found.rows["label"] == "complied-unscored").sum())
    if unscored:
        yield (
            f"No judge of harm has scored {unscored:,} replies that were neither refused nor "
            "broken. Whether they are a bypass is not known: `jaxsteer judge` asks one."
        )


def finished(root: Path) -> list[str]:
    """The finished studies below a folder's `results`, as paths relative to the folder."""
    found = (root / "results").glob(f"*/{results.RUN}")
    done = [path.parent for path in found if (path.parent / "responses.parquet").is_file()]
    return sorted(str(path.relative_to(root)) for path in done)


def header(folder: Path, opened: Results | None = None) -> Header:
    """What a page on a results folder begins with.

    Args:
      folder: the results folder; its rows may be missing, and its run record too.
      opened: the same folder, if it is open already.

    Raises:
      UserError: no such folder, or a damaged run record.
    """
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}{meant(folder)}: choose another study, or run `make demo` "
            "once and open this page again."
        )
    run = results.read_run(folder)
    if run is None:
        unknown = f"{folder} holds no run record: which model and study it is from is not known."
        return Header(facts=(), warnings=(unknown,))
    missing = banner(opened) if opened else ()
    warnings = [*missing, *_near_misses(run), *_poorly_known(folder, run)]
    with contextlib.suppress(UserError):
        found = opened or open_results(folder)
        warnings += [*_untestable(found), *_one_sided(found)]
    return Header(facts=tuple(_facts(run)), warnings=tuple(warnings))


# What a rule may choose, in words.
_CHOICES = {"policy": "policy", "steer": "layer", "dose": "strength", "refusal": "layer"}
_CHOICES |= {"window": "layers", "late_refusal": "layer", "refusal_dose": "strength"}


def _facts(run: RunRecord) -> Iterator[tuple[str, str, str]]:
    spec, tried, layers = run.study, run.candidates, run.layers
    at = {name: f"resid_post.{layer}" for name, layer in layers.items()}
    window = range(layers.get("window", 0), layers.get("window_last", layers.get("window", 0)) + 1)
    seeds = sorted({c.seed for c in run.conditions if c.seed is not None})
    n, held = spec.selection.prompts, spec.selection.refusal_validation
    chosen, others = spec.selection.harmful.name, spec.selection.harmless.name
    on = f"on {n} {chosen} prompts"
    little = f"brings most refusal back and does little alone, {on}"
    yield "study", ": ".join(filter(None, [spec.name, spec.about])), ""
    yield "model", f"{run.model.name}, {run.model.dtype}", ""
    sizes = ", ".join(f"{known.n} {set_words(k, known.kind)}" for k, known in run.prompts.items())
    yield "prompts", sizes, "not used in any choice"
    for what, names, value, rule in (
        ("policy", "policy", run.policy.name,
         f"best of {len(tried.policies)} at telling {n} {chosen} from {others} prompts"),
        ("persona", "steer dose", f"added at {at.get('steer')}, x{run.dose:g}",
         f"least refusal of {len(tried.doses) - 1} without breaking the model, {on}"),
        ("refusal direction", "refusal", f"taken from {at.get('refusal')}",
         f"Arditi et al. 2024, on {held} {chosen} and {held} {others} prompts"),
        ("window", "window", f"resid_post.{layer_list(window)}", little),
        ("late refusal", "late_refusal refusal_dose",
         f"added at {at.get('late_refusal')}, x{run.refusal_dose:g}", little),
    ):  # fmt: skip
        asked = names.split()
        ruled = [_CHOICES[name] for name in asked if name in prepare.open_choices(spec)]
        how = f"{' and '.join(ruled)} by rule: {rule}" if ruled else "given in the study"
        if asked[0] in ("policy", *at):
            yield what, value, how
    yield "random seeds", layer_list(seeds) or "none", "given in the study" if seeds else ""


def _near_misses(run: RunRecord) -> Iterator[str]:
    tried = run.candidates
    for policy in tried.policies:
        said = selection.uninformative(policy, run.study.selection.least_youden)
        if policy.policy == run.policy.name and said:
            yield f"{said[0].upper()}{said[1:]}."
    for what, why in (
        ("refusal direction", tried.refusal_near_miss),
        ("window", tried.window_near_miss),
        ("late refusal", tried.late_near_miss),
    ):
        if why:
            yield f"The {what} failed its own selection and is only the nearest: {', '.join(why)}."


def _poorly_known(folder: Path, run: RunRecord) -> Iterator[str]:
    """Directions whose halves agree little at a layer that a condition takes them from."""
    path = folder / "directions.safetensors"
    known = directions.load(path) if path.is_file() else {}
    used = {
        (op.direction, op.layers[0] if op.measured_at is None else op.measured_at)
        for condition in run.conditions
        for op in condition.operations
        if op.direction in known
    }
    for name, layer in sorted(used):
        halves = known[name].provenance.get("split_half", {}).get("mean", [])
        if layer < len(halves) and halves[layer] < WELL_KNOWN:
            cosine = f"{signed(halves[layer])} at layer {layer} ({WELL_KNOWN:g} is asked)"
            yield f"The direction {name} is poorly known: halves of its samples agree to {cosine}."


def _untestable(found: Results) -> Iterator[str]:
    judged = claims.evaluate(found)
    for verdict in ("not testable", "not tested"):
        names = [claim.name for claim in judged if claim.verdict == verdict]
        if names:
            yield f"Claims {verdict}, {len(names)} of {len(judged)}: {'; '.join(names)}."


def _one_sided(found: Results) -> Iterator[str]:
    for pair in agreements(found.rows, found.verdicts):
        one, other = pair.only_first, pair.only_second
        if pair.question == "refusal" and mcnemar(one, other) < claims.ALPHA:
            yield (
                f"Judges of refusals differ to one side: {pair.first} alone calls {one} of "
                f"{pair.n} replies refusals, {pair.second} alone {other}."
            )


def page(
    rows: pl.DataFrame, *, condition: str = "", family: str = "", label: str = "",
    number: int = 1, size: int = 6,
) -> Page:  # fmt: skip
    """One page of the rows that match; an empty choice means all."""
    chosen = rows
    for column, value in (("condition", condition), ("family", family), ("label", label)):
        if value:
            chosen = chosen.filter(pl.col(column) == value)
    pages = max(1, -(-chosen.height // size))
    at = min(max(number, 1), pages)
    return Page(
        rows=chosen.slice((at - 1) * size, size), number=at, pages=pages, total=chosen.height
    )


def choices(rows: pl.DataFrame, column: str) -> dict[str, str]:
    """Options for one column: all rows as "", then its values in the table's order."""
    return {ALL: ""} | {v: v for v in rows[column].unique(maintain_order=True).to_list()}


def may_harm(kind: str) -> bool:
    """Whether prompts of a kind, and replies to them, are blurred until the reader asks."""
    return kind != "benign"


# -- The page --------------------------------------------------------------------------------------


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
