from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsteer.directions import direction as directions
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("directions")
    hf = tiny.save(tiny.qwen2(), folder / "hf")
    return ChatModel.load(convert(hf, folder / "out", "float32"))


def direction(rng, name="v", **provenance):
    vectors = rng.standard_normal((3, 32)).astype(np.float32)
    return Direction(name=name, vectors=vectors, provenance={"tap": "resid_post", **provenance})


def test_a_random_direction_has_the_norms_of_its_model_and_no_other_likeness(rng):
    real = direction(rng, weights_sha256="abc")
    made = directions.random_like(real, 7)
    norms = [np.linalg.norm(d.vectors, axis=1) for d in (real, made)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert made.sha256 == directions.random_like(real, 7).sha256
    assert made.sha256 != directions.random_like(real, 8).sha256
    assert made.provenance["norm_of_sha256"] == real.sha256


def test_minus_and_without_say_what_they_are_made_of(rng):
    one, two = direction(rng, "a", weights_sha256="x"), direction(rng, "b", weights_sha256="x")
    difference, rest = directions.minus("c", one, two), directions.without("d", one, two)
    np.testing.assert_allclose(difference.vectors, one.vectors - two.vectors, atol=1e-6)
    np.testing.assert_allclose(np.einsum("ld,ld->l", rest.vectors, two.vectors), 0, atol=1e-4)
    assert rest.provenance["of"] == {"a": one.sha256, "b": two.sha256}
    assert rest.provenance["weights_sha256"] == "x"


def test_saved_directions_come_back_with_their_provenance(rng, tmp_path):
    saved = [direction(rng, "a", kind="trait", n=3), direction(rng, "b", source="ü <b>")]
    directions.save(tmp_path / "d.safetensors", saved)
    found = directions.load(tmp_path / "d.safetensors")
    assert list(found) == ["a", "b"]
    for one in saved:
        assert found[one.name].sha256 == one.sha256
        assert found[one.name].provenance == one.provenance


def test_directions_added_at_the_same_time_are_all_kept(rng, tmp_path, model):
    path, known = tmp_path / "d.safetensors", {"weights_sha256": model.weights_sha256}
    made = [direction(rng, f"v{i}", **known) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda one: directions.add(path, one, model), made))
    assert {n: d.sha256 for n, d in directions.load(path).items()} == {
        one.name: one.sha256 for one in made
    }


def test_the_hash_changes_with_any_value(rng):
    one = direction(rng)
    vectors = one.vectors.copy()
    vectors[1, 5] = np.nextafter(vectors[1, 5], np.float32(np.inf))
    assert Direction(name="v", vectors=vectors, provenance={}).sha256 != one.sha256


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_files_that_are_no_directions_are_refused_by_name(tmp_path, content):
    path = tmp_path / "d.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"d\.safetensors"):
        directions.load(path)


@pytest.mark.parametrize("vectors", [np.zeros((3, 4)), np.zeros(3, np.float32)])
def test_tensors_that_are_no_directions_are_refused(tmp_path, vectors):
    path = tmp_path / "d.safetensors"
    about = {"format": directions.FORMAT, "provenance": '{"v": {}}'}
    save_file({"v": vectors}, path, metadata=about)
    with pytest.raises(UserError, match=r"d\.safetensors: 'v' is float.*extract it again"):
        directions.load(path)


def test_a_direction_of_another_width_or_other_weights_is_refused(model, rng):
    mine = direction(rng, weights_sha256=model.weights_sha256)
    directions.check_model(mine, model, "here")
    wide = Direction(name="v", vectors=np.zeros((3, 33), np.float32), provenance=mine.provenance)
    with pytest.raises(UserError, match=r"here.*\(3, 33\).*\(3, 32\)"):
        directions.check_model(wide, model, "here")
    with pytest.raises(UserError, match="other weights"):
        directions.check_model(direction(rng, weights_sha256="0" * 64), model, "here")
