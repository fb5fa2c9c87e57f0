"""A GGUF file as a source: its metadata in the form of an HF config, its tensors as floats.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package reads it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsteer.errors import UserError, one_line
from jaxsteer.model.config import AttentionKind, ModelConfig, from_hf
from jaxsteer.model.convert import Source
from jaxsteer.model.families import FAMILIES
from jaxsteer.model.tokenizer import Tokenizer, transformers
from jaxsteer.model.weights import Tensor

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

ROPE_FACTORS = "rope_freqs.weight"
# How text is split before merging, by llama.cpp's name of it.
SPLITS = ("llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen", "smollm", "gpt-2")

# Metadata below the architecture's name, and the config keys that mean the same.
CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# Metadata that must equal the width of a head.
HEAD_WIDTHS = ("attention.value_length", "rope.dimension_count")
# Metadata that follows from the tensors.
IMPLIED = ("vocab_size", "tensor_data_layout")
# Values that mean the same as no value.
DEFAULTS = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
}


def read(path: Path) -> Source:
    """Read a GGUF file's metadata and find its tensors.

    Raises:
      UserError: a damaged file; an unsupported architecture, metadata or tensor type; a tokenizer
        that cannot be built, or no chat template.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(str(path))
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:
        # The reader raises whatever numpy does on short data.
        raise UserError(
            f"{path} is missing, damaged, truncated or not a GGUF file ({one_line(error)}); check "
            "the path, or download it again"
        ) from None
    config = configuration(fields, reader.tensors, path.name)
    for tensor in reader.tensors:
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{path.name}: tensor {tensor.name} has type {tensor.tensor_type.name}, which the "
                "gguf package cannot read; get a file of another type, such as Q8_0"
            ) from None
    return Source(
        kind="gguf",
        name=path.name,
        config=config,
        form="gguf",
        tensors=_tensors(reader.tensors),
        eos_token_ids=[int(fields["tokenizer.ggml.eos_token_id"])],
        tokenizer=_tokenizer(fields, path.name),
        files=[path],
    )


def configuration(
    fields: Mapping[str, Any], tensors: list[ReaderTensor], where: str
) -> ModelConfig:
    """The configuration that a GGUF's metadata and the names and shapes of its tensors describe.

    Raises:
      UserError: as `config.from_hf`, or rotary factors that are not those of a known model.
    """
    named = fields.get("general.architecture")
    of_name = [hf for hf, family in FAMILIES.items() if family.gguf == named]
    if not of_name:
        known = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES.values()))
        raise UserError(f"{where}: architecture {named!r} is not supported; supported: {known}")
    by_name = {tensor.name: tensor for tensor in tensors}
    if "token_embd.weight" not in by_name:
        raise UserError(f"{where}: tensor token_embd.weight is missing; the file may be truncated")
    values: dict[str, Any] = {
        "architectures": of_name,
        "vocab_size": int(by_name["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in by_name,
    }
    for key, value in fields.items():
        head, _, name = key.partition(".")
        if name in CONFIG_KEYS and head == named:
            values[CONFIG_KEYS[name]] = value
        elif head == named and name not in (*HEAD_WIDTHS, *IMPLIED) and DEFAULTS.get(name) != value:
            values[key] = value  # `from_hf` refuses it by this name
    names = {hf: f"{named}.{name}" for name, hf in CONFIG_KEYS.items()}
    config = from_hf(values, where, names)
    for name in HEAD_WIDTHS:
        width = fields.get(f"{named}.{name}", config.head_dim)
        if width != config.head_dim:
            raise UserError(
                f"{where}: {named}.{name}={width!r} is not supported, only the width of a head, "
                f"{config.head_dim}"
            )
    if ROPE_FACTORS not in by_name:
        return config
    # What each rotary frequency is divided by.
    factors = tuple(np.array(by_name[ROPE_FACTORS].data, float).tolist())
    if len(factors) != config.rotary_dim // 2:
        raise UserError(f"{where}: {ROPE_FACTORS} does not fit heads of {config.head_dim}")

    def divided(kind: AttentionKind) -> AttentionKind:
        rope = kind.rope and dataclasses.replace(kind.rope, divisors=factors)
        return dataclasses.replace(kind, rope=rope)

    return dataclasses.replace(config, attention=tuple(map(divided, config.attention)))


def _tensors(tensors: list[ReaderTensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        if tensor.name != ROPE_FACTORS:
            yield tensor.name, functools.partial(_dequantised, tensor)


def _dequantised(tensor: ReaderTensor) -> np.ndarray:
    from gguf.quants import dequantize

    # GGUF lists the innermost axis first.
    shape = tuple(int(length) for length in reversed(tensor.shape))
    return dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def _tokenizer(fields: Mapping[str, Any], where: str) -> Tokenizer:
    library = transformers()
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    for name in ("tokens", "model", "eos_token_id"):
        if f"tokenizer.ggml.{name}" not in fields:
            raise UserError(f"{where}: metadata tokenizer.ggml.{name} is missing")
    split = fields.get("tokenizer.ggml.pre")
    if fields["tokenizer.ggml.model"] == "gpt2" and split not in SPLITS:
        raise UserError(
            f"{where}: its tokenizer splits text by {split!r}, which is not supported; supported: "
            f"{', '.join(SPLITS)}; convert the Hugging Face weights instead"
        )
    named = GGUF_TOKENIZER_MAPPING["tokenizer"].items()
    ggml = {
        theirs: fields[f"tokenizer.{key}"] for key, theirs in named if f"tokenizer.{key}" in fields
    }
    try:
        backend, _ = convert_gguf_tokenizer(fields["general.architecture"], ggml)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: its tokenizer cannot be built ({error})") from None
    special = {
        f"{name}_token": ggml["tokens"][int(ggml[f"{name}_token_id"])]
        for name in ("bos", "eos", "unk", "pad")
        if f"{name}_token_id" in ggml
    }
    template = fields.get("tokenizer.chat_template")
    hf = library.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, **special
    )
    return Tokenizer.of(hf, where)
