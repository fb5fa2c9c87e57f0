from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jaxsteer.errors import UserError
from jaxsteer.model import checkpoint
from jaxsteer.model.config import from_hf
from jaxsteer.model.convert import convert, fill
from jaxsteer.model.layers import rope_frequencies
from jaxsteer.model.tokenizer import Tokenizer
from jaxsteer.model.weights import flatten, param_shapes, table, unpermute
from tests import tiny
from tests.tiny_gguf import write_gguf

TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K"),
    *("Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)


def permute(value, heads):
    """llama.cpp's own reordering of q and k on the way into a GGUF."""
    rows, width = value.shape
    return value.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def test_unpermute_undoes_llama_cpps_order(rng):
    value = rng.standard_normal((24, 5))
    np.testing.assert_array_equal(unpermute(permute(value, 3), 3), value)


def test_llama_ggufs_have_their_q_and_k_unpermuted_and_qwen2_ggufs_do_not(tmp_path, rng):
    for build in (tiny.llama, tiny.qwen2):
        hf = build()
        folder = tiny.save(hf, tmp_path / hf.config.model_type)
        config = from_hf(json.loads((folder / "config.json").read_text()), "test")
        tensors = load_file(folder / "model.safetensors")
        ours = {e.target: e.source for e in table(config, "hf")}

        def read(entry, tensors=tensors, ours=ours, config=config):
            value = tensors[ours[entry.target]]
            heads = {"unpermute_q": config.n_heads, "unpermute_k": config.n_kv_heads}.get(
                entry.rule
            )
            return permute(value, heads) if heads else value

        triples = ((e.source, lambda e=e, read=read: read(e)) for e in table(config, "gguf"))
        from_gguf = fill(config, triples, "gguf", "float32", "test")
        out = checkpoint.load(convert(folder, tmp_path / f"{hf.config.model_type}-out", "float32"))
        for path, value in flatten(out.params).items():
            np.testing.assert_array_equal(from_gguf[path], np.asarray(value))


@pytest.mark.parametrize("kind", TYPES)
def test_each_gguf_type_is_dequantised(kind, tmp_path):
    expected = write_gguf(tmp_path / "m.gguf", kind)
    loaded = checkpoint.load(convert(tmp_path / "m.gguf", tmp_path / "out", "float32"))
    params = flatten(loaded.params)
    assert set(params) == set(param_shapes(loaded.config))
    np.testing.assert_array_equal(
        params["layers/0/mlp/up/kernel"].T, expected["blk.0.ffn_up.weight"]
    )
    np.testing.assert_array_equal(params["embed/embedding"], expected["token_embd.weight"])


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("llama-bpe", ["123", "4"]), ("qwen2", ["1", "2", "3", "4"]), ("smollm", ["1234"])],
)
def test_a_gguf_tokenizer_splits_text_as_its_vocabulary_was_learned(pre, pieces, tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "m.gguf", "F32", pre=pre)
    out = convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
    ours = Tokenizer.load(out / "tokenizer").hf
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="m.gguf")
    assert ours.tokenize("1234") == pieces
    for text in ("1234", "ab 1234 cd", "a  12</s>d"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda w: w.add_float32("llama.logit_scale", 2.0), r"llama\.logit_scale is unknown"),
        (lambda w: w.add_array("llama.attention.key_length", [64, 32]), "key_length"),
        (lambda w: w.add_uint32("llama.attention.value_length", 32), "value_length"),
        (lambda w: w.add_uint32("llama.attention.key_length", 0), "key_length=0 is not supported"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.full(16, 3, np.float32)), "rope_freqs"),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "yarn"),
        (lambda w: w.add_uint32("llama.expert_count", 8), "expert_count"),
    ],
)
def test_gguf_metadata_that_would_change_the_computation_is_refused(extra, message, tmp_path):
    write_gguf(tmp_path / "m.gguf", "F32", extra=extra)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotary_factors_in_a_gguf_are_used(factor, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    )
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)

    def extra(writer):
        writer.add_rope_freq_base(500000.0)
        factors = (plain / theirs.inv_freq.numpy()).astype(np.float32)
        writer.add_tensor("rope_freqs.weight", factors)

    write_gguf(tmp_path / "m.gguf", "F32", extra=extra)
    found = checkpoint.load(convert(tmp_path / "m.gguf", tmp_path / "out", "float32")).config
    rope = found.attention[0].rope
    np.testing.assert_allclose(rope_frequencies(rope, 64), theirs.inv_freq, rtol=1e-6)


def test_a_gguf_tokenizer_that_splits_text_in_an_unknown_way_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", "F32", pre="tekken-9")
    with pytest.raises(UserError, match=r"tekken-9.*llama-bpe"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


def test_an_unsupported_gguf_type_is_refused_by_name(tmp_path):
    write_gguf(tmp_path / "m.gguf", "Q8_K")
    with pytest.raises(UserError, match="Q8_K, which the gguf package cannot read"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


def test_a_truncated_gguf_is_named(tmp_path):
    write_gguf(tmp_path / "m.gguf", "F16")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"m\.gguf is .*truncated"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


def test_an_unsupported_architecture_is_refused_by_name(tmp_path):
    write_gguf(tmp_path / "m.gguf", "F32", architecture="mamba")
    with pytest.raises(UserError, match=r"m\.gguf: architecture 'mamba' .*supported: llama, "):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


@pytest.mark.parametrize("data", [b"", b"not a GGUF at all, but long enough", b"GGUF\3\0\0\0"])
def test_a_file_that_is_no_gguf_is_named(tmp_path, data):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"m\.gguf is missing, damaged, .* or not a GGUF"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
