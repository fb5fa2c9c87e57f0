"""The weight map as data: each parameter's dimensions, its source tensor, and how to transform it.

Parameter paths are those of `decoder.Decoder`, written `layers/3/attn/q/kernel`. Kernels are stored
[in, out], so HF's [out, in] matrices are transposed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsteer.model.config import ModelConfig
from jaxsteer.model.families import FAMILIES

Rule = Literal["copy", "transpose", "unpermute_q", "unpermute_k", "less_offset"]
# A tensor's name, and the function that reads it.
Tensor = tuple[str, Callable[[], np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the map.

    Attributes:
      source: the tensor's name in the source file, or that `separate` gives it.
      target: the parameter's path.
      rule: how the source becomes the target.
    """

    source: str
    target: str
    rule: Rule


# Linear maps below layers/N, model.layers.N and blk.N: parameter, its dimensions (letters as in
# `lengths`), tensor in HF safetensors and in a GGUF, and the field that says whether it has a bias.
_LINEAR = (
    ("attn/q", "DN", "self_attn.q_proj", "attn_q", "qkv_bias"),
    ("attn/k", "DK", "self_attn.k_proj", "attn_k", "qkv_bias"),
    ("attn/v", "DK", "self_attn.v_proj", "attn_v", "qkv_bias"),
    ("attn/o", "ND", "self_attn.o_proj", "attn_output", "o_bias"),
    ("mlp/gate", "DF", "mlp.gate_proj", "ffn_gate", "mlp_bias"),
    ("mlp/up", "DF", "mlp.up_proj", "ffn_up", "mlp_bias"),
    ("mlp/down", "FD", "mlp.down_proj", "ffn_down", "mlp_bias"),
)
# Tensors of a source that are several of these, in the order of their rows.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_up": ("ffn_gate", "ffn_up"),
}
# Parts of a model of text and images that read images.
_IMAGES = ("vision_tower.", "multi_modal_projector.")


def _norms(config: ModelConfig) -> Iterator[tuple[str, str, str, str]]:
    """As `_LINEAR`, of one layer's norms."""
    # HF calls the MLP's first norm so where it is the only norm after attention.
    after = "post_attention_layernorm"
    if config.pre_norm:
        yield "attn_norm", "D", "input_layernorm", "attn_norm"
        before_mlp = "pre_feedforward_layernorm" if config.post_norm else after
        yield "mlp_norm", "D", before_mlp, "ffn_norm"
    if config.post_norm:
        yield "attn_post_norm", "D", after, "post_attention_norm"
        yield "mlp_post_norm", "D", "post_feedforward_layernorm", "post_ffw_norm"
    if config.qk_norm:
        for x, letter in zip("qk", "HH" if config.qk_norm == "head" else "NK", strict=True):
            yield f"attn/{x}_norm", letter, f"self_attn.{x}_norm", f"attn_{x}_norm"


def _rows(config: ModelConfig) -> Iterator[tuple[str, str, str, str]]:
    """Every parameter, its dimensions, and its tensor in HF's and GGUF's names."""
    yield "embed/embedding", "VD", "model.embed_tokens.weight", "token_embd.weight"
    yield "final_norm/scale", "D", "model.norm.weight", "output_norm.weight"
    if not config.tied:
        yield "head/kernel", "DV", "lm_head.weight", "output.weight"
    for n in range(config.n_layers):
        ours, hf, gguf = f"layers/{n}", f"model.layers.{n}", f"blk.{n}"
        for norm, letter, theirs, ggml in _norms(config):
            yield f"{ours}/{norm}/scale", letter, f"{hf}.{theirs}.weight", f"{gguf}.{ggml}.weight"
        for map_, letters, theirs, ggml, bias in _LINEAR:
            weight = f"{hf}.{theirs}.weight", f"{gguf}.{ggml}.weight"
            yield f"{ours}/{map_}/kernel", letters, *weight
            if getattr(config, bias):
                yield (
                    f"{ours}/{map_}/bias",
                    letters[1],
                    f"{hf}.{theirs}.bias",
                    f"{gguf}.{ggml}.bias",
                )


def table(config: ModelConfig, form: Literal["hf", "gguf"]) -> list[Entry]:
    """Every parameter of the model with its source tensor, for HF safetensors or GGUF names."""
    return [
        Entry(source=(hf, gguf)[form == "gguf"], target=target, rule=_rule(target, form, config))
        for target, _, hf, gguf in _rows(config)
    ]


def _rule(target: str, form: str, config: ModelConfig) -> Rule:
    if form == "gguf" and FAMILIES[config.family].gguf_pairs:
        if "attn/q/" in target:
            return "unpermute_q"
        if "attn/k/" in target:
            return "unpermute_k"
    if form == "gguf" and config.norm_offset and target.endswith("scale"):
        return "less_offset"
    return "transpose" if target.endswith("kernel") else "copy"


def separate(tensors: Iterable[Tensor], config: ModelConfig) -> Iterator[Tensor]:
    """The source's tensors by the names of `table`: one for each parameter, and none of images.

    Of 4 query and 2 key-value heads of width 8, rows 0 to 31 of `qkv_proj` are `q_proj`, 32 to 47
    `k_proj`, and 48 to 63 `v_proj`.
    """
    width = {hf: letters[1] for _, letters, *names, _ in _LINEAR for hf in names}
    for name, read in tensors:
        name = name.replace("language_model.", "")
        fused = next((f for f in _FUSED if f".{f}." in name), None)
        if fused is None or not FAMILIES[config.family].fused:
            if not any(part in name for part in _IMAGES):
                yield name, read
            continue
        first = 0
        for part in _FUSED[fused]:
            last = first + lengths(config)[width[part]]
            yield name.replace(fused, part), functools.partial(_rows_of, read, first, last)
            first = last


def _rows_of(read: Callable[[], np.ndarray], first: int, last: int) -> np.ndarray:
    return read()[first:last]


def lengths(config: ModelConfig) -> dict[str, int]:
    """The length of each dimension of a parameter, by its letter.

    D d_model, F d_ff, V vocabulary, N all query heads and K all key-value heads side by side, H
    one head.
    """
    c = config
    heads = {"N": c.n_heads * c.head_dim, "K": c.n_kv_heads * c.head_dim, "H": c.head_dim}
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
    if rule == "less_offset":
        return value - config.norm_offset
    if rule.startswith("unpermute"):
        value = unpermute(value, config.n_heads if rule == "unpermute_q" else config.n_kv_heads)
    return value if rule == "copy" else value.T


def unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of a [heads * head_dim, d_model] matrix, or of a bias.

    Per head, rows come as rotary pairs side by side; HF wants all first halves, then all second
    halves. For head_dim 4: rows [a0, b0, a1, b1] become [a0, a1, b0, b1].
    """
    paired = value.reshape(heads, len(value) // heads // 2, 2, *value.shape[1:])
    return paired.swapaxes(1, 2).reshape(value.shape)


def nest(flat: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    return unflatten_dict(dict(flat), sep="/")


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `nest`."""
    return flatten_dict(tree, sep="/")
