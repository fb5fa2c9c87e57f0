from __future__ import annotations

import itertools
import json

import polars as pl
import pytest

from jaxsteer.evidence import cosines
from jaxsteer.evidence.charts import geometry as charts
from tests.evidence import directions_made

WHOLE = (0, directions_made.LAYERS - 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return cosines.load(directions_made.folder(tmp_path_factory.mktemp("charts") / "made"))


@pytest.fixture(scope="module")
def table(found):
    return cosines.pairs(found)


def one(table, name="persona · refusal"):
    return table.filter(pl.col("pair") == name)


def test_the_title_counts_the_layers_beyond_chance(table):
    words = charts.pair_finding(one(table))
    inside = one(table)["cosine"].is_between(one(table)["low"], one(table)["high"])
    assert f"beyond chance at {(~inside).sum()} of {directions_made.LAYERS} layers" in words


def test_where_chance_was_not_measured_the_title_says_so(table):
    bare = one(table).with_columns(low=pl.lit(None, pl.Float64), high=pl.lit(None, pl.Float64))
    assert charts.pair_finding(bare).endswith("chance not measured")


def test_the_pair_chart_has_its_null_band_its_controls_the_paper_and_a_brush(found, table):
    random = cosines.random_cosines(found, "persona")
    spec = charts.pair_chart(one(table), random, cosines.paper(found.n_layers)).to_dict()
    kinds = [layer["mark"]["type"] for layer in spec["layer"]]
    assert kinds.count("area") == 2 and {"line", "point", "text"} <= set(kinds)
    assert [p["name"] for p in spec["params"]] == ["layers"]
    assert "−0.180" in json.dumps(spec, ensure_ascii=False)


def test_the_matrix_rings_what_chance_allows(table):
    averaged = cosines.means(table, WHOLE)
    cells = cosines.matrix_table(averaged, list(directions_made.MEANS))
    spec = charts.matrix_chart(cells, list(directions_made.MEANS), WHOLE).to_dict()
    ring = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "point")
    ringed = spec["datasets"][ring["data"]["name"]]
    assert len(ringed) == cells.filter(pl.col("chance") == "within chance").height > 0
    title = spec["description"]
    assert "evil · nurturing" in title or "nurturing · evil" in title


def test_extremes_draw_range_and_null_behind_every_mean(table):
    averaged = cosines.means(table, WHOLE)
    shown = cosines.extremes(averaged, {frozenset({"evil", "nurturing"})})
    spec = charts.extremes_chart(shown, averaged.height, WHOLE).to_dict()
    null, _, (whisker, dot) = (layer.get("layer", layer) for layer in spec["layer"])
    drawn = [layer["encoding"]["x"]["field"] for layer in (null, whisker, dot)]
    assert drawn == ["low", "least", "cosine"]
    assert "Most opposed evil · nurturing" in spec["description"]


def test_reliability_has_a_band_in_every_panel(found):
    drawn = charts.reliability_chart(cosines.reliability(found, WHOLE), WHOLE)
    kinds = [[layer["mark"]["type"] for layer in c.to_dict()["layer"]] for c in drawn.charts]
    assert kinds == [["area", "line"]] * 4


def test_labels_of_lines_that_end_together_do_not_touch(found):
    spec = charts.norm_chart(cosines.norms(found, WHOLE), WHOLE).to_dict()
    words = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "text")
    at = sorted(row["at"] for row in spec["datasets"][words["data"]["name"]])
    assert min(b / a for a, b in itertools.pairwise(at)) > 1.05


def test_a_hundred_directions_still_make_a_readable_square():
    names = [f"trait-{i}" for i in range(100)]
    averaged = pl.DataFrame(
        [(a, b, f"{a} · {b}", 0.1, 0.0, 0.2, None, None, 1) for i, a in enumerate(names)
         for b in names[i + 1 :]],
        schema=["first", "second", "pair", "cosine", "least", "most", "low", "high", "layers"],
        orient="row",
    )  # fmt: skip
    kept = cosines.strongest(averaged, names)
    inside = averaged.filter(pl.col("first").is_in(kept) & pl.col("second").is_in(kept))
    spec = charts.matrix_chart(cosines.matrix_table(inside, kept), kept, WHOLE, total=100).to_dict()
    assert len(kept) == 60 and "60 of 100 directions" in spec["description"]
    assert spec["height"] <= 1000 and "text" not in [k["mark"]["type"] for k in spec["layer"]]
    assert cosines.extremes(averaged, set()).height == 24


def test_the_growth_chart_has_a_panel_a_direction_and_names_the_least_known(found):
    table = cosines.growth(found, WHOLE)
    drawn = charts.growth_chart(table, "instruction", WHOLE)
    panels = [chart.to_dict() for chart in drawn.charts]
    titles = [panel["title"]["text"] for panel in panels]
    assert titles == table["direction"].unique(maintain_order=True).to_list()
    for panel in panels:
        assert [layer["mark"]["type"] for layer in panel["layer"]] == ["area", "line"]
    last = table.filter((pl.col("unit") == "instruction") & (pl.col("units") == 2))
    least = last.sort("mean")["direction"][0]
    assert f"half, {least} agrees" in drawn.finding
