from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxsteer.data.wheels import cache_dir
from jaxsteer.errors import UserError
from jaxsteer.generation.prefill import Prefix
from jaxsteer.model import sharding as parallel
from jaxsteer.model.config import from_hf
from jaxsteer.model.convert import convert
from jaxsteer.model.weights import param_shapes
from tests import tiny
from tests.meshes import MESHES

# Beside biases and heads: norms of each head and of all heads, and windows in some layers.
FAMILIES = {
    "llama": tiny.llama,
    "qwen2": tiny.qwen2,
    "gemma3": functools.partial(tiny.family, "gemma3_text", tie_word_embeddings=False),
    "olmo3": functools.partial(tiny.family, "olmo3"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What tests/meshes.py came to, by "family mesh"; the mesh "" is one device."""
    folder = tmp_path_factory.mktemp("meshes")
    made = []
    for name, build in FAMILIES.items():
        out = convert(tiny.save(build(), folder / f"{name}-hf"), folder / name, "float32")
        made.append(f"{name}={out}")
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache_dir() / "xla-tests"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.meshes", folder / "out", *made],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out").read_text())


def tiny_config():
    """Sizes of tests.tiny, and a vocabulary of 62 that four do not divide."""
    return tiny.config()


def mesh_of(data, model):
    """A mesh that is good for asking about: one device, counted many times."""
    return jax.sharding.Mesh(
        np.array(jax.devices()[:1] * data * model).reshape(data, model), parallel.AXES
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", MESHES)
def test_every_mesh_gives_the_replies_of_one_device(runs, family, shape):
    one, spread = runs[f"{family} "]["replies"], runs[f"{family} {shape}"]["replies"]
    assert spread["tokens"] == one["tokens"]
    for ours, theirs in zip(spread["logits"], one["logits"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    # The rows differ, so that a row in another's place would be seen.
    assert len({tuple(row) for row in one["tokens"]}) > 15


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_replies_of_one_device_are_those_of_the_stepwise_path(runs, family):
    one = runs[f"{family} "]
    assert one["replies"]["tokens"] == one["stepwise"]


@pytest.mark.slow
def test_the_slots_are_split_by_rows_and_their_cache_by_heads_too(runs):
    # 8 slots, caches of 2 key-value heads, replies of 6 tokens.
    found = runs["llama data=4,model=2"]["replies"]["shards"]
    assert [shape for shape in found if len(shape) < 4] == [[2], [2, 6]]
    ((rows, heads, _, width),) = [shape for shape in found if len(shape) == 4]
    assert (rows, heads, width) == (2, 1, 12)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_read_a_part_of_the_rows_on_each_device(runs, family):
    one, spread = (runs[f"{family} {shape}"]["captured"] for shape in ("", "data=4,model=2"))
    # The prefix, and then two packed prompts; on the mesh four at a time, one on each device.
    assert set(one["rows"]) == {1, 2} and set(spread["rows"]) == {1}
    np.testing.assert_allclose(spread["streams"], one["streams"], atol=1e-4)


@pytest.mark.slow
def test_what_a_mesh_cannot_split_is_whole_on_several_devices(runs):
    one, split, twice = (
        runs[f"llama {shape}"]["memory"] for shape in ("", "data=4,model=2", "data=2,model=4")
    )
    # A cache's rows are split, and 2 key-value heads in 2; in 4 they are whole on each.
    assert split[1] == one[1] and twice[1] == 4 * one[1]
    assert split[0] > 4 * one[0]


@pytest.mark.slow
def test_a_parameter_that_is_split_is_whole_on_no_device(runs):
    # 4 heads of 12, 2 key-value heads, MLP 48, vocabulary 64, width 32, on data=4,model=2.
    pieces = runs["llama data=4,model=2"]["pieces"]
    expected = {
        "embed/embedding": (32, 32),
        "head/kernel": (32, 32),
        "final_norm/scale": (32,),
        "layers/1/attn_norm/scale": (32,),
        "layers/1/attn/q/kernel": (32, 24),
        "layers/1/attn/k/kernel": (32, 12),
        "layers/1/attn/v/kernel": (32, 12),
        "layers/1/attn/o/kernel": (24, 32),
        "layers/1/mlp_norm/scale": (32,),
        "layers/1/mlp/gate/kernel": (32, 24),
        "layers/1/mlp/up/kernel": (32, 24),
        "layers/1/mlp/down/kernel": (24, 32),
    }
    for path, shape in expected.items():
        assert pieces[path] == [[device, list(shape)] for device in range(8)], path


@pytest.mark.slow
def test_heads_are_split_between_heads_only(runs):
    # 4 query heads in 4, 2 key-value heads not in 4, nothing of either in 8; biases as kernels.
    pieces = runs["qwen2 data=2,model=4"]["pieces"]
    assert {tuple(shape) for _, shape in pieces["layers/0/attn/q/kernel"]} == {(32, 8)}
    assert {tuple(shape) for _, shape in pieces["layers/0/attn/q/bias"]} == {(8,)}
    assert {tuple(shape) for _, shape in pieces["layers/0/attn/k/kernel"]} == {(32, 16)}
    assert {tuple(shape) for _, shape in pieces["layers/0/attn/k/bias"]} == {(16,)}
    pieces = runs["qwen2 data=1,model=8"]["pieces"]
    assert {tuple(shape) for _, shape in pieces["layers/0/attn/q/kernel"]} == {(32, 32)}
    assert {tuple(shape) for _, shape in pieces["layers/0/mlp/gate/kernel"]} == {(32, 6)}


@pytest.mark.slow
def test_what_is_not_split_is_said(runs):
    assert runs["llama data=4,model=2"]["notes"] == []
    assert runs["llama data=2,model=4"]["notes"] == [
        "2 key-value heads cannot be split in 4: k and v projections and the cache are whole on "
        "every device"
    ]
    assert len(runs["qwen2 data=1,model=8"]["notes"]) == 2


@pytest.mark.parametrize(
    "text",
    ["", "data", "data=", "data=0", "data=-1", "data=two", "data=2;model=4", "rows=2", "2,4",
     "data=2,data=4", "data=2,model=4,", "data=1.5", "data=²", f"model={'9' * 5000}"],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line_that_shows_how(text):
    with pytest.raises(UserError, match=r"write it as data=2,model=4") as caught:
        parallel.parse(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


def test_spaces_and_either_order_are_read():
    assert parallel.parse(" model=4, data=2") == {"data": 2, "model": 4}


def test_too_few_devices_are_counted():
    with pytest.raises(UserError, match=r"data=2,model=4 needs 8 devices and there is 1 \(CPU\)"):
        parallel.mesh("data=2,model=4", jax.devices()[:1])


def test_a_mesh_that_is_no_rectangle_of_chips_is_made_in_their_order(monkeypatch):
    # As JAX answers for 3 of the 8 chips of a v5e:2x4, and for 16 x 4 of the 8 x 8 of a v6e:8x8.
    for error in (AssertionError("jax_devices=[...]"), NotImplementedError("Failed to find")):

        def refuses(*asked, error=error, **options):
            raise error

        monkeypatch.setattr(jax, "make_mesh", refuses)
        made = parallel.mesh("data=2,model=3", jax.devices()[:1] * 8)
        assert dict(made.shape) == {"data": 2, "model": 3}
        assert made.axis_types == (AxisType.Auto, AxisType.Auto)


def test_every_parameter_of_all_families_is_in_the_table():
    for name in tiny.FAMILIES:
        hf = tiny.family(name)
        config = from_hf(hf.config.to_dict() | {"architectures": [type(hf).__name__]}, "test")
        shapes, mesh = param_shapes(config), mesh_of(1, 1)
        shardings = parallel.param_shardings(config, mesh)
        assert shardings.keys() == shapes.keys()
        for path, shape in shapes.items():
            assert len(shardings[path].spec) == len(shape), path


def test_a_vocabulary_that_is_not_divided_stays_whole():
    config = tiny_config()
    assert parallel.param_shardings(config, mesh_of(1, 4))["head/kernel"].spec == P(None, None)
    assert parallel.notes(config, mesh_of(1, 4))[1].startswith(
        "a vocabulary of 62 cannot be split in 4"
    )


def test_rows_are_split_and_so_are_the_heads_of_a_cache():
    kv = jnp.zeros((8, 2, 16, 12))
    tree = Prefix(cache=[(kv, kv)], real=np.zeros((8, 16), bool), realised={})
    found = parallel.shardings(tree, tiny_config(), mesh_of(4, 2))
    heads = P("data", "model", None, None)
    assert [sharding.spec for sharding in found] == [heads, heads, P("data")]
    # Two key-value heads cannot be split in four.
    found = parallel.shardings(tree, tiny_config(), mesh_of(2, 4))
    assert found[0].spec == P("data", None, None, None)


def test_a_batch_that_the_mesh_does_not_divide_says_what_would():
    with pytest.raises(UserError, match=r"6 rows cannot be split over data=4; .* \(such as 8\)"):
        parallel.place({"a": np.zeros((6, 2))}, tiny_config(), mesh_of(4, 2))


def test_a_data_axis_that_prompts_cannot_be_spread_over_is_refused_before_the_model_is_loaded():
    with pytest.raises(UserError, match=r"16 at a time, which data=3 does not divide; make data 1"):
        parallel.parse("data=3")


def test_without_a_mesh_nothing_is_placed():
    tree = {"a": np.zeros((3, 2))}
    assert parallel.place(tree, tiny_config(), None) is tree
