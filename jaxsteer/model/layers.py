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

from jaxsteer.model.config import ModelConfig, Rope


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale), the statistics in float32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, config: ModelConfig, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def __call__(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        """Normalise over the last axis; returns x's dtype."""
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.eps)
        if self.offset:
            # Added in float32: a scale in bfloat16 may be too small to change 1.
            return (normed * (self.offset + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return self.scale[...] * normed.astype(x.dtype)


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


def windowed(visible: Bool[Array, "token seen"], window: int) -> Bool[Array, "token seen"]:
    """The last `window` visible slots of each token, its own included; all of them if it is 0.

    Visible slots are in the order of their positions, whatever lies between. A window of 2 turns
    [T, T, F, T, F], the slots that the token in the fourth sees, into [F, T, F, T, F].
    """
    if not 0 < window < visible.shape[1]:
        return visible
    from_here_on = jnp.cumsum(visible[:, ::-1], axis=1)[:, ::-1]
    return visible & (from_here_on <= window)


def rope_frequencies(rope: Rope, width: int) -> Float[Array, " half"]:
    """Rotary frequencies in radians per token, float32 [width / 2] (RoFormer, section 3.3)."""
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    frequency = 1.0 / rope.theta**exponent
    return frequency / jnp.asarray(rope.divisors, jnp.float32) if rope.divisors else frequency


def rotation(
    rope: Rope | None, positions: Int[Array, " token"], width: int
) -> Float[Array, "2 token half"]:
    """Cosine and sine of the angle of each token and pair; without a rope, of no angle."""
    frequency = jnp.zeros(width // 2) if rope is None else rope_frequencies(rope, width)
    angle = positions[:, None] * frequency
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)]) * (1.0 if rope is None else rope.scale)


def rotate(
    x: Float[Array, "token head head_dim"], rotation: Float[Array, "2 token half"]
) -> Float[Array, "token head head_dim"]:
    """Rotate pairs (x[i], x[i + width/2]) of the first entries: the half-split layout of HF."""
    cos, sin = rotation[0][:, None, None], rotation[1][:, None]
    width = 2 * rotation.shape[-1]
    halves = x[..., :width].astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    rotated = halves * cos + halves[..., ::-1, :] * jnp.stack([-sin, sin], axis=-2)
    rotated = rotated.reshape(*x.shape[:-1], width).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., width:]], axis=-1) if width < x.shape[-1] else rotated


Views = list[tuple[Float[Array, "2 token half"], Bool[Array, "token seen"]]]


def views(
    config: ModelConfig, positions: Int[Array, " token"], visible: Bool[Array, "token seen"]
) -> Views:
    """For each kind of layer, how tokens are rotated and which slots they attend to."""
    return [
        (rotation(kind.rope, positions, config.rotary_dim), windowed(visible, kind.window))
        for kind in config.attention
    ]


def view(config: ModelConfig, views: Views, layer: int | Int[Array, ""]) -> tuple[Array, Array]:
    """Those of one layer, whose number may be known only when the program runs."""
    if len(views) == 1:
        return views[0]
    kind = jnp.asarray(config.pattern)[layer]
    return jax.tree.map(lambda *each: jnp.stack(each)[kind], *views)


def softcap(x: Float[Array, "*any"], bound: float) -> Float[Array, "*any"]:
    """bound * tanh(x / bound), which stays within +-bound; x itself if the bound is 0."""
    return bound * jnp.tanh(x / bound) if bound else x


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
    scale: float,
    bound: float = 0.0,
) -> Float[Array, "token kv_head group head_dim"]:
    """Softmax attention over several caches, as if their slots were concatenated.

    Args:
      q: queries, grouped by the key-value head that they read.
      caches: keys and values, each [kv_head, slot, head_dim].
      visible: which slots of all the caches each token attends to.
      scale: multiplies the products of queries and keys.
      bound: of the scores, see `softcap`.
    """
    by_head = jnp.moveaxis(q, 0, 2)
    score = jnp.concatenate([_scores(by_head, keys) for keys, _ in caches], axis=-1)
    score = jnp.where(visible, softcap(score * scale, bound), -1e30)
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
        c, self.config = config, config
        queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.q = Linear(c.d_model, queries, dtype, c.qkv_bias)
        self.k = Linear(c.d_model, keys, dtype, c.qkv_bias)
        self.v = Linear(c.d_model, keys, dtype, c.qkv_bias)
        self.o = Linear(queries, c.d_model, dtype, c.o_bias)
        if c.qk_norm:
            per_head = c.qk_norm == "head"
            self.q_norm = RMSNorm(c.head_dim if per_head else queries, c, dtype)
            self.k_norm = RMSNorm(c.head_dim if per_head else keys, c, dtype)

    def __call__(
        self,
        x: Float[Array, "token d_model"],
        rotation: Float[Array, "2 token half"],
        visible: Bool[Array, "token seen"],
        cache: tuple[Array, Array],
        slot: Int[Array, ""],
        past: tuple[Array, Array] | None = None,
    ) -> tuple[Float[Array, "token d_model"], tuple[Array, Array]]:
        """Write the tokens' keys and values from `slot` on, then attend to the visible slots.

        The slots of `past` come before those of `cache` and are only read.
        """
        c, tokens = self.config, x.shape[0]
        q, k, v = self.q(x), self.k(x), self.v(x)
        if c.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (each.reshape(tokens, -1, c.head_dim) for each in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if tokens > 1:
            # Not for a single token: every later token of its row attends to it anyway.
            k, v = contain_overflow(k, v)
        keys, values = write(cache[0], k, slot), write(cache[1], v, slot)
        # Head n reads key-value head n // G: reshaping N to (K, G) lines them up.
        q = q.reshape(tokens, c.n_kv_heads, -1, c.head_dim)
        written = (keys, values)
        caches = [written] if past is None else [past, written]
        mixed = attend(q, caches, visible, c.attention_scale, c.attention_softcap)
        return self.o(mixed.reshape(tokens, -1)), written


class MLP(nnx.Module):
    """down(act(gate x) * up x), with SiLU or tanh-GELU as act (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike):
        self.gate = Linear(config.d_model, config.d_ff, dtype, config.mlp_bias)
        self.up = Linear(config.d_model, config.d_ff, dtype, config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, dtype, config.mlp_bias)
        self.act = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[config.activation]

    def __call__(self, x: Float[Array, "token d_model"]) -> Float[Array, "token d_model"]:
        """The MLP's contribution to the residual stream at each token."""
        return self.down(self.act(self.gate(x)) * self.up(x))
