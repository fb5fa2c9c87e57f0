"""A GGUF file as a source: its metadata in the form of an HF config, its tensors as floats.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package reads it,
which takes seconds for a large vocabulary; so the architecture is read first, here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, pre_tokenizers

from jaxsteer.errors import UserError, one_line
from jaxsteer.model.config import READ, AttentionKind, ModelConfig, from_hf
from jaxsteer.model.convert import Options, Source
from jaxsteer.model.families import FAMILIES
from jaxsteer.model.tokenizer import Tokenizer, transformers
from jaxsteer.model.weights import Tensor, stored

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

# Tensors that say what each rotary frequency is divided by; two of them up to a first length of
# the context, and beyond it.
ROPE_FACTORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# How text is split before merging, by llama.cpp's names: those that split as GPT-2 does, those
# that split off each digit first, and those that look a piece up before they merge its letters.
GPT2_SPLITS = ("gpt-2", "mpt", "olmo")
DIGIT_SPLITS = ("smollm", "refact", "starcoder", "command-r")
WHOLE_SPLITS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "tekken",
)
# Types of tokens.
CONTROL, USER_DEFINED = 3, 4

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
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "layer_types",
    "attention.scale": "attention_multiplier",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
# The same of the config's table of the rotary embedding.
ROPE_KEYS = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
    "attention.temperature_scale": "llama_4_scaling_beta",
}
# Metadata that follows from the tensors or from other metadata.
IMPLIED = (
    "vocab_size", "tensor_data_layout", "attention.value_length", "rope.dimension_count",
    "rope.scaling.finetuned",
)  # fmt: skip
# Values that mean the same as no value.
DEFAULTS = {
    "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0,
    "attention.sliding_window": 0, "attention.causal": True, "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0, "use_parallel_residual": False, "pooling_type": 0,
    "expert_count": 0, "expert_used_count": 0, "expert_shared_count": 0, "logit_scale": 1.0,
}  # fmt: skip


def read(path: Path, options: Options) -> Source:
    """Read the metadata of a GGUF file, or of the parts of one, and find its tensors.

    Raises:
      UserError: a damaged file; an unsupported architecture, metadata or tensor type; a tokenizer
        that cannot be built, or no chat template.
    """
    if named := architecture(path):
        _families(named, path.name)
    fields, tensors = _contents(path)
    count, files = int(fields.get("split.count", 0)), [path]
    if count > 1:
        files = _parts(path, count)
        parts = [_contents(file) for file in files]
        fields = parts[0][0]
        tensors = [tensor for _, some in parts for tensor in some]
    name = files[0].name
    taken = {key: value for key, value in fields.items() if key not in options.accept_unknown}
    config = configuration(taken, tensors, name)
    ends = {f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")}
    notes = []
    rope = config.attention[0].rope
    plain = rope is not None and rope.theta == 500000 and not rope.divisors
    if fields["general.architecture"] == "llama" and plain and config.max_position > 8192:
        notes.append(
            f"it has no {ROPE_FACTORS}; if it is Llama 3.1 or later, it was written without them, "
            "and its logits are others: get a newer file"
        )
    tokenizer = _tokenizer(fields, name, options)
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if fields.get("tokenizer.ggml.add_bos_token") and bos not in tokenizer.chat("a")[:1]:
        notes.append("llama.cpp puts a beginning-of-sequence token before chats; the template none")
    return Source(
        kind="gguf",
        name=name,
        config=config,
        tokenizer=tokenizer,
        ends={int(fields[key]) for key in ends & fields.keys()},
        files=[],
        weights=lambda: (list(_tensors(tensors, config)), files),
        notes=notes,
    )


def architecture(path: Path) -> str | None:
    """The metadata `general.architecture`, found in the file's first bytes; None if not there.

    Writers put it first. A key is its length and text, then the type of its value: 8 for text,
    which again is a length and the text itself.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(1 << 16)
    key = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<I", 8)
    _, _, value = start.partition(key)
    length = int.from_bytes(value[:8], "little")
    return value[8 : 8 + length].decode(errors="replace") or None


def _families(named: Any, where: str) -> list[str]:
    """The keys of `FAMILIES` whose GGUF files have this architecture: several may share one."""
    of_name = [hf for hf, family in FAMILIES.items() if family.gguf == named]
    if not of_name:
        known = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES.values()))
        raise UserError(f"{where}: architecture {named!r} is not supported; supported: {known}")
    return of_name


