"""The pieces of a block: norm, linear maps, masks, rotary positions, attention over a cache, MLP.

One row at a time, as in `decoder`, which lists the dimension letters. Masks and positions follow
from masks of real tokens, never from token ids.
"""

from __future__ import annotations

import dataclasses
import functools
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
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "token n_in"]) -> Float[Array, "token n_out"]:
        """The affine map of each token."""
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


# The segment id of a prefix, which every prompt attends to.
EVERY = -1
NO_WINDOW = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """Which slots tokens attend to: those of their own prompt and its prefix, up to themselves.

    By token and by slot, since a mask of all pairs grows with the square of a prompt's length.

    Attributes:
      segment_ids: the prompt of each token; 0 for padding.
      positions: of each token, counted over its prompt's real tokens, prefix included.
      slot_segment_ids: the prompt of the token in each slot; 0 for none, `EVERY` for a prefix.
      slot_positions: of the token in each slot.
      window: a token sees the last so many of its slots, its own included.
    """

    segment_ids: Int[Array, "*row token"]
    positions: Int[Array, "*row token"]
    slot_segment_ids: Int[Array, "*row slot"]
    slot_positions: Int[Array, "*row slot"]
    window: int | Int[Array, "*row"] = NO_WINDOW

    def mask(self) -> Bool[Array, "token slot"]:
        """Which slots each token sees."""
        here = self.slot_segment_ids
        own = (here == self.segment_ids[:, None]) & (here > 0)
        back = self.positions[:, None] - self.slot_positions
        return (own | (here == EVERY)) & (back >= 0) & (back < self.window)


def causal(
    segment_ids: Bool[Array, " token"] | Int[Array, " token"],
    before: Bool[Array, " slot"] | None = None,
) -> Visible:
    """Each token attends to the real tokens of its own prompt, up to itself, and of its prefix.

    Args:
      segment_ids: the prompt of each token in a packed sequence, 0 for padding; or the mask of the
        real tokens of one prompt. The tokens of a prompt are neighbours.
      before: which slots of the prefix hold a real token; None without a prefix.

    The masks of [F, T, T], of the same after [F, T], and of [1, 1, 2] are
        [[F, F, F],             [[F, T, F, F, F],          [[T, F, F],
         [F, T, F],              [F, T, F, T, F],           [T, T, F],
         [F, T, T]]              [F, T, F, T, T]]           [F, F, T]]
    and the positions [0, 0, 1], [1, 1, 2] and [0, 1, 0].
    """
    ids, index = segment_ids.astype(jnp.int32), jnp.arange(segment_ids.shape[0])
    held = jnp.zeros((0,), bool) if before is None else before
    opens = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    own = index - jax.lax.cummax(jnp.where(opens, index, 0))
    positions = jnp.sum(held) + jnp.where(ids > 0, own, 0)
    return Visible(
        segment_ids=ids,
        positions=positions,
        slot_segment_ids=jnp.concatenate([EVERY * held, ids]),
        slot_positions=jnp.concatenate([jnp.cumsum(held) - 1, positions]),
    )


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


Views = list[tuple[Float[Array, "2 token half"], Visible]]


def views(config: ModelConfig, visible: Visible) -> Views:
    """For each kind of layer, how tokens are rotated and which slots they attend to."""
    return [
        (
            rotation(kind.rope, visible.positions, config.rotary_dim),
            dataclasses.replace(visible, window=kind.window or NO_WINDOW),
        )
        for kind in config.attention
    ]


def view(config: ModelConfig, views: Views, layer: int | Int[Array, ""]) -> tuple[Array, Visible]:
    """Those of one layer, whose number may be known only when the program runs."""
    if len(views) == 1:
        return views[0]
    kind = jnp.asarray(config.pattern)[layer]
    return jax.tree.map(lambda *each: jnp.stack(each)[kind], *views)


def softcap(x: Float[Array, "*any"], bound: float) -> Float[Array, "*any"]:
    """bound * tanh(x / bound), which stays within +-bound; x itself if the bound is 0."""
    return bound * jnp.tanh(x / bound) if bound else x


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
    """`write_block`, by writing the block alone, which may then begin at any slot."""
    return jax.lax.dynamic_update_slice_in_dim(cache, block, slot, axis=1)


