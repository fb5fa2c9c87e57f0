from __future__ import annotations

import jax
import pytest

from jaxsteer.errors import UserError
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.study import cost, results, run, spec
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


def test_a_plan_counts_the_rows_and_tokens_of_the_run(model, tmp_path):
    study = spec.load(tiny.study_file(tmp_path))
    planned = cost.plan(study, model)
    summary = run.run_study(study, model, tmp_path / "results")
    table = results.load(tmp_path / "results").rows
    assert planned.rows == sum(entry["n"] for entry in summary) == table.height
    assert planned.conditions == len({entry["condition"] for entry in summary})
    assert planned.new_tokens >= table["n_tokens"].sum()
    assert 0 < planned.own_tokens < planned.prompt_tokens
    assert planned.weights_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert planned.open_choices == []


def test_a_plan_says_what_is_still_to_choose(model):
    planned = cost.plan(spec.load("mode-audit"), model)
    assert planned.open_choices == ["steer", "dose", "refusal"]


def test_an_open_choice_without_selection_is_refused(model, tmp_path):
    study = spec.load(tiny.study_file(tmp_path, ("dose = 3.0\n", "")))
    with pytest.raises(UserError, match="choice of dose"):
        cost.plan(study, model)
