"""Compiled programs are kept across runs, so that a second run or notebook starts at once."""

from __future__ import annotations

import os


def use_compile_cache() -> None:
    """Let JAX keep compiled programs on disk, in $JAX_COMPILATION_CACHE_DIR or our cache."""
    import jax

    from jaxsteer.data.wheels import cache_dir

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_dir() / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
