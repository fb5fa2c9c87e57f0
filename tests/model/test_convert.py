from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types

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
from jaxsteer.model.convert import Options, convert
from jaxsteer.model.tokenizer import Tokenizer
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


def settings(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_keys_that_have_no_effect_are_taken_and_listed(copy, tmp_path):
    harmless = {
        "use_mrope": False, "unsloth_version": "2026.3.3", "max_length": 20, "do_sample": False,
        "pruned_heads": {}, "torchscript": False,
    }  # fmt: skip
    settings(copy, attention_bias=None, mlp_bias=None, **harmless)
    made = convert(copy, tmp_path / "out", "float32")
    ignored = checkpoint.read_manifest(made).ignored
    assert ignored.items() >= harmless.items()
    assert not {"hidden_size", "hidden_act", "rope_parameters"} & ignored.keys()


def test_unknown_keys_are_named_together_and_taken_on_the_users_word(copy, tmp_path):
    settings(copy, sinks=4, gates={"every": 2})
    with pytest.raises(UserError, match=r"sinks is unknown.*; gates is unknown.*--accept-unknown"):
        convert(copy, tmp_path / "out", "float32")
    options = Options(accept_unknown=["sinks", "gates"])
    made = checkpoint.load(convert(copy, tmp_path / "out", "float32", options=options)).manifest
    assert made.ignored["gates"] == {"every": 2}
    assert made.source.options == {"accept_unknown": ["sinks", "gates"]}
    with pytest.raises(UserError, match="hidden_size is known and cannot be left out"):
        convert(copy, tmp_path / "x", "float32", options=Options(accept_unknown=["hidden_size"]))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ("config.json", {"quantization_config": {"load_in_4bit": True}}, "load_in_4bit"),
        ("config.json", {"quantization": {"bits": 4, "group_size": 64}}, "group_size"),
        ("quant_config.json", {"w_bit": 4, "version": "gemm"}, "gemm"),
    ],
)
def test_quantised_weights_are_refused_by_their_method(copy, tmp_path, name, change, said):
    if name != "config.json":
        (copy / name).write_text("{}")
    settings(copy, name, **change)
    with pytest.raises(UserError, match=rf"hf: its weights are quantised \(.*{said}"):
        convert(copy, tmp_path / "out", "float32")