def _contents(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:
        # The reader raises whatever numpy does on short data.
        raise UserError(
            f"{path} is missing, damaged, truncated or not a GGUF file ({one_line(error)}); check "
            "the path, or download it again"
        ) from None
    return fields, reader.tensors


def _parts(path: Path, count: int) -> list[Path]:
    """All the files that a GGUF was split into, by llama.cpp's names for them."""
    names = [re.sub(r"-\d{5}-of-", f"-{n:05}-of-", path.name) for n in range(1, count + 1)]
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing or len({*names}) < count:
        raise UserError(
            f"{path} is a part of {count}, NAME-00001-of-{count:05}.gguf and so on, without "
            f"{', '.join(missing)}; get all parts, or merge them with llama-gguf-split --merge"
        )
    return [path.with_name(name) for name in names]


def configuration(
    fields: Mapping[str, Any], tensors: list[ReaderTensor], where: str
) -> ModelConfig:
    """The configuration that a GGUF's metadata and the names and shapes of its tensors describe.

    Raises:
      UserError: as `config.from_hf`, or rotary factors that do not fit the model.
    """
    named = fields.get("general.architecture")
    of_name = _families(named, where)
    by_name = {tensor.name: tensor for tensor in tensors}
    if "token_embd.weight" not in by_name:
        raise UserError(f"{where}: tensor token_embd.weight is missing; the file may be truncated")
    values: dict[str, Any] = {
        "vocab_size": int(by_name["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in by_name,
    }
    rope: dict[str, Any] = {}
    for key, value in fields.items():
        head, _, name = key.partition(".")
        if head == named and name in ROPE_KEYS and DEFAULTS.get(name) != value:
            rope[ROPE_KEYS[name]] = value
        elif head == named and name not in IMPLIED and DEFAULTS.get(name) != value:
            values[CONFIG_KEYS.get(name, key)] = value  # `from_hf` refuses an unknown key
    if SHORT in by_name and LONG in by_name:
        factors = {"short_factor": _factors(by_name[SHORT]), "long_factor": _factors(by_name[LONG])}
        rope |= {"rope_type": "longrope"} | factors
    values |= _rope(values, rope)
    # Several architectures may have one name; the metadata is read by one of them.
    own = values.keys() - READ
    hf = next((name for name in of_name if own <= {*FAMILIES[name].keys}), of_name[0])
    read = FAMILIES[hf].keys
    implied = {
        "attention_bias": "blk.0.attn_output.bias" in by_name,
        "mlp_bias": "blk.0.ffn_up.bias" in by_name,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings"),
        **_from_sizes(values, fields.get(f"{named}.rope.dimension_count"), FAMILIES[hf].gguf_depth),
    }
    values |= {key: value for key, value in implied.items() if value is not None and key in read}
    values["architectures"] = [hf]
    names = {hf: f"{named}.{name}" for name, hf in (CONFIG_KEYS | ROPE_KEYS).items()}
    config = from_hf(values, where, names)
    for name, width in (
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.rotary_dim),
    ):
        value = fields.get(f"{named}.{name}", width)
        if value != width:
            raise UserError(f"{where}: {named}.{name}={value!r} is not supported, only {width}")
    if ROPE_FACTORS not in by_name:
        return config
    divisors = tuple(_factors(by_name[ROPE_FACTORS]))
    if len(divisors) != config.rotary_dim // 2:
        raise UserError(f"{where}: {ROPE_FACTORS} does not fit heads of {config.head_dim}")

    def divided(kind: AttentionKind) -> AttentionKind:
        rope = kind.rope and dataclasses.replace(kind.rope, divisors=divisors)
        return dataclasses.replace(kind, rope=rope)

    return dataclasses.replace(config, attention=tuple(map(divided, config.attention)))


def _from_sizes(values: Mapping[str, Any], rotated: Any, depth: int) -> dict[str, Any]:
    """Keys that follow from the sizes of a model; none of sizes that `from_hf` refuses."""
    keys = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    width, heads, layers = sizes = [values.get(key) or 0 for key in keys]
    head_dim = values.get("head_dim", 1)
    if not all(isinstance(size, int) and size > 0 for size in (*sizes, head_dim)):
        return {}
    head_dim = values.get("head_dim", width // heads)
    scalar = width // heads if layers == depth else head_dim
    partial = rotated / head_dim if isinstance(rotated, int) else None
    return {"partial_rotary_factor": partial, "query_pre_attn_scalar": scalar}


def _rope(values: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding in HF's form: one table, or one for each type of layer."""
    if "mscale_all_dim" in rope:
        rope["mscale"] = 1.0
    # Phi-3 says the original length without a scaling, too.
    rope = rope if "rope_type" in rope else {"rope_type": "default"}
    slides = values.get("layer_types")
    if not isinstance(slides, list):
        return {"rope_scaling": rope}
    theta = values.pop("rope_theta", 1e4)
    local = values.pop("rope_local_base_freq", theta)
    return {
        "layer_types": ["sliding_attention" if each else "full_attention" for each in slides],
        "rope_parameters": {
            "full_attention": rope | {"rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _factors(tensor: ReaderTensor) -> list[float]:
    return np.array(tensor.data, float).tolist()


def _tensors(tensors: list[ReaderTensor], config: ModelConfig) -> Iterator[Tensor]:
    """The tensors, those of the model with the names and in the form that HF's files have."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    family = FAMILIES[config.family]
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.gguf)
    names = get_tensor_name_map(architecture, config.n_layers)
    hf = {names.get_name(name, (".weight", ".bias")): name for name in stored(config)}
    for tensor in tensors:
        if tensor.name not in (ROPE_FACTORS, SHORT, LONG):
            name = hf.get(tensor.name, tensor.name)
            yield name, functools.partial(_as_hf, tensor, name, config)


def _as_hf(tensor: ReaderTensor, name: str, config: ModelConfig) -> np.ndarray:
    from gguf.quants import dequantize

    # GGUF lists the innermost axis first.
    shape = tuple(int(length) for length in reversed(tensor.shape))
    value = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    if FAMILIES[config.family].gguf_pairs and (match := re.search(r"\.([qk])_proj\.", name)):
        return unpermute(value, config.n_heads if match[1] == "q" else config.n_kv_heads)
    return value - config.norm_offset if name.endswith("norm.weight") else value


def unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of a [heads * head_dim, d_model] matrix, or of a bias.

    Per head, rows come as rotary pairs side by side; HF wants all first halves, then all second
    halves. For head_dim 4: rows [a0, b0, a1, b1] become [a0, a1, b0, b1].
    """
    paired = value.reshape(heads, len(value) // heads // 2, 2, *value.shape[1:])
    return paired.swapaxes(1, 2).reshape(value.shape)


def _tokenizer(fields: Mapping[str, Any], where: str, options: Options) -> Tokenizer:
    library = transformers()
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    named = theirs.GGUF_TOKENIZER_MAPPING["tokenizer"].items()
    ggml = {name: fields[f"tokenizer.{key}"] for key, name in named if f"tokenizer.{key}" in fields}
    kind, split = ggml.get("tokenizer_type"), ggml.get("pre_tokenizer_type")
    if kind not in ("gpt2", "llama") or "tokens" not in ggml:
        raise UserError(
            f"{where}: a tokenizer of model {kind!r} is not supported, or has no tokens"
        )
    splits = (*theirs.GGUF_PRE_TOKENIZER_SPLITS, *GPT2_SPLITS, *DIGIT_SPLITS)
    if kind == "gpt2" and split not in splits:
        raise UserError(
            f"{where}: its tokenizer splits text by {split!r}, which is not supported; supported: "
            f"{', '.join(splits)}; convert the Hugging Face weights instead"
        )
    try:
        backend, _ = theirs.convert_gguf_tokenizer(fields["general.architecture"], ggml)
        backend = _with_own_tokens(backend, ggml["tokens"], ggml.get("token_type", ()))
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: its tokenizer cannot be built ({one_line(error)})") from None
    if kind == "gpt2" and split in DIGIT_SPLITS:
        digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    if kind == "gpt2":
        backend.model.ignore_merges = split in WHOLE_SPLITS
    special = {
        f"{name}_token": ggml["tokens"][int(ggml[f"{name}_token_id"])]
        for name in ("bos", "eos", "unk", "pad")
        if f"{name}_token_id" in ggml
    }
    template = fields.get("tokenizer.chat_template")
    hf = library.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, **special
    )
    return Tokenizer.of(hf, where, options.template, options.arguments)


def _with_own_tokens(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> Any:
    """The tokenizer with all of the file's control and user-defined tokens, and no others.

    The library adds tokens of its own, and respells those whose letters are not of the byte
    alphabet, such as DeepSeek's turn marks: no text would then be read as them.
    """
    lost = {
        id_: text
        for id_, (text, type_) in enumerate(zip(tokens, types, strict=False))
        if type_ in (CONTROL, USER_DEFINED) and text.strip() and backend.token_to_id(text) != id_
    }
    raw = json.loads(backend.to_str())
    raw["model"]["vocab"] = {lost.get(id_, t): id_ for t, id_ in raw["model"]["vocab"].items()}
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < len(tokens)]
    backend = type(backend).from_str(json.dumps(raw))
    for id_, text in lost.items():
        backend.add_tokens([AddedToken(text, special=types[id_] == CONTROL, normalized=False)])
    return backend
