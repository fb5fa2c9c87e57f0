from __future__ import annotations

import json
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from jaxsteer.errors import UserError
from jaxsteer.files import sha256_file
from jaxsteer.model import checkpoint
from jaxsteer.model.config import from_hf
from jaxsteer.model.convert import convert
from jaxsteer.model.weights import flatten, param_shapes, table
from tests import tiny
from tests.cli.command import here


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
    assert one.manifest.weights_sha256 == two.manifest.weights_sha256


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
        ("tokenizer.json", lambda data: data[:2000], r"hf/tokenizer\.json cannot be read"),
        ("tokenizer.json", lambda data: b"{}", r"hf/tokenizer\.json cannot be read"),
        (
            "tokenizer_config.json",
            lambda data: data[:-9],
            r"tokenizer\.json cannot be read with",
        ),
        (
            "chat_template.jinja",
            lambda data: b"",
            "no chat template; give one with --chat-template",
        ),
    ],
)
def test_a_damaged_tokenizer_is_named_and_the_checkpoint_that_is_there_kept(
    copy, tmp_path, name, damage, message
):
    out = convert(copy, tmp_path / "out", "float32")
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    with pytest.raises(UserError, match=message):
        convert(copy, out, "bfloat16")
    assert checkpoint.load(out).manifest.dtype == "float32"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("generation_config.json", {"eos_token_id": "two"}, r"cannot be read .*\$\.eos_token_id"),
        ("model.safetensors.index.json", {"weight_map": ["a"]}, r"cannot be read .*\$\.weight_map"),
        ("model.safetensors.index.json", {"weight_map": {"a": 1}}, r"cannot be .*\$\.weight_map"),
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
    assert out.manifest.source.files == {p.name: sha256_file(p) for p in sorted(read)}
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
    # The hub client's own cache, filled by hand: offline it asks no server.
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache/models--some--model"
    shutil.copytree(source, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    out = checkpoint.load(convert("some/model", tmp_path / "out", "float32"))
    about = out.manifest.source
    assert (about.kind, about.name, about.revision) == ("hub", "some/model", commit)
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


def test_other_types_than_these_are_refused_and_listed(tmp_path):
    done = here("convert", tmp_path, "--out", tmp_path / "out", "--dtype", "int8")
    assert done.returncode == 2
    assert "supported: auto, float32, bfloat16" in done.stderr
