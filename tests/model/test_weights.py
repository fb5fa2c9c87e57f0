"""The weight map, and LoRA adapters, written as PEFT writes them and merged by hand."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsteer.errors import UserError
from jaxsteer.files import sha256_file
from jaxsteer.model import checkpoint, weights
from jaxsteer.model.config import from_hf
from jaxsteer.model.convert import Options, convert
from jaxsteer.model.decoder import Decoder
from tests import tiny
from tests.tiny_gguf import write_gguf

# Layer, module, its place among the parameters, and the rank of its matrices.
CHANGED = (
    (0, "self_attn.q_proj", "attn/q", 4),
    (1, "self_attn.q_proj", "attn/q", 2),
    (2, "mlp.down_proj", "mlp/down", 4),
)
# As PEFT saves it: what does not matter here has its default.
CONFIG = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "base_model_name_or_path": "some/base", "bias": "none",
    "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False,
    "lora_dropout": 0.1, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.18.0",
    "qalora_group_size": 16, "r": 4, "rank_pattern": {r"layers\.1\..*q_proj": 2},
    "revision": None, "target_modules": ["q_proj", "down_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False,
}  # fmt: skip


@pytest.fixture(params=tiny.FAMILIES)
def any_hf(request):
    return tiny.family(request.param)


def configured(hf):
    return from_hf(hf.config.to_dict() | {"architectures": [type(hf).__name__]}, "test")


def test_every_tensor_of_the_hf_model_has_its_place_and_shape(any_hf):
    config = configured(any_hf)
    tensors = [(name, value.detach().numpy) for name, value in any_hf.named_parameters()]
    theirs = {name: read() for name, read in weights.separate(tensors, config)}
    table, shapes = weights.table(config), weights.param_shapes(config)
    assert sorted(table) == sorted(theirs)
    assert set(table.values()) == set(shapes)
    for name, path in table.items():
        value = theirs[name].T if path.endswith("kernel") else theirs[name]
        assert value.shape == shapes[path]
    assert weights.stored(config) == {name for name, _ in tensors}


def test_the_shapes_are_those_of_the_flax_model(any_hf):
    config = configured(any_hf)
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(config, jnp.float32))))

    def paths(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from paths(value, f"{prefix}{key}/")
            else:
                yield f"{prefix}{key}", value.shape

    assert dict(paths(state)) == weights.param_shapes(config)


def test_flatten_undoes_nest():
    flat = {"a/b/c": 1, "a/d": 2, "e": 3}
    assert weights.nest(flat.items()) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert weights.flatten(weights.nest(flat.items())) == flat


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("adapter") / "base")


def write(folder, base, change=None, rename=lambda name: name, **config):
    """An adapter of random matrices; returns them by layer and module."""
    rng = np.random.default_rng(0)
    weights, matrices, tensors = load_file(base / "model.safetensors"), {}, {}
    for layer, module, _, rank in CHANGED:
        out, width = weights[f"model.layers.{layer}.{module}.weight"].shape
        a = rng.standard_normal((rank, width)).astype(np.float32)
        b = rng.standard_normal((out, rank)).astype(np.float32)
        matrices[layer, module] = a, b
        name = rename(f"base_model.model.model.layers.{layer}.{module}")
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors | (change or {}), folder / "adapter_model.safetensors")
    return matrices


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (8 / 4, 8 / 2, 8 / 4)),
        ({"use_rslora": True}, (8 / 2, 8 / 2**0.5, 8 / 2)),
        ({"alpha_pattern": {"down_proj": 3, "proj": 5}}, (8 / 4, 8 / 2, 3 / 4)),
        ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": 1}}, (1 / 4, 8 / 2, 8 / 4)),
    ],
)
def test_an_adapter_is_added_to_the_weights_it_changes_and_to_no_others(
    base, tmp_path, config, scales
):
    matrices = write(tmp_path / "lora", base, **config)
    plain = weights.flatten(checkpoint.load(convert(base, tmp_path / "plain", "float32")).params)
    options = Options(adapter=str(tmp_path / "lora"))
    out = checkpoint.load(convert(base, tmp_path / "out", "float32", options=options))
    expected = {name: np.asarray(value) for name, value in plain.items()}
    for (layer, module, ours, _), scale in zip(CHANGED, scales, strict=True):
        a, b = matrices[layer, module]
        expected[f"layers/{layer}/{ours}/kernel"] = (
            expected[f"layers/{layer}/{ours}/kernel"] + scale * (b @ a).T
        )
    for name, value in weights.flatten(out.params).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_the_files_of_base_and_adapter_are_recorded(base, tmp_path):
    write(tmp_path / "lora", base)
    options = Options(adapter=str(tmp_path / "lora"))
    about = checkpoint.read_manifest(
        convert(base, tmp_path / "out", "float32", options=options)
    ).source
    assert about.options == {"adapter": "lora"}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert about.files[f"adapter/{name}"] == sha256_file(tmp_path / "lora" / name)
    assert about.files["model.safetensors"] == sha256_file(base / "model.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"trainable_token_indices": [5]},
        {"a_kind_of_tomorrow": {"x": 1}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_other_kinds_of_adapter_are_refused_by_name(base, tmp_path, config):
    write(tmp_path / "lora", base, **config)
    with pytest.raises(UserError, match=rf"{next(iter(config))}=.* is not supported"):
        convert(base, tmp_path / "out", "float32", options=Options(adapter=str(tmp_path / "lora")))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            {"base_model.model.model.embed_tokens.weight": np.ones((2, 2), np.float32)},
            {},
            r"beside A and B it holds base_model\.model\.model\.embed_tokens",
        ),
        (
            {"base_model.model.model.layers.9.x.lora_A.weight": np.ones((4, 32), np.float32)},
            {},
            r"cannot be read as a LoRA adapter .*layers\.9\.x\.lora_B",
        ),
        ({}, {"rank_pattern": {}}, "layers.1.self_attn.q_proj has rank 2, not 4"),
        ({}, {"rank_pattern": {"(": 2}}, "cannot be read as a LoRA adapter"),
        ({}, {"r": None}, "cannot be read as a LoRA adapter"),
        (
            {
                "base_model.model.model.layers.9.x.lora_A.weight": np.ones((4, 32), np.float32),
                "base_model.model.model.layers.9.x.lora_B.weight": np.ones((32, 4), np.float32),
            },
            {},
            r"the base has no weights model\.layers\.9\.x",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path, change, config, message):
    write(tmp_path / "lora", base, change, **config)
    with pytest.raises(UserError, match=message):
        convert(base, tmp_path / "out", "float32", options=Options(adapter=str(tmp_path / "lora")))


def test_an_adapter_of_a_wider_model_is_named(base, tmp_path):
    write(tmp_path / "lora", base)
    path = tmp_path / "lora/adapter_model.safetensors"
    wide = {n: v.repeat(2, 1) if "lora_A" in n else v for n, v in load_file(path).items()}
    save_file(wide, path)
    with pytest.raises(UserError, match=r"q_proj\.weight cannot be read"):
        convert(base, tmp_path / "out", "float32", options=Options(adapter=str(tmp_path / "lora")))


def test_an_adapter_alone_says_how_to_convert_it_with_its_base(base, tmp_path):
    write(tmp_path / "lora", base)
    with pytest.raises(UserError, match=r"is an adapter of some/base; .* some/base --adapter"):
        convert(tmp_path / "lora", tmp_path / "out", "float32")


def test_an_adapter_without_matrices_is_refused(base, tmp_path):
    write(tmp_path / "lora", base)
    save_file({}, tmp_path / "lora/adapter_model.safetensors")
    with pytest.raises(UserError, match="it holds no matrices"):
        convert(base, tmp_path / "out", "float32", options=Options(adapter=str(tmp_path / "lora")))


def test_a_missing_adapter_and_one_for_a_gguf_are_refused(base, tmp_path):
    nowhere = Options(adapter=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere cannot be read as a LoRA adapter"):
        convert(base, tmp_path / "out", "float32", options=nowhere)
    write_gguf(tmp_path / "m.gguf", "F32")
    with pytest.raises(UserError, match="merged into Hugging Face weights, not a GGUF"):
        convert(tmp_path / "m.gguf", tmp_path / "out", "float32", options=nowhere)


def test_the_text_part_of_a_model_of_text_and_images_is_found(base, tmp_path):
    write(tmp_path / "lora", base)
    write(
        tmp_path / "other", base, rename=lambda n: n.replace("l.model.", "l.model.language_model.")
    )
    made = [
        checkpoint.read_manifest(
            convert(base, tmp_path / f"{name}-out", "float32",
                    options=Options(adapter=str(tmp_path / name)))
        ).weights_sha256
        for name in ("lora", "other")
    ]  # fmt: skip
    assert made[0] == made[1]
