"""The pieces of a block: norm, linear maps, masks, rotary positions, attention over a cache, MLP.

One row at a time, as in `decoder`, which lists the dimension letters. Masks and positions follow
from masks of real tokens, never from token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.model.config import ModelConfig, RopeConfig, llama3_frequencies


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


def causal_mask(
    segment_ids: Bool[Array, " token"] | Int[Array, " token"],
    before: Bool[Array, " slot"] | None = None,
) -> Bool[Array, "token slots"]:
    """Which slots each token attends to: real ones of its own prompt, up to itself.

    Args:
      segment_ids: the prompt of each token in a packed sequence, 0 for padding; or the mask of the
        real tokens of one prompt.
      before: which slots of the prefix hold a real token; None without a prefix.

    [F, T, T] gives             with before = [F, T]       and [1, 1, 2] gives
        [[F, F, F],             [[F, T, F, F, F],          [[T, F, F],
         [F, T, F],              [F, T, F, T, F],           [T, T, F],
         [F, T, T]]              [F, T, F, T, T]]           [F, F, T]]
    """
    tokens = segment_ids.shape[0]
    same = segment_ids[None, :] == segment_ids[:, None]
    own = jnp.tril(same) & (segment_ids > 0)[None, :]
    if before is None:
        return own
    return jnp.concatenate([jnp.broadcast_to(before, (tokens, before.shape[0])), own], axis=1)


def positions(
    segment_ids: Bool[Array, " token"] | Int[Array, " token"],
    before: Bool[Array, " slot"] | None = None,
) -> Int[Array, " token"]:
    """Positions counted over a prompt's real tokens, prefix included; arguments as `causal_mask`.

    [F, T, T] gives [0, 0, 1], after [F, T] it gives [1, 1, 2]; [1, 1, 2] gives [0, 1, 0].
    """
    start = 0 if before is None else jnp.sum(before)
    return start + jnp.maximum(jnp.sum(causal_mask(segment_ids), axis=1) - 1, 0)


def visible_slots(
    held: Bool[Array, " slots"], start: Int[Array, ""], newest: Int[Array, ""]
) -> Bool[Array, " slots"]:
    """Which cache slots a generated token attends to: the prompt's real ones, and the reply's.

    Args:
      held: which slots hold a real token of the prompt.
      start: the slot of the reply's first token.
      newest: the slot of this token.

    held = [F, T, T, F, F, F] with start 3 and newest 4 gives [F, T, T, T, T, F].
    """
    index = jnp.arange(held.shape[0])
    return held | ((index >= start) & (index <= newest))


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
    cos, sin = jnp.cos(angle)[:, None, None], jnp.sin(angle)[:, None]
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    rotated = halves * cos + halves[..., ::-1, :] * jnp.stack([-sin, sin], axis=-2)
    return rotated.reshape(x.shape).astype(x.dtype)


def write(
    cache: Float[Array, "kv_head slot head_dim"],
    new: Float[Array, "token kv_head head_dim"],
    slot: Int[Array, ""],
) -> Float[Array, "kv_head slot head_dim"]:
    """The cache with the keys or values of new tokens written from `slot` on."""
    return jax.lax.dynamic_update_slice_in_dim(cache, jnp.swapaxes(new, 0, 1), slot, axis=1)


def write_block(
    cache: Float[Array, "kv_head slot head_dim"],
    block: Float[Array, "kv_head block_slot head_dim"],
    slot: Int[Array, ""],
) -> Float[Array, "kv_head slot head_dim"]:
    """The cache with a small block of slots written into it from `slot` on.

    The block's length divides the cache's and `slot`: 2 slots go into 6 at 0, 2 or 4.
    """
    # On a TPU, rows with different slots would be written one after another, which takes longer
    # than writing the whole cache.
    return jax.lax.platform_dependent(cache, block, slot, tpu=write_all, default=write_in_place)


def write_in_place(cache: Array, block: Array, slot: Array) -> Array:
    """`write_block`, by writing the block alone."""
    return jax.lax.dynamic_update_slice_in_dim(cache, block, slot, axis=1)


def write_all(cache: Array, block: Array, slot: Array) -> Array:
    """`write_block`, by writing the whole cache."""
    heads, slots, width = cache.shape
    length = block.shape[1]
    here = jnp.arange(slots // length) == slot // length
    parts = cache.reshape(heads, -1, length, width)
    return jnp.where(here[:, None, None], block[:, None], parts).reshape(cache.shape)


def contain_overflow(
    keys: Float[Array, "token kv_head head_dim"], values: Float[Array, "token kv_head head_dim"]
) -> tuple[Float[Array, "token kv_head head_dim"], Float[Array, "token kv_head head_dim"]]:
    """Keys and values changed so that an overflow reaches only tokens that attend to it.

    A value that is not finite would reach every token: in the weighted sum even zero times NaN is
    NaN. So the value becomes zero and the key NaN, which makes NaN only of the scores of tokens
    that attend to it.
    """
    finite = jnp.all(jnp.isfinite(values), axis=-1, keepdims=True)
    return jnp.where(finite, keys, jnp.nan), jnp.where(finite, values, 0)


def attend(
    q: Float[Array, "token kv_head group head_dim"],
    caches: Sequence[tuple[Array, Array]],
    visible: Bool[Array, "token seen"],
) -> Float[Array, "token kv_head group head_dim"]:
    """Softmax attention over several caches, as if their slots were concatenated.

    Args:
      q: queries, grouped by the key-value head that they read.
      caches: keys and values, each [kv_head, slot, head_dim].
      visible: which slots of all the caches each token attends to.
    """
    by_head = jnp.moveaxis(q, 0, 2)
    score = jnp.concatenate([_scores(by_head, keys) for keys, _ in caches], axis=-1)
    score = jnp.where(visible, score * q.shape[-1] ** -0.5, -1e30)
    weight = jax.nn.softmax(score, axis=-1).astype(q.dtype)
    mixed, first = [], 0
    for _, values in caches:
        part = weight[..., first : first + values.shape[1]]
        mixed.append(jnp.einsum("kgts,ksh->kgth", part, values, preferred_element_type=jnp.float32))
        first += values.shape[1]
    return jnp.moveaxis(sum(mixed), 2, 0).astype(q.dtype)


def _scores(
    q: Float[Array, "kv_head group token head_dim"], keys: Float[Array, "kv_head slot head_dim"]
) -> Float[Array, "kv_head group token slot"]:
    """Products of queries and keys, float32."""
    # The operand with more rows comes first: on a CPU the other order takes twice as long.
    if keys.shape[1] > q.shape[1] * q.shape[2]:
        group = q.shape[1]
        # Three query heads per key-value head run slower than four on a CPU, so pad to four.
        padded = jnp.pad(q, [(0, 0), (0, 1), (0, 0), (0, 0)]) if group == 3 else q
        scores = jnp.einsum("ksh,kgth->ksgt", keys, padded, preferred_element_type=jnp.float32)
        return jnp.moveaxis(scores, 1, 3)[:, :group]
    return jnp.einsum("kgth,ksh->kgts", q, keys, preferred_element_type=jnp.float32)


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
        visible: Bool[Array, "token seen"],
        cache: tuple[Array, Array],
        slot: Int[Array, ""],
        past: tuple[Array, Array] | None = None,
    ) -> tuple[Float[Array, "token d_model"], tuple[Array, Array]]:
        """Write the tokens' keys and values from `slot` on, then attend to the visible slots.

        The slots of `past` come before those of `cache` and are only read.
        """
        tokens = x.shape[0]
        q = rotate(self.q(x).reshape(tokens, -1, self.head_dim), angle)
        k = rotate(self.k(x).reshape(tokens, -1, self.head_dim), angle)
        v = self.v(x).reshape(tokens, -1, self.head_dim)
        if tokens > 1:
            # Not for a single token: every later token of its row attends to it anyway.
            k, v = contain_overflow(k, v)
        keys, values = write(cache[0], k, slot), write(cache[1], v, slot)
        # Head n reads key-value head n // G: reshaping N to (K, G) lines them up.
        q = q.reshape(tokens, self.n_kv_heads, -1, self.head_dim)
        written = (keys, values)
        mixed = attend(q, [written] if past is None else [past, written], visible)
        return self.o(mixed.reshape(tokens, -1)), written


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike):
        self.gate = Linear(config.d_model, config.d_ff, dtype)
        self.up = Linear(config.d_model, config.d_ff, dtype)
        self.down = Linear(config.d_ff, config.d_model, dtype)

    def __call__(self, x: Float[Array, "token d_model"]) -> Float[Array, "token d_model"]:
        """The MLP's contribution to the residual stream at each token."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
