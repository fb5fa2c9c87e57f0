"""What all commands share: the app, common options, the compilation cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxsteer.programs import use_compile_cache

__all__ = ["DEMO_MODEL", "ModelOption", "app", "use_compile_cache"]

app = typer.Typer(
    help="Steer chat models at explicit taps of the residual stream, and measure their refusals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
DEMO_MODEL = Path("checkpoints/smollm2-135m")
ModelOption = Annotated[Path, typer.Option(help="A converted checkpoint.")]
