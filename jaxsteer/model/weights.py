"""The weight map as data: each parameter's dimensions, and its tensor in HF's safetensors.

Parameter paths are those of `decoder.Decoder`, written `layers/3/attn/q/kernel`. Kernels are stored
[in, out], so HF's [out, in] matrices are transposed. `gguf` gives a GGUF's tensors HF's names.

`merged` adds a LoRA adapter, as PEFT saves it, to the weights of its base model: W <- W + s B A
with A [r, in] and B [out, r] (Hu et al. 2021, section 4.1); s = alpha / r, or alpha / sqrt(r) with
rank-stabilised LoRA (Kalajdzievski 2023). Both may differ by module. Other kinds of adapter are
refused by name.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxsteer.errors import UserError, one_line
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
        name = _text_part(name)
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


def _text_part(name: str) -> str:
    # A model of text and images has its text part below a name of its own.
    return name.replace("language_model.", "")


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


# -- Adapters --------------------------------------------------------------------------------------

ADAPTER_FILES = ADAPTER_CONFIG, _MATRICES = "adapter_config.json", "adapter_model.safetensors"
# Keys that the merge depends on or that have no part in it, and the only values of some others.
# Any other key is taken if its value switches it off. Other ways to begin a training than these,
# such as PiSSA, change the weights of the base.
_KEYS = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "auto_mapping",
    "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_OFF: tuple[Any, ...] = (None, False, "", [], {})

# By module of the base: s B and A.
Adapter = Mapping[str, tuple[np.ndarray, np.ndarray]]


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder.

    Raises:
      UserError: a missing or damaged file, or unsupported keys, all of them named.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        wrong = [
            f"{key}={value!r}"
            for key, value in config.items()
            if key not in _KEYS and value not in _ONLY.get(key, _OFF)
        ]
        if wrong:
            raise UserError(
                f"{folder}/{ADAPTER_CONFIG}: {', '.join(wrong)} is not supported, only plain LoRA; "
                "merge the adapter with PEFT and convert the result"
            )
        found: dict[str, np.ndarray] = load_file(folder / _MATRICES)
        return dict(_scaled(config, found))
    except (OSError, LookupError, TypeError, ValueError, re.error, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be read as a LoRA adapter ({one_line(error)}); give a folder with "
            f"{ADAPTER_CONFIG} and {_MATRICES}"
        ) from None


def _scaled(
    config: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    if not tensors:
        raise ValueError("it holds no matrices")
    if other := [n for n in tensors if not n.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise ValueError(f"beside A and B it holds {', '.join(other[:3])}")
    while tensors:
        name = next(iter(tensors)).rpartition(".lora_")[0]
        a, b = (tensors.pop(f"{name}.lora_{x}.weight").astype(np.float32) for x in "AB")
        module = name.removeprefix("base_model.model.")
        rank = _matched(config.get("rank_pattern"), module, config["r"])
        alpha = _matched(config.get("alpha_pattern"), module, config["lora_alpha"])
        if not len(a) == b.shape[1] == rank:
            raise ValueError(f"{module} has rank {len(a)}, not {rank}")
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        yield _text_part(module), (np.float32(scale) * b, a)


def _matched(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that the end of a module's name matches, as PEFT reads it."""
    found = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def merged(tensors: Iterable[Tensor], adapter: Adapter, where: str) -> Iterator[Tensor]:
    """The base's tensors, in float32 where the adapter changes them.

    Raises:
      UserError: the adapter changes weights that the base does not have.
    """
    held = {_text_part(name.removesuffix(".weight")): (name, read) for name, read in tensors}
    if missing := sorted(adapter.keys() - held.keys()):
        raise UserError(
            f"{where}: the base has no weights {', '.join(missing[:3])}; the adapter was made for "
            "another model"
        )
    for module, (name, read) in held.items():
        change = adapter.get(module)
        yield name, functools.partial(_added, read, *change) if change else read


def _added(read: Callable[[], np.ndarray], b: np.ndarray, a: np.ndarray) -> np.ndarray:
    return read().astype(np.float32) + b @ a
