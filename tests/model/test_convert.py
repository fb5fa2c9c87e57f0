from __future__ import annotations

import json
import shutil
import subprocess
import sys

import gguf
import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jaxsteer.errors import UserError
from jaxsteer.files import sha256_file
from jaxsteer.model import checkpoint
from jaxsteer.model.config import RopeConfig, from_hf
from jaxsteer.model.convert import GGUF_TYPES, convert, fill
from jaxsteer.model.layers import rope_frequencies
from jaxsteer.model.tokenizer import Tokenizer
from jaxsteer.model.weights import flatten, param_shapes, table, unpermute
from tests import tiny
from tests.cli.command import jaxsteer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture
def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "hf")


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


def test_sharded_and_single_files_give_the_same_weights(source, tmp_path):
    sharded = tiny.save(tiny.llama(), tmp_path / "sharded", shard="20KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    one = checkpoint.load(convert(source, tmp_path / "one", "float32"))
    two = checkpoint.load(convert(sharded, tmp_path / "two", "float32"))
    assert one.manifest["weights_sha256"] == two.manifest["weights_sha256"]


@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_weights_are_bfloat16_where_that_is_fast(source, tmp_path, monkeypatch, backend, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    made = convert(source, tmp_path / "made", "auto")
    assert json.loads((made / "manifest.json").read_text())["dtype"] == dtype


def test_every_problem_is_listed_at_once_and_nothing_is_written(copy, tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = np.zeros(3, np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)

    edit(copy, change)
    with pytest.raises(UserError) as caught:
        convert(copy, tmp_path / "out", "float32")
    for part in (
        "model.norm.weight is missing",
        "model.extra.weight is in the source",
        "up_proj.weight has shape",
    ):
        assert part in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_a_truncated_file_is_named(copy, tmp_path):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or truncated"):
        convert(copy, tmp_path / "out", "float32")


def test_a_missing_shard_is_named(tmp_path):
    sharded = tiny.save(tiny.llama(), tmp_path / "sharded", shard="20KB")
    victim = sorted(sharded.glob("model-0000*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(UserError, match=victim.name):
        convert(sharded, tmp_path / "out", "float32")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokenizer.json", lambda data: data[:2000], r"hf/tokenizer\.json is not readable JSON"),
        ("tokenizer.json", lambda data: b"{}", r"hf/tokenizer\.json cannot be read"),
        ("tokenizer_config.json", lambda data: data[:-9], r"hf/tokenizer_config\.json is not"),
        ("chat_template.jinja", lambda data: b"", "no chat template; convert a chat model"),
    ],
)
def test_a_damaged_tokenizer_is_named_and_the_checkpoint_that_is_there_kept(
    copy, tmp_path, name, damage, message
):
    out = convert(copy, tmp_path / "out", "float32")
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    with pytest.raises(UserError, match=message):
        convert(copy, out, "bfloat16")
    assert checkpoint.load(out).manifest["dtype"] == "float32"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("generation_config.json", {"eos_token_id": "two"}, "eos_token_id 'two' is no token id"),
        ("generation_config.json", {"eos_token_id": []}, r"eos_token_id \[\] is no token id"),
        ("model.safetensors.index.json", {"weight_map": ["a"]}, "weight_map names no file"),
        ("model.safetensors.index.json", {"weight_map": {"a": 1}}, "weight_map names no file"),
    ],
)
def test_a_value_of_another_kind_in_the_sources_json_is_named(
    copy, tmp_path, name, change, message
):
    path = copy / name
    held = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(held | change))
    with pytest.raises(UserError, match=message):
        convert(copy, tmp_path / "out", "float32")


def test_a_model_in_pickles_alone_is_asked_for_in_another_form(copy, tmp_path):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.* safetensors or GGUF"):
        convert(copy, tmp_path / "out", "float32")


def test_remote_code_pointers_are_not_kept(copy, tmp_path):
    path = copy / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": "evil.py"}})
    )
    out = convert(copy, tmp_path / "out", "float32")
    assert "auto_map" not in (out / "tokenizer/tokenizer_config.json").read_text()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_narrow_source_weights_keep_their_values(kind, tmp_path):
    hf = tiny.qwen2().to(kind)
    folder = tiny.save(hf, tmp_path / "hf")
    params = flatten(checkpoint.load(convert(folder, tmp_path / "out", "float32")).params)
    expected = hf.state_dict()["model.layers.1.self_attn.k_proj.weight"].float().numpy().T
    np.testing.assert_array_equal(params["layers/1/attn/k/kernel"], expected)


def test_the_manifest_has_the_hash_of_every_file_that_was_read(tmp_path):
    sharded = tiny.save(tiny.llama(), tmp_path / "sharded", shard="20KB")
    out = checkpoint.load(convert(sharded, tmp_path / "out", "float32"))
    read = [p for p in sharded.iterdir() if p.name != "README.md"]
    assert out.manifest["source"]["files"] == {p.name: sha256_file(p) for p in sorted(read)}
    assert {p.name for p in read} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_weights_that_are_no_floats_are_refused(copy, tmp_path):
    def change(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.int8)

    edit(copy, change)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has type int8"):
        convert(copy, tmp_path / "out", "float32")


