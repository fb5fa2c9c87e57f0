from __future__ import annotations

import os

import polars as pl
import pytest

from jaxsteer import tables
from jaxsteer.errors import UserError
from jaxsteer.judges import verdicts
from jaxsteer.study import results, store
from tests.receipt import made


@pytest.fixture
def path(tmp_path):
    pl.DataFrame({"a": [1, 2], "b": ["x", "y"]}).write_parquet(tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


def test_a_damaged_file_is_one_line_with_what_to_do(path):
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"t\.parquet is damaged \(.+\); run it again$"):
        tables.read(path, "run it again")


def test_a_folder_whose_name_reads_as_a_pattern_is_not_its_neighbour(tmp_path):
    rows = pl.DataFrame({"a": [1]})
    # Any bytes are a name on Linux: the last is not UTF-8.
    for name in ("run[1]", "run1", "run*", os.fsdecode(b"run\xff")):
        (tmp_path / name).mkdir()
        tables.write(tmp_path / name / "t.parquet", rows.with_columns(b=pl.lit(ascii(name))))
        store.write(tmp_path / name, "k" * 64, rows)
    for name in ("run[1]", "run*", os.fsdecode(b"run\xff")):
        assert tables.read(tmp_path / name / "t.parquet", "")["b"].to_list() == [ascii(name)]
        assert len(store.read(tmp_path / name, "k" * 64)) == 1


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
