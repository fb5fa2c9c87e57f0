"""Small Llama GGUFs of every tensor type."""

from __future__ import annotations

import contextlib

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
