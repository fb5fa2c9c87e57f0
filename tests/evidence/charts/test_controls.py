from __future__ import annotations

import polars as pl
import pytest

from jaxsteer.evidence import findings
from jaxsteer.evidence import outcomes as flips
from jaxsteer.evidence.charts import controls as charts
from jaxsteer.evidence.charts import marks
from jaxsteer.study import results
from tests.receipt import made


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    return made.loaded(tmp_path_factory.mktemp("charts") / "made")


def test_the_title_is_what_the_controls_say(found):
    every = findings.evaluate(found)
    drawn = charts.findings_chart(every).to_dict()
    assert drawn["description"].startswith(findings.headline(every) + ". ")


def test_each_seed_has_a_point_with_an_interval_and_n(found):
    table = findings.envelope_table(found, findings.evaluate(found))
    seeds = table.filter((pl.col("row") == "persona") & (pl.col("kind") == "random"))
    assert seeds["name"].to_list() == [f"random direction #{i}" for i in (1, 2, 3)]
    inside = table.filter(pl.col("rate").is_between("low", "high"))
    assert inside.height == table.height and (table["n"] == 40).all()
    assert ": 2 of 2 treated conditions. " in charts.envelope_chart(table).to_dict()["description"]


@pytest.fixture(scope="module")
def suppressing_and_bypassing(tmp_path_factory: pytest.TempPathFactory):
    """A study that asks of the persona both fewer refusals and more bypasses."""
    folder = made.folder(tmp_path_factory.mktemp("charts") / "two outcomes")
    (folder / "judges").mkdir()
    rows = pl.read_parquet(folder / "responses.parquet")
    unsafe = made.guard(rows, lambda row: row.startswith("persona/sr"))
    unsafe.write_parquet(folder / "judges/llama-guard.parquet")
    return results.load(folder)


def test_each_outcome_has_its_own_row_beside_its_random_directions(suppressing_and_bypassing):
    found = suppressing_and_bypassing
    made_of = [f for f in findings.evaluate(found) if f.treated == "persona"]
    table = findings.envelope_table(found, made_of)
    treated = table.filter(pl.col("kind") == "treated")
    rates = dict(treated.select("row", "rate").iter_rows())
    assert rates == {"persona · refusal": 1 / 40, "persona · bypass": 39 / 40}
    drawn = charts.envelope_chart(table).to_dict()
    assert ": 2 of 2 rates. " in drawn["description"]
    assert axis_titles(drawn) == {"refusal or bypass rate"}


def test_the_axis_names_the_one_outcome_that_is_drawn(suppressing_and_bypassing):
    found = suppressing_and_bypassing
    for outcome in ("refusal", "bypass"):
        made_of = [f for f in findings.evaluate(found) if f.outcome == outcome]
        table = findings.envelope_table(found, made_of)
        assert "persona" in table["row"].to_list()
        assert axis_titles(charts.envelope_chart(table).to_dict()) == {f"{outcome} rate"}


def axis_titles(drawn: dict) -> set[str]:
    """Titles of the horizontal axis in every layer of a chart."""
    found = {drawn["encoding"]["x"]["title"]} if "encoding" in drawn else set()
    return found.union(*map(axis_titles, drawn.get("layer", [])))


def test_many_pairs_are_reduced_to_those_that_flip(found):
    paired = flips.Labels(found.rows, found.verdicts).pair("persona", "baseline", "strongreject")
    copies = pl.DataFrame({"copy": range(25_000)})
    many = paired.join(copies, how="cross").with_columns(
        prompt_id=pl.format("{}-{}", "prompt_id", "copy")
    )
    assert many.height == 1_000_000
    table = flips.flip_table(many, "refusal", charts.MOST_PAIRS)
    assert table.height == charts.MOST_PAIRS and set(table["flip"]) == {"lost"}
    drawn = charts.flip_chart(many, "refusal", "persona", "baseline").to_dict()
    assert f"{charts.MOST_PAIRS} of the 425,000 that flip" in drawn["description"]


def test_cells_of_a_table_are_text_whatever_they_hold():
    table = marks.markdown_table(["a"], [["<img src=x> | **b**\n| c"]])
    assert table.count("\n") == 2 and "<img" not in table and "**" not in table
    assert table.splitlines()[2].count("|") == 2


def test_a_tiny_p_is_bounded_and_a_larger_one_given(found):
    for condition, words in (("persona", "p < 0.0001"), ("persona, out late", "p = 0.5 ")):
        paired = flips.Labels(found.rows, found.verdicts).pair(
            condition, "baseline", "strongreject"
        )
        counted = flips.flips(paired, "refusal")
        assert words in charts.mcnemar_table(counted, "refusal", condition, "baseline")
