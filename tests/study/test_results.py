from __future__ import annotations

import json

import polars as pl
import pytest

from jaxsteer.errors import UserError
from jaxsteer.study import results
from jaxsteer.study.results import Add, Project
from tests.receipt import made

KEY = "a" * 64
ROWS = pl.DataFrame({"row_id": ["x/1", "x/2"], "response": ["one", "two"], "n_tokens": [1, 2]})


@pytest.fixture
def folder(tmp_path):
    return made.folder(tmp_path / "made")


def test_a_record_is_read_as_it_was_written(folder):
    found = results.read_run(folder)
    results.write_run(folder, found)
    assert results.read_run(folder) == found


def test_no_record_is_none(tmp_path):
    assert results.read_run(tmp_path) is None


def test_a_field_that_a_later_version_adds_is_ignored(folder):
    value = json.loads((folder / results.RUN).read_text())
    (folder / results.RUN).write_text(json.dumps({**value, "later": 1}))
    assert results.read_run(folder).study.name == "made"


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
    whole = json.loads((folder / results.RUN).read_text())
    place = whole
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    (folder / results.RUN).write_text(json.dumps(whole))
    with pytest.raises(UserError, match=message.replace("$.", r"\$\.")) as caught:
        results.read_run(folder)
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
    assert results.describe(operation) == words


def test_what_is_written_is_read_and_writing_it_twice_is_one_shard(tmp_path):
    results.write_shard(tmp_path, KEY, ROWS)
    results.write_shard(tmp_path, KEY, ROWS)
    (found,) = results.read_shards(tmp_path, KEY)
    assert found.equals(ROWS)


def test_another_runs_shards_are_not_read(tmp_path):
    results.write_shard(tmp_path, "b" * 64, ROWS)
    assert results.read_shards(tmp_path, KEY) == []


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_every_damaged_shard_is_named(tmp_path, rng, count):
    results.write_shard(tmp_path, KEY, ROWS)
    (path,) = tmp_path.glob("*.parquet")
    good = path.read_bytes()
    for _ in range(count):
        data = bytearray(good)
        kind = int(rng.integers(3))
        if kind == 0:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[int(rng.integers(len(data))) :]
        else:
            data += bytes(rng.integers(0, 256, int(rng.integers(1, 20)), dtype="uint8"))
        path.write_bytes(bytes(data))
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            results.read_shards(tmp_path, KEY)


def test_the_table_needs_every_row_and_has_the_order_asked_for(tmp_path):
    names = ["x/2", "x/1", "x/3"]
    assert results.gathered(tmp_path, KEY, names) is None
    results.write_shard(tmp_path, KEY, ROWS)
    assert results.gathered(tmp_path, KEY, names) is None
    third = pl.DataFrame({"row_id": ["x/3"], "response": ["three"], "n_tokens": [3]})
    results.write_shard(tmp_path, KEY, third)
    assert results.gathered(tmp_path, KEY, names)["n_tokens"].to_list() == [2, 1, 3]


def test_a_row_that_two_processes_ran_is_in_the_table_once(tmp_path):
    results.write_shard(tmp_path, KEY, ROWS)
    results.write_shard(tmp_path, KEY, ROWS[1:])
    assert results.gathered(tmp_path, KEY, ["x/1", "x/2"]).equals(ROWS)
