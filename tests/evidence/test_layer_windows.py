from __future__ import annotations

import dataclasses

import msgspec
import polars as pl
import pytest
from statsmodels.stats.contingency_tables import mcnemar as theirs_mcnemar
from statsmodels.stats.proportion import proportion_confint

from jaxsteer.errors import UserError
from jaxsteer.evidence import layer_windows
from jaxsteer.study import results
from jaxsteer.study.selection import Candidates
from tests.evidence import windows_made
from tests.receipt import made


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results.load(windows_made.folder(tmp_path_factory.mktemp("windows") / "made"))


@pytest.fixture(scope="module")
def maps(found):
    return layer_windows.table(found, layer_windows.cells(found, "persona"))


def one(maps, column, norms, which="knockout"):
    cell = (pl.col("column") == column) & (pl.col("norms") == norms) & (pl.col("map") == which)
    return maps.filter(cell)


def test_the_persona_is_the_steered_direction(found):
    assert layer_windows.steered(found) == ["persona"]


def test_columns_are_layers_by_depth_with_windows_last(maps):
    mine = maps.filter(pl.col("map") == "knockout").sort("order")
    assert mine["column"].unique(maintain_order=True).to_list() == ["none", "3", "4", "5", "4..5"]
    assert set(mine["norms"]) == {"0", "1", "2", "4"}


def test_the_row_of_strength_nothing_is_the_knockout_alone(maps):
    twin = one(maps, "4..5", "0")
    assert twin["condition"].item().endswith("unsteered")
    assert twin["control"].item() == "baseline"
    assert one(maps, "4..5", "2")["twin"].item() == twin["condition"].item()


def test_cells_are_paired_with_the_steer_of_their_own_strength(maps):
    assert one(maps, "5", "2")["control"].item() == "persona x2"
    assert one(maps, "none", "2")["control"].item() == "baseline"
    assert one(maps, "5", "2", "refusal")["control"].item() == "persona x4"


def test_only_the_knockout_at_the_steering_layer_cancels(maps):
    assert maps.filter("cancels")["column"].unique().to_list() == ["3"]


def test_rates_have_the_wilson_interval_of_statsmodels(maps):
    for row in maps.iter_rows(named=True):
        low, high = proportion_confint(row["refused"], row["n"], method="wilson")
        assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-9)


def test_a_brush_takes_the_cells_it_touches(maps):
    chosen = layer_windows.brushed(
        maps, "knockout", {"cells": {"column": ["4", "5"], "norms": ["2", "4"]}}
    )
    assert chosen.height == 4 and set(chosen["map"]) == {"knockout"}
    assert (
        layer_windows.brushed(maps, "knockout", {"cells": {"column": [4], "norms": [2]}}).height
        == 1
    )
    assert layer_windows.brushed(maps, "knockout", {}).is_empty()
    assert layer_windows.brushed(maps, "refusal", {"cells": {}}).is_empty()


def test_without_a_brush_the_strongest_row_is_shown(maps):
    assert set(layer_windows.strongest(maps, "knockout")["norms"]) == {"4"}
    assert set(layer_windows.strongest(maps, "refusal")["norms"]) == {"2"}


def test_flips_are_mcnemars_and_holm_counts_the_cells_shown(found, maps):
    chosen = maps.filter(pl.col("norms") == "4", pl.col("column") != "none")
    table = layer_windows.flip_table(found, chosen)
    late = table.filter(pl.col("column") == "4..5").row(0, named=True)
    assert (late["raised"], late["lowered"], late["n"]) == (10, 0, windows_made.N)
    square = [[2, 10], [0, windows_made.N - 12]]
    assert late["p"] == pytest.approx(theirs_mcnemar(square, exact=True).pvalue)
    assert late["p_holm"] >= late["p"] and table.height == chosen.height


def test_the_twin_shows_what_the_steer_still_does(found, maps):
    table = layer_windows.flip_table(found, one(maps, "4..5", "4"))
    # The twin refuses 14 prompts and the cell 12 of the same; both break on the same four.
    assert table["unlike"].item() == 2


