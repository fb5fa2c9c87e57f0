"""Run the command line in a process of its own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys

from jaxsteer.data.wheels import cache_dir

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
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache_dir() / "xla-tests")}
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
