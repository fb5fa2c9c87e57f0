from __future__ import annotations

import os
import shutil
import threading
import zipfile

import huggingface_hub
import pytest

from jaxsteer.data.wheels import PinnedWheel
from jaxsteer.errors import UserError
from jaxsteer.files import sha256_file
from jaxsteer.model import chat_model
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests import tiny
from tests.tiny_gguf import write_gguf


def load(source):
    return ChatModel.load(chat_model.find(source))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("load") / "tiny")


@pytest.fixture
def folder(original, tmp_path, monkeypatch):
    """A Hugging Face folder of one's own, in an empty current folder, with an empty cache."""
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return shutil.copytree(original, tmp_path / "tiny")


@pytest.fixture
def conversions(monkeypatch):
    """What is converted, in order."""
    seen = []

    def counted(source, *arguments, **options):
        seen.append(str(source))
        return convert(source, *arguments, **options)

    monkeypatch.setattr(chat_model, "convert", counted)
    return seen


@pytest.fixture
def shipped(folder, tmp_path, monkeypatch):
    """A shipped model of a small GGUF in a wheel."""
    write_gguf(tmp_path / "small.gguf", "F32")
    path = tmp_path / "wheels/some_part-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "small.gguf", "small.gguf")
    monkeypatch.setenv("JAXSTEER_WHEELS", str(path.parent))
    wheel = PinnedWheel(
        name="some-part",
        version="1.0",
        sha256=sha256_file(path),
        members={"small.gguf": sha256_file(tmp_path / "small.gguf")},
    )
    monkeypatch.setattr(chat_model, "SHIPPED", {"small": wheel})
    monkeypatch.setattr(chat_model, "SHIPPED_DTYPE", "bfloat16")
    return "small"


def test_a_checkpoint_is_loaded_where_it_is(folder, tmp_path, conversions):
    made = convert(folder, tmp_path / "made", "bfloat16")
    assert chat_model.find(made) == chat_model.find(str(made), "bfloat16") == made
    assert load(made).name == "made"
    assert conversions == []
    with pytest.raises(UserError, match="made is in bfloat16, not float32; convert"):
        chat_model.find(made, "float32")


def test_a_hugging_face_folder_is_converted_once(folder, conversions, capsys):
    model = load(folder)
    assert model.name == "tiny" and model.identity()["dtype"] == "float32"
    assert "converting" in capsys.readouterr().err
    assert chat_model.find(str(folder)) == chat_model.find(folder)
    assert conversions == [str(folder)] and capsys.readouterr().err == ""


def test_a_changed_folder_and_another_dtype_are_converted_again(folder, conversions):
    first = chat_model.find(folder)
    assert chat_model.find(folder, "bfloat16") != first
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert chat_model.find(folder) != first
    assert len(conversions) == 3


def test_a_gguf_is_converted_once(folder, tmp_path, conversions):
    write_gguf(tmp_path / "small.gguf", "F32")
    assert load(tmp_path / "small.gguf").name == "small"
    chat_model.find(tmp_path / "small.gguf")
    assert len(conversions) == 1


def test_a_shipped_name_prepares_itself(shipped, tmp_path, conversions):
    found = chat_model.find(shipped)
    assert found.name == "small" and found.is_relative_to(tmp_path / "cache/checkpoints")
    assert load(shipped).identity()["dtype"] == "bfloat16"
    assert len(conversions) == 1


def test_a_prepared_model_is_taken_from_the_current_folder(shipped, conversions):
    assert chat_model.prepare(shipped) == chat_model.prepare(shipped) == chat_model.find(shipped)
    assert chat_model.find(shipped).parent.name == "checkpoints" and len(conversions) == 1
    # Another dtype is converted into the cache.
    assert chat_model.find(shipped, "float32").parent.parent.name == "checkpoints"
    assert chat_model.find(shipped, "float32") != chat_model.find(shipped)


def test_two_at_once_convert_once(shipped, conversions):
    both = [threading.Thread(target=chat_model.find, args=(shipped,)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(conversions) == 1


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The hub client's own cache with two commits of a model; `answer` is the hub's latest one."""
    commits = [letter * 40 for letter in "ab"]
    repo = tmp_path / "hub/models--some--model"
    for commit in commits:
        shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def answer(commit):
        if commit:
            (repo / "refs/main").write_text(commit)
        monkeypatch.setattr(chat_model, "hub_commit", lambda name: commit)

    return commits, answer


def test_a_hub_id_is_converted_once_for_each_commit(hub, conversions):
    commits, answer = hub
    for commit in (*commits, *commits):
        answer(commit)
        assert load("some/model").manifest.source.revision == commit
    assert len(conversions) == 2


def test_without_the_hub_the_commit_that_its_client_kept_is_taken(hub, conversions, capsys):
    commits, answer = hub
    answer(commits[0])
    first = chat_model.find("some/model")
    answer(None)
    assert chat_model.find("some/model") == first and len(conversions) == 1
    assert f"no answer from the hub; using its commit {commits[0]}" in capsys.readouterr().err


def test_without_the_hub_the_files_its_client_kept_are_converted(hub, conversions):
    commits, answer = hub
    answer(commits[1])
    answer(None)
    assert load("some/model").manifest.source.revision == commits[1]


def test_an_unknown_name_lists_what_can_be_given(folder, shipped):
    for name in ("nosuch", "checkpoints/nosuch"):
        with pytest.raises(UserError) as caught:
            chat_model.find(name)
        assert str(caught.value) == (
            f"no model {name}; give a checkpoint folder, a name (small), a Hugging Face folder, "
            "a .gguf file or a hub id (org/name)"
        )


def test_a_dtype_that_there_is_not_is_refused(folder):
    with pytest.raises(UserError, match="dtype 'int8' is not supported"):
        chat_model.find(folder, "int8")
