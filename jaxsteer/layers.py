"""The pieces of a block: norm, linear maps, rotary positions, attention over a cache, MLP.

One row at a time, like everything in `model`, which has the dimension letters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.config import ModelConfig, RopeConfig, llama3_frequencies


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, the statistics in float32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "token d_model"]) -> Float[Array, "token d_model"]:
        """Normalise each token; returns x's dtype."""
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return self.scale[...] * (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel (+ bias), kernel [in, out] in the model's dtype."""

    def __init__(self, n_in: int, n_out: int, dtype: DTypeLike, bias: bool = False):
        self.kernel = nnx.Param(jnp.zeros((n_in, n_out), dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((n_out,), dtype))
        self.use_bias = bias

    def __call__(self, x: Float[Array, "token n_in"]) -> Float[Array, "token n_out"]:
        """The affine map of each token."""
        y = x @ self.kernel[...]
        return y + self.bias[...] if self.use_bias else y


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Float[Array, " half"]:
    """Rotary frequencies in radians per token, float32 [head_dim / 2].

    Default: theta^(-2i / head_dim) (RoFormer, section 3.3); `llama3` slows some of them.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / rope.theta**exponent
    return frequency if rope.kind == "default" else llama3_frequencies(rope, frequency)


def rotate(
    x: Float[Array, "token head head_dim"], angle: Float[Array, "token half"]
) -> Float[Array, "token head head_dim"]:
    """Rotate pairs (x[i], x[i + H/2]) by the token's angles: the half-split layout of HF."""
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def write(
    cache: Float[Array, "kv_head slot head_dim"],
    new: Float[Array, "token kv_head head_dim"],
    slot: Int[Array, ""],
) -> Float[Array, "kv_head slot head_dim"]:
    """The cache with a pass's tokens in it, from `slot` on."""
    new = jnp.swapaxes(new, 0, 1)

    def in_place(cache: Array, new: Array, slot: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=1)

    def everywhere(cache: Array, new: Array, slot: Array) -> Array:
        return jnp.where((jnp.arange(cache.shape[1]) == slot)[:, None], new, cache)

    if new.shape[1] > 1:
        return in_place(cache, new, slot)
    # Rows with slots of their own write one by one on a TPU, which takes longer than writing all.
    return jax.lax.platform_dependent(cache, new, slot, tpu=everywhere, default=in_place)


def _by_products(
    q: Float[Array, "token kv_head group head_dim"],
    keys: Float[Array, "kv_head slot head_dim"],
    values: Float[Array, "kv_head slot head_dim"],
    visible: Bool[Array, "token slot"],
) -> Float[Array, "token kv_head group head_dim"]:
    """Attention as matrix products."""
    score = jnp.einsum("tkgh,ksh->kgts", q, keys, preferred_element_type=jnp.float32)
    weight = _weights(score, visible, q)
    return jnp.einsum("kgts,ksh->tkgh", weight, values)


def _by_sums(
    q: Float[Array, "1 kv_head group head_dim"],
    keys: Float[Array, "kv_head slot head_dim"],
    values: Float[Array, "kv_head slot head_dim"],
    visible: Bool[Array, "1 slot"],
) -> Float[Array, "1 kv_head group head_dim"]:
    """The same for one token, over the cache as it lies: for products XLA on a CPU copies it."""
    score = jnp.sum(q[0, :, :, None].astype(jnp.float32) * keys[:, None], axis=-1)
    weight = _weights(score[:, :, None], visible, q)
    wide = weight[:, :, 0, :, None].astype(jnp.float32)
    return jnp.sum(wide * values[:, None], axis=2)[None].astype(q.dtype)


def _weights(
    score: Float[Array, "kv_head group token slot"],
    visible: Bool[Array, "token slot"],
    q: Float[Array, "token kv_head group head_dim"],
) -> Float[Array, "kv_head group token slot"]:
    score = jnp.where(visible, score * q.shape[-1] ** -0.5, -1e30)
    return jax.nn.softmax(score, axis=-1).astype(q.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with a key-value cache (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike):
        c = config
        self.q = Linear(c.d_model, c.n_heads * c.head_dim, dtype, c.qkv_bias)
        self.k = Linear(c.d_model, c.n_kv_heads * c.head_dim, dtype, c.qkv_bias)
        self.v = Linear(c.d_model, c.n_kv_heads * c.head_dim, dtype, c.qkv_bias)
        self.o = Linear(c.n_heads * c.head_dim, c.d_model, dtype)
        self.n_kv_heads, self.head_dim = c.n_kv_heads, c.head_dim

    def __call__(
        self,
        x: Float[Array, "token d_model"],
        angle: Float[Array, "token half"],
        visible: Bool[Array, "token slot"],
        cache: tuple[Array, Array],
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "token d_model"], tuple[Array, Array]]:
        """Write this pass's keys and values at `slot` on, then attend to the visible slots."""
        tokens = x.shape[0]
        q = rotate(self.q(x).reshape(tokens, -1, self.head_dim), angle)
        k = rotate(self.k(x).reshape(tokens, -1, self.head_dim), angle)
        v = self.v(x).reshape(tokens, -1, self.head_dim)
        keys, values = write(cache[0], k, slot), write(cache[1], v, slot)
        # Head n reads key-value head n // G: reshaping N to (K, G) lines them up.
        q = q.reshape(tokens, self.n_kv_heads, -1, self.head_dim)
        if tokens > 1:
            mixed = _by_products(q, keys, values, visible)
        else:
            mixed = jax.lax.platform_dependent(
                q, keys, values, visible, cpu=_by_sums, default=_by_products
            )
        return self.o(mixed.reshape(tokens, -1)), (keys, values)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike):
        self.gate = Linear(config.d_model, config.d_ff, dtype)
        self.up = Linear(config.d_model, config.d_ff, dtype)
        self.down = Linear(config.d_ff, config.d_model, dtype)

    def __call__(self, x: Float[Array, "token d_model"]) -> Float[Array, "token d_model"]:
        """What the block adds to each token."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
