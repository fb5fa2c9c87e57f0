from __future__ import annotations

from pathlib import Path

import pytest

from jaxsteer.data import prompts
from jaxsteer.errors import UserError
from jaxsteer.evidence import browse
from jaxsteer.evidence.browse import open_results
from jaxsteer.study import results
from tests.receipt import made

ROWS = made.rows(made.study())


def test_pages_hold_every_row_that_fits_once():
    seen = []
    first = browse.page(ROWS, condition="persona", family="strongreject", size=7)
    for number in range(1, first.pages + 1):
        one = browse.page(ROWS, condition="persona", family="strongreject", number=number, size=7)
        seen += one.rows["row_id"].to_list()
    assert len(seen) == len(set(seen)) == first.total == 40
    assert all(row.startswith("persona/") for row in seen)


def test_a_page_beyond_the_last_is_the_last_and_nothing_is_one_empty_page():
    beyond = browse.page(ROWS, label="refusal", number=10**9)
    assert beyond.number == beyond.pages and beyond.rows.height > 0
    none = browse.page(ROWS, condition="no such")
    assert (none.number, none.pages, none.total, none.rows.height) == (1, 1, 0, 0)


def test_harmful_families_are_veiled_and_ours_are_not():
    veiled = {name: browse.may_harm(name) for name in ("strongreject", "harmbench", "unknown")}
    assert all(veiled.values())
    assert not browse.may_harm("benign") and not browse.may_harm("harmless")


def test_a_missing_data_set_is_said_and_the_others_are_there(monkeypatch):
    def missing(path: object = None) -> list[prompts.Prompt]:
        raise UserError("no such wheel")

    monkeypatch.setattr(prompts, "strongreject", missing)
    texts, problem = browse.known_texts()
    assert "no such wheel" in problem
    assert texts[prompts.benign()[0].id] == prompts.benign()[0].text


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
        results.write_shard(folder / "shards", key, part)
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
