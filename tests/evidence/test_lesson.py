from __future__ import annotations

import numpy as np
import pytest

from jaxsteer.data import prompts
from jaxsteer.directions import direction as directions
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.evidence import lesson
from jaxsteer.generation import stepwise
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests import tiny

PROMPT = [3, 9, 33, 5, 5, 12, 41, 8]
LAYER = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lesson")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


def direction(model, name, seed):
    shape = (model.config.n_layers, model.config.d_model)
    vectors = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    provenance = {"weights_sha256": model.weights_sha256}
    return Direction(name=name, vectors=vectors, provenance=provenance)


@pytest.fixture(scope="module")
def steerable(model):
    made = {name: direction(model, name, seed) for seed, name in enumerate(("persona", "refusal"))}
    return lesson.SteerableModel(model=model, directions=made, watched=("persona", "refusal"))


def test_adding_in_the_plane_is_vector_addition():
    states = lesson.steer_2d((-1, 2), (1.5, 0.5), ["add"], strength=-2)
    np.testing.assert_allclose(states, [[-1, 2], [-4, 1]], atol=1e-6)


def test_projecting_in_the_plane_leaves_the_perpendicular_part():
    _, after = lesson.steer_2d((3, 4), (2, 0), ["project"])
    np.testing.assert_allclose(after, [0, 4], atol=1e-6)


@pytest.mark.parametrize(("h", "expected"), [((3, 1), 1.5), ((-3, 1), -1.5), ((0.5, 1), 0.5)])
def test_capping_in_the_plane_bounds_the_projection_on_both_sides(h, expected):
    _, after = lesson.steer_2d(h, (2, 0), ["cap"], high=1.5)
    np.testing.assert_allclose(after, [expected, 1], atol=1e-6)


@pytest.mark.parametrize("strength", [-3, 0.5, 3])
def test_projecting_where_it_was_added_cancels_in_the_plane(strength):
    h, d = (-1.5, 2.0), (1.5, -0.25)
    added = lesson.steer_2d(h, d, ["add", "project"], strength=strength)[-1]
    alone = lesson.steer_2d(h, d, ["project"])[-1]
    np.testing.assert_allclose(added, alone, atol=1e-6)


def test_a_zero_direction_moves_nothing_in_the_plane():
    states = lesson.steer_2d((1, 2), (0, 0), ["add", "project", "cap"], high=0.1)
    np.testing.assert_array_equal(states, [[1, 2]] * 4)


def test_projections_in_the_plane_are_onto_the_unit_vector():
    assert lesson.projections_2d((0, 3), [np.array([5, 2]), np.array([1, -4])]) == [2, -4]
    assert lesson.projections_2d((0, 0), [np.array([5, 2])]) == [0]


def test_moved_is_the_total_variation_distance():
    one = np.log([0.5, 0.3, 0.2]).astype(np.float32)
    other = np.log([0.1, 0.3, 0.6]).astype(np.float32)
    assert lesson.moved(one, other) == pytest.approx(0.4, abs=1e-6)
    assert lesson.moved(one, one + 7) == pytest.approx(0, abs=1e-6)


def test_every_kind_layer_and_strength_runs_the_same_two_programs(steerable):
    stepwise.read_layers.clear_cache()
    for kind, layer, strength in (("add", 0, 2.0), ("project", 1, 1.0), ("cap", 2, 0.5)):
        operations = steerable.operation(kind, "persona", layer, strength)
        list(steerable.replies(steerable.read(PROMPT, operations)))
    list(steerable.replies(steerable.read(PROMPT, [])))
    assert stepwise.read_layers._cache_size() == 2


def test_the_neighbour_that_fixes_the_shapes_changes_nothing(steerable):
    plain, none = steerable.read(PROMPT, []), steerable.operation("add", "persona", LAYER, 0.0)
    np.testing.assert_array_equal(plain.logits, steerable.read(PROMPT, none).logits)


