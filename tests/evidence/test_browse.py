from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from jaxsteer.directions import direction
from jaxsteer.errors import UserError
from jaxsteer.evidence import browse
from jaxsteer.evidence.browse import open_results
from jaxsteer.judges.verdicts import SCHEMA
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


def test_all_prompts_but_benign_ones_are_veiled():
    assert browse.may_harm("harmful") and browse.may_harm("other")
    assert not browse.may_harm("benign")


def test_a_finished_study_opens_with_what_is_not_known_said(tmp_path: Path):
    opened = open_results(made.folder(tmp_path / "made"))
    assert opened.rows.height == made.rows(made.study()).height
    (words,) = browse.banner(opened)
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
    assert opened.rows.height == 110
    # In the study's order, whatever order the shards lie in.
    assert opened.rows["condition"][0] == "baseline"
    assert f"Partial results: 110 of {rows.height:,} rows" in next(browse.banner(opened))


def test_a_run_without_a_row_yet_is_said_to_be_empty(tmp_path: Path):
    folder = made.folder(tmp_path / "made")
    (folder / "responses.parquet").unlink()
    with pytest.raises(UserError, match="holds no rows yet"):
        open_results(folder)


def test_a_complete_table_without_rows_is_said_to_be_empty(tmp_path: Path):
    folder = made.folder(tmp_path / "made", frame=made.rows(made.study()).clear())
    with pytest.raises(UserError, match="holds no rows yet"):
        open_results(folder)


def facts(header: browse.Header) -> dict[str, str]:
    return {what: f"{value} | {chosen}" for what, value, chosen in header.facts}


def written(folder: Path, change) -> Path:
    """The folder with its run record changed."""
    path = folder / "run.json"
    run = json.loads(path.read_text())
    change(run)
    path.write_text(json.dumps(run))
    return folder


def test_a_header_says_what_was_run_and_what_was_given(tmp_path: Path):
    found = facts(browse.header(made.folder(tmp_path / "made")))
    assert found["prompts"].startswith("40 harmful strongreject, 20 benign")
    assert found["persona"] == "added at resid_post.3, x4 | given in the study"
    assert found["random seeds"] == "1..3 | given in the study"


def test_a_header_says_which_choice_was_made_by_rule_and_on_which_prompts(tmp_path: Path):
    def opened(run) -> None:
        run["study"]["layers"] = {"refusal": 2}

    found = facts(browse.header(written(made.folder(tmp_path / "made"), opened)))
    rule = "layer by rule: least refusal of 1 without breaking the model, on 32 harmbench prompts"
    assert rule in found["persona"]


def test_a_header_warns_of_every_reason_to_doubt(tmp_path: Path):
    def doubtful(run) -> None:
        run["candidates"]["refusal_near_miss"] = ["KL 0.31 > 0.1"]
        run["candidates"]["policies"][0] |= {"harmful": 0.97, "harmless": 0.95, "youden": 0.02}

    folder = written(made.folder(tmp_path / "made", label=lambda *_: "refusal"), doubtful)
    known = made.made_directions()
    known[0].provenance["split_half"]["mean"][3] = 0.38
    direction.save(folder / "directions.safetensors", known)
    frame = pl.read_parquet(folder / "responses.parquet")
    (folder / "judges").mkdir()
    rubric = made.guard(frame).with_columns(verdict=pl.lit("answered"), score=pl.lit(0.9))
    rubric.cast(SCHEMA).write_parquet(folder / "judges/strongreject-rubric.parquet")
    warnings = " ".join(browse.header(folder).warnings)
    for words in (
        "KL 0.31 > 0.1",
        "nearly everything gets one label",
        "persona is poorly known",
        "+0.38 at layer 3",
        "Claims not testable",
        "keyword alone calls",
    ):
        assert words in warnings


def test_a_header_without_a_run_record_or_a_folder_says_so(tmp_path: Path):
    (words,) = browse.header(tmp_path).warnings
    assert "holds no run record" in words
    with pytest.raises(UserError, match="There is no folder"):
        browse.header(tmp_path / "typo")


def test_the_menu_has_finished_studies_only(tmp_path: Path):
    made.folder(tmp_path / "results/b")
    made.folder(tmp_path / "results/a")
    (made.folder(tmp_path / "results/c") / "responses.parquet").unlink()
    (tmp_path / "results/screenshots").mkdir()
    assert browse.finished(tmp_path) == ["results/a", "results/b"]
