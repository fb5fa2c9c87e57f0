"""Several engine loops side by side, each in a thread.

A program of a few rows leaves cores idle: between matrix products it has stretches of small
operations that only one core works on. So on a CPU there are two loops, each with half of the slots
and half of the rows: while the program of one is in such a stretch, the products of the other use
the idle core. An accelerator is busy with one loop, and would read its weights twice for two. A
mesh has one, since programs that exchange arrays must reach all devices in one order.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from jaxsteer.model.decoder import Params

# Fewest slots of one of two loops.
LEAST = 16

Step = TypeVar("Step")


def count(slots: int, params: Params) -> int:
    """How many loops share the slots: two on a CPU, unless each would have few slots.

    Of 256 slots on a CPU 2, of 16 it is 1; on an accelerator always 1.
    """
    devices = params["embed"]["embedding"].devices()
    one_cpu = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return 2 if one_cpu and slots % 2 == 0 and slots // 2 >= LEAST else 1


def interleave(loops: Sequence[Generator[Step, None, None]]) -> Generator[Step, None, None]:
    """Yield what the loops yield, as it comes; each takes its next step while the caller works.

    An exception of a loop reaches the caller. Then, and when the caller closes this generator, the
    other loops end their current step and are closed.
    """
    try:
        with ThreadPoolExecutor(len(loops)) as pool:
            running: dict[Future[Step | None], Generator[Step, None, None]] = {
                pool.submit(next, loop, None): loop for loop in loops
            }
            while running:
                done = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
                loop, step = running.pop(done), done.result()
                if step is not None:
                    running[pool.submit(next, loop, None)] = loop
                    yield step
    finally:
        for loop in loops:
            loop.close()
