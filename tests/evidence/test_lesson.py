from __future__ import annotations

import msgspec
import numpy as np
import polars as pl
import pytest
import torch

from jaxsteer.data import prompts
from jaxsteer.directions import direction as directions
from jaxsteer.directions import extraction
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.evidence import lesson
from jaxsteer.evidence.lesson import View
from jaxsteer.generation import prefill, stepwise
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.study import results
from jaxsteer.study.results import Add, Project
from tests import tiny
from tests.receipt import made

PROMPT = [3, 9, 33, 5, 5, 12, 41, 8]
LAYER = 1


@pytest.fixture(scope="module")
def hf():
    return tiny.llama()


@pytest.fixture(scope="module")
def model(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lesson")
    return ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


def direction(model, name, seed):
    shape = (model.config.n_layers, model.config.d_model)
    vectors = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    provenance = {"weights_sha256": model.weights_sha256}
    return Direction(name=name, vectors=vectors, provenance=provenance)


@pytest.fixture(scope="module")
def steerable(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    some = [direction(model, name, seed) for seed, name in enumerate(("persona", "refusal"))]
    directions.save(folder / "directions.safetensors", some)
    return lesson.load(model, folder, folder / "kept")


def torch_reads(hf, layer, vector, tokens=PROMPT):
    """Next-token probabilities of HF with a vector added to a layer's output, and that output."""
    seen = {}

    def hook(module, inputs, output):
        seen["h"] = output + torch.from_numpy(np.asarray(vector, np.float32))
        return seen["h"]

    handle = hf.model.layers[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = hf(torch.tensor([tokens])).logits[0, -1]
    finally:
        handle.remove()
    return torch.softmax(logits.double(), dim=-1).numpy(), seen["h"][0].numpy()


def test_separation_counts_each_value_against_the_means_of_the_others(rng):
    one, other = rng.normal(0.8, 1, 9), rng.normal(0, 1, 7)
    expected = 0
    for own, far in ((one, other), (other, one)):
        for i, value in enumerate(own):
            rest = np.delete(own, i).mean()
            expected += (value > (rest + far.mean()) / 2) == (rest > far.mean())
    assert lesson.separation(one, other) == (expected, 16)
    assert lesson.separation(one + 100, other) == (16, 16)


def test_moved_is_the_total_variation_distance():
    one = np.log([0.5, 0.3, 0.2]).astype(np.float32)
    other = np.log([0.1, 0.3, 0.6]).astype(np.float32)
    assert lesson.moved(one, other) == pytest.approx(0.4, abs=1e-6)
    assert lesson.moved(one, one + 7) == pytest.approx(0, abs=1e-6)


def test_every_kind_layer_and_strength_runs_the_same_programs(steerable):
    stepwise.read_layers.clear_cache()
    prefill.run_layers.clear_cache()
    views = [View(kind, "persona", layer, 2.0) for kind in lesson.KINDS for layer in range(3)]
    for view in views:
        steerable.reply(steerable.read(PROMPT, steerable.operations(view)))
    steerable.next_logits(PROMPT, [[], *map(steerable.operations, views)])
    steerable.next_logits(PROMPT[:5], [steerable.operations(views[0])])
    assert stepwise.read_layers._cache_size() == 2
    assert prefill.run_layers._cache_size() == 1


def test_the_neighbour_that_fixes_the_shapes_changes_nothing(steerable):
    none = steerable.operations(View("add", "persona", LAYER, 0.0))
    plain, added = (steerable.read(PROMPT, operations) for operations in ([], none))
    np.testing.assert_array_equal(plain.logits, added.logits)


@pytest.mark.parametrize("kind", lesson.KINDS)
def test_many_conditions_at_once_are_the_readings_one_by_one(steerable, kind):
    views = [View(kind, "persona", layer, 1.5) for layer in range(3)]
    many = steerable.next_logits(PROMPT, [[], *map(steerable.operations, views)])
    one_by_one = [steerable.read(PROMPT, []).logits]
    one_by_one += [steerable.read(PROMPT, steerable.operations(view)).logits for view in views]
    np.testing.assert_allclose(many, one_by_one, atol=2e-5)


def test_the_map_is_what_torch_computes_with_a_hook(steerable, hf):
    done = []
    table = lesson.grid(steerable, PROMPT, ["persona"], [0, 2], top=3, done=done.append)
    assert sum(done) == 1 + 2 * 6 and len(table) == 2 * 7 * 3
    plain, _ = torch_reads(hf, 0, np.zeros(32))
    for row in table.filter(pl.col("rank") == 0).iter_rows(named=True):
        layer = row["layer"]
        added = row["strength"] * steerable.directions["persona"].vectors[layer]
        expected, _ = torch_reads(hf, layer, added)
        assert row["moved"] == pytest.approx(np.abs(expected - plain).sum() / 2, abs=1e-4)
        assert row["opens"] == pytest.approx(expected[steerable.openings].sum(), abs=1e-4)
        assert row["probability"] == pytest.approx(expected.max(), abs=1e-4)


def test_random_directions_of_a_fan_have_the_norms_of_the_direction(steerable, monkeypatch):
    asked = []
    monkeypatch.setattr(lesson, "grid", lambda *given: asked.append(given[0]) or pl.DataFrame())
    lesson.fan(steerable, PROMPT, "refusal", LAYER)
    own, *drawn = asked[0].directions.values()
    assert own.name == "refusal" and len(drawn) == lesson.RANDOM
    for each in drawn:
        norms = [np.linalg.norm(one.vectors, axis=1) for one in (each, own)]
        np.testing.assert_allclose(*norms, rtol=1e-5)


def test_projections_in_line_are_those_of_torch_against_the_median(steerable, hf):
    view = View("add", "persona", LAYER, 2.5)
    plain, steered = (steerable.read(PROMPT, o) for o in ([], steerable.operations(view)))
    none = np.zeros((3, 0, len(steerable.directions)), np.float32)
    texts, values = lesson.in_line(steerable, "refusal", LAYER, plain, steered, [], none)
    vector = steerable.directions["refusal"].vectors[LAYER]
    added = 2.5 * steerable.directions["persona"].vectors[LAYER]
    _, before = torch_reads(hf, LAYER, np.zeros(32))
    _, after = torch_reads(hf, LAYER, added)
    expected = (after @ vector - np.median(before @ vector)) / (vector @ vector)
    np.testing.assert_allclose(values, expected, atol=1e-4)
    assert texts == [steerable.model.tokenizer.hf.decode([token]) for token in PROMPT]


def test_along_depth_the_steered_direction_jumps_by_the_strength_at_its_layer(steerable):
    view = View("add", "persona", LAYER, 2.5)
    plain, steered = (steerable.read(PROMPT, o) for o in ([], steerable.operations(view)))
    table = lesson.depth(steerable, ["persona", "refusal"], plain, steered)
    assert table["direction"].n_unique() == 2 + lesson.RANDOM
    own = table.filter(direction="persona")
    np.testing.assert_allclose(own["change"][:2], [0, 2.5], atol=1e-4)
    one, other = (steerable.directions[name].vectors[LAYER] for name in ("persona", "refusal"))
    cosine_part = 2.5 * one @ other / (other @ other)
    found = table.filter(direction="refusal", layer=LAYER)["change"][0]
    assert found == pytest.approx(cosine_part, abs=1e-4)


def test_a_cap_keeps_projections_within_its_bound(steerable):
    capped = steerable.read(PROMPT, steerable.operations(View("cap", "persona", LAYER, 0.1)))
    plain = steerable.read(PROMPT, [])
    assert np.abs(plain.projections[LAYER, :, 0]).max() > 0.11
    assert np.abs(capped.projections[LAYER, :, 0]).max() <= 0.1 + 1e-5


def test_the_likeliest_tokens_of_either_side_come_first(steerable):
    plain = steerable.read(PROMPT, [])
    steered = steerable.read(PROMPT, steerable.operations(View("add", "refusal", LAYER, 6.0)))
    table = lesson.next_tokens(steerable.model, plain, steered, top=5)
    best = np.maximum(table["baseline"], table["steered"])
    assert list(best) == sorted(best, reverse=True)
    assert {int(plain.logits.argmax()), int(steered.logits.argmax())} <= set(table["token"])
    probability = np.exp(plain.logits - np.logaddexp.reduce(plain.logits.astype(np.float64)))
    np.testing.assert_allclose(table["baseline"], probability[table["token"]], rtol=1e-5)


def test_what_is_added_and_projected_out_at_once_moves_nothing(steerable):
    views = {str(k): View("add, then project out", "persona", 0, 6.0, later=k) for k in range(3)}
    table = dict(lesson.shares(steerable, PROMPT, views).iter_rows())
    assert table["0"] < 1e-5 and min(table["1"], table["2"]) > 1e-3
    alone = View("project out", "persona", LAYER, 6.0)
    plain, removed = (steerable.read(PROMPT, o) for o in ([], steerable.operations(alone)))
    expected = lesson.moved(plain.logits, removed.logits)
    found = lesson.shares(steerable, PROMPT, {"alone": alone})["moved"][0]
    assert found == pytest.approx(expected, abs=1e-5)


def test_every_exercise_has_an_answer_that_the_model_gives(steerable):
    for options in steerable.questions.values():
        table = lesson.shares(steerable, PROMPT, options)
        assert set(table["option"]) == set(options)
        assert table["moved"].is_sorted(descending=True) and table["moved"][0] > 0.005


def test_held_out_prompts_made_no_direction_and_project_as_in_torch(steerable, hf):
    asked = extraction.contrast(extraction.Refusal())
    used = {chat.user for chat in asked.chats}
    found = lesson.held_out(steerable, None, n=3)
    assert found.group.tolist() == [0] * 3 + [1] * 3
    harmful = [p.text for p in prompts.read(extraction.HARMFUL)[-3:]]
    assert not used & set(harmful)
    tokens = steerable.model.tokenizer.chat(harmful[0], None)
    _, states = torch_reads(hf, LAYER, np.zeros(32), tokens)
    vector = steerable.directions["refusal"].vectors[LAYER]
    table = lesson.groups(steerable, found, "refusal", LAYER)
    assert table["group"].to_list() == ["harmful"] * 3 + ["harmless"] * 3
    expected = states[-1] @ vector / (vector @ vector)
    assert table["projection"][0] == pytest.approx(expected, abs=1e-4)


def test_a_map_has_a_layer_of_each_group_and_the_studys_own(steerable):
    assert lesson.map_layers(steerable, PROMPT) == [0, 1, 2]
    assert lesson.map_layers(steerable, PROMPT * 45) == [1]
    with pytest.raises(UserError, match="tokens and at most"):
        steerable.width(PROMPT * 100)


def studied(model, folder, *operations):
    """A results folder whose first steered condition does this."""
    run = msgspec.convert(made.run_record(made.study()), results.RunRecord)
    some = [
        direction(model, name, seed) for seed, name in enumerate(("neutral", "refusal", "tone"))
    ]
    directions.save(folder / "directions.safetensors", some)
    conditions = [msgspec.structs.replace(run.conditions[0], operations=operations)]
    results.write_run(
        folder, msgspec.structs.replace(run, conditions=conditions, layers={"refusal": 2})
    )
    return lesson.load(model, folder, folder / "kept")


def test_the_page_begins_where_the_study_steers(model, tmp_path):
    moved = Add(direction="tone", layers=(0,), scale=9.0, measured_at=1)
    found = studied(model, tmp_path, moved, Add(direction="tone", layers=(2,), scale=3.0))
    assert found.start == View("add", "tone", 2, 3.0)
    assert found.refuse == View("add", "refusal", 2, 2.0)
    assert found.system and found.system == next(iter(found.policies.values()))
    cancelled = found.presets["cancel it"]
    assert (cancelled.kind, cancelled.layer, cancelled.strength) == (lesson.KINDS[3], 2, 3.0)
    assert found.presets["at random"].name in found.random


def test_a_study_that_adds_nothing_begins_with_a_guess(model, tmp_path):
    found = studied(model, tmp_path, Project(direction="tone", layers=(1,)))
    assert found.start == View("add", "neutral", 1, 4.0)


def test_a_folder_that_is_not_there_is_said_at_once(model, tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*typo"):
        lesson.load(model, tmp_path / "typo", tmp_path / "kept")


def test_directions_of_another_model_are_refused(model, tmp_path):
    foreign = direction(model, "persona", 0)
    other = Direction(name="persona", vectors=foreign.vectors, provenance={"weights_sha256": "x"})
    directions.save(tmp_path / "directions.safetensors", [other])
    with pytest.raises(UserError, match="other weights"):
        lesson.load(model, tmp_path, tmp_path / "kept")


def test_without_a_study_a_direction_is_extracted_once_and_kept(model, tmp_path, monkeypatch):
    kept = tmp_path / "lesson"
    trait = prompts.trait("compliant")
    small = type(trait)(
        name="compliant", description="", positive=["w1 w2"], negative=["w4 w5"], questions=["w6"]
    )
    monkeypatch.setattr(prompts, "trait", lambda name: small)
    first = lesson.load(model, None, kept)
    assert list(first.directions) == ["persona", *first.random] and not first.system
    assert first.refuse.strength == -first.start.strength
    written = (kept / "directions.safetensors").stat().st_mtime_ns
    again = lesson.load(model, None, kept)
    assert (kept / "directions.safetensors").stat().st_mtime_ns == written
    np.testing.assert_array_equal(
        first.directions["persona"].vectors, again.directions["persona"].vectors
    )
