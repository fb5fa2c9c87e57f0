"""Memory of the host."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Give the system the memory that was freed; done in a tenth of a second.

    glibc keeps what threads free for those threads, and so a process that runs studies one after
    the other holds more after each. Other systems need no asking.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        # musl, which keeps nothing, has none.
        if trim is not None:
            trim(0)
