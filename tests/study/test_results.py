from __future__ import annotations

import polars as pl
import pytest

from jaxsteer.errors import UserError
from jaxsteer.study import results

KEY = "a" * 64
ROWS = pl.DataFrame({"row_id": ["x/1", "x/2"], "response": ["one", "two"], "n_tokens": [1, 2]})


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
