"""What ends a command early: bad input, said in one line, and the wish to stop.

The command line prints a `UserError` as a single line and exits with code 2; notebooks can catch
it. After `listen`, a stop signal (Ctrl-C, or a preemption) sets a flag and nothing more, so that it
interrupts no library half-way through a file. Every loop that takes long calls `heed_stop` at a
place where its files are whole.
"""

import os
import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# The stop signals heard so far.
_heard: list[int] = []


class UserError(Exception):
    """Bad input, said in one line.

    Raise it at the boundary (files, arguments, specs) with a message that names the thing,
    the place and the fix. Anything else that escapes is a bug.
    """


class Stopped(BaseException):
    """A stop signal was heard: unwind, then say how to continue.

    Not an `Exception`, so that no reader of damaged files takes it for damage.
    """

    def __init__(self, number: int):
        self.number = number


def listen() -> None:
    """Hear stop signals from now on; a second one ends the process at once."""
    _heard.clear()
    for number in SIGNALS:
        signal.signal(number, lambda heard, frame: _heard.append(heard))
    # Python runs handlers only between its own instructions, not while XLA compiles; the pipe gets
    # every signal at once, and a thread reads it.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_the_second, args=(reading,), daemon=True).start()


def _end_at_the_second(reading: int) -> None:
    heard = 0
    while number := os.read(reading, 1):
        heard += number[0] in SIGNALS
        if heard == 2:
            os.write(2, b"jaxsteer: stopped at once\n")
            os._exit(128 + number[0])


def heed_stop() -> None:
    """Raise `Stopped` if a stop signal was heard."""
    if _heard:
        raise Stopped(_heard[0])


def one_line(error: Exception) -> str:
    """What another library's error says, on one line and not at length."""
    return " ".join(str(error).split())[:160] or type(error).__name__
