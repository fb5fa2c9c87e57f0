"""What all commands share: the app, common options, the compilation cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxsteer.programs import use_compile_cache

if TYPE_CHECKING:
    from jaxsteer.chatmodel import ChatModel

__all__ = ["DEMO_MODEL", "MeshOption", "ModelOption", "app", "open_model", "use_compile_cache"]

app = typer.Typer(
    help="Steer chat models at explicit taps of the residual stream, and measure their refusals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
DEMO_MODEL = Path("checkpoints/smollm2-135m")
ModelOption = Annotated[Path, typer.Option(help="A converted checkpoint.")]
MeshOption = Annotated[
    str | None,
    typer.Option(help="Spread model and rows over this machine's devices: data=2,model=4."),
]


def open_model(folder: Path, mesh: str | None) -> ChatModel:
    """Load a checkpoint, onto a mesh if one is asked for; what that cannot split is said."""
    from jaxsteer import parallel
    from jaxsteer.chatmodel import ChatModel

    if mesh is None:
        return ChatModel.load(folder)
    spread = parallel.mesh(mesh)
    loaded = ChatModel.load(folder, mesh=spread)
    for note in parallel.notes(loaded.config, spread):
        typer.echo(f"mesh {mesh}: {note}", err=True)
    return loaded
