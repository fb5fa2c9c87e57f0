"""The entry point: registers the commands, turns errors into one line and signals into a stop.

Most of the package is imported after `listen`, so that a stop signal is heard from the start.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from typing import NoReturn

from jaxsteer.errors import Stopped, UserError, heed_stop, listen, one_line
from jaxsteer.generation.distributed import leave, sharing

# Commands that continue a stopped run when they are run again.
GO_ON = {"prepare", "sweep", "judge"}


def _while_stopping(error: BaseException | None) -> bool:
    """Whether the error was raised while a stop unwound, so that the last rows may not be saved."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def _say_stopped(number: int) -> NoReturn:
    kept = ""
    if GO_ON.intersection(sys.argv[1:2]):
        # The same command, with --fresh, would start again from no rows.
        fresh = "--fresh" in sys.argv
        again = "run again without --fresh to continue it" if fresh else "run again to continue"
        kept = f"; what is finished is kept, {again}"
    print(f"jaxsteer: stopped{kept}", file=sys.stderr)
    leave(128 + number)


def _say_fault(error: Exception) -> NoReturn:
    """One line on an error of our own, with the version and where its traceback was written."""
    import importlib.metadata

    from jaxsteer.data.wheels import cache_dir
    from jaxsteer.words import plain, say

    path = cache_dir() / "faults" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    trace = "".join(traceback.format_exception(error))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trace, encoding="utf-8", errors="backslashreplace")
        where = f"its traceback is in {path}"
    except OSError:
        where = f"its traceback cannot be written to {path}:\n{trace}"
    said = f"{type(error).__name__}: {one_line(error)}"
    version = importlib.metadata.version("jaxsteer")
    say(plain(f"jaxsteer: a fault of jaxsteer {version} ({said}); please report it, {where}"))
    leave(1)


def main() -> None:
    """Run the command; user errors become one line on stderr and exit code 2.

    Raises:
      SystemExit: always, with the exit code.
    """
    listen()
    # The imports of the modules with commands register these.
    from jaxsteer.cli import common, models, results, studies  # noqa: F401
    from jaxsteer.words import plain

    try:
        try:
            common.app()
        except BaseException as error:
            # A stop that no loop looked at is heard here, unless this went wrong while stopping.
            if not _while_stopping(error):
                heed_stop()
            raise
    except UserError as error:
        # A message may quote names from files; their control characters must not be printed.
        print(f"jaxsteer: {plain(str(error))}", file=sys.stderr)
        leave(2)
    except Stopped as stopped:
        _say_stopped(stopped.number)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            # The system rejects a path that the user gave: name too long, no permission.
            print(f"jaxsteer: {plain(str(error.filename))}: {error.strerror}", file=sys.stderr)
            leave(2)
        _say_fault(error)


def script() -> None:
    """Entry point: `main`, and the end of the process. All is written then, so it ends at once.

    Python's own shutdown takes up to a second after JAX was used, and hears no signal. A process
    that shares a run goes through it, since JAX then waits for the other processes.
    """
    try:
        main()
    except SystemExit as ended:
        if sharing():
            raise
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 0)


if __name__ == "__main__":
    script()
