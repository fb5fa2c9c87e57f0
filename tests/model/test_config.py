from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jaxsteer.errors import UserError
from jaxsteer.model import config
from jaxsteer.model.config import from_hf
from jaxsteer.model.layers import rope_frequencies

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 50 for i in range(64)],
    "long_factor": [2.0] * 64,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize("raw", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_the_papers_models_are_read(raw):
    read = from_hf(raw, "test")
    assert read.head_dim == 128 and read.qkv_bias == (raw is QWEN2)


def test_llama3_scaling_is_read_in_both_spellings():
    new = {k: v for k, v in LLAMA.items() if not k.startswith("rope_")}
    new["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert from_hf(new, "test") == from_hf(LLAMA, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM.*LlamaForCausalLM, MistralForCausalLM",
        ),
        ({"rope_scaling": {"rope_type": "axial", "factor": 4}}, "axial.*default, dynamic, linear"),
        ({"rope_scaling": LLAMA["rope_scaling"] | {"factr": 4}}, "unknown keys.*llama3: factr"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "low_freq_factor"),
        ({"rope_scaling": "yarn"}, "'yarn' is not a table of keys and values"),
        ({"rope_parameters": {"full_attention": 5}}, "5 is not a table of keys and values"),
        ({"rope_scaling": {"rope_type": []}}, r"rope type \[\] is not supported"),
        ({"rope_scaling": YARN | {"mscale": "a"}}, "mscale"),
        ({"rope_scaling": LONGROPE | {"short_factor": ["a"] * 64}}, "short_factor='a'"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "short_factor has 1 .*not 64"),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": 5},
            "text_config=5 is not a table",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": -4}}, "factor=-4 is not supported"),
        ({"rope_parameters": {"rope_type": "default"}}, "disagree; remove one of them"),
        ({"hidden_act": "gelu"}, "gelu.*silu"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping.*unknown"),
        ({"num_key_value_heads": 5}, "divide"),
        ({"hidden_size": "wide"}, "hidden_size='wide' is not supported; a number above 0 is"),
        ({"hidden_size": float("inf")}, "hidden_size=inf is not supported"),
        ({"hidden_size": 32.5}, "hidden_size=32.5 is not supported; a whole number is"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not supported"),
        ({"architectures": 5}, "architecture 5 is not supported"),
        ({"architectures": [[]]}, r"architecture \[\] is not supported"),
        ({"layer_types": 5}, "layer_types=5"),
    ],
)
def test_what_would_change_the_computation_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        from_hf(LLAMA | change, "test")


def test_every_unknown_key_and_unsupported_value_is_named_at_once():
    with pytest.raises(UserError) as caught:
        from_hf(LLAMA | {"hidden_act": "gelu", "logit_scale": 2.0, "sinks": "x" * 500}, "test")
    for part in (
        "hidden_act='gelu'",
        "logit_scale is unknown",
        "sinks is unknown",
        "--accept-unknown",
    ):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


# Another value of every key that is read, and what it is read from.
OTHER_VALUES = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 128257,
    "hidden_size": 2048,
    "num_hidden_layers": 31,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 14337,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize("key", sorted(config.READ))
def test_every_key_that_is_read_changes_what_is_computed(key):
    plain = LLAMA | ({"rope_scaling": None} if key == "rope_parameters" else {})
    assert from_hf(plain | {key: OTHER_VALUES[key]}, "test") != from_hf(plain, "test")


def test_a_key_is_either_read_or_inert_or_has_one_value():
    assert not config.READ & config.INERT
    assert not (config.READ | config.INERT) & set(config.ONLY)


ROPES = [
    {"rope_type": "default"},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "linear", "factor": 4.0},
    LLAMA["rope_scaling"],
    LLAMA["rope_scaling"] | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
    YARN,
    YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    YARN | {"attention_factor": 1.5},
    LONGROPE,
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_frequencies_and_scale_of_every_rope_are_those_of_transformers(rope):
    raw = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    given = raw | {"rope_parameters": rope | {"rope_theta": 500000.0}}
    ours = from_hf(given, "test").attention[0].rope
    theirs = LlamaRotaryEmbedding(LlamaConfig(**given))
    np.testing.assert_allclose(rope_frequencies(ours, 128), theirs.inv_freq, rtol=2e-6)
    assert ours.scale == pytest.approx(theirs.attention_scaling)


def test_a_context_ends_where_the_rotary_embedding_would_change():
    raw = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    read = [from_hf(raw | {"rope_parameters": rope}, "test").max_position for rope in ROPES]
    assert read == [131072] * (len(ROPES) - 1) + [4096]


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "rms_norm_eps", "vocab_size"])
def test_a_missing_key_is_named(key):
    with pytest.raises(UserError, match=key):
        from_hf({k: v for k, v in LLAMA.items() if k != key}, "test")


