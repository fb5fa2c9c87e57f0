"""The weight map as data: where each source tensor goes, and how it is turned on the way.

Target paths are those of `model.Decoder`, written `layers/3/attn/q/kernel`. Kernels are stored
input-major, so HF's [out, in] matrices are transposed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from jaxsteer.model.config import ModelConfig

Rule = Literal["copy", "transpose", "unpermute_q", "unpermute_k"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the map.

    Attributes:
      source: the tensor's name in the source file.
      target: the parameter's path.
      rule: how the source becomes the target.
    """

    source: str
    target: str
    rule: Rule


# (target below layers/N, HF name below model.layers.N, GGUF name below blk.N)
_LAYER = (
    ("attn_norm/scale", "input_layernorm.weight", "attn_norm.weight"),
    ("attn/q/kernel", "self_attn.q_proj.weight", "attn_q.weight"),
    ("attn/k/kernel", "self_attn.k_proj.weight", "attn_k.weight"),
    ("attn/v/kernel", "self_attn.v_proj.weight", "attn_v.weight"),
    ("attn/o/kernel", "self_attn.o_proj.weight", "attn_output.weight"),
    ("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp/gate/kernel", "mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp/up/kernel", "mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp/down/kernel", "mlp.down_proj.weight", "ffn_down.weight"),
)
_BIASES = (
    ("attn/q/bias", "self_attn.q_proj.bias", "attn_q.bias"),
    ("attn/k/bias", "self_attn.k_proj.bias", "attn_k.bias"),
    ("attn/v/bias", "self_attn.v_proj.bias", "attn_v.bias"),
)
_OUTER = (
    ("embed/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    ("final_norm/scale", "model.norm.weight", "output_norm.weight"),
)
_HEAD = (("head/kernel", "lm_head.weight", "output.weight"),)


def table(config: ModelConfig, form: Literal["hf", "gguf"]) -> list[Entry]:
    """Every parameter of the model with its source tensor, for HF safetensors or GGUF names."""
    layer_rows = _LAYER + (_BIASES if config.qkv_bias else ())
    prefix = "model.layers" if form == "hf" else "blk"
    rows = [(t, hf, gguf) for t, hf, gguf in _OUTER + (() if config.tied else _HEAD)]
    entries = [
        Entry(source=hf if form == "hf" else gguf, target=target, rule=_rule(target))
        for target, hf, gguf in rows
    ]
    for layer in range(config.n_layers):
        for target, hf, gguf in layer_rows:
            rule = _rule(target)
            # llama.cpp stores Llama's q and k with the rotary pairs interleaved; Qwen2's not.
            if form == "gguf" and config.architecture == "llama":
                if target == "attn/q/kernel":
                    rule = "unpermute_q"
                elif target == "attn/k/kernel":
                    rule = "unpermute_k"
            entries.append(
                Entry(
                    source=f"{prefix}.{layer}.{hf if form == 'hf' else gguf}",
                    target=f"layers/{layer}/{target}",
                    rule=rule,
                )
            )
    return entries


def _rule(target: str) -> Rule:
    return "transpose" if target.endswith("kernel") else "copy"


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by path."""
    c = config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm/scale": (c.d_model,),
        "attn/q/kernel": (c.d_model, q),
        "attn/k/kernel": (c.d_model, kv),
        "attn/v/kernel": (c.d_model, kv),
        "attn/o/kernel": (q, c.d_model),
        "mlp_norm/scale": (c.d_model,),
        "mlp/gate/kernel": (c.d_model, c.d_ff),
        "mlp/up/kernel": (c.d_model, c.d_ff),
        "mlp/down/kernel": (c.d_ff, c.d_model),
    }
    if c.qkv_bias:
        layer |= {"attn/q/bias": (q,), "attn/k/bias": (kv,), "attn/v/bias": (kv,)}
    shapes: dict[str, tuple[int, ...]] = {
        "embed/embedding": (c.vocab_size, c.d_model),
        "final_norm/scale": (c.d_model,),
    }
    if not c.tied:
        shapes["head/kernel"] = (c.d_model, c.vocab_size)
    for index in range(c.n_layers):
        shapes |= {f"layers/{index}/{name}": shape for name, shape in layer.items()}
    return shapes


def turn(value: np.ndarray, rule: Rule, config: ModelConfig) -> np.ndarray:
    """Apply a rule to one source tensor."""
    if rule == "copy":
        return value
    if rule == "transpose":
        return value.T
    heads = config.n_heads if rule == "unpermute_q" else config.n_kv_heads
    return unpermute(value, heads).T


def unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of a [heads * head_dim, d_model] matrix.

    Per head, rows come as rotary pairs side by side; HF wants all first halves, then all second
    halves. For head_dim 4: rows [a0, b0, a1, b1] become [a0, a1, b0, b1].
    """
    rows, width = value.shape
    paired = value.reshape(heads, rows // heads // 2, 2, width)
    return paired.swapaxes(1, 2).reshape(rows, width)


def nest(flat: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat:
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{path}/")
        else:
            flat[path] = value
    return flat
