from __future__ import annotations

import polars as pl
import pytest

from jaxsteer.evidence import layer_windows
from jaxsteer.evidence.charts import windows as charts
from jaxsteer.study import results
from tests.evidence import windows_made


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results.load(windows_made.folder(tmp_path_factory.mktemp("charts") / "made"))


@pytest.fixture(scope="module")
def maps(found):
    return layer_windows.table(found, layer_windows.cells(found, "persona"))


def title(chart) -> str:
    return chart.to_dict()["description"]


def test_the_title_names_the_best_place_that_is_evidence_and_steering_alone(maps):
    words = title(charts.map_chart(maps, "knockout"))
    assert words.startswith("Removed at 4..5, refusal is 50 % (31 to 69 %)")
    assert "steering alone 8 %" in words


def test_where_no_place_beats_steering_the_title_says_so(maps):
    flat = maps.with_columns(rate=pl.lit(0.25))
    assert title(charts.map_chart(flat, "refusal")).startswith("Nowhere does refusal exceed")


def test_cancelled_cells_are_hatched_and_broken_ones_cornered(maps):
    spec = charts.map_chart(maps, "knockout").to_dict()

    def columns(kind: str) -> list[set[str]]:
        drawn = [layer for layer in spec["layer"] if layer["mark"]["type"] == kind]
        return [{row["column"] for row in spec["datasets"][x["data"]["name"]]} for x in drawn]

    assert columns("rule") == [{"3"}] * charts.STRIPS and columns("point") == [{"4..5"}]
    said = spec["description"]
    assert "cancels by algebra" in said and "broken replies" in said


def test_a_map_without_cancellation_says_nothing_of_hatching(maps):
    spec = charts.map_chart(maps, "refusal").to_dict()
    assert "hatched" not in spec["description"]


def test_every_cell_shows_its_interval_and_can_be_brushed(maps):
    spec = charts.map_chart(maps, "knockout").to_dict()
    assert any(x.get("encoding", {}).get("text", {}).get("field") == "ends" for x in spec["layer"])
    (brush,) = spec["params"]
    assert (brush["name"], brush["select"]["type"]) == ("cells", "interval")


@pytest.fixture(scope="module")
def over(found, maps):
    return layer_windows.over_unsteered(found, maps)


def test_the_third_map_says_where_steering_matters_least(over):
    words = title(charts.difference_chart(over))
    assert words.startswith("Added x4, the direction moves refusal by −50 points")
    assert "removed at 4..5, by −8 (" in words and "places" not in words


def test_the_third_map_of_cells_that_all_cancel_claims_nothing(over):
    cancelled = over.with_columns(cancels=pl.lit(True))
    assert "shows nothing" in title(charts.difference_chart(cancelled))
    assert "hatched" in " ".join(charts.difference_chart(cancelled).to_dict()["title"]["subtitle"])


def test_the_colours_of_the_third_map_are_centred_at_nothing(over):
    spec = charts.difference_chart(over).to_dict()
    domain = spec["layer"][0]["encoding"]["color"]["scale"]["domain"]
    assert domain[0] == -domain[-1] and domain[1] == -domain[2]


def test_the_chosen_window_is_framed_and_explained_only_where_it_is(maps):
    spec = charts.map_chart(maps, "knockout").to_dict()
    assert "bold frame" not in " ".join(spec["title"]["subtitle"])
    framed = charts.map_chart(maps.with_columns(chosen=pl.col("column") == "4..5"), "knockout")
    spec = framed.to_dict()
    assert "bold frame" in " ".join(spec["title"]["subtitle"])
    frames = [x for x in spec["layer"] if x["mark"].get("strokeWidth") == 2.5]
    rows = spec["datasets"][frames[0]["data"]["name"]]
    assert {row["column"] for row in rows} == {"4..5"}


def test_flips_go_both_ways_with_an_interval_and_their_counts(found, maps):
    table = layer_windows.flip_table(found, layer_windows.strongest(maps, "knockout"))
    spec = charts.flips_chart(table).to_dict()
    kinds = [layer["mark"]["type"] for layer in spec["layer"]]
    assert kinds == ["bar", "bar", "rule", "point", "text"]
    (data,) = spec["datasets"].values()
    words = {row["column"]: row["words"] for row in data}
    assert words["4..5"] == "+10 −0 of 24" and words["3"] == "+11 −0 of 24, by algebra"
    assert title(charts.flips_chart(table)).startswith(
        "Unlike their control beyond chance: 1 of 3 chosen cells"
    )


def test_cancelled_cells_alone_are_no_evidence(found, maps):
    table = layer_windows.flip_table(found, maps.filter("cancels"))
    assert "no evidence" in charts.flips_finding(table)
    assert set(layer_windows.flips_to_read(table)["note"]) == {"true by algebra, no evidence"}


def test_projections_have_a_band_behind_every_line(found):
    table = layer_windows.along_depth(found, ["persona x4"], "baseline", "persona", "response")
    spec = charts.depth_chart(table, "persona", "response").to_dict()
    assert [layer["mark"]["type"] for layer in spec["layer"]] == ["rule", "area", "line"]
    words = title(charts.depth_chart(table, "persona", "response"))
    assert "at layer 3: +2.00 natural norms, after adding persona at 3." in words
