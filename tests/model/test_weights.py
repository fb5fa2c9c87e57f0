from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxsteer.model import weights
from jaxsteer.model.config import from_hf
from jaxsteer.model.decoder import Decoder
from tests import tiny


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
