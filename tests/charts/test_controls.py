from __future__ import annotations

import polars as pl
import pytest

from jaxsteer.analysis import controls, flips
from jaxsteer.charts import controls as charts
from tests.receipt import made


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    return made.loaded(tmp_path_factory.mktemp("charts") / "made")


def test_the_title_is_what_the_controls_say(found):
    findings = controls.findings(found)
    drawn = charts.findings_chart(findings).to_dict()
    assert " ".join(drawn["title"]["text"]) == controls.headline(findings)


def test_each_seed_has_a_point_with_an_interval_and_n(found):
    table = charts.envelope_table(found.rows, controls.findings(found))
    seeds = table.filter((pl.col("row") == "persona") & (pl.col("kind") == "random"))
    assert seeds["name"].to_list() == [f"random direction #{i}" for i in (1, 2, 3)]
    inside = table.filter(pl.col("rate").is_between("low", "high"))
    assert inside.height == table.height and (table["n"] == 40).all()
    words = " ".join(charts.envelope_chart(table).to_dict()["title"]["text"])
    assert words.endswith(": 2 of 2 treated conditions")


def test_flipped_prompts_stand_first(found):
    paired = flips.pairs(found.rows, "persona", "baseline", "strongreject")
    table = charts.flip_table(paired, "refusal")
    assert table["flip"].to_list()[:18] == ["lost"] * 17 + ["kept"] and table.height == 40


def test_many_pairs_are_reduced_to_those_that_flip(found):
    paired = flips.pairs(found.rows, "persona", "baseline", "strongreject")
    copies = pl.DataFrame({"copy": range(25_000)})
    many = paired.join(copies, how="cross").with_columns(
        prompt_id=pl.format("{}-{}", "prompt_id", "copy")
    )
    assert many.height == 1_000_000
    table = charts.flip_table(many, "refusal")
    assert table.height == charts.MOST_PAIRS and set(table["flip"]) == {"lost"}
    drawn = charts.flip_chart(many, "refusal", "persona", "baseline").to_dict()
    assert f"{charts.MOST_PAIRS} of the 425,000 that flip" in " ".join(drawn["title"]["subtitle"])


def test_cells_of_a_table_are_text_whatever_they_hold():
    table = charts.markdown_table(["a"], [["<img src=x> | **b**\n| c"]])
    assert table.count("\n") == 2 and "<img" not in table and "**" not in table
    assert table.splitlines()[2].count("|") == 2


def test_a_tiny_p_is_bounded_and_a_larger_one_given(found):
    for condition, words in (("persona", "p < 0.0001"), ("persona, out late", "p = 0.5 ")):
        paired = flips.pairs(found.rows, condition, "baseline", "strongreject")
        counted = flips.flips(paired, "refusal")
        assert words in charts.mcnemar_table(counted, "refusal", condition, "baseline")
