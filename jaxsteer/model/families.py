"""The families of models that can be read: what sets them apart, as data.

A model belongs to the family of the architecture that its config.json names. All families share one
decoder, and what differs are fields of `config.ModelConfig`: some are the same for a whole family
(`Family.fixed`), the others follow from keys of config.json (`Family.keys`, read by
`config.from_hf`). A new family of this kind is a new row here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What sets the models of an architecture apart.

    Attributes:
      model_type: name of its configuration in transformers, which gives the defaults of keys.
      gguf: name of the architecture in GGUF files.
      keys: keys of config.json that its modelling code reads, beside those in `config.READ`.
      inert: keys that its published configs have, and that its modelling code does not read.
      fixed: fields of `config.ModelConfig` that all its models share.
      scaled_embedding: whether the embedding is multiplied by the root of its width.
      fused: whether q, k and v are one tensor of the source, and gate and up another.
      gguf_pairs: whether a GGUF stores the rows of q and k with rotary pairs side by side.
      gguf_depth: layers of the model whose queries are scaled by d_model / heads and not by the
        width of a head, which a GGUF does not say; 0 for none.
    """

    model_type: str
    gguf: str
    keys: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scaled_embedding: bool = False
    fused: bool = False
    gguf_pairs: bool = False
    gguf_depth: int = 0


_WINDOWS = ("sliding_window", "layer_types")
_QWEN = (*_WINDOWS, "use_sliding_window", "max_window_layers")
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_GEMMA = ("attention_bias", "hidden_act", "hidden_activation")
_GEMMA2 = (*_GEMMA, *_WINDOWS, *_SOFTCAPS, "query_pre_attn_scalar")
_GEMMA3 = (*_GEMMA2, "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq")
_GRANITE = (
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling",
)  # fmt: skip
_AROUND = {"post_norm": True, "norm_offset": 1.0}
_AFTER = {"pre_norm": False, "post_norm": True, "qk_norm": "width"}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama", gguf="llama", keys=("attention_bias", "mlp_bias"), gguf_pairs=True
    ),
    "MistralForCausalLM": Family(
        model_type="mistral", gguf="llama", keys=("sliding_window",), gguf_pairs=True
    ),
    "MinistralForCausalLM": Family(
        model_type="ministral", gguf="llama", keys=_WINDOWS, gguf_pairs=True
    ),
    "Ministral3ForCausalLM": Family(
        model_type="ministral3", gguf="mistral3", keys=("sliding_window",), gguf_pairs=True
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2", gguf="qwen2", keys=_QWEN, fixed={"qkv_bias": True}
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3", gguf="qwen3", keys=(*_QWEN, "attention_bias"), fixed={"qk_norm": "head"}
    ),
    "GemmaForCausalLM": Family(
        model_type="gemma", gguf="gemma", keys=_GEMMA, fixed={"norm_offset": 1.0},
        scaled_embedding=True,
    ),
    "Gemma2ForCausalLM": Family(
        model_type="gemma2", gguf="gemma2", keys=_GEMMA2, inert=("sliding_window_size",),
        fixed=_AROUND, scaled_embedding=True, gguf_depth=46,
    ),
    "Gemma3ForCausalLM": Family(
        model_type="gemma3_text", gguf="gemma3", keys=_GEMMA3,
        fixed=_AROUND | {"qk_norm": "head"}, scaled_embedding=True, gguf_depth=62,
    ),
    "Olmo2ForCausalLM": Family(
        model_type="olmo2", gguf="olmo2", keys=("attention_bias",), fixed=_AFTER
    ),
    "Olmo3ForCausalLM": Family(
        model_type="olmo3", gguf="olmo2", keys=("attention_bias", *_WINDOWS), fixed=_AFTER
    ),
    "Phi3ForCausalLM": Family(
        model_type="phi3", gguf="phi3", fused=True,
        keys=("sliding_window", "partial_rotary_factor", "original_max_position_embeddings"),
        # Code of the repository, which transformers has had for long.
        inert=("auto_map", "full_attn_mod", "interpolate_factor", "lm_head_bias"),
    ),
    "SmolLM3ForCausalLM": Family(
        model_type="smollm3", gguf="smollm3", gguf_pairs=True,
        keys=("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *_QWEN),
        inert=("pretraining_tp",),
    ),
    "GraniteForCausalLM": Family(
        model_type="granite", gguf="granite", gguf_pairs=True,
        keys=("attention_bias", "mlp_bias", *_GRANITE),
    ),
}  # fmt: skip

# Models of text and images: their text part belongs to the family with its `model_type`.
WRAPPERS: Mapping[str, str] = {
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Mistral3ForConditionalGeneration": "mistral",
}
