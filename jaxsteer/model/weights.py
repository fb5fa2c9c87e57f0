"""The weight map as data: each parameter's dimensions, and its tensor in HF's safetensors.

Parameter paths are those of `decoder.Decoder`, written `layers/3/attn/q/kernel`. Kernels are stored
[in, out], so HF's [out, in] matrices are transposed. `gguf` gives a GGUF's tensors HF's names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsteer.model.config import ModelConfig
from jaxsteer.model.families import FAMILIES

# A tensor's name, and the function that reads it.
Tensor = tuple[str, Callable[[], np.ndarray]]
# Linear maps below layers/N and model.layers.N: parameter, its dimensions (letters as in
# `lengths`), HF's tensor, and the field that says whether it has a bias.
_LINEAR = (
    ("attn/q", "DN", "self_attn.q_proj", "qkv_bias"),
    ("attn/k", "DK", "self_attn.k_proj", "qkv_bias"),
    ("attn/v", "DK", "self_attn.v_proj", "qkv_bias"),
    ("attn/o", "ND", "self_attn.o_proj", "o_bias"),
    ("mlp/gate", "DF", "mlp.gate_proj", "mlp_bias"),
    ("mlp/up", "DF", "mlp.up_proj", "mlp_bias"),
    ("mlp/down", "FD", "mlp.down_proj", "mlp_bias"),
)
# Tensors of a fused family that are several of these, in the order of their rows.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
# Parts of a model of text and images that read images.
_IMAGES = ("vision_tower.", "multi_modal_projector.")


def _norms(config: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """One layer's norms: parameter, its dimension and HF's tensor."""
    # HF calls the MLP's first norm so where it is the only norm after attention.
    after = "post_attention_layernorm"
    if config.pre_norm:
        yield "attn_norm", "D", "input_layernorm"
        yield "mlp_norm", "D", "pre_feedforward_layernorm" if config.post_norm else after
    if config.post_norm:
        yield "attn_post_norm", "D", after
        yield "mlp_post_norm", "D", "post_feedforward_layernorm"
    if config.qk_norm:
        for x, letter in zip("qk", "HH" if config.qk_norm == "head" else "NK", strict=True):
            yield f"attn/{x}_norm", letter, f"self_attn.{x}_norm"


def _rows(config: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """Every parameter, its dimensions, and HF's tensor."""
    yield "embed/embedding", "VD", "model.embed_tokens.weight"
    yield "final_norm/scale", "D", "model.norm.weight"
    if not config.tied:
        yield "head/kernel", "DV", "lm_head.weight"
    for n in range(config.n_layers):
        ours, hf = f"layers/{n}", f"model.layers.{n}"
        for norm, letter, theirs in _norms(config):
            yield f"{ours}/{norm}/scale", letter, f"{hf}.{theirs}.weight"
        for map_, letters, theirs, bias in _LINEAR:
            yield f"{ours}/{map_}/kernel", letters, f"{hf}.{theirs}.weight"
            if getattr(config, bias):
                yield f"{ours}/{map_}/bias", letters[1], f"{hf}.{theirs}.bias"


def table(config: ModelConfig) -> dict[str, str]:
    """Every parameter's path, by the name that HF's model gives its tensor."""
    return {hf: target for target, _, hf in _rows(config)}


def stored(config: ModelConfig) -> set[str]:
    """Names of the tensors that the family's files hold: those of `table`, or the fused ones."""
    names = set(table(config))
    for whole, parts in _FUSED.items() if FAMILIES[config.family].fused else ():
        for part in parts:
            names = {name.replace(part, whole) for name in names}
    return names


def separate(tensors: Iterable[Tensor], config: ModelConfig) -> Iterator[Tensor]:
    """The source's tensors by the names of `table`: one for each parameter, and none of images.

    Of 4 query and 2 key-value heads of width 8, rows 0 to 31 of `qkv_proj` are `q_proj`, 32 to 47
    `k_proj`, and 48 to 63 `v_proj`.
    """
    width = {hf: letters[1] for _, letters, hf, _ in _LINEAR}
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
    return {target: letters for target, letters, _ in _rows(config)}


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by path."""
    length = lengths(config)
    return {
        path: tuple(length[letter] for letter in letters)
        for path, letters in dimensions(config).items()
    }


def nest(flat: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    return unflatten_dict(dict(flat), sep="/")


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `nest`."""
    return flatten_dict(tree, sep="/")
