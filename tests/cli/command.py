"""Run the command line in a process of its own, as a user does, or sooner in this one."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys

import jax
import pytest

from jaxsteer.cli.__main__ import main

# The largest file this process may write is set before anything is imported: a real full disk
# needs a file system of its own, and fails the same writes in the same places.
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = ["jaxsteer", *sys.argv[2:]]
runpy.run_module("jaxsteer.cli", run_name="__main__")
"""


def jaxsteer(
    *arguments: object, file_limit: int | None = None, devices: int = 1, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`jaxsteer ARGUMENTS` on some virtual devices.

    With `file_limit`, writing more bytes than that to a file fails. `variables` go into its
    environment.
    """
    start = ["-m", "jaxsteer.cli"] if file_limit is None else ["-c", LIMITED, str(file_limit)]
    # Programs are kept where this process keeps its own.
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    env |= variables
    if file_limit is not None:
        # What it compiles would be cut off too, in a cache that all tests share.
        env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if devices > 1:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )


def here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`jaxsteer ARGUMENTS` in this process, which has imported and compiled most of it already."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxsteer", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert code is None or isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), err.getvalue())
