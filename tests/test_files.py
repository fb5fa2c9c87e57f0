from __future__ import annotations

import errno

import pytest

from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path, write_json


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
