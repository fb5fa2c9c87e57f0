"""What this machine can do at best: products of float32 matrices, and bytes read and copied."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LARGE = 2048
WIDTH, INNER = 576, 1536
FLOATS = 64 * 1024 * 1024


def measure(library: str, rows: Sequence[int]) -> dict[str, Any]:
    """Ceilings seen from one library.

    Args:
      library: `jax` or `torch`.
      rows: batch sizes whose product with a matrix of the model's MLP is measured.

    Returns:
      `matmul` at 2048 x 2048 x 2048 in operations per second, `matmul_rows` by number of rows
      (30 matrices one after another, so that each comes from memory as in a decode step), `read`
      and `copy` in bytes per second (a copy counts both ways).
    """
    product, read, copy = (_jax if library == "jax" else _torch)()
    found: dict[str, Any] = {
        "matmul": 2 * LARGE**3 / best(product(LARGE, LARGE, LARGE, 1), 4),
        "matmul_rows": {
            str(n): 2 * n * WIDTH * INNER * 30 / best(product(n, WIDTH, INNER, 30), 7) for n in rows
        },
        "read": FLOATS * 4 / best(read, 4),
        "copy": 2 * FLOATS * 4 / best(copy, 4),
    }
    return found


Product = Callable[[int, int, int, int], Callable[[], None]]


def _jax() -> tuple[Product, Callable[[], None], Callable[[], None]]:
    import jax
    import jax.numpy as jnp

    from jaxsteer.model.decoder import exact_products

    @jax.jit
    def multiply(a: Any, several: list[Any]) -> list[Any]:
        with exact_products():
            return [a @ b for b in several]

    def product(m: int, k: int, n: int, count: int) -> Callable[[], None]:
        a, several = jnp.asarray(_random(m, k)), [jnp.asarray(_random(k, n)) for _ in range(count)]
        return lambda: jax.block_until_ready(multiply(a, several))

    held = [jnp.ones((FLOATS,), jnp.float32)]
    total = jax.jit(jnp.sum)
    # In place, as a cache is written: a new array a time would measure the kernel's page faults.
    negated = jax.jit(lambda x: -x, donate_argnums=0)

    def copy() -> None:
        held[0] = negated(held[0]).block_until_ready()

    return product, lambda: total(held[0]).block_until_ready(), copy


def _torch() -> tuple[Product, Callable[[], None], Callable[[], None]]:
    import torch

    def product(m: int, k: int, n: int, count: int) -> Callable[[], None]:
        a = torch.from_numpy(_random(m, k))
        several = [torch.from_numpy(_random(n, k)) for _ in range(count)]

        def multiply() -> None:
            for b in several:
                torch.nn.functional.linear(a, b)

        return multiply

    held, other = torch.ones(FLOATS), torch.empty(FLOATS)

    def read() -> None:
        held.sum()

    def copy() -> None:
        other.copy_(held)

    return product, read, copy


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def best(call: Callable[[], Any], times: int) -> float:
    """Seconds of the best of some calls: a ceiling is what can be when nothing is in the way."""
    call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
