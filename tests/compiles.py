"""Which programs JAX compiles, by the name of the function, from its own log."""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator

# The programs of `generation` that every row passes through.
ENGINE = ("embed", "run_layers", "gather", "first_token", "empty", "_put", "advance")


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count compilations while the context is open; a program from the cache on disk counts too."""
    found: Counter[str] = Counter()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if name := re.search(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()):
                found[name[1]] += 1

    logger, listener = logging.getLogger("jax._src.dispatch"), Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    try:
        yield found
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
