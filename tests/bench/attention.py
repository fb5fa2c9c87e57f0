"""Attention in plain JAX against `jax.nn.dot_product_attention`, XLA's and cuDNN's, on this device.

    python -m tests.bench.attention

prints milliseconds of one layer in bfloat16, and how far the others are from `attend`. Shapes are
those of SmolLM2 and of Llama-3.1-8B: a decode step of 256 rows over 512 slots, and a batch of eight
packed sequences of 128 tokens, each of three prompts, behind a prefix of 256.

The caches of the others are stored as they read them, [slot, head], so that they copy nothing. They
take no segment ids: they get the whole mask.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsteer.model.layers import EVERY, NO_WINDOW, Visible, attend, causal

# (heads, key-value heads, head_dim)
MODELS = {"SmolLM2-135M": (9, 3, 64), "Llama-3.1-8B": (32, 8, 128)}
ROWS, SLOTS = 256, 512
PACKED, TOKENS, PREFIX = 8, 128, 256
# Calls in one program, so that starting it does not count.
LAYERS = 8


def milliseconds(layer: Callable[..., jax.Array], q: jax.Array, *rest: Any) -> float:
    """Median time of a layer whose queries are the output of the layer before."""

    @jax.jit
    def run(q: jax.Array, *rest: Any) -> jax.Array:
        return jax.lax.fori_loop(0, LAYERS, lambda _, x: layer(x, *rest), q)

    run(q, *rest).block_until_ready()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        run(q, *rest).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds) / LAYERS


def decode_mask() -> Visible:
    """Rows at different places of their caches, the first slots a prefix."""
    length = SLOTS // 2 + jnp.arange(ROWS) % (SLOTS // 2)
    slots = jnp.arange(SLOTS)
    real = slots < length[:, None]
    return Visible(
        segment_ids=jnp.ones((ROWS, 1), jnp.int32),
        positions=length[:, None],
        slot_segment_ids=jnp.where(slots < PREFIX, EVERY, 1) * real,
        slot_positions=jnp.broadcast_to(slots, real.shape),
        window=jnp.full(ROWS, NO_WINDOW),
    )


def prefill_mask() -> Visible:
    """Three prompts in each packed sequence, of lengths that differ, and padding."""
    cuts = 30 + 5 * jnp.arange(PACKED)[:, None] + jnp.array([0, 40])
    ids = 1 + jnp.sum(jnp.arange(TOKENS)[None, :, None] >= cuts[:, None], axis=-1)
    ids = jnp.where(jnp.arange(TOKENS) < TOKENS - 4, ids, 0)
    return jax.vmap(causal, (0, None))(ids, jnp.ones(PREFIX, bool))


def compare(name: str, visible: Visible) -> None:
    """A line for each way to attend."""
    n_heads, n_kv, width = MODELS[name]
    rows, tokens = visible.segment_ids.shape
    slots, scale = visible.slot_segment_ids.shape[1], width**-0.5
    shapes = (rows, tokens, n_heads, width), (rows, slots, n_kv, width), (rows, slots, n_kv, width)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )
    mask = jax.vmap(Visible.mask)(visible)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible) -> jax.Array:
        grouped = q.reshape(rows, tokens, n_kv, -1, width)
        one = functools.partial(attend, scale=scale)
        return jax.vmap(lambda q, k, v, seen: one(q, [(k, v)], seen))(
            grouped, k, v, visible
        ).reshape(q.shape)

    def other(how: str, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=scale, implementation=how
        )

    by_head = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    real = visible.segment_ids > 0
    expected = plain(q, *by_head, visible)
    what = f"{name:<14}{'decode' if tokens == 1 else 'prefill':<9}"
    print(f"{what}attend {milliseconds(plain, q, *by_head, visible):.3f} ms", flush=True)
    for how in ("xla", "cudnn"):
        try:
            found = other(how, q, k, v, mask)
            far = jnp.abs(found - expected)[real].max()
            took = milliseconds(functools.partial(other, how), q, k, v, mask)
            print(f"{what}{how} {took:.3f} ms, at most {far:.1e} away", flush=True)
        except Exception as error:
            print(f"{what}{how}: {str(error).splitlines()[0]}", flush=True)


def main() -> None:
    """All shapes."""
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    for name in MODELS:
        for visible in (decode_mask(), prefill_mask()):
            compare(name, visible)


if __name__ == "__main__":
    main()