def test_cells_without_a_control_have_no_flips(found, maps):
    assert layer_windows.flip_table(found, one(maps, "none", "0")).is_empty()


def test_projections_are_differences_to_the_same_prompts_baseline(found):
    table = layer_windows.along_depth(found, ["persona x4"], "baseline", "persona", "response")
    moved = dict(table.select("layer", "mean").iter_rows())
    assert [moved[k] for k in range(6)] == pytest.approx([0, 0, 0, 2, 2, 2], abs=1e-5)
    assert (table["high"] - table["low"]).max() == pytest.approx(0, abs=1e-5)
    assert set(table["n"]) == {windows_made.N}


def test_rows_without_projections_are_refused_in_one_line(tmp_path):
    bare = results.load(
        windows_made.folder(tmp_path / "bare", frame=made.rows(windows_made.study()))
    )
    with pytest.raises(UserError, match="recorded no projections on refusal"):
        layer_windows.along_depth(bare, ["persona x4"], "baseline", "refusal", "response")


def test_the_first_layer_is_where_something_is_done(found):
    assert layer_windows.first_layer(found, ["persona x4", "persona, refusal at 1 x2"]) == 1
    assert layer_windows.first_layer(found, ["baseline"]) == 0


def test_a_study_that_steers_with_nothing_has_no_window(tmp_path):
    frame = made.rows(windows_made.study()).filter(pl.col("condition") == "baseline")
    bare = results.load(windows_made.folder(tmp_path / "bare", frame=frame))
    cells = layer_windows.cells(bare, "refusal")
    assert cells == []
    assert layer_windows.table(bare, cells).is_empty()


def test_a_million_rows_become_a_few_cells(found):
    times = 1_000_000 // found.rows.height + 1
    many = pl.concat([found.rows.select("condition", "family", "label", "prompt_id")] * times)
    large = results.Results(folder=found.folder, run=found.run, rows=many, verdicts={})
    table = layer_windows.table(large, layer_windows.cells(large, "persona"))
    assert table["n"].sum() > 900_000 and table.height < 40


def test_the_candidates_of_the_window_are_listed_with_the_chosen_one(tmp_path):
    found = made.loaded(tmp_path / "made")
    run = msgspec.structs.replace(found.run, layers={"window": 4, "window_last": 5})
    table = layer_windows.candidates(dataclasses.replace(found, run=run))
    assert table["what"].unique().to_list() == ["window"]
    assert table.select("layers", "chosen", "refused alone").rows() == [
        ("no operation", "", "50 %"),
        ("4..5", "✓", "50 %"),
    ]
    nothing = msgspec.structs.replace(run, candidates=Candidates())
    assert layer_windows.candidates(dataclasses.replace(found, run=nothing)).is_empty()


def test_the_third_map_subtracts_the_same_knockout_without_steering(found, maps):
    over = layer_windows.over_unsteered(found, maps)
    moved = dict(over.filter(pl.col("norms") == "4").select("column", "difference").iter_rows())
    # Of 24 prompts steering leaves 2 of 14 refused, and under the late knockout 12 of 14.
    assert moved == pytest.approx({"none": -12 / 24, "4..5": -2 / 24})
    assert over["low"].le(over["difference"]).all() and over["high"].ge(over["difference"]).all()
    assert not over.filter(pl.col("strength") == 0).height


def test_the_window_of_the_study_is_marked_in_every_row(found):
    layers = found.run.layers | {"window": 4, "window_last": 5}
    chosen = dataclasses.replace(found, run=msgspec.structs.replace(found.run, layers=layers))
    marked = layer_windows.table(chosen, layer_windows.cells(chosen, "persona")).filter("chosen")
    assert set(marked["column"]) == {"4..5"} and set(marked["norms"]) == {"0", "1", "2", "4"}


def test_a_study_without_a_window_marks_nothing(maps):
    assert not maps["chosen"].any()
