"""Model configuration, read from a Hugging Face `config.json` by allow-list.

A key that could change the computation and is not implemented is refused by name. A key that is
not known at all is refused too: ignoring an unknown key is how logits drift from the source.
`gguf` puts a GGUF's metadata in the same form, so that one function checks both.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any, Literal

from jaxsteer.errors import UserError

Architecture = Literal["llama", "qwen2"]
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      theta: base of the frequencies.
      kind: `default`, or `llama3` (frequencies slowed beyond the original context).
      factor: llama3: how much slower the longest wavelengths rotate.
      low_freq_factor: llama3: original_max_position / this is the wavelength fully slowed.
      high_freq_factor: llama3: original_max_position / this is the wavelength kept as is.
      original_max_position: llama3: context length before the scaling, in tokens.
    """

    theta: float
    kind: Literal["default", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the decoder's computation depends on.

    Attributes:
      architecture: `llama` or `qwen2`.
      vocab_size: rows of the token table.
      d_model: width of the residual stream.
      n_layers: number of blocks.
      n_heads: query heads.
      n_kv_heads: key-value heads; divides n_heads.
      head_dim: width of a head.
      d_ff: width of the MLP.
      norm_eps: added to the variance in every RMSNorm.
      rope: rotary embedding.
      qkv_bias: whether q, k and v have biases (Qwen2).
      tied: whether the head is the token table.
      max_position: longest context the model was trained for, in tokens.
    """

    architecture: Architecture
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    tied: bool
    max_position: int


# Keys that `from_hf` reads.
READ = {
    "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "tie_word_embeddings", "max_position_embeddings",
}  # fmt: skip

# Keys that do not enter inference: bookkeeping, training, token ids that are recorded elsewhere.
INERT = {
    "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
    "return_dict", "output_hidden_states", "output_attentions", "max_window_layers",
    "sliding_window", "is_llama_config", "transformers.js_config", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "rope_interleaved",
}  # fmt: skip

# Keys of which some values only are implemented, and those values in words. A list counts as the
# set of its entries.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "silu"),
    "attention_bias": ((False,), "false"),
    "mlp_bias": ((False,), "false"),
    "pretraining_tp": ((1,), "1"),
    "use_sliding_window": ((False, None), "false"),
    "layer_types": ((None, [], ["full_attention"]), "full_attention everywhere"),
    "auto_map": ((None, {}), "absent (no remote code is run)"),
    "quantization_config": ((None, {}), "absent (convert the unquantised weights)"),
}

# The keys of each type of rotary embedding.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads single values, and names the source and its key when one is wrong."""

    values: Mapping[str, Any]
    where: str
    names: Mapping[str, str]

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.values.get(key)
        value = default if value is None else value
        name = self.names.get(key, key)
        if value is None:
            raise UserError(f"{self.where}: key {name!r} is missing")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{self.where}: {name}={value!r} is not supported; a number above 0 is")
        return float(value)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value, name = self.number(key, default), self.names.get(key, key)
        if not value.is_integer():
            raise UserError(f"{self.where}: {name}={value} is not supported; a whole number is")
        return int(value)


def from_hf(
    config: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None
) -> ModelConfig:
    """Check and read a config in Hugging Face's form.

    Args:
      config: the decoded config.json.
      where: the source's name in errors.
      names: in errors, what the source calls a key, where that is not HF's name.

    Raises:
      UserError: an unsupported architecture or rope type, a missing key or a value of the wrong
        type; or unknown keys and unsupported values, all in one message.
    """
    read = _Reader(values=config, where=where, names=names or {})
    listed = config.get("architectures") or ["(none)"]
    named = listed[0] if isinstance(listed, list) else listed
    if not isinstance(named, str) or named not in ARCHITECTURES:
        raise UserError(
            f"{where}: architecture {named} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[named]
    problems = [_problem(key, value) for key, value in config.items()]
    if any(problems):
        known = ", ".join(sorted(READ | set(ONLY)))
        raise UserError(f"{where}: {'; '.join(filter(None, problems))}; known keys: {known}")
    n_heads, d_model = read.size("num_attention_heads"), read.size("hidden_size")
    n_kv_heads = read.size("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise UserError(f"{where}: {n_kv_heads} key-value heads do not divide {n_heads} heads")
    return ModelConfig(
        architecture=architecture,
        vocab_size=read.size("vocab_size"),
        d_model=d_model,
        n_layers=read.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=read.size("head_dim", d_model // n_heads),
        d_ff=read.size("intermediate_size"),
        norm_eps=read.number("rms_norm_eps"),
        rope=_rope(read),
        qkv_bias=architecture == "qwen2",
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position=read.size("max_position_embeddings"),
    )


def _problem(key: str, value: Any) -> str | None:
    if key in READ or key in INERT:
        return None
    if key not in ONLY:
        shown = reprlib.repr(value)
        return f"{key} is unknown, so its effect would be ignored (its value is {shown})"
    values, supported = ONLY[key]
    if isinstance(value, list):
        value = sorted(set(map(str, value)))
    return None if value in values else f"{key}={value!r} is not supported, only {supported}"


def _rope(read: _Reader) -> RopeConfig:
    # transformers 5 writes one `rope_parameters`; earlier versions `rope_theta` + `rope_scaling`.
    scaling = read.values.get("rope_parameters") or read.values.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise UserError(f"{read.where}: rope scaling {scaling!r} is not a table of keys and values")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise UserError(
            f"{read.where}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}"
        )
    unknown = sorted({*scaling} - {*ROPE_KEYS[kind], "rope_theta", "rope_type", "type"})
    if unknown:
        raise UserError(f"{read.where}: unknown keys for rope type {kind}: {', '.join(unknown)}")
    inner = dataclasses.replace(read, values=scaling)
    theta = inner if "rope_theta" in scaling else read
    rope = RopeConfig(theta=theta.number("rope_theta", 10000.0))
    if kind == "default":
        return rope
    return dataclasses.replace(
        rope,
        kind="llama3",
        factor=inner.number("factor"),
        low_freq_factor=inner.number("low_freq_factor"),
        high_freq_factor=inner.number("high_freq_factor"),
        original_max_position=inner.size("original_max_position_embeddings"),
    )


def llama3_frequencies(rope: RopeConfig, frequency: Any) -> Any:
    """Llama 3's slowed rotary frequencies, float32 or float64 as given; numpy or jax arrays.

    Wavelengths beyond original_max_position / low_freq_factor are slowed by `factor`, those below
    original_max_position / high_freq_factor are kept, and the band between is interpolated.
    """
    turns = rope.original_max_position * frequency / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clip(0.0, 1.0)
    return frequency * (blend + (1 - blend) / rope.factor)
