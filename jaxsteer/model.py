"""Llama and Qwen2 decoders as Flax NNX modules, with the residual stream in the open.

Everything here is written for ONE row of tokens and lifted over rows with `jax.vmap`, so no shape
carries a batch axis. The path of the residual stream, with its taps:

    embed -> [ resid_pre[l] -> +attention -> resid_mid[l] -> +mlp -> resid_post[l] ] -> norm -> head

`resid_post[l]` is `resid_pre[l + 1]`, and `embed` is `resid_pre[0]`. Interventions are applied at
the tap, and what is captured there is the stream after them. Layers are a plain Python list, so
they unroll in the compiled program: on CPU that is faster than a scan, which copies each layer's
weights and cache at every step. Not for training: no dropout, no initialisers worth the name.

Dimension letters: T token, S cache slot, D d_model, F d_ff, N heads, K key-value heads, G = N / K,
H head_dim, V vocabulary, L layer, P captured position, R probe direction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.arrays import AnyArray
from jaxsteer.config import ModelConfig, RopeConfig, llama3_frequencies
from jaxsteer.interventions import Interventions, SiteArrays, apply

KeyValues = Float[Array, "*lead kv_head slot head_dim"]
Cache = list[tuple[KeyValues, KeyValues]]
Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Realised:
    """What really happened at one tap, summed over a row's real tokens: the run's own evidence.

    Attributes:
      touched: number of tokens the intervention was allowed to change.
      change: sum over tokens of |dh|, the norm of the realised change.
      norm: sum over tokens of |h| before the change.
      before: sum over tokens of the projection onto each probe direction, before.
      after: the same, after.
    """

    touched: Int[AnyArray, " *lead"]
    change: Float[AnyArray, " *lead"]
    norm: Float[AnyArray, " *lead"]
    before: Float[AnyArray, "*lead probe"]
    after: Float[AnyArray, "*lead probe"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """The result of one forward pass over one row.

    Attributes:
      hidden: after the final norm (so not a residual tap), input of the head.
      cache: keys and values per layer, with this pass's tokens written.
      captured: by tap name, layers stacked: the stream at the positions asked for, float32.
      realised: by tap name, layers stacked; empty when no intervention was given.
    """

    hidden: Float[Array, "token d_model"]
    cache: Cache
    captured: dict[str, Float[Array, "layer position d_model"]]
    realised: dict[str, Realised]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """An intervention as a forward pass needs it.

    Attributes:
      interventions: one row's arrays.
      touched: which of the pass's tokens they change (scope and padding already applied).
      real: which of the pass's tokens are real, for the averages of `Realised`.
      probes: unit directions per layer whose projections are recorded at `resid_post`.
    """

    interventions: Interventions
    touched: Bool[Array, " token"]
    real: Bool[Array, " token"]
    probes: Float[Array, "layer probe d_model"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """Which taps to read, and where.

    Attributes:
      taps: tap names; layers are all captured.
      weights: one row of token weights per captured position: a one-hot row picks a token, a row
        of 1/n averages n tokens. E.g. for 4 tokens, [[0, 0, 0, 1], [0, .5, .5, 0]] captures the
        last token and the mean of the middle two.
    """

    taps: tuple[str, ...]
    weights: Float[Array, "position token"]

    def read(self, h: Float[Array, "token d_model"]) -> Float[Array, "position d_model"]:
        """The weighted tokens of one tap, float32."""
        return jnp.einsum(
            "pt,td->pd", self.weights, h.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )


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


class Embed(nnx.Module):
    """The token table, which is also the head of a tied model."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike):
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.d_model), dtype))


