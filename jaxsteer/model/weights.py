"""The weight map as data: each parameter's dimensions, its source tensor, and how to transform it.

Parameter paths are those of `decoder.Decoder`, written `layers/3/attn/q/kernel`. Kernels are stored
[in, out], so HF's [out, in] matrices are transposed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

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


# Parameter, its dimensions (letters as in `lengths`), and the tensor in HF safetensors and in a
# GGUF, there with .weight or .bias at the end.
_OUTER = (
    ("embed/embedding", "VD", "model.embed_tokens", "token_embd"),
    ("final_norm/scale", "D", "model.norm", "output_norm"),
)
_HEAD = (("head/kernel", "DV", "lm_head", "output"),)
# The same below layers/N, model.layers.N and blk.N.
_LAYER = (
    ("attn_norm/scale", "D", "input_layernorm", "attn_norm"),
    ("attn/q/kernel", "DN", "self_attn.q_proj", "attn_q"),
    ("attn/k/kernel", "DK", "self_attn.k_proj", "attn_k"),
    ("attn/v/kernel", "DK", "self_attn.v_proj", "attn_v"),
    ("attn/o/kernel", "ND", "self_attn.o_proj", "attn_output"),
    ("mlp_norm/scale", "D", "post_attention_layernorm", "ffn_norm"),
    ("mlp/gate/kernel", "DF", "mlp.gate_proj", "ffn_gate"),
    ("mlp/up/kernel", "DF", "mlp.up_proj", "ffn_up"),
    ("mlp/down/kernel", "FD", "mlp.down_proj", "ffn_down"),
)
_BIASES = (
    ("attn/q/bias", "N", "self_attn.q_proj", "attn_q"),
    ("attn/k/bias", "K", "self_attn.k_proj", "attn_k"),
    ("attn/v/bias", "K", "self_attn.v_proj", "attn_v"),
)


def _rows(config: ModelConfig) -> Iterator[tuple[str, str, str, str]]:
    yield from _OUTER + (() if config.tied else _HEAD)
    for n in range(config.n_layers):
        for target, letters, hf, gguf in _LAYER + (_BIASES if config.qkv_bias else ()):
            yield f"layers/{n}/{target}", letters, f"model.layers.{n}.{hf}", f"blk.{n}.{gguf}"


def table(config: ModelConfig, form: Literal["hf", "gguf"]) -> list[Entry]:
    """Every parameter of the model with its source tensor, for HF safetensors or GGUF names."""
    # llama.cpp stores Llama's q and k with the rotary pairs interleaved; Qwen2's not.
    permuted = form == "gguf" and config.architecture == "llama"
    entries = []
    for target, _, hf, gguf in _rows(config):
        kind = "bias" if target.endswith("bias") else "weight"
        source = f"{hf if form == 'hf' else gguf}.{kind}"
        entries.append(Entry(source=source, target=target, rule=_rule(target, permuted)))
    return entries


def _rule(target: str, permuted: bool) -> Rule:
    if permuted and target.endswith("attn/q/kernel"):
        return "unpermute_q"
    if permuted and target.endswith("attn/k/kernel"):
        return "unpermute_k"
    return "transpose" if target.endswith("kernel") else "copy"


def lengths(config: ModelConfig) -> dict[str, int]:
    """The length of each dimension of a parameter, by its letter.

    D d_model, F d_ff, V vocabulary, N all query heads and K all key-value heads side by side.
    """
    c = config
    heads = {"N": c.n_heads * c.head_dim, "K": c.n_kv_heads * c.head_dim}
    return {"D": c.d_model, "F": c.d_ff, "V": c.vocab_size, **heads}


def dimensions(config: ModelConfig) -> dict[str, str]:
    """Letters of the dimensions of every parameter, by path."""
    return {target: letters for target, letters, _, _ in _rows(config)}


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by path."""
    length = lengths(config)
    return {
        path: tuple(length[letter] for letter in letters)
        for path, letters in dimensions(config).items()
    }


def transform(value: np.ndarray, rule: Rule, config: ModelConfig) -> np.ndarray:
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
    return unflatten_dict(dict(flat), sep="/")


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `nest`."""
    return flatten_dict(tree, sep="/")
