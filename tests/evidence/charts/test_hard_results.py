"""No chart and no sentence says more than the results on which it stands, whatever they are."""

from __future__ import annotations

import re
from typing import Any

import altair as alt
import polars as pl
import pytest

from jaxsteer.evidence import claims, cosines, findings, layer_windows, outcomes
from jaxsteer.evidence.charts import controls as charts
from jaxsteer.evidence.charts import geometry, marks, opening, windows
from jaxsteer.receipt import build, page, statement
from tests.evidence import hard_results
from tests.receipt import made

ONE = re.compile(r"\b1 (?!of)(?:\w+ )?(?:seeds|prompts|controls|conditions|cells|layers|pairs)\b")


@pytest.fixture(scope="module", params=hard_results.WORLDS)
def named(request, tmp_path_factory):
    return request.param, hard_results.world(request.param, tmp_path_factory.mktemp("hard") / "x")


def drawn(chart: alt.LayerChart) -> tuple[str, list[dict[str, Any]]]:
    """(title and subtitle, all rows of the data drawn)."""
    spec = chart.to_dict()
    assert spec["width"] == "container"
    words = spec["description"]
    assert not ONE.search(words), words
    assert "nan" not in words.lower().split() and "None" not in words
    return words, [row for table in spec.get("datasets", {}).values() for row in table]


def test_outcomes_name_their_extremes_only_where_they_differ(named):
    name, found = named
    rows = found.rows.filter(pl.col("family") == "strongreject")
    table = outcomes.shares(rows, "condition")
    words, data = drawn(charts.stacked_chart(table, "condition", "harmful prompts"))
    bars = {row["group"] for row in data if "outcome" in row}
    assert bars == set(rows["condition"]), "every condition is drawn"
    shown = re.findall(r"\((.+?)\)", charts.outcomes(table, "condition", "harmful prompts"))
    assert len(shown) == len(set(shown)), "the highest and the lowest are different figures"
    if name in ("nothing refused", "all degenerate"):
        assert words.startswith("No refusal under")
    if name == "all degenerate":
        assert "“broken text (degenerate)”" in words
    if name == "everything refused":
        assert words.startswith("Refusal is 100 % under each of")
    if name == "ties":
        assert words.startswith("Refusal is 63 % under each of")
        assert {row["row"][:10] for row in data if "outcome" in row} == {"63 % of 40"}
    if name == "one condition":
        assert words.startswith("Refusal is 63 % under baseline.")


def test_a_category_of_three_has_the_interval_of_three(named):
    _, found = named
    rows = found.rows.filter(family="strongreject", condition="baseline")
    table = outcomes.shares(rows, "category")
    few = table.filter(pl.col("group") == "few")
    assert set(few["n"]) == {3}
    drawn(charts.stacked_chart(table, "category", "harmful prompts under baseline"))
    for row in few.iter_rows(named=True):
        assert row["high"] - row["low"] > 0.5


def test_controls_are_counted_once_and_in_words_that_fit(named):
    name, found = named
    made_of = findings.evaluate(found)
    assert not ONE.search(findings.headline(made_of))
    if name in ("one condition", "without claims"):
        assert not made_of and "ran no control" in findings.headline(made_of)
        return
    keys = {(f.kind, f.first, f.second, f.family, f.outcome) for f in made_of}
    assert len(made_of) > len(keys), "two claims share controls"
    words, data = drawn(charts.findings_chart(made_of))
    assert words.startswith(f"Of {len(keys)} controls, ")
    assert len({row["row"] for row in data if "status" in row}) == len(keys)
    for f in made_of:
        assert not ONE.search(f.why)
    if name == "one seed":
        assert "which cannot show less than p = 0.5" in str([f.why for f in made_of])


@pytest.mark.parametrize("name", ["usual", "one seed"])
def test_a_random_control_has_one_p_in_findings_claims_and_receipt(name, tmp_path):
    found = hard_results.world(name, tmp_path / "x")
    random = [f for f in findings.evaluate(found) if f.kind == "random"]
    p = statement.load(build.write(found.folder)[0]).predicate
    in_receipt = {(c.treated, c.outcome, c.family): page.one_sided(p, c) for c in p.random_controls}
    assert random and {f.p for f in random} == {0.5 if name == "one seed" else 0.25}
    for f in random:
        assert in_receipt[f.treated, f.outcome, f.family] == f.p


def test_envelopes_tell_one_seed_from_a_range(named):
    name, found = named
    table = findings.envelope_table(found, findings.evaluate(found))
    if table.is_empty():
        return
    words, _ = drawn(charts.envelope_chart(table))
    assert ("1 random seed" in words) == (name == "one seed")
    assert ("shaded" in words) == (name != "one seed")


