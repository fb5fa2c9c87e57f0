"""The entry point: registers the commands, turns errors into one line and signals into a stop."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import NoReturn

from jaxsteer.cli import (  # noqa: F401 (importing registers the commands)
    app,
    models,
    results,
    studies,
)
from jaxsteer.errors import UserError
from jaxsteer.generation.distributed import leave
from jaxsteer.words import plain

# Commands that continue a stopped run when they are run again.
GO_ON = {"prepare", "sweep", "judge"}


class Stopped(SystemExit):
    """A stop signal arrived (Ctrl-C, or a preemption): unwind, then say how to continue.

    It is a `SystemExit`, because asyncio logs any other exception of a handler and continues.
    """

    def __init__(self, number: int):
        self.number = number


# The stop signals received so far.
_asked: list[int] = []


def _stop(number: int, frame: object) -> None:
    _asked.append(number)
    raise Stopped(number)


def _while_stopping(error: BaseException | None) -> bool:
    """True if the error was raised while handling a stop, so the last rows may not be saved."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def _say_stopped(number: int) -> NoReturn:
    # A second Ctrl-C would interrupt Python's own shutdown and print a traceback.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    kept = ""
    if GO_ON.intersection(sys.argv[1:2]):
        # The same command, with --fresh, would start again from no rows.
        fresh = "--fresh" in sys.argv
        again = "run again without --fresh to continue it" if fresh else "run again to continue"
        kept = f"; what is finished is kept, {again}"
    print(f"jaxsteer: stopped{kept}", file=sys.stderr)
    leave(128 + number)


def main() -> None:
    """Entry point: user errors become one line on stderr and exit code 2."""
    _asked.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except UserError as error:
        # A message may quote names from files; their control characters must not be printed.
        print(f"jaxsteer: {plain(str(error))}", file=sys.stderr)
        leave(2)
    except Stopped as stopped:
        _say_stopped(stopped.number)
    except Exception as error:
        if _asked and not _while_stopping(error):
            # Native code that called Python turned the stop into an error of its own.
            _say_stopped(_asked[0])
        if isinstance(error, OSError) and error.filename is not None:
            # The system rejects a path that the user gave: name too long, no permission.
            print(f"jaxsteer: {plain(str(error.filename))}: {error.strerror}", file=sys.stderr)
            leave(2)
        traceback.print_exc()
        leave(1)


if __name__ == "__main__":
    main()