def test_a_tied_model_of_which_only_the_head_is_stored_is_read(copy, tmp_path):
    settings(copy, tie_word_embeddings=True)
    edit(copy, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    head = load_file(copy / "model.safetensors")["lm_head.weight"]
    params = flatten(checkpoint.load(convert(copy, tmp_path / "out", "float32")).params)
    np.testing.assert_array_equal(params["embed/embedding"], head)


def test_a_tied_model_with_a_head_of_its_own_is_refused_or_untied_on_request(copy, tmp_path):
    settings(copy, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding.*--untie"):
        convert(copy, tmp_path / "out", "float32")
    made = checkpoint.load(convert(copy, tmp_path / "out", "float32", options=Options(untie=True)))
    head = load_file(copy / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(flatten(made.params)["head/kernel"], head.T)
    assert made.manifest.source.options == {"untie": True}


def test_a_tied_model_with_the_embedding_stored_twice_is_read(copy, tmp_path):
    settings(copy, tie_word_embeddings=True)
    edit(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    made = checkpoint.load(convert(copy, tmp_path / "out", "float32"))
    assert "head/kernel" not in flatten(made.params)


def test_an_untied_model_without_a_head_says_so(copy, tmp_path):
    edit(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"there is no lm_head\.weight, though its config does not"):
        convert(copy, tmp_path / "out", "float32")


@pytest.fixture
def both(tmp_path):
    """Shards and their index, and the same weights in a single file."""
    sharded = tiny.save(tiny.llama(), tmp_path / "both", shard="20KB")
    shutil.copyfile(
        tiny.save(tiny.llama(), tmp_path / "single") / "model.safetensors",
        sharded / "model.safetensors",
    )
    return sharded


def test_a_single_file_and_shards_with_the_same_weights_are_read(both, tmp_path):
    made = checkpoint.read_manifest(convert(both, tmp_path / "out", "float32"))
    assert "model.safetensors" in made.source.files
    assert not any(name.startswith("model-0") for name in made.source.files)


@pytest.mark.parametrize(
    "change", [lambda t: t["model.norm.weight"].fill(1), lambda t: t.popitem()]
)
def test_a_single_file_and_shards_with_other_weights_are_refused(both, tmp_path, change):
    edit(both, change)
    with pytest.raises(UserError, match=r"index\.json name different weights; remove the one"):
        convert(both, tmp_path / "out", "float32")


def test_a_stale_index_beside_the_whole_model_does_no_harm(both, tmp_path):
    for shard in both.glob("model-0*"):
        shard.unlink()
    whole = convert(tmp_path / "single", tmp_path / "whole", "float32")
    made = convert(both, tmp_path / "out", "float32")
    one, two = (checkpoint.read_manifest(folder).weights_sha256 for folder in (whole, made))
    assert one == two


def test_an_index_of_other_shards_names_both(tmp_path):
    sharded = tiny.save(tiny.llama(), tmp_path / "sharded", shard="20KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    other = {name: f"other-{file}" for name, file in index["weight_map"].items()}
    settings(sharded, "model.safetensors.index.json", weight_map=other)
    with pytest.raises(UserError, match=r"names other-model-00001.*, and it holds model-00001"):
        convert(sharded, tmp_path / "out", "float32")


def test_shards_without_their_index_are_listed(tmp_path):
    sharded = tiny.save(tiny.llama(), tmp_path / "sharded", shard="20KB")
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"no model.safetensors.index.json, and it holds model-00"):
        convert(sharded, tmp_path / "out", "float32")


def test_a_tensor_in_two_shards_is_named(tmp_path):
    sharded = tiny.save(tiny.llama(), tmp_path / "sharded", shard="20KB")
    one, two = sorted(sharded.glob("model-0*.safetensors"))[:2]
    name, value = next(iter(load_file(one).items()))
    save_file({**load_file(two), name: value}, two)
    with pytest.raises(UserError, match=rf"tensor {name} is in .*{one.name} and in {two.name}"):
        convert(sharded, tmp_path / "out", "float32")


def test_replies_end_on_all_that_the_files_and_the_template_say(copy, tmp_path):
    settings(copy, eos_token_id=[2, 7])
    settings(copy, "generation_config.json", eos_token_id=[8, -1])
    settings(copy, "tokenizer_config.json", eos_token="<unk>")
    made = checkpoint.read_manifest(convert(copy, tmp_path / "out", "float32"))
    # The template writes </s> after an assistant's turn.
    assert made.eos_token_ids == [0, 2, 7, 8]


def test_nothing_that_ends_a_reply_is_an_error(copy, tmp_path):
    settings(copy, eos_token_id=None)
    settings(copy, "generation_config.json", eos_token_id=[])
    settings(copy, "tokenizer_config.json", eos_token=None)
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="nothing in its files says which token ends a reply"):
        convert(copy, tmp_path / "out", "float32")


def test_a_template_from_a_file_and_its_variables_are_kept_and_recorded(copy, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(tiny.TEMPLATE + "{% if not think|default(true) %}w9{% endif %}")
    options = Options(template=str(file), arguments={"think": False})
    out = convert(copy, tmp_path / "out", "float32", options=options)
    assert Tokenizer.load(out / "tokenizer").chat("w1")[-1] == 15
    about = checkpoint.read_manifest(out).source
    assert about.options == {"template": "mine.jinja", "arguments": {"think": False}}
    assert about.files["mine.jinja"] == sha256_file(file)


def test_a_folder_without_a_config_says_what_to_give(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no config\.json; give a Hugging Face model"):
        convert(tmp_path / "empty", tmp_path / "out", "float32")


def test_the_hub_says_why_a_model_cannot_be_had_and_what_to_do(tmp_path, monkeypatch):
    def refused(kind):
        def fetch(*arguments, **options):
            raise kind(
                "401 Client Error.", response=types.SimpleNamespace(headers={}, request=None)
            )

        return fetch

    errors = huggingface_hub.errors
    for kind, said in (
        (
            errors.GatedRepoError,
            r"only to users with access; ask for it at https://.*hf auth login",
        ),
        (errors.RepositoryNotFoundError, "shows no model some/model; check the name, and log in"),
        (errors.HfHubHTTPError, r"cannot fetch some/model from the hub \(401"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", refused(kind))
        with pytest.raises(UserError, match=said):
            convert("some/model", tmp_path / "out", "float32")


def test_the_weights_of_a_hub_model_are_fetched_after_everything_else_was_checked(
    source, tmp_path, monkeypatch
):
    asked = []

    def fetch(name, revision, allow_patterns, **options):
        asked.append((revision, allow_patterns))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UserError, match="no chat template nowhere"):
        convert("some/model", tmp_path / "out", "float32", options=Options(template="nowhere"))
    assert asked == [(None, ["*.json", "*.jinja"])]
    convert("some/model", tmp_path / "out", "float32")
    assert asked[1:] == [(None, ["*.json", "*.jinja"]), ("hf", ["*.safetensors"])]


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


@pytest.mark.slow
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
    for name, path in table(config).items():
        shape = shapes[path][:: -1 if path.endswith("kernel") else 1]
        tensors[name] = np.full(shape, 0.5, np.float32)
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
