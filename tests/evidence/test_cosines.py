from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import polars as pl
import pytest
from scipy.spatial.distance import cosine as theirs_distance

from jaxsteer.directions import direction
from jaxsteer.errors import UserError
from jaxsteer.evidence import cosines, reliability
from tests.evidence import directions_made

WHOLE = (0, directions_made.LAYERS - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return directions_made.folder(tmp_path_factory.mktemp("geometry") / "made")


@pytest.fixture(scope="module")
def found(folder):
    return cosines.load(folder)


@pytest.fixture(scope="module")
def averaged(found):
    return cosines.means(cosines.pairs(found), WHOLE)


def test_cosines_agree_with_scipy_at_every_layer(found):
    table = cosines.pairs(found)
    assert table.height == 6 * directions_made.LAYERS
    for first, second, layer, value in table.select(
        "first", "second", "layer", "cosine"
    ).iter_rows():
        one, other = (found.named[k].vectors[layer] for k in (first, second))
        assert value == pytest.approx(1 - theirs_distance(one, other), abs=1e-6)


def test_a_pair_finds_its_null_whichever_way_round_it_was_measured(found):
    table = cosines.pairs(found)
    assert table["low"].null_count() == 0
    measured = {frozenset((p.first, p.second)): p for p in found.measured.pairs}
    for row in table.iter_rows(named=True):
        null = measured[frozenset((row["first"], row["second"]))].null
        assert row["high"] == null.high[row["layer"]]


def test_a_zero_vector_has_no_cosine_and_does_not_count_in_the_mean(found):
    persona = found.named["persona"]
    vectors = persona.vectors.copy()
    vectors[0] = 0
    holed = {**found.named, "persona": dataclasses.replace(persona, vectors=vectors)}
    table = cosines.pairs(dataclasses.replace(found, named=holed))
    one = table.filter(pl.col("pair") == "persona · refusal")
    assert one["cosine"].to_list()[0] is None
    mean = cosines.means(table, WHOLE).filter(pl.col("pair") == "persona · refusal")
    assert mean["layers"].item() == directions_made.LAYERS - 1
    assert mean["cosine"].item() == pytest.approx(one["cosine"].drop_nulls().mean())


def test_without_measurements_the_cosines_stand_and_a_note_says_what_to_run(tmp_path):
    bare = cosines.load(directions_made.folder(tmp_path / "bare", measured=False))
    table = cosines.pairs(bare)
    assert table["low"].null_count() == table.height and table["cosine"].null_count() == 0
    assert "jaxsteer geometry" in bare.notes[0]
    assert cosines.reliability(bare, WHOLE).is_empty()


def test_measurements_of_other_directions_are_not_used(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "stale")
    path = tmp_path / "stale" / reliability.FILE
    value = json.loads(path.read_text())
    value["directions"]["evil"]["sha256"] = "f" * 64
    path.write_text(json.dumps(value))
    stale = cosines.load(tmp_path / "stale")
    assert stale.measured is None and "another evil" in stale.notes[0]


def test_an_empty_folder_is_refused_and_the_message_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match="make demo"):
        cosines.load(tmp_path)


def test_random_directions_alone_are_nothing_to_compare(found, tmp_path):
    direction.save(tmp_path / "directions.safetensors", list(found.random.values()))
    with pytest.raises(UserError, match="random directions only"):
        cosines.load(tmp_path)


def test_random_cosines_are_the_range_over_the_controls(found):
    table = cosines.random_cosines(found, "persona")
    each = [reliability.cosines(found.named["persona"].vectors, r.vectors) for r in
            found.random.values()]  # fmt: skip
    assert np.allclose(table["low"], np.min(each, axis=0), atol=1e-6)
    assert np.allclose(table["high"], np.max(each, axis=0), atol=1e-6)


