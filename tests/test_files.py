from __future__ import annotations

import errno
import fcntl
import os

import pytest

from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path, locked, write_json


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "kept.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    path = tmp_path / "big.bin"
    with pytest.raises(UserError, match=r"big\.bin.*No space left"), atomic_path(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_killed_writers_leftovers_are_removed_when_the_folder_is_taken(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in (".setup.json.abc", "shards/.x.parquet.def"):
        (tmp_path / name).write_text("half")
    with locked(tmp_path):
        assert [p.name for p in tmp_path.rglob(".*")] == [".lock"]


def test_a_folder_is_free_again_after_use(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="in use"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_not_reported_as_in_use(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.raises(UserError, match="No locks available; choose another --out"),
        locked(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write .*file/results"),
        locked(tmp_path / "file/results"),
    ):
        pass