class Block(nnx.Module):
    """One decoder layer's parameters; `Decoder` runs it, since the taps lie between its halves."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike):
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.attn = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.mlp = MLP(config, dtype)


def exact_products() -> AbstractContextManager[Any]:
    """Products of float32 in float32: GPUs and TPUs round their inputs to fewer bits by default.

    Whoever wants that speed converts the model to bfloat16, whose products this does not touch.
    """
    return jax.default_matmul_precision("highest")


class Blocks(nnx.Module):
    """Some consecutive layers, to be run without the rest of the model (see `prefill`)."""

    def __init__(self, config: ModelConfig, n: int, dtype: DTypeLike):
        self.config = config
        self.layers = nnx.List([Block(config, dtype) for _ in range(n)])


def run_blocks(
    config: ModelConfig,
    blocks: Iterable[Block],
    h: Float[Array, "token d_model"],
    positions: Int[Array, " token"],
    visible: Bool[Array, "token slot"],
    cache: Cache,
    slot: Int[Array, ""],
    taps: Taps,
) -> tuple[Float[Array, "token d_model"], Cache]:
    """One row through consecutive layers: the residual stream after them, and their cache.

    Arguments as for the whole model (`Decoder`); `cache` and the layers of `taps` are theirs only.
    """
    angle = positions[:, None] * rope_frequencies(config.rope, config.head_dim)
    written = []
    with exact_products():
        for index, (block, kept) in enumerate(zip(blocks, cache, strict=True)):
            mixed, kv = block.attn(block.attn_norm(h), angle, visible, kept, slot)
            written.append(kv)
            h = taps.visit("resid_mid", index, h + mixed)
            h = taps.visit("resid_post", index, h + block.mlp(block.mlp_norm(h)))
    return h, written


class Decoder(nnx.Module):
    """A decoder-only transformer. Parameters are zeros until `bind` fills them."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.embed = Embed(config, dtype)
        self.layers = nnx.List([Block(config, dtype) for _ in range(config.n_layers)])
        self.final_norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        if not config.tied:
            self.head = Linear(config.d_model, config.vocab_size, dtype)

    def __call__(
        self,
        tokens: Int[Array, " token"],
        positions: Int[Array, " token"],
        visible: Bool[Array, "token slot"],
        cache: Cache,
        slot: Int[Array, ""],
        *,
        steering: Steering | None = None,
        capture: Capture | None = None,
    ) -> Forward:
        """Run one row's tokens through every block.

        Args:
          tokens: token ids; padding may be any id, it is told apart by the masks alone.
          positions: rotary position of each token, counted over real tokens.
          visible: which cache slots each token attends to, its own included.
          cache: keys and values of earlier tokens.
          slot: where in the cache this pass's tokens go.
          steering: what to apply at the taps; None runs the plain model.
          capture: which taps to read; None reads nothing and costs nothing.
        """
        taps = Taps(steering, capture)
        h = self.embedded(tokens, taps)
        h, written = run_blocks(self.config, self.layers, h, positions, visible, cache, slot, taps)
        captured, realised = taps.results()
        return Forward(
            hidden=self.final_norm(h), cache=written, captured=captured, realised=realised
        )

    def embedded(self, tokens: Int[Array, " token"], taps: Taps) -> Float[Array, "token d_model"]:
        """The residual stream where it begins, after the tap `embed`."""
        return taps.visit("embed", 0, self.embed.embedding[...][tokens])

    def logits(self, hidden: Float[Array, "token d_model"]) -> Float[Array, "token vocab"]:
        """Next-token logits, float32, from `Forward.hidden`."""
        with exact_products():
            if self.config.tied:
                table = self.embed.embedding[...]
                return jnp.einsum("td,vd->tv", hidden, table, preferred_element_type=jnp.float32)
            return jnp.matmul(hidden, self.head.kernel[...], preferred_element_type=jnp.float32)


class Taps:
    """Applies, captures and measures at the taps of one forward pass, in layer order."""

    def __init__(self, steering: Steering | None, capture: Capture | None):
        self.steering, self.capture = steering, capture
        self.captured: dict[str, list[Array]] = {}
        self.realised: dict[str, list[Realised]] = {}

    def visit(self, tap: str, layer: int, h: Array) -> Array:
        """The stream as it leaves a tap."""
        if self.steering is not None and tap in self.steering.interventions.sites:
            site = self.steering.interventions.sites[tap].at(layer)
            h = self._steer(tap, layer, h, site)
        if self.capture is not None and tap in self.capture.taps:
            self.captured.setdefault(tap, []).append(self.capture.read(h))
        return h

    def _steer(self, tap: str, layer: int, h: Array, site: SiteArrays) -> Array:
        assert self.steering is not None
        touched, real = self.steering.touched & self.steering.real, self.steering.real
        new, change = apply(h, site, touched)
        probes = self.steering.probes[layer] if tap == "resid_post" else jnp.zeros((0, h.shape[1]))
        real_f = real.astype(jnp.float32)
        # A probe's projections summed over tokens are the projection of the summed tokens.
        before = real_f @ h.astype(jnp.float32)
        moved = real_f @ change
        self.realised.setdefault(tap, []).append(
            Realised(
                touched=jnp.sum(touched),
                change=jnp.sum(jnp.linalg.norm(change, axis=-1)),
                norm=jnp.sum(jnp.linalg.norm(h.astype(jnp.float32), axis=-1) * real_f),
                before=probes @ before,
                after=probes @ (before + moved),
            )
        )
        return new

    def results(self) -> tuple[dict[str, Array], dict[str, Realised]]:
        """What was captured and what was changed, by tap, layers stacked."""
        captured = {tap: jnp.stack(layers) for tap, layers in self.captured.items()}
        realised = {
            tap: jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
            for tap, layers in self.realised.items()
        }
        return captured, realised


def empty_cache(config: ModelConfig, n_layers: int, slots: int, dtype: DTypeLike) -> Cache:
    """One row's cache of zeros: per layer, keys and values [kv_head, slot, head_dim]."""
    shape = (config.n_kv_heads, slots, config.head_dim)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(n_layers)]


def graph(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> nnx.GraphDef[Decoder]:
    """The model without its parameters: hashable, so jitted functions take it as static."""
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, dtype)))


def blocks_graph(
    config: ModelConfig, n: int, dtype: DTypeLike = jnp.float32
) -> nnx.GraphDef[Blocks]:
    """`n` consecutive layers without their parameters, as `graph` is the model."""
    return nnx.graphdef(nnx.eval_shape(lambda: Blocks(config, n, dtype)))


M = TypeVar("M", bound=nnx.Module)


def bind(definition: nnx.GraphDef[M], params: Params) -> M:
    """Put parameters (a nested dict of arrays, paths as in `weights.param_shapes`) in the model."""
    return nnx.merge(definition, _state(params))


def _state(params: Params) -> nnx.State:
    def variable(value: Any) -> Any:
        if isinstance(value, dict):
            # Layer lists have integer keys in a Flax state and string keys on disk.
            return {int(k) if k.isdigit() else k: variable(v) for k, v in value.items()}
        return nnx.Param(value)

    return nnx.State(variable(params))
