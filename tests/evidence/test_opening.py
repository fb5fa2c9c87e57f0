from __future__ import annotations

from pathlib import Path

import pytest

from jaxsteer.errors import UserError
from jaxsteer.evidence.opening import open_results
from jaxsteer.study import store
from tests.receipt import made


def test_a_finished_study_opens_with_what_is_not_known_said(tmp_path: Path):
    opened = open_results(made.folder(tmp_path / "made"))
    assert opened.found.rows.height == made.rows(made.study()).height
    (words,) = opened.banner
    assert words.startswith("No judge of harm has scored")


def test_nothing_there_says_what_to_run(tmp_path: Path):
    with pytest.raises(UserError, match="make demo"):
        open_results(tmp_path)


def test_an_interrupted_run_opens_with_a_banner(tmp_path: Path):
    folder = made.folder(tmp_path / "made")
    (folder / "responses.parquet").unlink()
    key = made.run_record(made.study())["key"]
    rows = made.rows(made.study())
    for part in (rows[300:350], rows[:60]):
        store.write(folder / "shards", key, part)
    opened = open_results(folder)
    assert opened.found.rows.height == 110
    # In the study's order, whatever order the shards lie in.
    assert opened.found.rows["condition"][0] == "baseline"
    assert f"Partial results: 110 of {rows.height:,} rows" in opened.banner[0]


def test_a_run_without_a_row_yet_is_said_to_be_empty(tmp_path: Path):
    folder = made.folder(tmp_path / "made")
    (folder / "responses.parquet").unlink()
    with pytest.raises(UserError, match="holds no rows yet"):
        open_results(folder)


def test_a_complete_table_without_rows_is_said_to_be_empty(tmp_path: Path):
    folder = made.folder(tmp_path / "made", frame=made.rows(made.study()).clear())
    with pytest.raises(UserError, match="holds no rows yet"):
        open_results(folder)
