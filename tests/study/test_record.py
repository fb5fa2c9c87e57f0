from __future__ import annotations

import json

import pytest

from jaxsteer.errors import UserError
from jaxsteer.study import record
from jaxsteer.study.record import Add, Project
from tests.receipt import made


@pytest.fixture
def folder(tmp_path):
    return made.folder(tmp_path / "made")


def test_a_record_is_read_as_it_was_written(folder):
    found = record.read(folder)
    record.write(folder, found)
    assert record.read(folder) == found


def test_no_record_is_none(tmp_path):
    assert record.read(tmp_path) is None


def test_a_field_that_a_later_version_adds_is_ignored(folder):
    value = json.loads((folder / record.FILE).read_text())
    (folder / record.FILE).write_text(json.dumps({**value, "later": 1}))
    assert record.read(folder).study.name == "made"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "jaxsteer-run-1", "'jaxsteer-run-1' - at `$.format`"),
        (["conditions", 1, "benign"], None, r"missing required field `benign` .*conditions\[1\]"),
        (["conditions", 1, "operations", 0, "operation"], "hook", "'hook' - at .*operation`"),
        (["conditions", 1, "operations", 0, "layers"], [-1], "int` >= 0 - at"),
        (["model", "weights_sha256"], "00", "regex .* at `$.model.weights_sha256`"),
        (["conditions", 1, "name"], "baseline", "two conditions have one name"),
    ],
)
def test_a_damaged_record_is_one_line_that_names_the_field(folder, path, value, message):
    whole = json.loads((folder / record.FILE).read_text())
    place = whole
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    (folder / record.FILE).write_text(json.dumps(whole))
    with pytest.raises(UserError, match=message.replace("$.", r"\$\.")) as caught:
        record.read(folder)
    assert "run.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (Add(direction="p", layers=(3,), scale=-0.5), "add p at resid_post.3 x-0.5"),
        (
            Add(direction="p", layers=(3,), scale=4.0, norm_of="r"),
            "add p at resid_post.3 x4 (norm of r)",
        ),
        (
            Add(direction="p", layers=(3, 4), scale=4.0, measured_at=2, norm_of="r", norm_at=1),
            "add p at resid_post.3..4 x4 (measured at resid_post.2) (norm of r at resid_post.1)",
        ),
        (Project(direction="p", layers=(1, 3, 4)), "project p at resid_post.1, resid_post.3..4"),
        (Project(direction="p", layers=(0, 1), everywhere=True), "project p everywhere"),
    ],
)
def test_operations_have_words(operation, words):
    assert record.describe(operation) == words
