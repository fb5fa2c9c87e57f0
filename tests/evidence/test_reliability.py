from __future__ import annotations

import msgspec
import pytest

from jaxsteer.errors import UserError
from jaxsteer.evidence import reliability
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
    assert found.pairs[0].null.shuffled == [found.pairs[0].first]
