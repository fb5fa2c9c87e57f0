"""What is refused before a run, and what a plan says."""

from __future__ import annotations

import jax
import pytest
from msgspec.structs import replace

from jaxsteer.errors import UserError
from jaxsteer.generation.distributed import Hosts
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.study import results, run, selection, spec
from tests import tiny

DIRECTION = 'persona = { kind = "trait", trait = "compliant" }\n'
SELECTION = "[selection]\nprompts = 2\nmax_new_tokens = 4\n"
CANDIDATES = "layers = [0.5]\nscales = [1.0]\n"
REFUSAL = ("[directions]\n", '[directions]\nrefusal = { kind = "refusal" }\n')
OPEN = ("dose = 3.0\n", "")


def chosen(old, new):
    """The study with an open dose and layers, and a [selection] changed in one place."""
    written = SELECTION + CANDIDATES
    assert old in written
    return OPEN, ("steer = 1, ", ""), (SELECTION, written.replace(old, new))


def claimed(control, expect):
    """The study with a test that names another control and expectation."""
    return [('control = "baseline", expect = "lower"', f"{control}, expect = {expect}")]


WRONG = {
    "layer in a condition": ([('at = "late"', 'at = "17"')], r"'persona, out'.*resid_post\.17"),
    "named layer": ([("late = 1.0", "late = 7")], r"layers\.late: unknown layer resid_post\.7"),
    "too few prompts": (chosen("prompts = 2", "prompts = 2000"), "asks for .* harmbench prompts"),
    "long replies": ([("new_tokens = 6", "new_tokens = 512")], "lower it"),
    "long replies in selection": (
        chosen("max_new_tokens = 4", "max_new_tokens = 900"),
        "lower it",
    ),
    "no room for a prompt": ([("new_tokens = 6", "new_tokens = 500")], "at most 12 fit"),
    "no token": (
        [REFUSAL, (SELECTION, SELECTION + 'refusal_openings = [" "]\n')],
        "refusal_openings holds ' '",
    ),
    "a claim's layer": (
        [
            (DIRECTION, DIRECTION + 'other = { kind = "trait", trait = "evil" }\n'),
            *claimed('control = "other"', '"cosine-above", at = "17"'),
        ],
        r"claim 'suppression'.*resid_post\.17",
    ),
    "a claim's twin": (
        claimed('control = "persona, unsteered"', '"lower"'),
        "there is no condition 'persona, unsteered'",
    ),
    "a layer of a candidate": (
        [*chosen("[0.5]", "[0.0, 0.5]"), ('at = "late"', 'at = "steer-1"')],
        r"'persona, out'.*resid_post\.-1 ",
    ),
    "a layer that is not chosen": (
        [("steer = 1, ", ""), (DIRECTION, DIRECTION.replace("persona", "charm"))]
        + [('"persona", at', '"charm", at')] * 3,
        "cannot read layers 'steer'",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


@pytest.mark.parametrize("name", WRONG)
def test_a_study_the_model_cannot_run_is_refused_before_anything_is_made(model, tmp_path, name):
    changes, message = WRONG[name]
    study = spec.load(tiny.study_file(tmp_path, *changes))
    with pytest.raises(UserError, match=message):
        run.run_study(study, model, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", WRONG)
def test_planning_refuses_what_running_refuses(model, tmp_path, name):
    changes, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        run.plan(spec.load(tiny.study_file(tmp_path, *changes)), model)


def test_every_process_refuses_it_by_itself(model, tmp_path):
    study = spec.load(tiny.study_file(tmp_path, ('at = "late"', 'at = "17"')))
    with pytest.raises(UserError, match=r"resid_post\.17"):
        run.run_study(study, model, tmp_path / "results", hosts=Hosts(process=1, count=1))


def test_fresh_keeps_the_old_results_from_a_study_that_cannot_run(model, tmp_path):
    out = tmp_path / "results"
    run.run_study(tiny.study(tmp_path), model, out)
    held = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    wrong = spec.load(tiny.study_file(tmp_path, ('at = "late"', 'at = "17"')))
    with pytest.raises(UserError, match=r"resid_post\.17"):
        run.run_study(wrong, model, out, fresh=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == held


def test_a_run_goes_on_with_the_layer_it_chose_though_another_candidate_would_not_do(
    model, tmp_path
):
    changes = (*chosen("[0.5]", "[0.0, 1.0]"), ('"persona", at = "steer"', '"persona", at = "1"'))
    study = spec.load(tiny.study_file(tmp_path, *changes, ('at = "late"', 'at = "steer+2"')))
    cells = [
        selection.DoseCandidate(layer=0, scale=scale, refusal=0.0, degenerate=0.0)
        for scale in (0.0, 1.0)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "checked", lambda *args: ([], []))
        patch.setattr(selection, "dose_candidates", lambda *args, **kwargs: cells)
        summary = run.run_study(study, model, tmp_path / "results")
    assert run.run_study(study, model, tmp_path / "results") == summary


@pytest.mark.parametrize(("candidates", "made"), [("[0.0, 0.5]", True), ("[0.5]", False)])
def test_a_claim_may_name_a_twin_that_only_some_candidate_makes(model, tmp_path, candidates, made):
    # With steer at 1 the study has that twin already, as "alone".
    ops = (
        '[{ add = "persona", at = "steer", scale = "dose" }, { project = "persona", at = "late" }]'
    )
    twisted = '[{ add = "persona", at = "late" }, { project = "persona", at = "steer" }]'
    alone = '[[condition]]\nname = "alone"\nops = [{ project = "persona", at = "1" }]'
    study = spec.load(
        tiny.study_file(
            tmp_path,
            *chosen("[0.5]", candidates),
            (ops, f"{twisted}\n{alone}"),
            *claimed('control = "persona, out, unsteered"', '"lower"'),
        )
    )
    if made:
        assert run.checked(study, model, {})[1] == []
    else:
        with pytest.raises(UserError, match="there is no condition"):
            run.checked(study, model, {})


def test_a_plan_counts_the_rows_and_tokens_of_the_run(model, tmp_path):
    study = spec.load(tiny.study_file(tmp_path))
    planned = run.plan(study, model)
    summary = run.run_study(study, model, tmp_path / "results")
    table = results.load(tmp_path / "results").rows
    assert planned.rows == sum(entry["n"] for entry in summary) == table.height
    assert len(planned.conditions) == len({entry["condition"] for entry in summary})
    assert planned.new_tokens >= table["n_tokens"].sum()
    assert 0 < planned.own_tokens < planned.prompt_tokens
    assert planned.memory["weights"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert planned.open_choices == []


def test_a_plan_says_what_is_still_to_choose(deep):
    planned = run.plan(spec.load("mode-audit"), deep)
    assert planned.open_choices == ["refusal", "steer", "dose", "window"]


def test_a_window_that_may_begin_behind_the_last_layer_is_refused(model):
    with pytest.raises(UserError, match=r"windows may begin at resid_post\.3; this model has"):
        run.plan(spec.load("mode-audit"), model)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A tiny model of 32 layers, which all shipped studies fit."""
    folder = tmp_path_factory.mktemp("deep")
    hf = tiny.llama(num_hidden_layers=32, max_position_embeddings=2048)
    return ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


@pytest.mark.parametrize("name", spec.shipped())
def test_every_shipped_study_can_be_planned(deep, name):
    planned = run.plan(spec.load(name), deep, limit=2)
    assert planned.rows > 0 and planned.conditions


@pytest.mark.slow
@pytest.mark.parametrize("name", spec.shipped())
def test_every_shipped_study_runs_to_its_end(deep, tmp_path, name):
    whole = spec.load(name)
    few = replace(whole.selection, prompts=2, refusal_train=4, refusal_validation=2)
    few = replace(few, max_new_tokens=2, allow_near_miss=True, max_degenerate=1.0)
    small = {"prompts": [replace(each, n=2) for each in whole.prompts], "selection": few}
    decoding = replace(whole.decoding, max_new_tokens=2)
    study = replace(whole, **small, decoding=decoding, allow_uninformative=True)
    assert run.run_study(study, deep, tmp_path / "results")
    found = results.load(tmp_path / "results")
    assert set(found.rows["condition"]) == {c.name for c in found.run.conditions}