def write_all(cache: Array, block: Array, slot: Array) -> Array:
    """`write_block`, by writing the whole cache."""
    heads, slots, width = cache.shape
    length = block.shape[1]
    here = jnp.arange(slots // length) == slot // length
    parts = cache.reshape(heads, -1, length, width)
    return jnp.where(here[:, None, None], block[:, None], parts).reshape(cache.shape)


# Most tokens whose scores are held at once; more of them, block by block.
LONG = 256
# The score of a slot that is not visible.
HIDDEN = -1e30


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
    visible: Visible,
    scale: float,
    bound: float = 0.0,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "token kv_head group head_dim"]:
    """Softmax attention over several caches, as if their slots were concatenated.

    Args:
      q: queries, grouped by the key-value head that they read.
      caches: keys and values, each [kv_head, slot, head_dim].
      visible: which slots of all the caches each token attends to.
      scale: multiplies the products of queries and keys.
      bound: of the scores, see `softcap`.
      first: the slot of the first token; none attends to a slot after its own.
    """
    if len(q) > LONG:
        return attend_in_blocks(q, caches, visible, scale, bound, first)
    by_head = jnp.moveaxis(q, 0, 2)
    score = jnp.concatenate([_scores(by_head, keys) for keys, _ in caches], axis=-1)
    score = jnp.where(visible.mask(), softcap(score * scale, bound), HIDDEN)
    weight = jax.nn.softmax(score, axis=-1).astype(q.dtype)
    mixed, first = [], 0
    for _, values in caches:
        part = weight[..., first : first + values.shape[1]]
        mixed.append(jnp.einsum("kgts,ksh->kgth", part, values, preferred_element_type=jnp.float32))
        first += values.shape[1]
    return jnp.moveaxis(sum(mixed), 2, 0).astype(q.dtype)


def attend_in_blocks(
    q: Float[Array, "token kv_head group head_dim"],
    caches: Sequence[tuple[Array, Array]],
    visible: Visible,
    scale: float,
    bound: float,
    first: int | Int[Array, ""],
) -> Float[Array, "token kv_head group head_dim"]:
    """`attend` for many tokens: never holds more than a block of the score matrix.

    The softmax is summed from block to block (Milakov and Gimelshein 2018, algorithm 3), and blocks
    after a token's own are left out. Arguments as for `attend`.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # Of a block: so that 384 and 768 tokens are whole blocks, and larger ones in longer prompts.
    tokens, slots = 128 if len(q) % 256 else 256, 256 if len(q) < 1024 else 512
    both = (jnp.concatenate(some, axis=1) for some in zip(*caches, strict=True))
    keys, values = (_blocks(some, slots, 1) for some in both)
    of_slots = visible.slot_segment_ids, visible.slot_positions
    by_slot = [_blocks(some, slots, 0) for some in of_slots]

    def one(block: tuple[Array, ...]) -> Array:
        number, queries, *of_tokens = block
        by_head = jnp.moveaxis(queries, 0, 2)

        def add(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, mixed = carry
            score = softcap(product("kgth,ksh->kgts", by_head, keys[at]) * scale, bound)
            here = Visible(*of_tokens, *(some[at] for some in by_slot))
            mask = dataclasses.replace(here, window=visible.window).mask()
            score = jnp.where(mask, score, HIDDEN)
            highest = jnp.maximum(top, jnp.max(score, axis=-1))
            weight, kept = jnp.exp(score - highest[..., None]), jnp.exp(top - highest)
            found = product("kgts,ksh->kgth", weight.astype(q.dtype), values[at])
            total = total * kept + jnp.sum(weight, axis=-1)
            return highest, total, mixed * kept[..., None] + found

        zeros = jnp.zeros(by_head.shape, jnp.float32)
        begin = (zeros[..., 0] + HIDDEN, zeros[..., 0], zeros)
        end = (first + (number + 1) * tokens - 1) // slots + 1
        _, total, mixed = jax.lax.fori_loop(0, jnp.minimum(end, len(keys)), add, begin)
        return jnp.moveaxis(mixed / total[..., None], 2, 0).astype(q.dtype)

    by_token = [_blocks(some, tokens, 0) for some in (q, visible.segment_ids, visible.positions)]
    found = jax.lax.map(one, (jnp.arange(len(by_token[0])), *by_token))
    return found.reshape(-1, *q.shape[1:])[: len(q)]


def _blocks(x: Array, size: int, axis: int) -> Array:
    """Blocks of an axis as the first axis, the last filled with zeros: 3 of [4] or 2 of [2, 4]."""
    length = x.shape[axis]
    count = -(-length // size)
    x = jnp.pad(x, [(0, count * size - length if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


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
        visible: Visible,
        cache: tuple[Array, Array],
        slot: Int[Array, ""],
        past: Sequence[tuple[Array, Array]] = (),
    ) -> tuple[Float[Array, "token d_model"], tuple[Array, Array]]:
        """Write the tokens' keys and values from `slot` on, then attend to the visible slots.

        The slots of the caches in `past` come before those of `cache` and are only read.
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
        # Caches have the heads first.
        k, v = jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)
        written = write_in_place(cache[0], k, slot), write_in_place(cache[1], v, slot)
        # Head n reads key-value head n // G: reshaping N to (K, G) lines them up.
        q = q.reshape(tokens, c.n_kv_heads, -1, c.head_dim)
        first = slot + sum(keys.shape[1] for keys, _ in past)
        mixed = attend(q, [*past, written], visible, c.attention_scale, c.attention_softcap, first)
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