def test_core_pairs_come_first_and_then_the_strongest(found):
    names = cosines.ranked(cosines.pairs(found), WHOLE)
    assert names[:2] == ["persona · refusal", "evil · nurturing"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, (0, 9)),
        ({"layers": {}}, (0, 9)),
        ({"layers": {"layer": [2.2, 5.9]}}, (3, 5)),
        ({"layers": {"layer": [5.9, 2.2]}}, (3, 5)),
        ({"layers": {"layer": [-3, 40]}}, (0, 9)),
        ({"layers": {"layer": [4.1, 4.8]}}, (0, 9)),
    ],
)
def test_a_brush_becomes_whole_layers(selection, expected):
    assert cosines.window_of(selection, 10) == expected


def test_similar_directions_are_neighbours_and_opposites_lie_at_the_ends():
    angles = np.radians([0, 170, 10, 160, 20])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    order = cosines.hierarchical(vectors @ vectors.T)
    assert {frozenset(order[:2]), frozenset(order[2:])} in (
        {frozenset({1, 3}), frozenset({0, 2, 4})},
    ) or {frozenset(order[:3]), frozenset(order[3:])} == {frozenset({0, 2, 4}), frozenset({1, 3})}


def test_the_matrix_has_both_halves_and_says_what_chance_allows(averaged):
    order = ["refusal", "persona", "evil", "nurturing"]
    cells = cosines.matrix_table(averaged, order)
    assert cells.height == 12
    assert cells["row"].unique(maintain_order=True).to_list() == order
    chance = {(r["row"], r["column"]): r["chance"] for r in cells.iter_rows(named=True)}
    assert chance["evil", "nurturing"] == chance["nurturing", "evil"] == "beyond chance"
    assert chance["persona", "evil"] == "within chance"


def test_opposite_traits_are_found_by_their_files(found):
    assert cosines.opposites(found) == {frozenset({"evil", "nurturing"})}


def test_many_pairs_are_cut_to_the_extremes_and_named_opposites_stay(averaged):
    cut = cosines.extremes(averaged, {frozenset({"persona", "evil"})}, most=2)
    assert cut["pair"].to_list()[0] == "evil · nurturing"
    assert "persona · evil" in cut["pair"].to_list() and cut.height == 3
    assert cut["cosine"].is_sorted()


def test_components_are_those_of_the_vectors_themselves():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((6, 40)) + 1.0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = cosines.components(vectors @ vectors.T, list("abcdef"))
    centred = vectors - vectors.mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False)
    assert np.allclose(found.shares, singular**2 / (singular**2).sum(), atol=1e-9)
    planar = found.table.select("x", "y").to_numpy()
    assert np.allclose(np.linalg.norm(planar, axis=0), singular[:2])


def test_reliabilities_are_cut_to_the_window(found):
    table = cosines.reliability(found, (2, 4))
    assert sorted(table["layer"].unique()) == [2, 3, 4]
    assert (table["low"] <= table["mean"]).all() and (table["mean"] <= table["high"]).all()


def test_norms_stand_beside_the_streams_own(found):
    table = cosines.norms(found, (1, 1)).filter(pl.col("direction") == "evil")
    norm = float(np.linalg.norm(found.named["evil"].vectors[1]))
    assert table["share"].item() == pytest.approx(norm / 13.0, rel=1e-5)


def test_the_papers_values_sit_at_the_same_share_of_depth():
    table = cosines.paper(32)
    assert table["cosine"].to_list() == [-0.180, -0.279]
    assert table["layer"].to_list() == pytest.approx([20.0, 20 / 27 * 31])


def test_growth_is_averaged_over_the_window(found):
    table = cosines.growth(found, (2, 4))
    assert set(table["unit"]) == {"instruction", "question"}
    one = table.row(
        by_predicate=(pl.col("direction") == "persona")
        & (pl.col("unit") == "instruction")
        & (pl.col("units") == 2),
        named=True,
    )
    curve = found.measured.directions["persona"].reliability["instruction"].growth[2][2:5]
    assert one["mean"] == pytest.approx(sum(curve) / 3)
    assert (one["low"], one["high"]) == (min(curve), max(curve))
