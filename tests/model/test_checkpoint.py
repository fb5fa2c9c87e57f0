from __future__ import annotations

import hashlib
import json
import shutil
import threading

import numpy as np
import pytest
from filelock import FileLock

from jaxsteer.errors import UserError
from jaxsteer.model import checkpoint
from jaxsteer.model.convert import convert
from jaxsteer.model.weights import flatten
from tests import tiny
from tests.cli.command import jaxsteer


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
    assert loaded.manifest.eos_token_ids == [2]


def test_a_changed_tokenizer_file_is_named(saved):
    path = saved / "tokenizer/tokenizer.json"
    path.write_text(path.read_text().replace("w7", "w8", 1))
    with pytest.raises(UserError, match=r"tokenizer/tokenizer\.json"):
        checkpoint.load(saved)


def test_a_changed_config_is_named(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"norm_eps": 0.1}))
    with pytest.raises(UserError, match=r"config\.json is missing or does not match"):
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


def test_a_tokenizer_file_that_the_manifest_does_not_know_is_named(saved):
    # It would change the prompts, and the tokenizer's hash would not say so.
    (saved / "tokenizer/special_tokens_map.json").write_text('{"eos_token": "<s>"}')
    with pytest.raises(UserError, match=r"tokenizer/special_tokens_map\.json"):
        checkpoint.load(saved)


def test_a_folder_among_the_tokenizers_files_is_named(saved):
    (saved / "tokenizer/chat_templates").mkdir()
    with pytest.raises(UserError, match="tokenizer/chat_templates is missing or does not match"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: "{}",
        lambda text: "[1]",
        lambda text: text.replace('"float32"', "5"),
        lambda text: text.replace('"weights_sha256"', '"other"'),
        lambda text: text.replace('"config_sha256"', '"other"'),
        lambda text: text.replace('"eos_token_ids": [', '"eos_token_ids": ["two", '),
    ],
)
def test_a_damaged_manifest_is_named(saved, damage):
    path = saved / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"manifest\.json cannot be read \("):
        checkpoint.load(saved)


def test_missing_parameters_are_one_line(saved):
    shutil.rmtree(saved / "params")
    with pytest.raises(UserError, match=r"out/params cannot be read \([^\n]*\); convert") as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(saved, tmp_path):
    source, out = tmp_path / "hf", tmp_path / "big"
    done = jaxsteer("convert", source, "--out", out, file_limit=20_000)
    assert done.returncode == 2
    assert done.stderr.startswith(f"jaxsteer: cannot write {out}: File too large; free space")
    assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".big.lock", ".out.lock", "hf", "out"]


def test_an_array_is_known_by_its_type_shape_and_bytes():
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(b"float32(2, 3)" + value.tobytes()).hexdigest()
    assert checkpoint.array_sha256(value) == expected
    assert checkpoint.array_sha256(np.asfortranarray(value)) == expected
    others = [value.reshape(3, 2), value.astype(np.float64), value.view(np.int32), -value]
    assert expected not in [checkpoint.array_sha256(other) for other in others]


def test_a_folder_that_is_no_checkpoint_is_refused_and_kept(saved, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(UserError, match="not a checkpoint"):
        convert(tmp_path / "hf", tmp_path / "mine", "float32")
    assert (tmp_path / "mine/notes.txt").read_text() == "precious"
    with pytest.raises(UserError, match=r"manifest\.json cannot be read .*; convert the model"):
        checkpoint.load(tmp_path / "mine")


def test_converting_again_replaces_the_checkpoint_and_leaves_a_lock_beside_it(saved, tmp_path):
    convert(tmp_path / "hf", saved, "bfloat16")
    assert checkpoint.load(saved).manifest.dtype == "bfloat16"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "hf", "out"]


@pytest.fixture
def left_behind(saved, tmp_path):
    """What a conversion into `saved` leaves that is killed while it writes."""
    folder = tmp_path / ".out.converting"
    (folder / "made/params").mkdir(parents=True)
    return folder


def test_what_a_killed_conversion_left_is_removed_by_the_next(saved, tmp_path, left_behind):
    convert(tmp_path / "hf", saved, "float32")
    assert not left_behind.exists()


def test_two_conversions_into_one_folder_run_one_after_the_other(saved, tmp_path):
    def other():
        convert(tmp_path / "hf", saved, "bfloat16")

    with FileLock(tmp_path / ".out.lock"):
        second = threading.Thread(target=other)
        second.start()
        second.join(timeout=0.5)
        assert checkpoint.load(saved).manifest.dtype == "float32"
    second.join()
    assert checkpoint.load(saved).manifest.dtype == "bfloat16"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "hf", "out"]


def test_a_checkpoint_that_was_being_replaced_at_the_kill_is_put_back(saved, left_behind):
    config = checkpoint.load(saved).config
    saved.rename(left_behind / "old")

    def full(folder):
        raise OSError(0, "disk full")

    source = checkpoint.read_manifest(left_behind / "old").source
    with pytest.raises(UserError, match="disk full"):
        checkpoint.save(saved, config, {}, write_tokenizer=full, eos_token_ids=[], source=source)
    assert checkpoint.load(saved).manifest.dtype == "float32"
