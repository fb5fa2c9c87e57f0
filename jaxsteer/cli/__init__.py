"""The command line: every command is a call into the library that a notebook could make too.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys
import traceback
from typing import NoReturn

from jaxsteer.cli import (  # noqa: F401 (each registers itself)
    judges,
    models,
    receipts,
    studies,
)
from jaxsteer.cli.common import app
from jaxsteer.errors import UserError
from jaxsteer.generation.distributed import leave
from jaxsteer.terminal import plain

# Commands of which another run goes on where one was stopped.
GO_ON = {"prepare", "sweep", "judge"}


class Stopped(SystemExit):
    """A signal asked us to end (Ctrl-C, or a machine taken away): unwind, then say how to go on.

    A `SystemExit`, because asyncio logs any other exception of a handler and goes on.
    """

    def __init__(self, number: int):
        self.number = number


# Signals that asked.
_asked: list[int] = []


def _stop(number: int, frame: object) -> None:
    _asked.append(number)
    raise Stopped(number)


def _while_stopping(error: BaseException | None) -> bool:
    """Whether it is of what was done on account of a stop, so that not all may have been kept."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def _say_stopped(number: int) -> NoReturn:
    # A second Ctrl-C would land in what Python does at its end, and show as a traceback.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    kept = ""
    if GO_ON.intersection(sys.argv[1:2]):
        # The very same command would begin anew. What is kept may still be the rows of before.
        fresh = "--fresh" in sys.argv
        again = "run again without --fresh to go on with it" if fresh else "run again to go on"
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
        # A message may quote names from files, which must not drive the terminal.
        print(f"jaxsteer: {plain(str(error))}", file=sys.stderr)
        leave(2)
    except Stopped as stopped:
        _say_stopped(stopped.number)
    except Exception as error:
        if _asked and not _while_stopping(error):
            # Native code that was calling Python made an error of its own of it.
            _say_stopped(_asked[0])
        if isinstance(error, OSError) and error.filename is not None:
            # The system's own word on a path that a person gave: too long a name, no permission.
            print(f"jaxsteer: {plain(str(error.filename))}: {error.strerror}", file=sys.stderr)
            leave(2)
        traceback.print_exc()
        leave(1)
