"""Tiny random HF models on torch, their folders, and the same weights as jaxsteer parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from jaxsteer.model.config import AttentionKind, ModelConfig, Rope
from jaxsteer.study import spec
from jaxsteer.study.spec import StudySpec

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
    "initializer_range": 0.2,
}


def config(**changes: Any) -> ModelConfig:
    """The configuration of a small Llama, or of one with other values."""
    values: dict[str, Any] = {
        "family": "LlamaForCausalLM", "vocab_size": 62, "d_model": 32, "n_layers": 3, "n_heads": 4,
        "n_kv_heads": 2, "head_dim": 12, "d_ff": 48, "tied": False, "max_position": 512,
        "attention": (AttentionKind(rope=Rope(theta=1e4)),), "pattern": (0, 0, 0),
        "rotary_dim": 12, "norm_eps": 1e-6, "attention_scale": 12**-0.5,
    }  # fmt: skip
    return ModelConfig(**values | changes)


def llama(**sizes: Any) -> LlamaForCausalLM:
    """Llama with llama3 rope, grouped queries, an untied head and a head_dim of its own.

    Args:
      sizes: fields of its config that differ from `COMMON`.
    """
    torch.manual_seed(0)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    own = {"head_dim": 12, "tie_word_embeddings": False, "rope_parameters": rope}
    config = LlamaConfig(**COMMON | own | sizes)
    return _shaken(LlamaForCausalLM(config))


def qwen2() -> Qwen2ForCausalLM:
    """Qwen2 with its q, k and v biases and a tied head."""
    torch.manual_seed(1)
    return _shaken(Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=True)))


YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
    "beta_fast": 8.0, "beta_slow": 1.0,
}  # fmt: skip
WINDOW = 8
# By name of the model: what its config has beside `COMMON`, with the features of its family so
# strong that a tiny model shows them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "attention_bias": True, "mlp_bias": True, "head_dim": 12,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    },
    "mistral": {"sliding_window": WINDOW, "head_dim": 12},
    "ministral": {
        "sliding_window": WINDOW, "head_dim": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ministral3": {
        "head_dim": 12, "sliding_window": WINDOW, "tie_word_embeddings": True,
        "rope_parameters": YARN
        | {"mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.1},
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 12, "attention_bias": True, "rope_parameters": YARN},
    "gemma": {"head_dim": 12, "num_key_value_heads": 1},
    "gemma2": {
        "head_dim": 12, "sliding_window": WINDOW, "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 12, "sliding_window": WINDOW, "query_pre_attn_scalar": 5,
        "num_hidden_layers": 4, "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        },
    },
    "olmo2": {"attention_bias": True},
    "olmo3": {
        "sliding_window": WINDOW, "num_hidden_layers": 4,
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "phi3": {"sliding_window": WINDOW, "pad_token_id": 0},
    "phi4": {
        "model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": 256,
        "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [3.0] * 3,
        },
    },
    "smollm3": {
        "num_hidden_layers": 4, "no_rope_layer_interval": 2, "use_sliding_window": True,
        "sliding_window": WINDOW, "pad_token_id": 0,
    },
    "granite": {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.6, "residual_multiplier": 0.4,
        "logits_scaling": 0.25,
    },
}  # fmt: skip
# Models of text and images: the vision part is as small as it can be.
VISION = {
    "gemma3": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 14,
        "num_attention_heads": 2, "image_size": 28, "model_type": "siglip_vision_model",
    },
    "mistral3": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 14,
        "num_attention_heads": 2, "image_size": 28, "head_dim": 8, "model_type": "pixtral",
    },
}  # fmt: skip


def family(name: str, **other: Any) -> Any:
    """A model of `FAMILIES`, with other values in its config."""
    torch.manual_seed(2)
    values = COMMON | {"model_type": name} | FAMILIES[name] | other
    return _shaken(AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)))


def wrapper(name: str, text: str) -> Any:
    """A model of text and images, whose text part is of a family."""
    torch.manual_seed(3)
    part = COMMON | {"model_type": text} | FAMILIES[text]
    config = AutoConfig.for_model(
        name,
        text_config=part,
        vision_config=VISION[name],
        tie_word_embeddings=name == "gemma3",
        attn_implementation="eager",
    )
    return _shaken(AutoModelForImageTextToText.from_config(config))


def _shaken(model: Any) -> Any:
    # Fresh norms are ones and fresh biases zeros, which would hide a swapped or dropped one.
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def save(model: Any, folder: Path, shard: str | None = None) -> Path:
    """Save a model with a small word-level chat tokenizer."""
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    words = ["<unk>", "<s>", "</s>", "user", "system", "assistant"] + [f"w{i}" for i in range(58)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("<s>", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


STUDY = """
name = "tiny"
system = "generic"
allow_uninformative = true
dose = 3.0
layers = { steer = 1, late = 1.0 }
[[prompts]]
set = "strongreject"
n = 6
[[prompts]]
set = "benign"
n = 3
[decoding]
max_new_tokens = 6
batch = 4
[directions]
persona = { kind = "trait", trait = "compliant" }
[selection]
prompts = 2
max_new_tokens = 4
[[condition]]
name = "baseline"
benign = true
[[condition]]
name = "persona"
benign = true
ops = [{ add = "persona", at = "steer", scale = "dose" }]
[[condition]]
name = "persona, out"
ops = [{ add = "persona", at = "steer", scale = "dose" }, { project = "persona", at = "late" }]
[[condition]]
name = "random"
random_seeds = [1, 2]
ops = [{ add = "random", at = "steer", scale = 4.0 }]
[[claim]]
name = "suppression"
says = "The persona lowers refusal."
tests = [{ treated = "persona", control = "baseline", expect = "lower" }]
"""


def study_file(folder: Path, *changes: tuple[str, str]) -> Path:
    """A small study with fixed layers and dose; each change replaces a piece of its text."""
    text = STUDY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def study(folder: Path) -> StudySpec:
    """The same, read."""
    return spec.load(study_file(folder))
