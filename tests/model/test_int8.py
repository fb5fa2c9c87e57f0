from __future__ import annotations

import dataclasses
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.generation.engine import Request, run
from jaxsteer.generation.generate import Decoding, Rows, Sampling, generate, no_probes
from jaxsteer.generation.padding import left_pad
from jaxsteer.model import checkpoint, int8
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, compile_conditions
from jaxsteer.model.weights import flatten
from tests import tiny
from tests.cli.command import jaxsteer


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folders(request, tmp_path_factory):
    """One model in float32, and with kernels in eight bits."""
    folder = tmp_path_factory.mktemp("int8")
    hf = tiny.save(getattr(tiny, request.param)(), folder / "hf")
    return convert(hf, folder / "whole", "float32"), convert(hf, folder / "eight", "float32+int8")


def test_no_weight_is_off_by_more_than_half_a_step_of_its_column(rng):
    kernel = rng.standard_normal((40, 7)).astype(np.float32) * 10.0 ** np.arange(-3, 4)
    found = int8.rounded(kernel.astype(np.float32))
    assert found.values.dtype == np.int8 and found.scale.shape == (1, 7)
    assert np.all(np.abs(found.values * found.scale - kernel) <= 0.501 * found.scale)
    # A column's largest weight has the largest number: no bit is wasted.
    assert np.all(np.abs(found.values.astype(np.int32)).max(axis=0) >= 127)


def test_a_product_is_that_of_the_rounded_kernel(rng):
    kernel = rng.standard_normal((40, 7)).astype(np.float32)
    x = rng.standard_normal((5, 40)).astype(np.float32)
    made = int8.rounded(kernel)
    found = int8.product(jnp.asarray(x), jax.tree.map(jnp.asarray, made))
    np.testing.assert_allclose(found, x @ (made.values * made.scale), rtol=1e-5, atol=1e-5)


def test_taking_apart_undoes_joining(rng):
    made = int8.rounded(rng.standard_normal((4, 3)).astype(np.float32))
    flat = {"b/kernel": made.values, "b/kernel_scale": made.scale, "embed/embedding": made.scale}
    assert set(int8.joined(flat)) == {"b/kernel", "embed/embedding"}
    assert int8.parts(int8.joined(flat)) == flat


def test_a_checkpoint_keeps_everything_but_block_kernels_as_it_was(folders):
    whole, eight = (checkpoint.load(folder) for folder in folders)
    assert eight.manifest["dtype"] == "float32+int8"
    assert eight.manifest["weights_sha256"] != whole.manifest["weights_sha256"]
    stored, before = int8.parts(flatten(eight.params)), flatten(whole.params)
    assert {path for path in stored if stored[path].dtype == jnp.int8} == {
        path for path in before if path.startswith("layers/") and path.endswith("kernel")
    }
    for path, value in before.items():
        if not int8.is_rounded(path):
            np.testing.assert_array_equal(stored[path], value)


def test_in_bfloat16_scales_are_bfloat16_too(tmp_path):
    made = convert(tiny.save(tiny.llama(), tmp_path / "hf"), tmp_path / "out", "bfloat16+int8")
    stored = int8.parts(flatten(checkpoint.load(made).params))
    assert {value.dtype.name for value in stored.values()} == {"int8", "bfloat16"}


def test_a_changed_scale_is_caught(folders, tmp_path, monkeypatch):
    rounded = int8.rounded

    def changed(kernel):
        made = rounded(kernel)
        return dataclasses.replace(made, scale=made.scale * (2 if kernel.shape == (32, 48) else 1))

    monkeypatch.setattr(int8, "rounded", changed)
    other = convert(folders[0].parent / "hf", tmp_path / "out", "float32+int8")
    shutil.copy(folders[1] / "manifest.json", other)
    with pytest.raises(UserError, match=r"params: layers/0/[a-z/]+/kernel_scale"):
        checkpoint.load(other)


def test_slots_give_the_tokens_of_the_plain_path(folders, rng):
    model = ChatModel.load(folders[1])
    shape = (model.config.n_layers, model.config.d_model)
    steer = Add(direction=rng.standard_normal(shape).astype(np.float32), layers=(1,), scale=2.0)
    stacked = compile_conditions(
        [[], [steer]], ["all"] * 2, n_layers=shape[0], d_model=model.config.d_model
    )
    prompts = [[3, 9, 33, 4], [3, 9, 33, 7, 60, 22], [3, 9, 33, 5, 5]]
    requests = [Request(tokens=p, condition=c, shared=3) for c in range(2) for p in prompts]
    decoding = Decoding(max_new_tokens=12, eos=model.eos)
    tokens, real = left_pad([list(r.tokens) for r in requests], 32)
    batch = Rows(
        tokens=tokens,
        real=real,
        interventions=stacked.rows(np.array([r.condition for r in requests])),
        ids=np.zeros(len(requests), np.uint32),
    )
    probes = no_probes(*shape)
    plain = generate(model.definition, decoding, model.params, batch, probes, Sampling())
    for reply in (r for some in run(model, requests, stacked, decoding, batch=2) for r in some):
        expected = plain.tokens[reply.index, : plain.length[reply.index]]
        np.testing.assert_array_equal(reply.tokens, expected)


def test_only_rounding_needs_qwix_and_says_what_to_install(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    checkpoint.load(folders[1])
    with pytest.raises(UserError, match=r"pip install 'jaxsteer\[int8\]'"):
        convert(folders[0].parent / "hf", tmp_path / "out", "float32+int8")


def test_other_types_than_these_are_refused_and_listed(tmp_path):
    done = jaxsteer("convert", tmp_path, "--out", tmp_path / "out", "--dtype", "int8")
    assert done.returncode == 2
    assert "supported: auto, float32, bfloat16, float32+int8, bfloat16+int8" in done.stderr