def sizes(hidden, layers, heads, kv_heads, ffn, vocab, context, **other):
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab,
        "max_position_embeddings": context, "rms_norm_eps": 1e-6, **other,
    }  # fmt: skip


# Configs as they are published, and what they mean: the window of each layer (0 for none) and the
# base of its rotary embedding, in the order of the first six layers.
PUBLISHED = {
    "gemma 3 4b": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                "num_hidden_layers": 34, "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        },
        [(1024, 1e4)] * 5 + [(0, 1e6)],
        {"head_dim": 256, "n_heads": 8, "vocab_size": 262208, "tied": True, "norm_offset": 1.0},
    ),
    "gemma 2 9b": (
        sizes(
            3584, 42, 16, 8, 14336, 256000, 8192, architectures=["Gemma2ForCausalLM"],
            attn_logit_softcapping=50.0, cache_implementation="hybrid", head_dim=256,
            final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh", query_pre_attn_scalar=256,
            hidden_activation="gelu_pytorch_tanh", rope_theta=10000.0, sliding_window=4096,
            sliding_window_size=4096, attention_bias=False,
        ),
        [(4096, 1e4), (0, 1e4)] * 3,
        {"attention_softcap": 50.0, "logit_softcap": 30.0, "attention_scale": 1 / 16, "tied": True},
    ),
    "phi 4 mini": (
        sizes(
            3072, 32, 24, 8, 8192, 200064, 131072, architectures=["Phi3ForCausalLM"],
            auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, attention_bias=False,
            full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
            original_max_position_embeddings=4096, partial_rotary_factor=0.75, hidden_act="silu",
            rope_scaling={
                "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
            },
            rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=True,
        ),
        [(262144, 1e4)] * 6,
        {"rotary_dim": 96, "max_position": 4096, "tied": True},
    ),
    "smollm 3 3b": (
        sizes(
            2048, 36, 16, 4, 11008, 128256, 65536, architectures=["SmolLM3ForCausalLM"],
            layer_types=["full_attention"] * 36, max_window_layers=28, no_rope_layer_interval=4,
            no_rope_layers=[1, 1, 1, 0] * 9, pretraining_tp=2, rope_scaling=None, mlp_bias=False,
            rope_theta=5000000.0, sliding_window=None, use_sliding_window=False, hidden_act="silu",
        ),
        [(0, 5e6)] * 3 + [(0, None)] + [(0, 5e6)] * 2,
        {"tied": True, "qkv_bias": False},
    ),
    "mistral small 3.2": (
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "vision_config": {"model_type": "pixtral"},
            "image_token_index": 10,
            "text_config": sizes(
                5120, 40, 32, 8, 32768, 131072, 131072, model_type="mistral", head_dim=128,
                rope_theta=1e9, sliding_window=None, hidden_act="silu",
            ),
        },
        [(0, 1e9)] * 6,
        {"tied": False, "head_dim": 128},
    ),
    "granite 3.3 2b": (
        sizes(
            2048, 40, 32, 8, 8192, 49159, 131072, architectures=["GraniteForCausalLM"],
            attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12.0,
            logits_scaling=8.0, residual_multiplier=0.22, mlp_bias=False, hidden_act="silu",
            rope_theta=10000000.0, tie_word_embeddings=True,
        ),
        [(0, 1e7)] * 6,
        {"attention_scale": 0.015625, "embedding_scale": 12.0, "logit_divisor": 8.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_of_other_families_are_read(name):
    raw, layers, fields = PUBLISHED[name]
    read = from_hf(raw, "test")
    kinds = [read.attention[read.pattern[layer]] for layer in range(6)]
    assert [(kind.window, kind.rope and kind.rope.theta) for kind in kinds] == layers
    assert {field: getattr(read, field) for field in fields} == fields
