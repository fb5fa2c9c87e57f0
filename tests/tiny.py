"""Tiny random HF models on torch, their folders, and the same weights as jaxsteer parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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


def llama() -> LlamaForCausalLM:
    """Llama with llama3 rope, grouped queries, an untied head and a head_dim of its own."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(**COMMON, head_dim=12, tie_word_embeddings=False, rope_parameters=rope)
    return _shaken(LlamaForCausalLM(config))


def qwen2() -> Qwen2ForCausalLM:
    """Qwen2 with its q, k and v biases and a tied head."""
    torch.manual_seed(1)
    return _shaken(Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=True)))


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
dose = 3.0
layers = { steer = 1, late = 1.0 }
[data]
harmful = 6
benign = 3
[decoding]
max_new_tokens = 6
batch = 4
[directions]
persona = { kind = "trait", trait = "compliant" }
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
