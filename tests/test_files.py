from __future__ import annotations

import errno
import fcntl
import json
import os
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pytest

from jaxsteer import files
from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path, locked, one_at_a_time, write_json
from jaxsteer.judges import verdicts
from jaxsteer.study import results
from tests.receipt import made


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "kept.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    path = tmp_path / "big.bin"
    with pytest.raises(UserError, match=r"big\.bin.*No space left"), atomic_path(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_killed_writers_leftovers_are_removed_when_the_folder_is_taken(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in (".setup.json.abc", "shards/.x.parquet.def"):
        (tmp_path / name).write_text("half")
    with locked(tmp_path):
        assert [p.name for p in tmp_path.rglob(".*")] == [".lock"]


def test_a_folder_is_free_again_after_use(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="in use"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_taking_a_folder_leaves_the_locks_of_its_files(tmp_path):
    with one_at_a_time(tmp_path / "d.safetensors"), locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".d.safetensors.lock", ".lock"}


def test_a_file_is_changed_by_one_at_a_time(tmp_path):
    path = tmp_path / "count.json"
    write_json(path, 0)

    def more(_):
        with one_at_a_time(path):
            write_json(path, json.loads(path.read_text()) + 1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(more, range(40)))
    assert json.loads(path.read_text()) == 40


def test_a_file_system_without_locks_is_not_reported_as_in_use(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.raises(UserError, match="No locks available; choose another --out"),
        locked(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write .*file/results"),
        locked(tmp_path / "file/results"),
    ):
        pass


@pytest.fixture
def path(tmp_path):
    pl.DataFrame({"a": [1, 2], "b": ["x", "y"]}).write_parquet(tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


def test_a_damaged_file_is_one_line_with_what_to_do(path):
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"t\.parquet is damaged \(.+\); run it again$"):
        files.read_table(path, "run it again")


def test_a_folder_whose_name_reads_as_a_pattern_is_not_its_neighbour(tmp_path):
    rows = pl.DataFrame({"a": [1]})
    # Any bytes are a name on Linux: the last is not UTF-8.
    for name in ("run[1]", "run1", "run*", os.fsdecode(b"run\xff")):
        (tmp_path / name).mkdir()
        files.write_table(tmp_path / name / "t.parquet", rows.with_columns(b=pl.lit(ascii(name))))
        results.write_shard(tmp_path / name, "k" * 64, rows)
    for name in ("run[1]", "run*", os.fsdecode(b"run\xff")):
        assert files.read_table(tmp_path / name / "t.parquet", "")["b"].to_list() == [ascii(name)]
        assert len(results.read_shards(tmp_path / name, "k" * 64)) == 1


READERS = {
    "a study's results": results.load,
    "a judge's verdicts": verdicts.read_all,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_on_which_the_parquet_reader_panics_is_one_line(reader, tmp_path, monkeypatch):
    def panics(*of, **options):
        raise pl.exceptions.PanicException("called `Option::unwrap()` on a `None` value\nand more")

    folder = made.folder(tmp_path)
    (folder / "judges").mkdir()
    pl.DataFrame(schema=verdicts.SCHEMA).write_parquet(folder / "judges/keyword.parquet")
    monkeypatch.setattr(pl, "read_parquet", panics)
    with pytest.raises(UserError, match=r"is damaged \(called `.+` on a `None` value\); "):
        READERS[reader](folder)
