"""The command line: each command calls library functions that a notebook can call too.

This module holds what all commands share: the app, common options, the compilation cache. Slow
imports happen inside the commands, so that `--help` is fast.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from jaxsteer.errors import UserError
from jaxsteer.generation.compile_cache import use_compile_cache

if TYPE_CHECKING:
    from jaxsteer.api import Model

__all__ = [
    "DEMO_MODEL",
    "MeshOption",
    "ModelOption",
    "app",
    "check_device",
    "open_model",
    "use_compile_cache",
]

app = typer.Typer(
    help="Steer chat models at explicit taps of the residual stream, and measure their refusals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
DEMO_MODEL = "smollm2-135m"
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