def test_flips_say_how_many_whatever_happens(named):
    name, found = named
    labels = outcomes.Labels(found.rows, found.verdicts)
    other = "baseline" if name == "one condition" else "persona"
    pairs = labels.pair(other, "baseline", "strongreject")
    words, data = drawn(charts.flip_chart(pairs, "refusal", other, "baseline"))
    lost = int(((pairs["control"] == "refusal") & (pairs["treated"] != "refusal")).sum())
    assert words.startswith(f"Of 40 prompts, {lost or 'none'} lose")
    assert len({row["prompt_id"] for row in data}) == 40
    said = charts.mcnemar_table(outcomes.flips(pairs, "refusal"), "refusal", other, "baseline")
    assert f"counts: {lost} prompt" in said or lost == 0


def test_maps_name_a_highest_place_only_where_one_is_higher(named):
    name, found = named
    maps = layer_windows.table(found, layer_windows.cells(found, "persona"))
    for which in ("knockout", "refusal"):
        if maps.filter((pl.col("map") == which) & (pl.col("column") != "none")).is_empty():
            continue
        words, data = drawn(windows.map_chart(maps, which))
        figures = {row["figure"] for row in data if "figure" in row}
        if name == "ties":
            assert figures == {"63 %"} and words.startswith("Nowhere does refusal exceed")
        if name in ("everything refused", "nothing refused", "all degenerate"):
            assert words.startswith("Nowhere does refusal exceed") and " other" in words


def test_the_same_count_reads_the_same_in_receipt_table_and_chart(tmp_path):
    found = hard_results.world("ties", tmp_path / "ties")
    maps = layer_windows.table(found, layer_windows.cells(found, "persona"))
    _, data = drawn(windows.map_chart(maps, "knockout"))
    assert {row["figure"] for row in data if "figure" in row} == {"63 %"}
    build.write(found.folder)
    html = (found.folder / "receipt.html").read_text()
    assert "63 %" in html and "62 %" not in html


def test_a_change_is_credited_to_what_had_acted_by_then(named):
    name, found = named
    if name == "one condition":
        return
    late = "persona, out late"
    table = layer_windows.along_depth(found, [late], "baseline", "persona", "response")
    words, data = drawn(windows.depth_chart(table, "persona", "response"))
    assert "at layer 3: +2.00 natural norms, after adding persona at 3. " in words
    after = {row["layer"]: row["after"] for row in data if "after" in row}
    assert after[2] == "" and after[4] == "adding persona at 3 and removing persona at 4"


def test_a_projection_that_nothing_moves_has_no_author(tmp_path):
    found = hard_results.world("usual", tmp_path / "usual")
    table = layer_windows.along_depth(found, ["baseline"], "baseline", "persona", "response")
    assert windows.depth_finding(table, "persona") == "No operation moves the projection on persona"


def test_candidates_have_words_where_nothing_applies(named):
    table = layer_windows.candidates(named[1])
    assert table["layers"].to_list() == ["no operation", "4..5"]
    assert table["strength"].to_list() == ["–", "–"]


def test_a_selection_that_failed_is_said_before_the_results(tmp_path, monkeypatch):
    why = ["KL 0.31 > 0.1"]
    monkeypatch.setitem(made.CANDIDATES, "refusal_near_miss", why)
    folder = made.folder(tmp_path / "failed")
    (said,) = [line for line in opening.header(folder).warnings if "selection" in line]
    assert said.startswith("The refusal direction failed") and why[0] in said


def test_claims_of_one_seed_speak_of_one_seed(tmp_path):
    found = hard_results.world("one seed", tmp_path / "one")
    for claim in claims.evaluate(found):
        assert not ONE.search(claim.reason), claim.reason


@pytest.mark.parametrize("names", [("persona", "refusal"), ("persona", "refusal", "evil")])
def test_another_model_that_was_not_measured_has_its_own_numbers(names, tmp_path):
    found = cosines.load(hard_results.directions(tmp_path / "other", names))
    table, window = cosines.pairs(found), cosines.whole(found)
    one = table.filter(pl.col("pair") == "persona · refusal")
    words, data = drawn(geometry.pair_chart(one, cosines.random_cosines(found, "persona")))
    assert "chance not measured" in words and "grey" not in words and "mauve" not in words
    assert len([row for row in data if "cosine" in row]) == 24
    panels = geometry.pairs_chart(table, cosines.ranked(table, window), window)
    assert "grey" not in panels.detail and not ONE.search(panels.finding)
    assert len(panels.charts) == table["pair"].n_unique()
    averaged = cosines.means(table, window)
    words, _ = drawn(
        geometry.extremes_chart(cosines.extremes(averaged, set()), averaged.height, window)
    )
    assert "grey" not in words
    words, _ = drawn(
        geometry.matrix_chart(cosines.matrix_table(averaged, names), list(names), window)
    )
    assert "ring" not in words
    assert ("the mean cosine is" in words) == (len(names) == 2)
    words, _ = drawn(geometry.norm_chart(cosines.norms(found, window), window))
    assert "not recorded" in words


def test_opposite_traits_side_by_side_have_colours_of_their_own():
    roles = marks.roles(["persona", "evil", "nurturing", "random-1"])
    assert len(set(roles.values())) == 4
