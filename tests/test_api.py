"""The public face: what `import jaxsteer as js` offers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import jaxsteer as js
from jaxsteer.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSTEER_CACHE", str(folder / "cache"))
        yield js.load(tiny.save(tiny.llama(), folder / "hf"))


@pytest.fixture(scope="module")
def persona(model):
    return js.direction(model, "compliant")


def test_a_hugging_face_folder_is_converted_once(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "cache"))
    source = tiny.save(tiny.qwen2(), tmp_path / "hf")
    first = js.load(source)
    assert "converting" in capfd.readouterr().err
    again = js.load(source)
    assert "converting" not in capfd.readouterr().err
    assert first.weights_sha256 == again.weights_sha256 != model.weights_sha256


def test_a_direction_is_kept_with_its_model(model, persona, capfd):
    assert persona.vectors.shape == (model.config.n_layers, model.config.d_model)
    again = js.direction(model, "compliant")
    assert capfd.readouterr().err == "" and again.sha256 == persona.sha256
    like = np.linalg.norm(js.random(persona, 1).vectors, axis=1)
    np.testing.assert_allclose(like, np.linalg.norm(persona.vectors, axis=1), rtol=1e-5)


# Two prompts, three conditions and four tokens wherever possible: the same programs.
PROMPTS = ["w4 w5", "w6"]


@pytest.fixture(scope="module")
def conditions(persona):
    steer = js.add(persona, at=1, scale=4)
    return {"plain": [], "steered": [steer], "out": [steer, js.project(persona, at="1..2")]}


@pytest.fixture(scope="module")
def made(model, conditions):
    return model.generate(PROMPTS, conditions=conditions, max_new_tokens=4)


def test_generate_gives_one_reply_for_each_condition_and_prompt(model, conditions, made):
    table = made.table()
    assert table.columns == ["condition", "prompt", "reply", "label", "change"]
    assert table["condition"].to_list() == [name for name in conditions for _ in range(2)]
    assert (table["change"] > 0).to_list() == [False] * 2 + [True] * 4
    steered = {"steered": conditions["steered"]}
    alone = model.generate(PROMPTS[1:], conditions=steered, max_new_tokens=4)
    assert alone.rows[0].text == made.rows[3].text


def test_stream_writes_the_reply_of_generate(model, conditions, made):
    pieces = list(model.stream(PROMPTS[0], conditions=conditions, max_new_tokens=4))
    written = {
        name: "".join(piece.text for piece in pieces if piece.condition == name)
        for name in conditions
    }
    assert list(written.values()) == [reply.text for reply in made.rows[::2]]


def test_an_intervention_without_effect_is_an_error(model, conditions, persona):
    nothing = conditions | {"out": [js.add(persona, at=1, scale=0)]}
    with pytest.raises(UserError, match="'out' changed nothing"):
        model.generate(PROMPTS, conditions=nothing, max_new_tokens=4)
    with pytest.raises(UserError, match="'out' changed nothing"):
        list(model.stream(PROMPTS[0], conditions=nothing, max_new_tokens=4))


def test_importing_jaxsteer_imports_no_jax():
    code = "import sys, jaxsteer; print('jax' in sys.modules, sorted(jaxsteer.__all__)[:2])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False ['Model', 'Replies']\n"
