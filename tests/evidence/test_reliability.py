from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from jaxsteer.directions import direction
from jaxsteer.directions.samples import Samples
from jaxsteer.errors import UserError
from jaxsteer.evidence import reliability
from jaxsteer.study import prepare
from tests.evidence import directions_made
from tests.receipt import made as receipts


def test_a_folder_without_measurements_has_no_geometry(tmp_path):
    assert reliability.load(tmp_path) is None


def test_a_study_without_directions_has_nothing_to_measure(tmp_path, smollm2):
    study = receipts.study(claims=[])
    study = msgspec.structs.replace(study, directions={}, condition=study.condition[:1])
    with pytest.raises(UserError, match="its study has no directions"):
        reliability.measure(receipts.folder(tmp_path, study=study), smollm2)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', "[" * 100_000])
def test_a_damaged_geometry_file_is_refused_in_one_line(tmp_path, text):
    (tmp_path / reliability.FILE).write_text(text)
    with pytest.raises(UserError, match=r"geometry\.json"):
        reliability.load(tmp_path)


def test_what_was_measured_reads_back(tmp_path):
    found = reliability.load(directions_made.folder(tmp_path))
    assert found.directions["persona"].reliability["instruction"].units == 20
    assert found.pairs[0].null.relabellings > 1


def test_the_sums_that_a_sweep_kept_are_measured(tmp_path, monkeypatch, rng, smollm2):
    def no_gathering(*given):
        raise AssertionError("the samples were there")

    monkeypatch.setattr(reliability, "gather", no_gathering)
    model = receipts.run_record(receipts.study())["model"]
    model |= {"weights_sha256": smollm2.weights_sha256}
    folder = receipts.folder(tmp_path / "made", model=model)
    for name in ("persona", "refusal"):
        made = Samples(
            values=rng.standard_normal((8, receipts.LAYERS, receipts.WIDTH)).astype(np.float32),
            group=np.arange(8) // 4,
            units={"prompt": np.arange(8)},
            labelled="prompt",
        )
        made.keep(folder / prepare.SAMPLES / f"{name}.safetensors")
    # A direction that `extract` added is not the study's.
    path = folder / "directions.safetensors"
    known = direction.load(path)
    direction.save(path, [*known.values(), dataclasses.replace(known["persona"], name="evil")])
    found = reliability.measure(folder, smollm2, halves=10, draws=20)
    assert set(found.directions) == {"persona", "refusal"}
    assert found == reliability.load(folder)
    assert found.directions["persona"].reliability["prompt"].units == 8
    (pair,) = found.pairs
    assert pair.null is not None and pair.null.relabellings == 70