def test_a_revision_of_something_that_has_none_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="--revision is for hub ids"):
        convert(source, tmp_path / "out", "float32", revision="main")


def test_a_hub_id_is_converted_and_its_commit_recorded(source, tmp_path, monkeypatch):
    # The hub client's own cache, filled by hand: offline it asks nobody else.
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache/models--some--model"
    shutil.copytree(source, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    out = checkpoint.load(convert("some/model", tmp_path / "out", "float32"))
    about = out.manifest["source"]
    assert (about["kind"], about["name"], about["revision"]) == ("hub", "some/model", commit)
    with pytest.raises(UserError, match="cannot fetch some/other from the hub"):
        convert("some/other", tmp_path / "other", "float32")


# Converts under a limit on this process's own memory: what it has once everything is imported and
# a first model is converted, and so many bytes more.
UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
from jaxsteer.model.convert import convert
small, large, out, room = *map(Path, sys.argv[1:4]), int(sys.argv[4])
convert(small, out / "small", "float32")
status = dict(line.split(":") for line in open("/proc/self/status"))
held = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + room, held + room))
convert(large, out / "made", "float32")
"""


def test_conversion_needs_the_output_and_little_more(copy, tmp_path):
    large = tmp_path / "large"
    shutil.copytree(copy, large)
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "vocab_size": 8000}
    raw = json.loads((large / "config.json").read_text()) | wide
    (large / "config.json").write_text(json.dumps(raw | {"num_attention_heads": 16}))
    config = from_hf(json.loads((large / "config.json").read_text()), "test")
    shapes = param_shapes(config)
    size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    tensors = {}
    for entry in table(config, "hf"):
        shape = shapes[entry.target][:: -1 if entry.rule == "transpose" else 1]
        tensors[entry.source] = np.full(shape, 0.5, np.float32)
    save_file(tensors, large / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, copy, large, tmp_path, str(int(1.4 * size))],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert size > 200e6 and done.returncode == 0, done.stderr
    assert (tmp_path / "made/manifest.json").is_file()


def test_a_source_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model at"):
        convert(tmp_path / "nowhere", tmp_path / "out", "float32")


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

        triples = ((e.source, (), lambda e=e, read=read: read(e)) for e in table(config, "gguf"))
        from_gguf = fill(config, triples, "gguf", "float32", "test")
        out = checkpoint.load(convert(folder, tmp_path / f"{hf.config.model_type}-out", "float32"))
        for path, value in flatten(out.params).items():
            np.testing.assert_array_equal(from_gguf[path], np.asarray(value))


def write_gguf(path, kind, width=256, pre="smollm", extra=lambda writer: None):
    """A small Llama GGUF whose matrices are all of one quantised type; returns them in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    extra(writer)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    words = ["<unk>", "<s>", "</s>", *"abcd1234", "ab", "12", "123", "1234", "\u0120"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * 13)
    writer.add_token_merges(["a b", "1 2", "12 3", "123 4"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    generator = np.random.default_rng(0)
    quant = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    expected = {}
    shapes = {"token_embd": (16, width), "output_norm": (width,), "blk.0.attn_norm": (width,)}
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
        expected[f"{name}.weight"] = gguf.quants.dequantize(raw, quant).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("kind", GGUF_TYPES)
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
        (lambda w: w.add_tensor("rope_freqs.weight", np.full(32, 3, np.float32)), "rope_freqs"),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "yarn"),
        (lambda w: w.add_uint32("llama.expert_count", 8), "expert_count"),
    ],
)
def test_gguf_metadata_that_would_change_the_computation_is_refused(extra, message, tmp_path):
    write_gguf(tmp_path / "m.gguf", "F32", extra=extra)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recognised_in_a_gguf_by_its_factors(factor, tmp_path):
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
    assert found.rope == RopeConfig(theta=500000.0, kind="llama3", factor=factor)
    np.testing.assert_allclose(rope_frequencies(found.rope, 64), theirs.inv_freq, rtol=1e-6)


def test_a_gguf_tokenizer_that_splits_text_in_an_unknown_way_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", "F32", pre="tekken-9")
    with pytest.raises(UserError, match=r"tekken-9.*llama-bpe"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


def test_an_unsupported_gguf_type_is_refused_by_name(tmp_path):
    write_gguf(tmp_path / "m.gguf", "Q2_K")
    with pytest.raises(UserError, match="Q2_K"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


def test_a_truncated_gguf_is_named(tmp_path):
    write_gguf(tmp_path / "m.gguf", "F16")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"m\.gguf is damaged"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32")


def test_other_types_than_these_are_refused_and_listed(tmp_path):
    done = jaxsteer("convert", tmp_path, "--out", tmp_path / "out", "--dtype", "int8")
    assert done.returncode == 2
    assert "supported: auto, float32, bfloat16" in done.stderr
