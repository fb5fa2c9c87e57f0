"""Small GGUFs: a Llama of every tensor type, and models of all families."""

from __future__ import annotations

import contextlib
import math

import gguf
import numpy as np

WORDS = ("<unk>", "<s>", "</s>", *"abcd1234", "ab", "12", "123", "1234", "\u0120")


def write_gguf(
    path,
    kind,
    width=256,
    pre="smollm",
    extra=lambda writer: None,
    architecture="llama",
    words=WORDS,
    types=None,
    template="{{ messages[0]['content'] }}",
    context=64,
):
    """A small Llama GGUF whose matrices are all of one quantised type; returns them in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    extra(writer)
    writer.add_block_count(1)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(words))
    writer.add_token_types(types or [3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["a b", "1 2", "12 3", "123 4"])
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    generator = np.random.default_rng(0)
    quant = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    expected = {}
    shapes = {
        "token_embd": (len(words), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
    }
    shapes |= {
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
    }
    shapes |= {
        f"blk.0.{n}": (width, width) for n in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    shapes["blk.0.attn_v"] = (width // 2, width)
    for name, shape in shapes.items():
        value = generator.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", value)
            expected[f"{name}.weight"] = value
            continue
        try:
            raw = gguf.quants.quantize(value, quant)
        except NotImplementedError:
            # K-quants have no numpy encoder: blocks of small random bytes are valid input too.
            raw = generator.integers(0, 40, (shape[0], shape[1] // block * size), dtype=np.uint8)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=quant)
        # Of some types the package has the sizes alone.
        with contextlib.suppress(NotImplementedError):
            expected[f"{name}.weight"] = gguf.quants.dequantize(raw, quant).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


# Keys of a config, and the writer's method for each.
SIMPLE = {
    "max_position_embeddings": "add_context_length",
    "hidden_size": "add_embedding_length",
    "num_hidden_layers": "add_block_count",
    "intermediate_size": "add_feed_forward_length",
    "num_attention_heads": "add_head_count",
    "num_key_value_heads": "add_head_count_kv",
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
}


def permute(value, heads):
    """llama.cpp's own reordering of q and k on the way into a GGUF."""
    paired = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return paired.swapaxes(1, 2).reshape(value.shape)


def write_family(path, hf, architecture, *, norms=0.0, pairs=False):
    """A GGUF of an HF model as llama.cpp's converter writes it (its `conversion` folder).

    Args:
      path: the file to write.
      hf: the model, on torch.
      architecture: llama.cpp's name of it.
      norms: what is added to the weights of norms.
      pairs: whether rows of q and k are put in pairs.
    """
    config = hf.config.to_dict()
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    for key, method in SIMPLE.items():
        if config.get(key) is not None:
            getattr(writer, method)(config[key])
    if config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    _add_rope(writer, config, head_dim)
    window = config.get("sliding_window")
    if architecture in ("gemma2", "gemma3", "olmo2", "phi3") and "sliding_window" in config:
        writer.add_sliding_window(window or 0)
    if architecture == "olmo2" and window:
        writer.add_sliding_window_pattern([t != "full_attention" for t in config["layer_types"]])
    words = ["<unk>", "<s>", "</s>", "a", "b", "ab", *(f"w{i}" for i in range(58))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * 61)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, parameter in hf.named_parameters():
        value = parameter.detach().numpy()
        if name.endswith("norm.weight"):
            value = value + np.float32(norms)
        map_ = name.split(".")[-2]
        if pairs and map_ in heads:
            value = permute(value, heads[map_])
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_rope(writer, config, head_dim):
    tables = config["rope_parameters"]
    rope = tables.get("full_attention", tables)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if "sliding_attention" in tables:
        writer.add_rope_freq_base_swa(tables["sliding_attention"]["rope_theta"])
    if config["model_type"] == "phi3":
        length = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(length)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if "llama_4_scaling_beta" in rope:
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        scale = config["max_position_embeddings"] / length
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(length)))
        for name in ("long", "short"):
            writer.add_tensor(
                f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32)
            )
