from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsteer.model import weights
from jaxsteer.model.config import from_hf
from jaxsteer.model.decoder import Decoder
from tests import tiny


@pytest.fixture(params=[tiny.llama, tiny.qwen2])
def hf(request):
    return request.param()


@pytest.fixture(params=tiny.FAMILIES)
def any_hf(request):
    return tiny.family(request.param)


def configured(hf):
    return from_hf(hf.config.to_dict() | {"architectures": [type(hf).__name__]}, "test")


def test_every_tensor_of_the_hf_model_has_its_place_and_shape(any_hf):
    config = configured(any_hf)
    tensors = [(name, value.detach().numpy) for name, value in any_hf.named_parameters()]
    theirs = {name: read() for name, read in weights.separate(tensors, config)}
    table = weights.table(config, "hf")
    assert sorted(entry.source for entry in table) == sorted(theirs)
    shapes = weights.param_shapes(config)
    for entry in table:
        value = weights.transform(theirs[entry.source], entry.rule, config)
        assert value.shape == shapes[entry.target]


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


def test_both_naming_schemes_fill_the_same_parameters(any_hf):
    config = configured(any_hf)
    targets = [[e.target for e in weights.table(config, form)] for form in ("hf", "gguf")]
    assert targets[0] == targets[1] == list(dict.fromkeys(targets[0]))
    assert set(targets[0]) == set(weights.param_shapes(config))


def test_only_llamas_ggufs_have_q_and_k_permuted(hf):
    config = configured(hf)
    permuted = [e.target for e in weights.table(config, "gguf") if "unpermute" in e.rule]
    expected = [f"layers/{i}/attn/{x}/kernel" for i in range(config.n_layers) for x in "qk"]
    assert permuted == (expected if config.family == "LlamaForCausalLM" else [])


def test_unpermute_of_the_documented_rows():
    rows = np.array([["a0"], ["b0"], ["a1"], ["b1"]])
    assert weights.unpermute(rows, 1).ravel().tolist() == ["a0", "a1", "b0", "b1"]


def test_flatten_undoes_nest():
    flat = {"a/b/c": 1, "a/d": 2, "e": 3}
    assert weights.nest(flat.items()) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert weights.flatten(weights.nest(flat.items())) == flat
