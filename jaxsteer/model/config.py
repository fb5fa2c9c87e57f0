"""Model configuration, read from a Hugging Face `config.json` by allow-list.

A key that could change the computation and is not implemented is refused by name. A key that is
not known at all is refused too: ignoring an unknown key is how logits drift from the source. What a
key means that is left out, or that has an older form, is asked of transformers.
`gguf` puts a GGUF's metadata in the same form, so that one function checks both.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from jaxsteer.errors import UserError, one_line
from jaxsteer.model.families import FAMILIES, WRAPPERS, Family
from jaxsteer.model.tokenizer import transformers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: pair i of width w turns by theta^(-2i/w) / divisors[i] a token.

    Attributes:
      theta: base of the frequencies.
      divisors: what each frequency is divided by, for a longer context; () for ones.
      scale: multiplies the rotated pairs.
    """

    theta: float
    divisors: tuple[float, ...] = ()
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionKind:
    """What may differ from layer to layer.

    Attributes:
      window: a token attends to itself and this many - 1 tokens before it; 0 for all of them.
      rope: rotary embedding; None for none.
    """

    window: int = 0
    rope: Rope | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the decoder's computation depends on.

    Attributes:
      family: key of `families.FAMILIES`, for the names of the source's tensors.
      vocab_size: rows of the token table.
      d_model: width of the residual stream.
      n_layers: number of blocks.
      n_heads: query heads.
      n_kv_heads: key-value heads; divides n_heads.
      head_dim: width of a head.
      d_ff: width of the MLP.
      tied: whether the head is the token table.
      max_position: longest context, in tokens.
      attention: the kinds of layers that there are.
      pattern: by layer, index into `attention`.
      rotary_dim: how much of a head is rotated, from its first entry on.
      norm_eps: added to the variance in every RMSNorm.
      norm_offset: added to the scale of every RMSNorm.
      pre_norm: whether attention and MLP read a normalised stream.
      post_norm: whether what they add to the stream is normalised.
      qk_norm: whether queries and keys are normalised, per head or all heads together.
      qkv_bias: whether q, k and v have biases.
      o_bias: whether attention's output map has one.
      mlp_bias: whether the maps of the MLP have biases.
      activation: of the MLP's gate.
      attention_scale: multiplies the products of queries and keys.
      attention_softcap: bound c of attention scores x, c tanh(x / c); 0 for none.
      embedding_scale: multiplies rows of the token table.
      residual_scale: multiplies what attention and MLP add to the stream.
      logit_divisor: divides the logits.
      logit_softcap: as `attention_softcap`, of the logits.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    tied: bool
    max_position: int
    attention: tuple[AttentionKind, ...]
    pattern: tuple[int, ...]
    rotary_dim: int
    norm_eps: float
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: Literal["", "head", "width"] = ""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float
    attention_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float = 0.0


LAYER_TYPES = ("full_attention", "sliding_attention")
# Fields that are a key of every family's config, and of some with the value for all others.
SAME = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps",
}  # fmt: skip
SOME: dict[str, tuple[str, bool | float]] = {
    "qkv_bias": ("attention_bias", False), "o_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False), "attention_softcap": ("attn_logit_softcapping", 0.0),
    "embedding_scale": ("embedding_multiplier", 1.0), "logit_divisor": ("logits_scaling", 1.0),
    "residual_scale": ("residual_multiplier", 1.0),
    "logit_softcap": ("final_logit_softcapping", 0.0),
}  # fmt: skip
# Numbers above 0 that every config gives, and those that it may give.
SIZES = ("max_position_embeddings", *SAME.values())
NUMBERS = (
    "num_key_value_heads", "head_dim", "sliding_window", "original_max_position_embeddings",
    "rope_theta", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
    "partial_rotary_factor",
)  # fmt: skip
# Those of them that count something.
COUNTS = {*SIZES[:-1], *NUMBERS[:4]}
# Keys that `from_hf` reads for every family.
READ = {
    *SIZES, "architectures", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings",
}  # fmt: skip

