from __future__ import annotations

import dataclasses
import struct
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jaxsteer.errors import UserError
from jaxsteer.model import checkpoint
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.convert import Options, convert
from jaxsteer.model.gguf import configuration, unpermute
from jaxsteer.model.layers import rope_frequencies
from jaxsteer.model.tokenizer import Tokenizer
from jaxsteer.model.weights import flatten, param_shapes
from tests import tiny
from tests.tiny_gguf import WORDS, permute, write_family, write_gguf

TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K"),
    *("Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)


def test_unpermute_undoes_llama_cpps_order(rng):
    value = rng.standard_normal((24, 5))
    np.testing.assert_array_equal(unpermute(permute(value, 3), 3), value)


def test_unpermute_of_the_documented_rows():
    rows = np.array([["a0"], ["b0"], ["a1"], ["b1"]])
    assert unpermute(rows, 1).ravel().tolist() == ["a0", "a1", "b0", "b1"]


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
    [
        ("llama-bpe", ["123", "4"]),
        ("smaug-bpe", ["123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("gpt-2", ["1234"]),
    ],
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


@pytest.mark.parametrize("pre", ["smollm", "refact"])
def test_digits_are_split_off_where_the_vocabulary_was_learned_so(pre, tmp_path):
    # The tokenizer.json of SmolLM2 and of Granite says: single digits, and then as GPT-2.
    write_gguf(tmp_path / "m.gguf", "F32", pre=pre)
    out = convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
    ours = Tokenizer.load(out / "tokenizer").hf
    space = "\u0120"
    assert ours.tokenize("1234") == ["1", "2", "3", "4"]
    assert ours.tokenize("ab  12") == ["ab", space, space, "1", "2"]


def test_a_whole_piece_of_the_vocabulary_is_taken_before_its_letters_are_merged(tmp_path):
    # "cd" is a token, and no merge makes it: Llama 3's own tokenizer.json ignores merges for it.
    for pre, pieces in (("llama-bpe", ["cd"]), ("qwen2", ["c", "d"])):
        write_gguf(tmp_path / "m.gguf", "F32", pre=pre, words=[*WORDS, "cd"])
        out = convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
        assert Tokenizer.load(out / "tokenizer").hf.tokenize("cd") == pieces


# Turn marks as DeepSeek writes them, with letters that are not in the byte alphabet.
BEGIN, USER, ASSISTANT = (
    "<\uff5cbegin\u2581of\uff5c>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
)


def test_metadata_that_changes_nothing_is_taken(tmp_path):
    def extra(writer):
        writer.add_bool("llama.attention.causal", True)
        writer.add_float32("llama.attention.clamp_kqv", 0.0)
        writer.add_float32("llama.logit_scale", 1.0)
        writer.add_uint32("llama.pooling_type", 0)

    made = []
    for name, more in (("plain", lambda writer: None), ("more", extra)):
        write_gguf(tmp_path / f"{name}.gguf", "F32", extra=more)
        out = convert(tmp_path / f"{name}.gguf", tmp_path / name, "float32")
        made.append(checkpoint.load(out).config)
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", [3, 4], ids=["control", "user-defined"])
@pytest.mark.parametrize("pre", ["deepseek-r1-qwen", "llama-bpe"])
def test_every_turn_mark_of_a_gguf_is_one_token_and_none_is_added(kind, pre, tmp_path):
    write_gguf(
        tmp_path / "m.gguf",
        "F32",
        pre=pre,
        words=[*WORDS, BEGIN, USER, ASSISTANT],
        types=[3, 3, 3] + [1] * 13 + [3, kind, kind],
        template="{{ bos_token }}" + USER + "{{ messages[0]['content'] }}" + ASSISTANT,
        extra=lambda writer: writer.add_bos_token_id(16),
    )
    out = convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
    tokenizer = Tokenizer.load(out / "tokenizer")
    assert tokenizer.chat("ab") == [16, 17, 11, 18]
    assert len(tokenizer.hf) == 19
    # They are marks of turns, so a prompt cannot write them.
    assert tokenizer.broken(f"a{USER}b") == 1
    assert tokenizer.chat(f"a{USER}b").count(17) == 1


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
    with pytest.raises(UserError, match="Dequantization for Q8_K"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


def split(path, whole, count, first):
    """A GGUF's tensors in part files, the first `first` of them in the first; path is a stem."""
    reader = gguf.GGUFReader(whole)
    rest = len(reader.tensors) - first
    ends = [first + rest * n // (count - 1) for n in range(count)]
    for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        part = f"{path}-{n + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(part, "llama")
        for key, field in reader.fields.items() if n == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
        writer.add_uint16("split.no", n)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[start:end]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@pytest.mark.parametrize("first", [0, 4], ids=["metadata alone", "tensors too"])
def test_the_parts_of_a_gguf_are_read_together_whichever_is_given(tmp_path, first):
    write_gguf(tmp_path / "m.gguf", "F32")
    whole = checkpoint.load(convert(tmp_path / "m.gguf", tmp_path / "whole", "float32")).manifest
    split(tmp_path / "m", tmp_path / "m.gguf", 3, first)
    for n in (1, 3):
        part = tmp_path / f"m-0000{n}-of-00003.gguf"
        made = checkpoint.load(convert(part, tmp_path / "out", "float32")).manifest
        assert made.weights_sha256 == whole.weights_sha256
        assert sorted(made.source.files) == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(UserError, match=r"without m-00002-of-00003\.gguf; .*gguf-split --merge"):
        convert(part, tmp_path / "out", "float32")
    part.rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match=r"renamed\.gguf is a part of 3, NAME-00001-of-00003"):
        convert(tmp_path / "renamed.gguf", tmp_path / "out", "float32")


def test_the_ends_of_turns_and_messages_that_a_gguf_names_end_replies(tmp_path):
    def extra(writer):
        writer.add_eot_token_id(5)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 6)

    write_gguf(tmp_path / "m.gguf", "F32", extra=extra)
    out = convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
    assert checkpoint.read_manifest(out).eos_token_ids == [2, 5, 6]


def test_a_gguf_that_may_lack_the_factors_of_llama_3_1_says_so(tmp_path):
    def extra(writer):
        writer.add_rope_freq_base(500000.0)

    for length, said in ((131072, True), (8192, False)):
        write_gguf(tmp_path / "m.gguf", "F32", extra=extra, context=length)
        notes = checkpoint.read_manifest(
            convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
        ).notes
        assert any("rope_freqs.weight" in note for note in notes) == said


def test_a_gguf_without_a_chat_template_takes_one_from_a_file(tmp_path):
    write_gguf(tmp_path / "m.gguf", "F32", template=None)
    with pytest.raises(UserError, match=r"m\.gguf has no chat template; .*--chat-template"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
    (tmp_path / "mine.jinja").write_text("1{{ messages[0]['content'] }}2")
    options = Options(template=str(tmp_path / "mine.jinja"))
    out = convert(tmp_path / "m.gguf", tmp_path / "out", "float32", options=options)
    assert (
        Tokenizer.load(out / "tokenizer").hf.decode(Tokenizer.load(out / "tokenizer").chat("ab"))
        == "1ab2"
    )


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


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def test_an_unsupported_architecture_is_refused_before_the_rest_is_read(tmp_path):
    # These are all the bytes that there are: the vocabulary would come later, and take seconds.
    path = tmp_path / "m.gguf"
    entries = [text(k) + struct.pack("<I", 8) + text(v) for k, v in (
        ("general.name", "some name"), ("general.architecture", "mamba"),
    )]  # fmt: skip
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 20) + b"".join(entries))
    with pytest.raises(UserError, match=r"m\.gguf: architecture 'mamba' .*supported: llama, "):
        convert(path, tmp_path / "out", "float32")


@pytest.mark.parametrize("data", [b"", b"not a GGUF at all, but long enough", b"GGUF\3\0\0\0"])
def test_a_file_that_is_no_gguf_is_named(tmp_path, data):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"m\.gguf is missing, damaged, .* or not a GGUF"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


# How llama.cpp stores each family: its name, what it adds to norms, whether q and k are in pairs;
# and values that its files cannot say otherwise.
GGUF_FAMILIES = {
    "llama": ("llama", 0.0, True, {}),
    "qwen2": ("qwen2", 0.0, False, {"use_sliding_window": False}),
    "qwen3": ("qwen3", 0.0, False, {}),
    "gemma": ("gemma", 1.0, False, {}),
    "gemma2": ("gemma2", 1.0, False, {"query_pre_attn_scalar": 12}),
    "gemma3_text": (
        "gemma3", 1.0, False,
        {"query_pre_attn_scalar": 12, "num_hidden_layers": 6, "sliding_window_pattern": 6},
    ),
    "olmo2": ("olmo2", 0.0, False, {}),
    "olmo3": ("olmo2", 0.0, False, {}),
    "phi3": ("phi3", 0.0, False, {}),
    "phi4": ("phi3", 0.0, False, {}),
    "smollm3": ("smollm3", 0.0, True, {"no_rope_layer_interval": 4, "use_sliding_window": False}),
    "granite": ("granite", 0.0, True, {}),
    "ministral3": ("mistral3", 0.0, True, {"sliding_window": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF_FAMILIES)
def test_a_gguf_of_every_family_is_the_model_of_the_folder_it_was_made_from(name, tmp_path):
    architecture, norms, pairs, other = GGUF_FAMILIES[name]
    hf = tiny.family(name, **other)
    write_family(tmp_path / "m.gguf", hf, architecture, norms=norms, pairs=pairs)
    ours = checkpoint.load(convert(tmp_path / "m.gguf", tmp_path / "a", "float32"))
    theirs = checkpoint.load(convert(tiny.save(hf, tmp_path / "hf"), tmp_path / "b", "float32"))
    for kind, expected in zip(ours.config.attention, theirs.config.attention, strict=True):
        assert kind.window == expected.window and (kind.rope is None) == (expected.rope is None)
        if kind.rope is not None:
            np.testing.assert_allclose(kind.rope.divisors, expected.rope.divisors, rtol=1e-6)
            assert kind.rope.theta == expected.rope.theta
            assert kind.rope.scale == pytest.approx(expected.rope.scale)
    same = {f.name: getattr(theirs.config, f.name) for f in dataclasses.fields(ModelConfig)}
    for field, value in same.items():
        if field != "attention":
            assert getattr(ours.config, field) == pytest.approx(value), field
    for path, value in flatten(theirs.params).items():
        np.testing.assert_allclose(flatten(ours.params)[path], value, atol=2e-7)


@pytest.mark.parametrize(("layers", "scale"), [(2, 12), (46, 8)])
def test_the_largest_gemma_2_scales_queries_by_the_mean_width_of_its_heads(layers, scale):
    fields = {
        "general.architecture": "gemma2", "gemma2.context_length": 64, "gemma2.block_count": layers,
        "gemma2.embedding_length": 32, "gemma2.feed_forward_length": 48,
        "gemma2.attention.head_count": 4, "gemma2.attention.key_length": 12,
        "gemma2.attention.layer_norm_rms_epsilon": 1e-6, "gemma2.attention.sliding_window": 8,
    }  # fmt: skip
    table = SimpleNamespace(name="token_embd.weight", shape=[32, 64])
    found = configuration(fields, [table], "test")
    assert found.attention_scale == pytest.approx(scale**-0.5)
