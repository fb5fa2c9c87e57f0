from __future__ import annotations

import html
import json
import re
from pathlib import Path

import marimo as mo
import polars as pl
import pytest

from jaxsteer.directions import direction
from jaxsteer.errors import UserError
from jaxsteer.evidence.charts import opening
from jaxsteer.judges.verdicts import SCHEMA
from jaxsteer.study import results
from tests.receipt import made

ROWS = made.rows(made.study())


class Address(dict[str, str]):
    """The part of marimo's query parameters that controls use."""

    def set(self, key: str, value: str) -> None:
        self[key] = value


@pytest.fixture
def address(monkeypatch):
    made = Address()
    monkeypatch.setattr(mo, "query_params", lambda: made)
    return made


def test_a_control_begins_with_the_value_of_the_address(address):
    address["strength"] = "-2.5"
    assert opening.kept("strength", 4.0, [-2.5, 4.0])["value"] == -2.5


@pytest.mark.parametrize("asked", ["7", "", "<script>", "nan", "None"])
def test_a_value_that_is_not_possible_is_the_first_one(address, asked):
    address["layer"] = asked
    assert opening.kept("layer", 3, range(6))["value"] == 3


def test_what_is_chosen_is_written_as_it_is_read_again(address):
    steps = [-0.5, 0.0, 4.0]
    opening.kept("strength", 0.0, steps)["on_change"](4)
    assert address == {"strength": "4"}
    assert opening.kept("strength", 0.0, steps)["value"] == 4.0


def test_a_menu_begins_with_the_choice_that_the_address_names(address):
    modes = {"no mode": "", "kind": "kind"}
    chosen = []
    for asked in ("kind", "no mode", "unknown"):
        address["mode"] = asked
        chosen.append(opening.menu("mode", modes, label="mode").value)
    assert chosen == ["kind", "", ""]


def test_a_sentence_with_markup_is_shown_as_text():
    (inside,) = re.findall("data-html='(.*?)'", opening.note("<b>bold</b>", "two").text)
    shown = json.loads(html.unescape(inside))
    assert "<b>" not in shown and "&lt;b&gt;bold" in shown and shown.count("<li>") == 2


def test_pages_hold_every_row_that_fits_once():
    seen = []
    first = opening.page(ROWS, condition="persona", family="strongreject", size=7)
    for number in range(1, first.pages + 1):
        one = opening.page(ROWS, condition="persona", family="strongreject", number=number, size=7)
        seen += one.rows["row_id"].to_list()
    assert len(seen) == len(set(seen)) == first.total == 40
    assert all(row.startswith("persona/") for row in seen)


def test_a_page_beyond_the_last_is_the_last_and_nothing_is_one_empty_page():
    beyond = opening.page(ROWS, label="refusal", number=10**9)
    assert beyond.number == beyond.pages and beyond.rows.height > 0
    none = opening.page(ROWS, condition="no such")
    assert (none.number, none.pages, none.total, none.rows.height) == (1, 1, 0, 0)


def test_all_prompts_but_benign_ones_are_veiled():
    assert opening.may_harm("harmful") and opening.may_harm("other")
    assert not opening.may_harm("benign")


def test_a_finished_study_opens_with_what_is_not_known_said(tmp_path: Path):
    opened = opening.open_results(made.folder(tmp_path / "made"))
    assert opened.rows.height == made.rows(made.study()).height
    (words,) = opening.banner(opened)
    assert words.startswith("No judge of harm has scored")


def test_nothing_there_says_what_to_run(tmp_path: Path):
    with pytest.raises(UserError, match="make demo"):
        opening.open_results(tmp_path)


def test_an_interrupted_run_opens_with_a_banner(tmp_path: Path):
    folder = made.folder(tmp_path / "made")
    (folder / "responses.parquet").unlink()
    key = made.run_record(made.study())["key"]
    rows = made.rows(made.study())
    for part in (rows[300:350], rows[:60]):
        results.write_shard(folder / "shards", key, part)
    opened = opening.open_results(folder)
    assert opened.rows.height == 110
    # In the study's order, whatever order the shards lie in.
    assert opened.rows["condition"][0] == "baseline"
    assert f"Partial results: 110 of {rows.height:,} rows" in next(opening.banner(opened))


def test_a_run_without_a_row_yet_is_said_to_be_empty(tmp_path: Path):
    folder = made.folder(tmp_path / "made")
    (folder / "responses.parquet").unlink()
    with pytest.raises(UserError, match="holds no rows yet"):
        opening.open_results(folder)


def test_a_complete_table_without_rows_is_said_to_be_empty(tmp_path: Path):
    folder = made.folder(tmp_path / "made", frame=made.rows(made.study()).clear())
    with pytest.raises(UserError, match="holds no rows yet"):
        opening.open_results(folder)


def facts(header: opening.Header) -> dict[str, str]:
    return {what: f"{value} | {chosen}" for what, value, chosen in header.facts}


def written(folder: Path, change) -> Path:
    """The folder with its run record changed."""
    path = folder / "run.json"
    run = json.loads(path.read_text())
    change(run)
    path.write_text(json.dumps(run))
    return folder


def test_a_header_says_what_was_run_and_what_was_given(tmp_path: Path):
    found = facts(opening.header(made.folder(tmp_path / "made")))
    assert found["prompts"].startswith("40 harmful strongreject, 20 benign")
    assert found["persona"] == "added at resid_post.3, x4 | given in the study"
    assert found["random seeds"] == "1..3 | given in the study"


def test_a_header_says_which_choice_was_made_by_rule_and_on_which_prompts(tmp_path: Path):
    def opened(run) -> None:
        run["study"]["layers"] = {"refusal": 2}

    found = facts(opening.header(written(made.folder(tmp_path / "made"), opened)))
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
    warnings = " ".join(opening.header(folder).warnings)
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
    (words,) = opening.header(tmp_path).warnings
    assert "holds no run record" in words
    with pytest.raises(UserError, match="There is no folder"):
        opening.header(tmp_path / "typo")


def test_the_menu_has_finished_studies_only(tmp_path: Path):
    made.folder(tmp_path / "results/b")
    made.folder(tmp_path / "results/a")
    (made.folder(tmp_path / "results/c") / "responses.parquet").unlink()
    (tmp_path / "results/screenshots").mkdir()
    assert opening.finished(tmp_path) == ["results/a", "results/b"]
