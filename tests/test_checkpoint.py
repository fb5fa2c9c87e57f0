from __future__ import annotations

import json

import numpy as np
import pytest

from jaxsteer import checkpoint
from jaxsteer.convert import convert
from jaxsteer.errors import UserError
from jaxsteer.weights import flatten
from tests import tiny


@pytest.fixture
def saved(tmp_path):
    return convert(tiny.save(tiny.llama(), tmp_path / "hf"), tmp_path / "out", "float32")


def test_loading_gives_back_what_was_converted(saved):
    loaded = checkpoint.load(saved)
    expected = tiny.llama().state_dict()
    flat = flatten(loaded.params)
    np.testing.assert_array_equal(
        flat["layers/2/attn/q/kernel"], expected["model.layers.2.self_attn.q_proj.weight"].numpy().T
    )
    assert loaded.eos_token_ids == [2]


def test_a_changed_tokenizer_file_is_named(saved):
    path = saved / "tokenizer/tokenizer.json"
    path.write_text(path.read_text().replace("w7", "w8", 1))
    with pytest.raises(UserError, match=r"tokenizer/tokenizer\.json"):
        checkpoint.load(saved)


def test_a_changed_config_is_named(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match=r"config\.json does not match"):
        checkpoint.load(saved)


def test_a_flipped_byte_in_the_parameters_is_caught(saved):
    biggest = max(
        (p for p in (saved / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(biggest.read_bytes())
    data[len(data) // 2] ^= 1
    biggest.write_bytes(bytes(data))
    with pytest.raises(UserError, match="params"):
        checkpoint.load(saved)


def test_a_folder_that_is_no_checkpoint_is_refused_and_kept(saved, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(UserError, match="no checkpoint"):
        convert(tmp_path / "hf", tmp_path / "mine", "float32")
    assert (tmp_path / "mine/notes.txt").read_text() == "precious"
    with pytest.raises(UserError, match=r"no manifest\.json"):
        checkpoint.load(tmp_path / "mine")


def test_converting_again_replaces_the_checkpoint_and_leaves_nothing_beside_it(saved, tmp_path):
    convert(tmp_path / "hf", saved, "bfloat16")
    assert checkpoint.load(saved).manifest["dtype"] == "bfloat16"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]
