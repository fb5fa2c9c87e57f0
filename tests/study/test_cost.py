from __future__ import annotations

import pytest

from jaxsteer.errors import UserError
from jaxsteer.generation import prefill
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.study import cost, prepare, run, spec
from tests import tiny
from tests.bench.tpu import config_of
from tests.study import stand_ins

LLAMA_8B = config_of("llama-3.1-8b")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


LONG_AND_SHORT = ('system = "generic"', 'system = "generic"\nmodes = ["none", "friendly"]')


@pytest.mark.parametrize("changes", [(), (LONG_AND_SHORT,)])
def test_a_plan_foretells_rows_widths_and_tokens_of_the_run(model, tmp_path, monkeypatch, changes):
    study = spec.load(tiny.study_file(tmp_path, *changes))
    planned = cost.plan(study, model)
    widths, tokens = set(), [0.0]
    finish, segment = prefill.finish, prefill.segment

    def finished(*args):
        widths.add(args[7].shape[1])
        return finish(*args)

    def counted(*args):
        layers = args[5].cache if args[5] else args[1]["layers"]
        tokens[0] += args[4].size * len(layers) / model.config.n_layers
        return segment(*args)

    prepare.prepare(study, model, tmp_path / "results")
    monkeypatch.setattr(prefill, "finish", finished)
    monkeypatch.setattr(prefill, "segment", counted)
    # Read beside the rows, and not in the plan.
    monkeypatch.setattr(run, "_mode_shifts", lambda *_: [])
    summary = run.run_study(study, model, tmp_path / "results")
    assert planned.rows == sum(entry["n"] for entry in summary)
    assert planned.conditions == len({entry["condition"] for entry in summary})
    assert planned.widths == tuple(sorted(widths))
    # Batches are cut as they come, so a few more fillers than the plan counts.
    assert planned.computed_tokens <= tokens[0] <= 1.5 * planned.computed_tokens
    assert planned.open_choices == ()


def test_a_plan_says_what_is_still_to_choose(model):
    planned = cost.plan(spec.load("mode-audit"), model)
    assert planned.open_choices == ("layer of the persona", "dose", "layer of refusal")


def test_an_open_choice_without_selection_is_refused(model, tmp_path):
    study = spec.load(tiny.study_file(tmp_path, ("dose = 3.0\n", "")))
    with pytest.raises(UserError, match="dose is open"):
        cost.plan(study, model)


def test_full_size_models_have_their_published_numbers_of_parameters():
    assert cost.n_params(LLAMA_8B) == 8_030_261_248
    assert cost.n_params(config_of("qwen2.5-7b")) == 7_615_616_512


@pytest.mark.parametrize("name", ["llama3.1-8b-paper", "qwen2.5-7b-paper"])
def test_the_paper_studies_compile_for_their_models_with_every_condition_of_the_protocol(name):
    compiled = stand_ins.compiled(spec.load(name), LLAMA_8B.n_layers)
    names = [condition.name for condition in compiled]
    # PROTOCOL 2.1 lists 63 conditions for Llama and 64 for Qwen, the baseline among them.
    blocks = {"persona, natural", "user persona, natural", "I-Thou, natural", "minus refusal"}
    blocks |= {"I-Thou without assistant axis", "random, norm of I-Thou", "baseline"}
    blocks |= {"I-Thou at several blocks", "refusal out of blocks 14 to 27"}
    first = [condition for condition in compiled if condition.base in blocks]
    assert len(first) == (63 if name.startswith("llama") else 64)
    assert len([n for n in names if n.startswith("persona, random out at 22 #")]) >= 20
    cancelling = [condition.name for condition in compiled if condition.cancels_steering]
    assert cancelling == ["persona, out at steering layer"]
