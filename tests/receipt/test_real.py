"""The whole way on a tiny random model: a real run, its geometry, its receipt, verified by all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxsteer.directions import direction
from jaxsteer.errors import UserError
from jaxsteer.evidence import reliability
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.receipt import build, statement, verify
from jaxsteer.study import run, spec
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """A finished run with its geometry and receipt."""
    out = tmp_path_factory.mktemp("real")
    model = ChatModel.load(checkpoint)
    run.run_study(spec.load(tiny.study_file(out)), model, out / "results")
    reliability.measure(out / "results", model, halves=10, draws=50)
    build.write(out / "results", samples=2)
    return out / "results"


def test_a_real_receipt_passes_every_check(folder, checkpoint):
    checks = verify.verify(folder / build.JSON, folder=folder, model=checkpoint)
    assert [c for c in checks if c.status == "mismatch"] == []
    assert [c.what for c in checks if c.status == "unchecked"] == ["the author of the receipt"]


def test_its_subjects_are_the_checkpoints_files(folder, checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    value = json.loads((folder / build.JSON).read_text())
    digests = {s["name"]: s["digest"]["sha256"] for s in value["subject"]}
    assert digests["weights"] == manifest["weights_sha256"]
    assert digests["config.json"] == manifest["config_sha256"]
    for name, sha256 in manifest["source"]["files"].items():
        assert digests[f"source/{name}"] == sha256


def test_a_model_is_hashed_on_the_mesh_that_is_asked_for(folder, checkpoint, monkeypatch):
    loaded, load = [], ChatModel.load

    def spied(path, **options):
        loaded.append(load(path, **options))
        return loaded[-1]

    monkeypatch.setattr(ChatModel, "load", spied)
    checks = verify.verify(folder / build.JSON, model=checkpoint, mesh="data=1,model=1")
    assert verify.passed(checks)
    assert dict(loaded[0].mesh.shape) == {"data": 1, "model": 1}
    with pytest.raises(UserError, match="mesh model=8 needs 8 devices"):
        verify.verify(folder / build.JSON, model=checkpoint, mesh="model=8")


def test_another_model_is_a_mismatch(folder, tmp_path):
    other = convert(tiny.save(tiny.qwen2(), tmp_path / "hf"), tmp_path / "out", "float32")
    checks = verify.verify(folder / build.JSON, model=other)
    assert [c.what for c in checks if c.status == "mismatch"] == [
        "the model's weights, tokenizer, chat template and config",
        "the manifest's record of the files it was converted from",
    ]


def test_the_samples_behind_a_direction_make_that_direction(folder):
    measured = json.loads((folder / reliability.FILE).read_text())
    persona = measured["directions"]["persona"]
    assert persona["recomputed_cosine"] == pytest.approx(1, abs=1e-5)
    assert set(persona["reliability"]) == {"instruction", "question"}
    assert measured["pairs"] == []


def test_the_receipt_shows_what_was_measured_and_changed(folder):
    receipt = statement.load(folder / build.JSON).predicate
    assert set(receipt.geometry.directions) == {"persona"}
    change = {c.name: c.change for c in receipt.conditions}
    assert change["baseline"].mean == 0
    assert change["persona"].mean > 0
    # Four times a vector of known length was added at one layer, for every token.
    vectors = direction.load(folder / "directions.safetensors")["random-1"].vectors
    expected = 4 * float(np.linalg.norm(vectors[1]))
    assert change["random #1"].mean == pytest.approx(expected, rel=1e-4)


def test_geometry_of_another_model_is_refused(folder, tmp_path):
    other = convert(tiny.save(tiny.qwen2(), tmp_path / "hf"), tmp_path / "out", "float32")
    with pytest.raises(UserError, match="was run on another model"):
        reliability.measure(folder, ChatModel.load(other))
