"""The decoder of all families as Flax NNX modules, with taps on the residual stream.

Everything here is written for ONE row of tokens and applied to many rows by `jax.vmap`, so no shape
has a batch axis. The path of the residual stream, with its taps:

    embed -> [ resid_pre[l] -> +attention -> resid_mid[l] -> +mlp -> resid_post[l] ] -> norm -> head

`resid_post[l]` is `resid_pre[l + 1]`, and `embed` is `resid_pre[0]`. Interventions are applied at
the tap; captures are the stream after them. Layers are a plain Python list, unrolled in the
compiled program: on a CPU that is faster than a scan, which copies each layer's weights and cache
at every step. Not for training: there is no dropout, and parameters start as zeros.

Dimension letters: T token, S cache slot, D d_model, F d_ff, N heads, K key-value heads, G = N / K,
H head_dim, V vocabulary, L layer, R probe direction.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.model.config import ModelConfig
from jaxsteer.model.interventions import AnyArray, Interventions, apply
from jaxsteer.model.layers import MLP, Attention, Linear, RMSNorm, Visible, softcap, view, views

KeyValues = Float[Array, "*lead kv_head slot head_dim"]
Cache = list[tuple[KeyValues, KeyValues]]
# A further cache, with another number of slots.
EarlierKeyValues = Float[Array, "*lead kv_head _ head_dim"]
Past = list[tuple[EarlierKeyValues, EarlierKeyValues]]
Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Realised:
    """The measured effect of an intervention at one tap, summed over a prompt's real tokens.

    Attributes:
      steered: number of tokens the intervention was allowed to change.
      change: sum over tokens of |dh|, the norm of the realised change.
      norm: sum over tokens of |h| before the change.
      before: sum over tokens of the projection onto each probe direction, before.
      after: the same, after.
    """

    steered: Int[AnyArray, " *lead"]
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
      captured: by name of the taps asked for, layers stacked: the stream of every token, float32.
      realised: by tap name, layers stacked; empty when no intervention was given.
    """

    hidden: Float[Array, "token d_model"]
    cache: Cache
    captured: dict[str, Float[Array, "layer token d_model"]]
    realised: dict[str, Realised]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """An intervention as a forward pass needs it.

    Attributes:
      interventions: one row's arrays.
      steered: which of the pass's tokens they change (scope and padding already applied).
      real: which of the pass's tokens are real, for the sums of `Realised`; in a packed sequence
        with a leading axis of prompts.
      probes: unit directions per layer whose projections are recorded at `resid_post`.
    """

    interventions: Interventions
    steered: Bool[Array, " token"]
    real: Bool[Array, "*prompt token"]
    probes: Float[Array, "layer probe d_model"]


class Embed(nnx.Module):
    """The token table, which is also the head of a tied model."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike):
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.d_model), dtype))


class Block(nnx.Module):
    """One decoder layer's parameters; `Blocks` runs it, since a tap is between its halves."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike):
        def norm(wanted: bool) -> RMSNorm | None:
            return RMSNorm(config.d_model, config, dtype) if wanted else None

        self.attn_norm, self.attn_post_norm = norm(config.pre_norm), norm(config.post_norm)
        self.attn = Attention(config, dtype)
        self.mlp_norm, self.mlp_post_norm = norm(config.pre_norm), norm(config.post_norm)
        self.mlp = MLP(config, dtype)
        self.scale = config.residual_scale

    def added(self, x: Array, norm: RMSNorm | None) -> Array:
        """What attention or MLP adds to the stream, given its output."""
        x = x if norm is None else norm(x)
        return x if self.scale == 1 else self.scale * x


def exact_products() -> AbstractContextManager[Any]:
    """Multiply float32 in float32: by default GPUs and TPUs round the inputs to fewer bits.

    Products of bfloat16 are not affected: convert the model to bfloat16 for their speed.
    """
    return jax.default_matmul_precision("highest")


class Blocks(nnx.Module):
    """Consecutive layers, which also run without the rest of the model (see `prefill`)."""

    def __init__(self, config: ModelConfig, n: int, dtype: DTypeLike):
        self.config = config
        self.layers = nnx.List([Block(config, dtype) for _ in range(n)])

    def run(
        self,
        h: Float[Array, "token d_model"],
        visible: Visible,
        cache: Cache,
        slot: Int[Array, ""],
        taps: Taps,
        past: Sequence[Past] = (),
        first: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "token d_model"], Cache]:
        """Run one row through these layers, of which `first` is the number of the first.

        Other arguments as for `Decoder`, but caches and taps number these layers alone, from 0.

        Returns:
          The residual stream after them, and their cache.
        """
        kinds = views(self.config, visible)
        written = []
        with exact_products():
            for index, (block, kept) in enumerate(zip(self.layers, cache, strict=True)):
                before = [earlier[index] for earlier in past]
                seen = view(self.config, kinds, first + index)
                x = h if block.attn_norm is None else block.attn_norm(h)
                mixed, kv = block.attn(x, *seen, kept, slot, before)
                written.append(kv)
                h = taps.visit("resid_mid", index, h + block.added(mixed, block.attn_post_norm))
                x = block.mlp(h if block.mlp_norm is None else block.mlp_norm(h))
                h = taps.visit("resid_post", index, h + block.added(x, block.mlp_post_norm))
        return h, written


