"""Merge a LoRA adapter, as PEFT saves it, into the weights of its base model.

W <- W + s B A with A [r, in] and B [out, r] (Hu et al. 2021, section 4.1); s = alpha / r, or
alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023). Both may differ by module. Other
kinds of adapter are refused by name.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxsteer.errors import UserError, one_line
from jaxsteer.model.weights import Tensor

FILES = CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys that the merge depends on or that have no part in it, and the only values of some others.
# Any other key is taken if its value switches it off. Other ways to begin a training than these,
# such as PiSSA, change the weights of the base.
KEYS = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "auto_mapping",
    "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
OFF: tuple[Any, ...] = (None, False, "", [], {})

# By module of the base: s B and A.
Adapter = Mapping[str, tuple[np.ndarray, np.ndarray]]


def load(folder: Path) -> Adapter:
    """Read an adapter's folder.

    Raises:
      UserError: a missing or damaged file, or unsupported keys, all of them named.
    """
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        wrong = [
            f"{key}={value!r}"
            for key, value in config.items()
            if key not in KEYS and value not in ONLY.get(key, OFF)
        ]
        if wrong:
            raise UserError(
                f"{folder}/{CONFIG}: {', '.join(wrong)} is not supported, only plain LoRA; merge "
                "the adapter with PEFT and convert the result"
            )
        found: dict[str, np.ndarray] = load_file(folder / WEIGHTS)
        return dict(_scaled(config, found))
    except (OSError, LookupError, TypeError, ValueError, re.error, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be read as a LoRA adapter ({one_line(error)}); give a folder with "
            f"{CONFIG} and {WEIGHTS}"
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
        rank = _of(config.get("rank_pattern"), module, config["r"])
        alpha = _of(config.get("alpha_pattern"), module, config["lora_alpha"])
        if not len(a) == b.shape[1] == rank:
            raise ValueError(f"{module} has rank {len(a)}, not {rank}")
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        yield _text_part(module), (np.float32(scale) * b, a)


def _of(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that the end of a module's name matches, as PEFT reads it."""
    found = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _text_part(module: str) -> str:
    # A model of text and images has its text part below a name of its own.
    return module.replace("language_model.", "")


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