# Keys that do not enter inference: bookkeeping, training, token ids that are recorded elsewhere.
INERT = {
    "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
    "return_dict", "output_hidden_states", "output_attentions", "max_window_layers",
    "sliding_window", "is_llama_config", "transformers.js_config", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "rope_interleaved",
    "resid_pdrop", "embd_pdrop", "cache_implementation", "_attn_implementation_autoset",
    "torchscript", "unsloth_fixed", "unsloth_version",
    "unsloth_needs_bf16", "use_cache_quantization", "tie_encoder_decoder", "is_decoder",
    "finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "sep_token_id",
    "use_bfloat16", "tf_legacy_loss", "gradient_checkpointing", "attn_implementation",
    "_attn_implementation", "_flash_attn_2_enabled", "_commit_hash", "num_labels",
    # How to generate, which earlier versions of transformers wrote here with their defaults.
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "decoder_start_token_id", "remove_invalid_values", "output_scores", "return_dict_in_generate",
}  # fmt: skip

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Keys of which some values only are implemented, and those values in words. A list counts as the
# set of its entries. A family that reads the key takes any value.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (tuple(ACTIVATIONS), " and ".join(ACTIVATIONS)),
    "attention_bias": ((False, None), "false"),
    "mlp_bias": ((False, None), "false"),
    "pretraining_tp": ((1, None), "1"),
    "use_sliding_window": ((False, None), "false"),
    "use_mrope": ((False, None), "false"),
    "add_cross_attention": ((False, None), "false"),
    "cross_attention_hidden_size": ((None,), "null"),
    "pruned_heads": ((None, {}), "none"),
    "use_bidirectional_attention": ((False, None), "false"),
    "partial_rotary_factor": ((1, None), "1"),
    "layer_types": ((None, [], ["full_attention"]), "full_attention everywhere"),
    "auto_map": ((None, {}), "absent (no remote code is run)"),
    "quantization_config": ((None, {}), "absent (convert the unquantised weights)"),
}
# The keys of each type of rotary embedding. `dynamic` differs from `default` only beyond the
# context that the model was trained for.
_LENGTH = "original_max_position_embeddings"
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "yarn": (
        "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
        "truncate", _LENGTH, "llama_4_scaling_beta", "max_position_embeddings",
    ),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor", _LENGTH),
}  # fmt: skip
_EVERY_ROPE = ("rope_theta", "rope_type", "type", "partial_rotary_factor")


def from_hf(
    config: Mapping[str, Any],
    where: str,
    names: Mapping[str, str] | None = None,
    accept: Collection[str] = (),
) -> ModelConfig:
    """Check and read a config in Hugging Face's form; of a model of text and images its text part.

    Args:
      config: the decoded config.json.
      where: the source's name in errors.
      names: in errors, what the source calls a key, where that is not HF's name.
      accept: unknown keys that are left out.

    Raises:
      UserError: an unsupported architecture or rope type, a missing key or a value of the wrong
        type; or unknown keys and unsupported values, all in one message.
    """
    name, text = _text_part(config, where)
    family = FAMILIES[name]
    if known := {*accept} & {*READ, *INERT, *ONLY, *family.keys, *family.inert}:
        raise UserError(f"{where}: {', '.join(sorted(known))} is known and cannot be left out")
    text = {key: value for key, value in text.items() if key not in accept}
    problems = [_problem(key, value, family, names or {}) for key, value in text.items()]
    if any(problems):
        raise UserError(
            f"{where}: {'; '.join(filter(None, problems))}; convert another model, or take the "
            "responsibility for unknown keys with --accept-unknown KEY"
        )
    required = () if "text_config" in config else SIZES
    for key in (*required, *(key for key in NUMBERS if text.get(key) is not None)):
        _check_number(text.get(key), key, where, names or {})
    values = _standard(text, family, where)

    def read(key: str, default: Any) -> Any:
        value = values.get(key) if key in family.keys else None
        return default if value is None else value

    fields = {field: values[key] for field, key in SAME.items()}
    fields |= {field: type(default)(read(key, default)) for field, (key, default) in SOME.items()}
    d_model, n_heads = fields["d_model"], fields["n_heads"]
    n_kv_heads = values.get("num_key_value_heads") or n_heads
    if n_heads % n_kv_heads:
        raise UserError(f"{where}: {n_kv_heads} key-value heads do not divide {n_heads} heads")
    head_dim = values.get("head_dim") or d_model // n_heads
    activation = read("hidden_activation", values.get("hidden_act"))
    if activation not in ACTIVATIONS:
        listed = ", ".join(ACTIVATIONS)
        raise UserError(f"{where}: hidden_act={activation!r} is not supported, only {listed}")
    rotary_dim = int(head_dim * read("partial_rotary_factor", 1.0))
    kinds, max_position = _attention(values, read, rotary_dim, where)
    distinct = tuple(dict.fromkeys(kinds))
    scale = read("attention_multiplier", read("query_pre_attn_scalar", head_dim) ** -0.5)
    if family.scaled_embedding:
        fields["embedding_scale"] = d_model**0.5
    return ModelConfig(
        family=name,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        tied=values["tie_word_embeddings"],
        max_position=max_position,
        attention=distinct,
        pattern=tuple(map(distinct.index, kinds)),
        rotary_dim=rotary_dim,
        activation=ACTIVATIONS[activation],
        attention_scale=scale,
        **(fields | dict(family.fixed)),
    )


