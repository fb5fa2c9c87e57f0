from __future__ import annotations

import polars as pl
import pytest

from jaxsteer import shards
from jaxsteer.errors import UserError

KEY = "a" * 64
ROWS = pl.DataFrame({"row_id": ["x/1", "x/2"], "response": ["one", "two"], "n_tokens": [1, 2]})


def test_what_is_written_is_read_and_writing_it_twice_is_one_shard(tmp_path):
    shards.write(tmp_path, KEY, ROWS)
    shards.write(tmp_path, KEY, ROWS)
    (found,) = shards.read(tmp_path, KEY)
    assert found.equals(ROWS)


def test_another_runs_shards_are_not_read(tmp_path):
    shards.write(tmp_path, "b" * 64, ROWS)
    assert shards.read(tmp_path, KEY) == []


def test_every_one_of_500_damaged_shards_is_named(tmp_path, rng):
    shards.write(tmp_path, KEY, ROWS)
    (path,) = tmp_path.glob("*.parquet")
    good = path.read_bytes()
    for _ in range(500):
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
            shards.read(tmp_path, KEY)


def test_a_killed_writers_leftovers_are_swept_when_the_folder_is_taken(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in (".setup.json.abc", "shards/.x.parquet.def"):
        (tmp_path / name).write_text("half")
    with shards.locked(tmp_path):
        assert [p.name for p in tmp_path.rglob(".*")] == [".lock"]


def test_the_folder_is_free_again_after_use(tmp_path):
    with shards.locked(tmp_path), pytest.raises(UserError, match="in use"), shards.locked(tmp_path):
        pass
    with shards.locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write .*file/results"),
        shards.locked(tmp_path / "file/results"),
    ):
        pass
