"""What all commands share: the app, common options, the compilation cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Steer chat models at explicit taps of the residual stream, and measure their refusals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
DEMO_MODEL = Path("checkpoints/smollm2-135m")
ModelOption = Annotated[Path, typer.Option(help="A converted checkpoint.")]


def use_compile_cache() -> None:
    """Keep compiled programs across runs, so that a second run starts at once."""
    import jax

    from jaxsteer.fetch import cache_dir

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_dir() / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