def _attention(
    values: Mapping[str, Any], read: Callable[[str, Any], Any], rotary_dim: int, where: str
) -> tuple[list[AttentionKind], int]:
    """The kind of every layer, and the longest context for which that holds."""
    window, n_layers = read("sliding_window", 0), values["num_hidden_layers"]
    uniform = "sliding_attention" if window else "full_attention"
    layer_types = read("layer_types", [uniform] * n_layers)
    tables, longest = values["rope_parameters"], values["max_position_embeddings"]
    found = {}
    for kind in dict.fromkeys(layer_types):
        if kind not in LAYER_TYPES:
            raise UserError(f"{where}: layer type {kind!r} is not supported")
        # One table for each type of layer, or one for all.
        table = tables[kind] if tables.keys() & {*LAYER_TYPES} else tables
        found[kind] = _rope(table, rotary_dim, longest, where)
    kinds = []
    for kind, rotated in zip(layer_types, read("no_rope_layers", [1] * n_layers), strict=False):
        size = window if kind == "sliding_attention" else 0
        kinds.append(AttentionKind(window=size, rope=found[kind][0] if rotated else None))
    return kinds, min(limit for _, limit in found.values())


def ignored(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys that do not enter the computation, with their values."""
    name, text = _text_part(config, where)
    read = {*READ, "hidden_act", "text_config", *FAMILIES[name].keys}
    return {key: value for key, value in {**config, **text}.items() if key not in read}


def _text_part(config: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """The key of its family, and the config of the part of a model that reads text."""
    listed = config.get("architectures") or ["(none)"]
    named, text = listed[0] if isinstance(listed, list) else listed, config
    if isinstance(named, str) and named in WRAPPERS:
        text = config.get("text_config") or {}
        if not isinstance(text, Mapping):
            raise UserError(f"{where}: text_config={text!r} is not a table of keys and values")
        kind = text.get("model_type", WRAPPERS[named])
        named = next((name for name, f in FAMILIES.items() if f.model_type == kind), kind)
        # These are said of the whole model.
        whole = ("tie_word_embeddings", "quantization_config", "auto_map")
        text = {**text, **{key: config[key] for key in whole if key in config}}
    if not isinstance(named, str) or named not in FAMILIES:
        raise UserError(
            f"{where}: architecture {named} is not supported; supported: "
            f"{', '.join([*FAMILIES, *WRAPPERS])}"
        )
    return named, text


def _problem(key: str, value: Any, family: Family, names: Mapping[str, str]) -> str | None:
    name = names.get(key, key)
    if key in READ or key in INERT or key in family.keys or key in family.inert:
        return None
    if key not in ONLY:
        shown = reprlib.repr(value)
        return f"{name} is unknown, so its effect would be ignored (its value is {shown})"
    values, supported = ONLY[key]
    if isinstance(value, list):
        value = sorted(set(map(str, value)))
    return None if value in values else f"{name}={value!r} is not supported, only {supported}"


def _check_number(value: Any, key: str, where: str, names: Mapping[str, str]) -> None:
    """Refuse what is not a number above 0, and a part of a whole where things are counted."""
    name = names.get(key, key)
    if value is None:
        raise UserError(f"{where}: key {name!r} is missing")
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {name}={value!r} is not supported; a number above 0 is")
    if key in COUNTS and int(value) != value:
        raise UserError(f"{where}: {name}={value} is not supported; a whole number is")


def _standard(text: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The values of all keys in today's form, those that are left out by transformers' defaults."""
    old, new = text.get("rope_scaling") or {}, text.get("rope_parameters") or {}
    if isinstance(new, Mapping):
        new = new.get("full_attention", new)
    for rope in (old, new):
        if not isinstance(rope, Mapping):
            raise UserError(f"{where}: rope scaling {rope!r} is not a table of keys and values")
    if old and new and _named(old) != _named(new):
        raise UserError(f"{where}: rope_scaling and rope_parameters disagree; remove one of them")
    library = transformers()
    library.utils.logging.set_verbosity_error()
    # These have no value that means none.
    given = {key: text[key] for key in text if text[key] is not None or key not in READ | {*ONLY}}
    some = {key: given[key] for key in given if key in family.keys or key not in INERT}
    try:
        made = library.AutoConfig.for_model(family.model_type, **copy.deepcopy(some))
        return made.to_dict()
    except Exception as error:
        # Its validators raise many types of error.
        raise UserError(f"{where}: transformers refuses its values ({one_line(error)})") from None


def _named(rope: Mapping[str, Any]) -> dict[str, Any]:
    named = {"rope_type" if key == "type" else key: value for key, value in rope.items()}
    return {key: value for key, value in named.items() if key != "rope_theta"}


def _rope(given: Mapping[str, Any], width: int, max_position: int, where: str) -> tuple[Rope, int]:
    """A rotary embedding of so many dimensions, and the longest context in which it is the same."""
    kind = given["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise UserError(
            f"{where}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}"
        )
    unknown = sorted({*given} - {*ROPE_KEYS[kind], *_EVERY_ROPE})
    if unknown:
        raise UserError(f"{where}: unknown keys for rope type {kind}: {', '.join(unknown)}")
    for key, value in given.items():
        if key.endswith(("short_factor", "long_factor")):
            for number in value if isinstance(value, list) else [value]:
                _check_number(number, key, where, {})
        elif value is not None and key not in ("rope_type", "type", "truncate"):
            _check_number(value, key, where, {})
    theta = float(given["rope_theta"])
    length, factor = given.get(_LENGTH) or max_position, given.get("factor")
    factor = factor or max_position / length
    if kind in ("default", "dynamic"):
        return Rope(theta=theta), max_position
    if kind == "longrope":
        # Beyond the first length other factors hold, even for the tokens before.
        growth = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
        scale, divisors = given.get("attention_factor") or growth, tuple(given["short_factor"])
        if len(divisors) != width // 2:
            raise UserError(f"{where}: short_factor has {len(divisors)} numbers, not {width // 2}")
        return Rope(theta=theta, divisors=divisors, scale=scale), length
    if kind == "linear":
        return Rope(theta=theta, divisors=(float(factor),) * (width // 2)), max_position
    index = np.arange(width // 2)
    if kind == "llama3":
        # Wavelengths up to length / high are kept, those from length / low on are slowed.
        turns = length * theta ** (-2 * index / width) / (2 * math.pi)
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        kept, scale = ((turns - low) / (high - low)).clip(0, 1), 1.0
    else:
        kept, scale = _yarn(given, width, length, factor)
    # The band between is interpolated.
    divisors = tuple((1 / (kept + (1 - kept) / factor)).tolist())
    # Queries beyond the first length are scaled too, which the decoder does not do.
    limit = length if "llama_4_scaling_beta" in given else max_position
    return Rope(theta=theta, divisors=divisors, scale=scale), limit


def _yarn(given: Mapping[str, Any], width: int, length: int, factor: float) -> tuple[Any, float]:
    """YaRN's share of each frequency that is kept, and its scale (Peng et al. 2023, 3.2 to 3.4)."""
    base = given["rope_theta"]

    def at(turns: float) -> float:
        """The index, not whole, of the frequency that turns so often in the first length."""
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    def growth(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1 if factor > 1 else 1.0

    first, last = at(given.get("beta_fast") or 32), at(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    slowed = ((np.arange(width // 2) - first) / ((last - first) or 0.001)).clip(0, 1)
    scale, all_dims = given.get("mscale"), given.get("mscale_all_dim")
    found = growth(scale) / growth(all_dims) if scale and all_dims else growth(1)
    return 1 - slowed, given.get("attention_factor") or found
