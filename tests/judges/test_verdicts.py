from __future__ import annotations

import polars as pl
import pytest

from jaxsteer.errors import UserError
from jaxsteer.judges import verdicts
from jaxsteer.judges.verdicts import Finding, JudgeRecord, Store

ROWS = pl.DataFrame({"row_id": ["a", "b", "c"], "response": ["one", "two", "three"]})
YES = Finding(score=1.0, verdict="yes", reason="so")


def store(folder, rows=ROWS, identity=None, **options) -> Store:
    record = JudgeRecord(name="judge", version="1", settings=identity or {"model": "m"})
    return Store(folder, record, rows, **options)


def test_verdicts_come_back_with_everything_that_names_them(tmp_path):
    with store(tmp_path) as made:
        made.add([("a", YES), ("b", Finding(reason="no reply: HTTP 500"))])
    table = verdicts.read_all(tmp_path)["judge"]
    assert table.schema == pl.Schema(verdicts.SCHEMA)
    assert table["judge"].to_list() == ["judge-1"] * 2
    assert table["judge_sha256"].unique().to_list() == [made.judge.sha256]
    assert table["response_sha256"][0] == verdicts.response_sha256("one")
    assert table.row(1, named=True)["verdict"] is None
    known = verdicts.provenance(tmp_path / "judges/judge.parquet")
    assert known["model"] == "m" and known["judge"] == "judge-1"


def test_the_next_run_knows_what_is_judged_and_what_stayed_unscored(tmp_path):
    with store(tmp_path) as first:
        first.add([("a", YES), ("b", Finding(reason="unparsable"))])
    again = store(tmp_path)
    assert again.judged() == {"a"}
    assert again.tried() == {"a", "b"}


def test_a_later_finding_on_a_row_replaces_the_earlier(tmp_path):
    with store(tmp_path) as first:
        first.add([("b", Finding(reason="unparsable"))])
    with store(tmp_path) as second:
        second.add([("b", YES), ("a", YES)])
    assert verdicts.read_all(tmp_path)["judge"].select("row_id", "verdict").rows() == [
        ("a", "yes"),
        ("b", "yes"),
    ]


def test_a_verdict_on_a_text_that_changed_is_dropped(tmp_path):
    with store(tmp_path) as first:
        first.add([("a", YES), ("b", YES)])
    changed = ROWS.with_columns(pl.Series("response", ["one", "TWO", "three"]))
    assert store(tmp_path, changed).judged() == {"a"}


def test_verdicts_of_another_judge_are_refused_plainly_and_kept(tmp_path):
    with store(tmp_path) as first:
        first.add([("a", YES)])
    before = (tmp_path / "judges/judge.parquet").read_bytes()
    with pytest.raises(UserError, match=r"another judge \(model was m, is n\); give --fresh"):
        store(tmp_path, identity={"model": "n"})
    assert (tmp_path / "judges/judge.parquet").read_bytes() == before


def test_a_file_without_verdicts_is_no_other_judges(tmp_path):
    with store(tmp_path) as first:
        first.add([("a", Finding(reason="no reply: HTTP 400"))])
    with store(tmp_path, identity={"model": "n"}) as second:
        assert second.tried() == set()
        second.add([("b", YES)])
    assert verdicts.read_all(tmp_path)["judge"]["row_id"].to_list() == ["b"]


def test_fresh_replaces_another_judges_verdicts(tmp_path):
    with store(tmp_path) as first:
        first.add([("a", YES), ("b", YES)])
    with store(tmp_path, identity={"model": "n"}, fresh=True) as second:
        second.add([("c", YES)])
    assert verdicts.read_all(tmp_path)["judge"]["row_id"].to_list() == ["c"]


def test_what_was_added_is_on_disk_after_an_exception(tmp_path):
    clock = iter(
        range(1000)
    ).__next__  # the second comes a second later, too soon to be written at once
    with pytest.raises(KeyboardInterrupt), store(tmp_path, clock=clock) as made:
        made.add([("a", YES)])
        made.add([("b", YES)])
        assert verdicts.read_all(tmp_path)["judge"].height == 1
        raise KeyboardInterrupt
    assert verdicts.read_all(tmp_path)["judge"].height == 2


def test_nothing_is_written_when_nothing_was_judged(tmp_path):
    with store(tmp_path):
        pass
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all"])
def test_a_damaged_file_is_one_clear_error(tmp_path, data):
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges/judge.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"judge\.parquet is damaged"):
        store(tmp_path)


def test_a_file_with_other_columns_or_repeated_rows_is_refused(tmp_path):
    with store(tmp_path) as made:
        made.add([("a", YES)])
    path = tmp_path / "judges/judge.parquet"
    table = pl.read_parquet(path)
    pl.concat([table, table]).write_parquet(path)
    with pytest.raises(UserError, match="two on one row"):
        verdicts.read(path)
    table.with_columns(row_id=pl.lit(None, pl.String)).write_parquet(path)
    with pytest.raises(UserError, match="a verdict without a row"):
        verdicts.read(path)
    table.drop("score").write_parquet(path)
    with pytest.raises(UserError, match="no column score"):
        verdicts.read(path)


def test_every_single_byte_change_is_refused_or_harmless(tmp_path, rng):
    with store(tmp_path) as made:
        made.add([("a", YES), ("b", YES)])
    path = tmp_path / "judges/judge.parquet"
    good = path.read_bytes()
    for at in rng.integers(0, len(good), 60):
        data = bytearray(good)
        data[at] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bytes(data))
        try:
            found = store(tmp_path).judged()
        except UserError:
            continue
        assert found <= {"a", "b"}
