from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from jaxsteer.data import prompts as data
from jaxsteer.directions import samples
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.study import results, run, spec
from tests import tiny

POLICY = "w1 w2 w3"


@pytest.fixture(scope="module")
def hf():
    return tiny.llama()


@pytest.fixture(scope="module")
def model(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    return ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


def test_a_shift_is_the_difference_of_hf_states_in_norms_of_the_direction(hf, model, rng):
    prompts = [
        data.Prompt(id=str(i), family="benign", kind="benign", category="", text=text)
        for i, text in enumerate(["w4 w5", "w6", "w7 w8 w9"])
    ]
    mode = data.Mode(name="loud", version="1", text="w20 w21")
    vectors = rng.standard_normal((3, 32)).astype(np.float32) * 5
    direction = Direction(name="v", vectors=vectors, provenance={})

    def measured(prompts, layer):
        modes = [data.mode("none"), mode]
        return samples.shifts(model, modes, POLICY, prompts, {"v": direction}, layer)

    def state(system, text, layer):
        ids = torch.tensor([model.tokenizer.chat(text, system)])
        return hf(ids, output_hidden_states=True).hidden_states[layer + 1][0, -1].numpy()

    # The last entry of hidden_states is after the final norm, so the last layer is not compared.
    for layer in range(2):
        unit = vectors[layer] / np.linalg.norm(vectors[layer])
        along = [
            unit @ (state(f"w20 w21\n\n{POLICY}", p.text, layer) - state(POLICY, p.text, layer))
            for p in prompts
        ]
        norm = np.linalg.norm(vectors[layer])
        (shift,) = measured(prompts, layer)
        assert (shift.mode, shift.direction, shift.n) == ("loud", "v", 3)
        assert shift.at == f"resid_post.{layer}" and len(shift.by_layer) == 3
        assert shift.shift == pytest.approx(np.mean(along) / norm, abs=1e-5)
        half = 1.959964 * np.std(along, ddof=1) / np.sqrt(3) / norm
        assert shift.low == pytest.approx(shift.shift - half, abs=1e-5)
        assert shift.high == pytest.approx(shift.shift + half, abs=1e-5)
    (alone,) = measured(prompts[:1], 1)
    assert (alone.n, alone.low, alone.high) == (1, None, None)


def test_a_study_with_modes_runs_every_condition_under_each_and_records_the_shifts(model, tmp_path):
    change = ('system = "generic"', 'system = "generic"\nmodes = ["none", "direct", "friendly"]')
    study = spec.load(tiny.study_file(tmp_path, change))
    run.run_study(study, model, tmp_path / "results")
    loaded = results.load(tmp_path / "results")
    assert set(loaded.rows["mode"]) == {"none", "direct", "friendly"}
    assert loaded.rows.group_by("mode").len()["len"].n_unique() == 1
    found = json.loads((tmp_path / "results/modes.json").read_text())
    assert [(f["mode"], f["direction"]) for f in found] == [
        ("direct", "persona"),
        ("friendly", "persona"),
    ]
    assert all(f["low"] <= f["shift"] <= f["high"] and len(f["by_layer"]) == 3 for f in found)


def test_modes_from_two_files_with_one_name_are_refused(model, tmp_path):
    files = [tmp_path / "first.toml", tmp_path / "second.toml"]
    for path in files:
        path.write_text(f'name = "mine"\nversion = "1"\ntext = "Be the {path.stem}."\n')
    first, second = map(str, files)
    change = ('system = "generic"', f'system = "generic"\nmodes = ["{first}", "{second}"]')
    study = spec.load(tiny.study_file(tmp_path, change))
    with pytest.raises(UserError, match="two modes are named 'mine'; rename one"):
        run.run_study(study, model, tmp_path / "results")
