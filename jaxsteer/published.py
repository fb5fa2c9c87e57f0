"""Published sizes of full-size models, for programs that need no weights."""

from __future__ import annotations

from jaxsteer.model.config import ModelConfig, RopeConfig

# By short name: meta-llama/Llama-3.1-8B and Qwen/Qwen2.5-7B.
MODELS = {
    "llama-3.1-8b": ModelConfig(
        architecture="llama",
        vocab_size=128256,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=14336,
        norm_eps=1e-5,
        rope=RopeConfig(
            theta=500000.0,
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=8192,
        ),
        qkv_bias=False,
        tied=False,
        max_position=131072,
    ),
    "qwen2.5-7b": ModelConfig(
        architecture="qwen2",
        vocab_size=152064,
        d_model=3584,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        head_dim=128,
        d_ff=18944,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1000000.0),
        qkv_bias=True,
        tied=False,
        max_position=32768,
    ),
}