class Decoder(Blocks):
    """A decoder-only transformer. Parameters are zeros until `bind` fills them."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike = jnp.float32):
        super().__init__(config, config.n_layers, dtype)
        self.embed = Embed(config, dtype)
        self.final_norm = RMSNorm(config.d_model, config, dtype)
        if not config.tied:
            self.head = Linear(config.d_model, config.vocab_size, dtype)

    def __call__(
        self,
        tokens: Int[Array, " token"],
        visible: Visible,
        cache: Cache,
        slot: Int[Array, ""],
        *,
        past: Sequence[Past] = (),
        steering: Steering | None = None,
        capture: Collection[str] = (),
    ) -> Forward:
        """Run one row's tokens through every block.

        Args:
          tokens: token ids; padding may be any id, since the masks alone identify it.
          visible: which slots, of `past` and of `cache`, each token attends to, its own included.
          cache: keys and values of earlier tokens.
          slot: where in the cache this pass's tokens go.
          past: keys and values of tokens before those in `cache`, only read.
          steering: what to apply at the taps; None runs the plain model.
          capture: names of the taps to read, at all layers.
        """
        taps = Taps(steering, capture)
        h = self.embedded(tokens, taps)
        h, written = self.run(h, visible, cache, slot, taps, past)
        captured, realised = taps.results()
        return Forward(
            hidden=self.final_norm(h), cache=written, captured=captured, realised=realised
        )

    def embedded(self, tokens: Int[Array, " token"], taps: Taps) -> Float[Array, "token d_model"]:
        """The residual stream after the tap `embed`."""
        h, scale = self.embed.embedding[...][tokens], self.config.embedding_scale
        return taps.visit("embed", 0, h if scale == 1 else h * scale)

    def logits(self, hidden: Float[Array, "token d_model"]) -> Float[Array, "token vocab"]:
        """Next-token logits, float32, from `Forward.hidden`."""
        tied, wide = self.config.tied, jnp.float32
        with exact_products():
            if tied:
                table = self.embed.embedding[...]
                found = jnp.einsum("td,vd->tv", hidden, table, preferred_element_type=wide)
            else:
                found = jnp.matmul(hidden, self.head.kernel[...], preferred_element_type=wide)
        divisor = self.config.logit_divisor
        return softcap(found if divisor == 1 else found / divisor, self.config.logit_softcap)


class Taps:
    """Applies, captures and measures at the taps of one forward pass, in layer order."""

    def __init__(self, steering: Steering | None, capture: Collection[str] = ()):
        self.steering, self.capture = steering, capture
        self.captured: dict[str, list[Array]] = {}
        self.realised: dict[str, list[Realised]] = {}

    def visit(self, tap: str, layer: int, h: Array) -> Array:
        """The stream after a tap: steered, and captured."""
        if self.steering is not None and tap in self.steering.interventions.sites:
            h = self._steer(self.steering, tap, layer, h)
        if tap in self.capture:
            self.captured.setdefault(tap, []).append(h.astype(jnp.float32))
        return h

    def _steer(self, steering: Steering, tap: str, layer: int, h: Array) -> Array:
        steered, real = steering.steered, steering.real
        new, change = apply(h, steering.interventions.sites[tap].at(layer), steered)
        probes = steering.probes[layer] if tap == "resid_post" else jnp.zeros((0, h.shape[1]))
        wide = h.astype(jnp.float32)
        before, moved = wide @ probes.T, change @ probes.T

        def total(tokens: Array) -> Array:
            # `where`, since zero times another prompt's NaN would be NaN.
            # Projections [token, probe] of two prompts (`real` [2, token]) sum to [2, probe].
            kept = real.reshape(*real.shape, *[1] * (tokens.ndim - 1))
            return jnp.sum(jnp.where(kept, tokens, 0), axis=real.ndim - 1)

        self.realised.setdefault(tap, []).append(
            Realised(
                steered=total(steered),
                change=total(jnp.linalg.norm(change, axis=-1)),
                norm=total(jnp.linalg.norm(wide, axis=-1)),
                before=total(before),
                after=total(before + moved),
            )
        )
        return new

    def results(self) -> tuple[dict[str, Array], dict[str, Realised]]:
        """Captures and measured effects by tap, layers stacked."""
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


def token_bytes(config: ModelConfig, params: Params) -> int:
    """Bytes of the keys and values of one token, in all layers."""
    entries = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return entries * int(params["embed"]["embedding"].dtype.itemsize)


@functools.cache
def graph(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> nnx.GraphDef[Decoder]:
    """The model without its parameters: hashable, so jitted functions take it as static."""
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, dtype)))


@functools.cache
def blocks_graph(
    config: ModelConfig, n: int, dtype: DTypeLike = jnp.float32
) -> nnx.GraphDef[Blocks]:
    """`n` consecutive layers without their parameters, as `graph` is the model."""
    return nnx.graphdef(nnx.eval_shape(lambda: Blocks(config, n, dtype)))


M = TypeVar("M", bound=nnx.Module)


def bind(definition: nnx.GraphDef[M], params: Params) -> M:
    """Give the model its parameters: nested arrays, with paths as in `weights.param_shapes`."""
    # Layer lists have integer keys in a Flax state and string keys on disk.
    return nnx.merge(definition, nnx.State(jax.tree.map(nnx.Param, nnx.restore_int_paths(params))))
