"""Model configuration, read from a Hugging Face `config.json` or GGUF metadata by allow-list.

A key that could change the computation and is not implemented is refused by name. A key that is
not known at all is refused too: silence about an unknown key is how logits drift from the source.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

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
      factor: llama3: how much slower the longest wavelengths turn.
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
_READ = {
    "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "tie_word_embeddings", "max_position_embeddings",
}  # fmt: skip

# Keys that do not enter inference: bookkeeping, training, token ids that are recorded elsewhere.
_INERT = {
    "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
    "return_dict", "output_hidden_states", "output_attentions", "max_window_layers",
    "sliding_window", "is_llama_config", "transformers.js_config", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "rope_interleaved",
}  # fmt: skip

# Keys with one value that we compute; anything else is refused.
_ONLY: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (lambda v: v == "silu", "silu"),
    "attention_bias": (lambda v: v is False, "false"),
    "mlp_bias": (lambda v: v is False, "false"),
    "pretraining_tp": (lambda v: v == 1, "1"),
    "use_sliding_window": (lambda v: not v, "false"),
    "layer_types": (
        lambda v: v is None or (isinstance(v, list) and all(k == "full_attention" for k in v)),
        "full_attention everywhere",
    ),
    "auto_map": (lambda v: not v, "absent (no remote code is run)"),
    "quantization_config": (lambda v: not v, "absent (convert the unquantised weights)"),
}


def from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Read an HF config.

    Args:
      config: the decoded config.json.
      where: how to call it in errors.

    Raises:
      UserError: an unsupported architecture, rope type, activation or value, an unknown key, or a
        missing one.
    """
    names = config.get("architectures") or ["(none)"]
    named = names[0] if isinstance(names, list) else names
    if named not in list(ARCHITECTURES):
        raise UserError(
            f"{where}: architecture {named} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[named]
    for key, value in config.items():
        if key in _ONLY:
            good, supported = _ONLY[key]
            if not good(value):
                raise UserError(
                    f"{where}: {key}={value!r} is not supported; supported: {supported}"
                )
        elif key not in _READ and key not in _INERT:
            raise UserError(
                f"{where}: config key {key!r} is unknown, so its effect would be ignored; "
                f"known keys: {', '.join(sorted(_READ | set(_ONLY)))}"
            )
    try:
        n_heads = _size(config["num_attention_heads"])
        d_model = _size(config["hidden_size"])
        result = ModelConfig(
            architecture=architecture,
            vocab_size=_size(config["vocab_size"]),
            d_model=d_model,
            n_layers=_size(config["num_hidden_layers"]),
            n_heads=n_heads,
            n_kv_heads=_size(config.get("num_key_value_heads") or n_heads),
            head_dim=_size(config.get("head_dim") or d_model // n_heads),
            d_ff=_size(config["intermediate_size"]),
            norm_eps=float(config["rms_norm_eps"]),
            rope=_rope(config, where),
            qkv_bias=architecture == "qwen2",
            tied=bool(config.get("tie_word_embeddings", False)),
            max_position=_size(config["max_position_embeddings"]),
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error.args[0]!r} is missing") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: a value has the wrong type: {error}") from None
    if result.n_heads % result.n_kv_heads:
        raise UserError(
            f"{where}: {result.n_kv_heads} key-value heads do not divide {n_heads} heads"
        )
    return result


def _size(value: Any) -> int:
    size = int(value)
    if size < 1:
        raise ValueError(f"{value!r} where a size of at least 1 belongs")
    return size


def _rope(config: Mapping[str, Any], where: str) -> RopeConfig:
    # transformers 5 writes one `rope_parameters`; earlier versions `rope_theta` + `rope_scaling`.
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(scaling.pop("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if kind == "default":
        known: set[str] = set()
        values: dict[str, Any] = {}
    elif kind == "llama3":
        known = {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        }
        missing = known - set(scaling)
        if missing:
            raise UserError(f"{where}: llama3 rope scaling lacks {', '.join(sorted(missing))}")
        values = {
            "factor": float(scaling["factor"]),
            "low_freq_factor": float(scaling["low_freq_factor"]),
            "high_freq_factor": float(scaling["high_freq_factor"]),
            "original_max_position": int(scaling["original_max_position_embeddings"]),
        }
    else:
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: default, llama3")
    unknown = set(scaling) - known
    if unknown:
        raise UserError(f"{where}: rope key {sorted(unknown)[0]!r} is unknown for type {kind}")
    return RopeConfig(theta=theta, kind=kind, **values)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The HF form of a config: `from_hf(to_hf(c)) == c`, and transformers reads it too."""
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind == "llama3":
        rope |= {
            "factor": config.rope.factor,
            "low_freq_factor": config.rope.low_freq_factor,
            "high_freq_factor": config.rope.high_freq_factor,
            "original_max_position_embeddings": config.rope.original_max_position,
        }
    names = {short: name for name, short in ARCHITECTURES.items()}
    return {
        "architectures": [names[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_position,
    }


# GGUF keys below the architecture's name that `from_gguf` reads.
_GGUF_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "rope.dimension_count", "vocab_size", "tensor_data_layout",
}  # fmt: skip
_GGUF_ONLY: dict[str, Any] = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
}


def from_gguf(
    fields: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    where: str,
    rope_factors: np.ndarray | None = None,
) -> ModelConfig:
    """Read GGUF metadata.

    Args:
      fields: metadata values by key.
      tensors: shapes by GGUF tensor name, outermost axis first.
      where: how to call the file in errors.
      rope_factors: its tensor rope_freqs.weight: what each rotary frequency is divided by.

    Raises:
      UserError: an unsupported architecture or rope scaling, an unknown key, a value of another
        type, or a missing field.
    """
    named = fields.get("general.architecture")
    architecture = next((short for short in ARCHITECTURES.values() if short == named), None)
    if architecture is None:
        raise UserError(
            f"{where}: architecture {named!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES.values())}"
        )
    for key, value in fields.items():
        head, _, name = key.partition(".")
        if head != architecture or name in _GGUF_READ:
            continue
        if name not in _GGUF_ONLY:
            raise UserError(
                f"{where}: metadata {key} is unknown, so its effect would be ignored; known: "
                f"{', '.join(sorted(_GGUF_READ | set(_GGUF_ONLY)))}"
            )
        if value != _GGUF_ONLY[name]:
            raise UserError(
                f"{where}: {key}={value!r} is not supported; supported: {_GGUF_ONLY[name]}"
            )

    def field(name: str, cast: Callable[[Any], Any] = _size, default: Any = None) -> Any:
        key = f"{architecture}.{name}"
        value = fields.get(key, default)
        if value is None:
            raise UserError(f"{where}: metadata {key} is missing; the file may be truncated")
        try:
            return cast(value)
        except (TypeError, ValueError):
            raise UserError(
                f"{where}: {key}={value!r} is not supported; one number above 0 is"
            ) from None

    if "token_embd.weight" not in tensors:
        raise UserError(f"{where}: tensor token_embd.weight is missing; the file may be truncated")
    n_heads, d_model = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", default=d_model // n_heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if field(name, default=head_dim) != head_dim:
            raise UserError(f"{where}: {architecture}.{name} is not the head's width, {head_dim}")
    theta = field("rope.freq_base", float, 10000.0)
    return ModelConfig(
        architecture=architecture,
        vocab_size=tensors["token_embd.weight"][0],
        d_model=d_model,
        n_layers=field("block_count"),
        n_heads=n_heads,
        n_kv_heads=field("attention.head_count_kv", default=n_heads),
        head_dim=head_dim,
        d_ff=field("feed_forward_length"),
        norm_eps=field("attention.layer_norm_rms_epsilon", float),
        rope=_gguf_rope(theta, head_dim, rope_factors, where),
        qkv_bias=architecture == "qwen2",
        tied="output.weight" not in tensors,
        max_position=field("context_length"),
    )


def _gguf_rope(theta: float, head_dim: int, factors: np.ndarray | None, where: str) -> RopeConfig:
    """Llama 3.1 to 3.3 in a GGUF: the factors alone are stored, so their origin is recognised."""
    if factors is None:
        return RopeConfig(theta=theta)
    rope = RopeConfig(theta=theta, kind="llama3", factor=round(float(factors.max()), 4))
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    expected = frequency / llama3_frequencies(rope, frequency)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(
            f"{where}: its rope_freqs.weight is not Llama 3's scaling of the published models; "
            "convert the Hugging Face weights instead"
        )
    return rope


def llama3_frequencies(rope: RopeConfig, frequency: Any) -> Any:
    """Llama 3's slowed rotary frequencies, float32 or float64 as given; numpy or jax arrays.

    Wavelengths beyond original_max_position / low_freq_factor are slowed by `factor`, those below
    original_max_position / high_freq_factor are kept, and the band between is interpolated.
    """
    turns = rope.original_max_position * frequency / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clip(0.0, 1.0)
    return frequency * (blend + (1 - blend) / rope.factor)
