from __future__ import annotations

import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxsteer.generation.memory import give_back


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is asked of the system")
def test_what_a_thread_freed_goes_back_to_the_system():
    def use():
        # 256 MiB in blocks too small to be mapped one by one, of which some stay between the rest.
        blocks = [np.ones(2**16, np.uint8) for _ in range(4096)]
        return blocks[::64]

    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(use).result()
    before = resident()
    give_back()
    assert before - resident() > 128
    assert len(kept) == 64