def test_projections_are_in_natural_norms(steerable):
    plain = steerable.read(PROMPT, [])
    steered = steerable.read(PROMPT, steerable.operation("add", "persona", LAYER, 2.5))
    table = lesson.projections(steerable, PROMPT, plain, steered)
    assert len(table) == steerable.model.config.n_layers * len(PROMPT) * 2
    own = table.filter(direction="persona", layer=LAYER)
    np.testing.assert_allclose(own["change"], 2.5, rtol=1e-4)
    np.testing.assert_allclose(table.filter(layer=0)["change"], 0, atol=1e-5)
    last = table.filter(direction="refusal", layer=2, position=len(PROMPT) - 1).row(0, named=True)
    expected = steered.projections[2, -1, 1] / steerable.norms[2, 1]
    assert last["steered"] == pytest.approx(expected, rel=1e-5)


def test_a_cap_keeps_projections_within_its_bound(steerable):
    plain = steerable.read(PROMPT, [])
    capped = steerable.read(PROMPT, steerable.operation("cap", "persona", LAYER, 0.1))
    table = lesson.projections(steerable, PROMPT, plain, capped).filter(
        direction="persona", layer=LAYER
    )
    assert table["baseline"].abs().max() > 0.11
    assert table["steered"].abs().max() <= 0.1 + 1e-5


def test_the_likeliest_tokens_of_either_side_come_first(steerable):
    plain = steerable.read(PROMPT, [])
    steered = steerable.read(PROMPT, steerable.operation("add", "refusal", LAYER, 6.0))
    table = lesson.next_tokens(steerable.model, plain, steered, top=5)
    best = np.maximum(table["baseline"], table["steered"])
    assert list(best) == sorted(best, reverse=True)
    assert {int(plain.logits.argmax()), int(steered.logits.argmax())} <= set(table["token"])
    probability = np.exp(plain.logits - np.logaddexp.reduce(plain.logits.astype(np.float64)))
    np.testing.assert_allclose(table["baseline"], probability[table["token"]], rtol=1e-5)


def test_an_addition_survives_a_later_projection_but_not_one_at_its_own_layer(steerable):
    table = lesson.survival(steerable, PROMPT, "persona", 0, 6.0)
    assert table["later"].to_list() == [0, 1, 2] and table["layer"].to_list() == [0, 1, 2]
    assert table["moved"][0] < 1e-5
    assert table["moved"][1:].min() > 1e-3
    plain = steerable.read(PROMPT, [])
    steered = steerable.read(PROMPT, steerable.operation("add", "persona", 0, 6.0))
    alone = lesson.moved(plain.logits, steered.logits)
    assert table["alone"][0] == pytest.approx(alone, abs=1e-5)


def test_directions_of_a_results_directory_are_taken_as_they_are(model, tmp_path):
    path = tmp_path / "directions.safetensors"
    made = [direction(model, name, seed) for seed, name in enumerate(("other", "refusal"))]
    directions.save(path, made)
    steerable = lesson.load(model, path, tmp_path / "kept")
    assert set(steerable.directions) == {"other", "refusal"} and steerable.watched == ("refusal",)


def test_directions_of_another_model_are_refused(model, tmp_path):
    path = tmp_path / "directions.safetensors"
    foreign = direction(model, "persona", 0)
    directions.save(
        path,
        [Direction(name="persona", vectors=foreign.vectors, provenance={"weights_sha256": "x"})],
    )
    with pytest.raises(UserError, match="other weights"):
        lesson.load(model, path, tmp_path / "kept")


def test_without_directions_they_are_extracted_once_and_kept(model, tmp_path, monkeypatch):
    kept = tmp_path / "lesson/directions.safetensors"
    words = "w1 w2 w3"
    trait = prompts.trait("compliant")
    small = type(trait)(
        name="compliant", description="", positive=[words], negative=["w4 w5"], questions=["w6"]
    )
    monkeypatch.setattr(prompts, "trait", lambda name: small)
    first = lesson.load(model, tmp_path / "none", kept)
    assert sorted(first.directions) == ["persona", "random-1"]
    written = kept.stat().st_mtime_ns
    again = lesson.load(model, tmp_path / "none", kept)
    assert kept.stat().st_mtime_ns == written
    np.testing.assert_array_equal(
        first.directions["persona"].vectors, again.directions["persona"].vectors
    )
