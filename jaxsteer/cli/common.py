"""What all commands share: the app, common options, the compilation cache, tables on the terminal.

Slow imports happen inside the commands, so that `--help` is fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from jaxsteer.data.wheels import use_compile_cache
from jaxsteer.errors import UserError, heed_stop
from jaxsteer.words import plain, signed

if TYPE_CHECKING:
    from jaxsteer.api import Model
    from jaxsteer.receipt.statement import Statement

app = typer.Typer(
    help="Steer chat models at explicit taps of the residual stream, and measure their refusals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
DEMO_MODEL = "smollm2-135m"
STYLES = {
    "confirmed": "green",
    "not confirmed": "red",
    "not testable": "yellow",
    "not tested": "dim",
    "ok": "green",
    "mismatch": "bold red",
    "unchecked": "dim",
}
ModelOption = Annotated[
    str,
    typer.Option(
        help="Checkpoint folder, shipped name, Hugging Face folder, .gguf file or hub id; a source "
        "that is not a checkpoint is converted once and kept."
    ),
]
MeshOption = Annotated[
    str | None,
    typer.Option(help="Split model and rows over this machine's devices: data=2,model=4."),
]


def check_device() -> None:
    """Check that JAX has a device to run on, before any file is read.

    Raises:
      UserError: naming what JAX_PLATFORMS asks for.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        # For a missing GPU, JAX raises an AssertionError without a message.
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "there is none"
        raise UserError(
            f"JAX finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} "
            f"({' '.join(reason.split())[:160]}); install what it needs, or set JAX_PLATFORMS=cpu"
        ) from None
    # The imports before this take seconds.
    heed_stop()


def open_model(source: str, mesh: str | None) -> Model:
    """Load a model, onto a mesh if one is given, and print what the mesh cannot split."""
    from jaxsteer import api
    from jaxsteer.model import sharding

    check_device()
    use_compile_cache()
    loaded = api.load(source, mesh=mesh)
    if loaded.mesh is not None:
        for note in sharding.notes(loaded.config, loaded.mesh):
            typer.echo(f"mesh {mesh}: {note}", err=True)
    return loaded


def console() -> Console:
    """Standard output; a pipe gets lines of one width, whatever the terminal is."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


def safe(text: object, style: str = "") -> Text:
    """Text that can neither drive the terminal nor be read as markup, on one line."""
    return Text(plain(str(text)).replace("\n", " "), style=style)


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    numbers: Sequence[str] = (),
) -> Table:
    """A table whose every cell goes through `safe`; `numbers` names the right-aligned columns.

    Numbers keep to one line. A column of them that repeats one value is said in the title instead.
    """
    cells = [[cell if isinstance(cell, Text) else safe(cell) for cell in row] for row in rows]
    shown, said = [], []
    for at, name in enumerate(columns):
        values = {row[at].plain for row in cells}
        if name in numbers and len(cells) > 1 and len(values) == 1:
            said.append(f"{name}: {values.pop()}")
        else:
            shown.append(at)
    made = Table(
        title=safe("; ".join([title, *said]), "table.title"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for at in shown:
        number = columns[at] in numbers
        widest = max((row[at].cell_len for row in cells), default=0) if number else None
        made.add_column(columns[at], justify="right" if number else "left", min_width=widest)
    for row in cells:
        made.add_row(*(row[at] for at in shown))
    return made


def claims_table(receipt: Statement) -> RenderableType:
    """The study's claims with their verdicts: what is confirmed comes first."""
    from jaxsteer.evidence.claims import in_order
    from jaxsteer.receipt.statement import known, poorly_known

    p = receipt.predicate
    if not p.claims:
        return safe(f"{p.study.name} makes no claims")
    rows = [(c.name, safe(c.verdict, STYLES[c.verdict]), c.reason) for c in in_order(p.claims)]
    made = table(f"claims of {p.study.name}", ("claim", "verdict", "why"), rows)
    poor = [
        f"{name} at layer {layer} ({signed(cosine)})"
        for claim in p.claims
        for (name, layer), cosine in known(p, claim).items()
        if cosine is not None and poorly_known(cosine)
    ]
    if poor:
        words = ", ".join(dict.fromkeys(poor))
        made.caption = safe(f"poorly known directions, by the agreement of halves: {words}")
    return made
