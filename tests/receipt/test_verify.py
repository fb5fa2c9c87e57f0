"""Verification: what it accepts, and that no changed byte passes."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import polars as pl
import pytest

from jaxsteer.errors import UserError
from jaxsteer.files import sha256_bytes
from jaxsteer.judges.verdicts import DEGENERATE, KEYWORD, SCHEMA
from jaxsteer.receipt import build, page, statement, verify
from jaxsteer.study import results
from tests.receipt import made


def outcome(path, **more):
    """mismatch, ok, or refused: what a user sees of a file."""
    try:
        return "ok" if verify.passed(verify.verify(path, **more)) else "mismatch"
    except UserError:
        return "refused"


def failed(path, **more):
    return {c.what for c in verify.verify(path, **more) if c.status == "mismatch"}


def forge(folder, change):
    """Change a receipt's value and make its digest and page anew, as a forger would."""
    value = json.loads((folder / build.JSON).read_text())
    change(value)
    value["predicate"]["digest"]["sha256"] = statement.digest(value)
    (folder / build.JSON).write_text(statement.canonical_text(value))
    (folder / build.HTML).unlink()
    return folder / build.JSON


def test_a_receipt_as_written_passes_with_its_results(finished):
    checks = verify.verify(finished / build.JSON, folder=finished)
    assert verify.passed(checks)
    assert [c.what for c in checks if c.status == "unchecked"] == [
        "the model's files",
        "the author of the receipt",
    ]


def test_what_was_not_given_is_said_to_be_unchecked(finished, tmp_path):
    shutil.copy(finished / build.JSON, tmp_path)
    unchecked = [c.what for c in verify.verify(tmp_path / build.JSON) if c.status == "unchecked"]
    assert unchecked == [
        "receipt.html shows this receipt",
        "the rows behind the counts",
        "the model's files",
        "the author of the receipt",
    ]


SHIPPED = "the prompts are those of the receipt, and shipped ones are as shipped"


def of_prompts(folder, what=SHIPPED):
    checks = verify.verify(folder / build.JSON, folder=folder)
    return next((c.status, c.detail) for c in checks if c.what == what)


def test_prompts_other_than_the_shipped_ones_are_named(finished, monkeypatch):
    shipped = verify.prompts.strongreject()

    def checked(found):
        monkeypatch.setattr(verify.prompts, "strongreject", found)
        return of_prompts(finished)

    def cannot():
        raise UserError("no network")

    assert checked(lambda: shipped)[0] == "ok"
    other = dataclasses.replace(shipped[3], text="Another text under its name.")
    status, detail = checked(lambda: [*shipped[:3], other, *shipped[4:]])
    assert status == "mismatch" and "strongreject prompts that were run are not those" in detail
    assert checked(cannot) == ("unchecked", "no network")


def test_kept_prompts_must_be_those_that_the_rows_answer(copied):
    path = copied / verify.prompts.SAVED
    kept = pl.read_parquet(path)
    kept.with_columns(pl.col("text") + "?").write_parquet(path)
    assert "the benign prompts in prompts.parquet have another hash" in of_prompts(copied)[1]


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_every_single_byte_change_is_caught(copied, count):
    path = copied / build.JSON
    raw = path.read_bytes()
    draw = random.Random(0)
    at_digest = raw.index(b'"digest"', raw.index(b'"date"'))
    positions = [draw.randrange(len(raw)) for _ in range(count * 9 // 10)]
    positions += [at_digest + draw.randrange(90) for _ in range(count // 10)]
    for position in positions:
        changed = bytearray(raw)
        changed[position] = draw.choice([b for b in range(256) if b != raw[position]])
        path.write_bytes(bytes(changed))
        assert outcome(path) != "ok", (position, raw[position], changed[position])


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_every_single_deletion_and_insertion_is_caught(copied, count):
    path = copied / build.JSON
    raw = path.read_bytes()
    draw = random.Random(1)
    for _ in range(count):
        at = draw.randrange(len(raw))
        for changed in (raw[:at] + raw[at + 1 :], raw[:at] + b" " + raw[at:]):
            path.write_bytes(changed)
            assert outcome(path) != "ok"


@pytest.mark.parametrize("old", [b"\n", b" ", b'"k": 18', b"0.45"])
def test_changes_that_keep_the_value_are_caught_too(copied, old):
    new = {b"\n": b"\r\n", b" ": b"  ", b'"k": 18': b'"k": 18.0', b"0.45": b"0.450"}[old]
    path = copied / build.JSON
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    assert "the file is as it was written" in failed(path)


@pytest.mark.parametrize("name", ["receipt.html", "run.json", "setup.json", "responses.parquet",
                                  "directions.safetensors", "summary.json"])  # fmt: skip
@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_changed_byte_in_each_file_next_to_it_is_caught(copied, name, count):
    path = copied / name
    raw = path.read_bytes()
    draw = random.Random(name)
    for _ in range(count):
        changed = bytearray(raw)
        position = draw.randrange(len(raw))
        changed[position] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(changed))
        assert outcome(copied / build.JSON, folder=copied) != "ok", position


def test_a_removed_file_is_missed(copied):
    (copied / "setup.json").unlink()
    assert "the results' files" in failed(copied / build.JSON, folder=copied)


def test_rows_of_another_run_do_not_pass(finished, tmp_path):
    def other(condition, family, i):
        given = made.usual(condition, family, i)
        return "refusal" if condition == "persona" and i == 1 else given

    folder = made.folder(tmp_path / "other", label=other)
    assert failed(finished / build.JSON, folder=folder) == {
        "the results' files",
        "the receipt rebuilt from the results",
    }


def built_anew(folder, frame):
    """The folder with other rows, and everything made of them made anew, as a forger would."""
    frame.write_parquet(folder / "responses.parquet")
    results.refresh_summary(folder)
    return build.write(folder)[0]


def relabelled(frame, row, label, judge):
    def at(column, value):
        return pl.when(pl.col("row_id") == row).then(pl.lit(value)).otherwise(column).alias(column)

    return frame.with_columns(at("label", label), at("judge", judge))


LABELLED = "labels that need no model follow from the replies"


@pytest.mark.parametrize(
    ("was", "label", "judge"),
    [
        ("refusal", "complied-unscored", ""),
        ("complied-unscored", "refusal", KEYWORD.label),
        ("complied-unscored", "degenerate", DEGENERATE.label),
        ("complied-unscored", "bypass", ""),
        ("complied-unscored", "benign-answer", "llama-guard-1"),
    ],
)
def test_a_label_that_does_not_follow_from_its_reply_is_found(copied, was, label, judge):
    frame = pl.read_parquet(copied / "responses.parquet")
    row = frame.filter(pl.col("label") == was)["row_id"][0]
    path = built_anew(copied, relabelled(frame, row, label, judge))
    assert failed(path) == set()
    assert failed(path, folder=copied) == {LABELLED}


def test_labels_of_another_version_of_a_rule_are_said_to_be_unchecked(copied):
    frame = pl.read_parquet(copied / "responses.parquet")
    row = frame.filter(pl.col("label") == "complied-unscored")["row_id"][0]
    checks = verify.verify(
        built_anew(copied, relabelled(frame, row, "refusal", "keyword-0")), folder=copied
    )
    assert verify.passed(checks)
    [check] = [c for c in checks if c.what == "labels by other versions of the rules"]
    assert check.status == "unchecked"
    assert check.detail.startswith("keyword-0 gave some")


def test_a_verdict_that_does_not_follow_from_its_reply_is_found(copied):
    frame = pl.read_parquet(copied / "responses.parquet")
    verdicts = made.guard(frame).with_columns(
        judge=pl.lit(KEYWORD.label),
        verdict=pl.when(frame["label"] == "refusal")
        .then(pl.lit("refusal"))
        .otherwise(pl.lit("other")),
    )
    (copied / "judges").mkdir()

    def judged(table):
        table.cast(SCHEMA).write_parquet(copied / "judges/keyword.parquet")
        return failed(built_anew(copied, frame), folder=copied)

    assert judged(verdicts) == set()
    assert judged(verdicts.with_columns(verdict=pl.lit("other"))) == {LABELLED}


def conditions(value):
    return value["predicate"]["conditions"]


def claims_of(value):
    return {claim["name"]: claim for claim in value["predicate"]["claims"]}


WITHOUT_RESULTS = {
    "a rate": lambda v: conditions(v)[0]["outcomes"]["strongreject"]["refusal"].update(rate=0.9),
    "an interval": lambda v: conditions(v)[0]["outcomes"]["benign"]["refusal"].update(high=0.1),
    "a count": lambda v: conditions(v)[1]["outcomes"]["strongreject"]["counts"].update(refusal=9),
    "rows left out": lambda v: conditions(v).pop(),
    "judged bypass": lambda v: conditions(v)[0]["outcomes"]["strongreject"].update(unjudged=0),
    "the rows": lambda v: v["predicate"]["rows"].update(n=7),
    "the deciding judges": lambda v: v["predicate"]["judges"]["decided"].update({"keyword-1": 1}),
    "a condition twice": lambda v: conditions(v)[1].update(name=conditions(v)[0]["name"]),
    "a verdict": lambda v: claims_of(v)["more bypass"].update(verdict="confirmed"),
    "the words of a claim": lambda v: claims_of(v)["suppression"].update(reason="clear as day"),
    "a p-value": lambda v: claims_of(v)["suppression"]["comparisons"][0].update(p=0.2),
    "a failed comparison left out": lambda v: claims_of(v)["none by random"].update(comparisons=[]),
    "what a claim needs": lambda v: claims_of(v)["restoration"]["comparisons"][0].update(
        needs=["more bypass"]
    ),
    "a claim's prompts at risk": lambda v: claims_of(v)["none by random"]["comparisons"][0].update(
        at_risk=9
    ),
    "a claim's own counts": lambda v: claims_of(v)["more bypass"]["comparisons"].append(
        claims_of(v)["suppression"]["comparisons"][0] | {"control_k": 17}
    ),
}
WITH_RESULTS = {
    "a date": lambda v: v["predicate"].update(date="2030-01-01T00:00:00+00:00"),
    "samples of a direction": lambda v: v["predicate"]["steering"]["directions"][0].update(
        n_positive=9
    ),
    "algebra as evidence": lambda v: next(
        c for c in conditions(v) if c["name"] == "persona, out late"
    ).update(cancels_steering=True),
    "a policy": lambda v: v["predicate"]["policy"].update(text="Anything goes."),
    "a system prompt": lambda v: conditions(v)[0].update(system_sha256="0" * 64),
    "the model": lambda v: v["predicate"]["model"].update(weights_sha256="0" * 64),
    "a subject": lambda v: v["subject"].pop(),
    "an envelope": lambda v: v["predicate"]["random_controls"][0].update(low=0.1),
    "a twin": lambda v: v["predicate"]["paired_controls"][0].update(difference=0.5),
    "the last digit of a dose": lambda v: v["predicate"]["steering"].update(dose=4.00001),
    "a float as a whole number": lambda v: v["predicate"]["steering"].update(dose=4),
}


@pytest.mark.parametrize("what", WITHOUT_RESULTS)
def test_a_forged_figure_with_a_new_digest_does_not_follow_from_the_counts(copied, what):
    path = forge(copied, WITHOUT_RESULTS[what])
    assert "the file is as it was written" not in failed(path)
    assert failed(path)


@pytest.mark.parametrize("what", WITH_RESULTS)
def test_a_consistent_forgery_is_found_with_the_results(copied, what):
    path = forge(copied, WITH_RESULTS[what])
    assert failed(path, folder=copied) == {"the receipt rebuilt from the results"}


def as_another_version(folder, change=lambda predicate: None):
    """A receipt that another version seems to have written."""

    def renamed(value):
        value["predicate"]["tool"] = "jaxsteer 0.0.9"
        change(value["predicate"])

    return forge(folder, renamed)


def test_a_receipt_of_another_version_says_so_and_is_compared_all_the_same(copied):
    checks = verify.verify(as_another_version(copied), folder=copied)
    assert verify.passed(checks)
    [check] = [c for c in checks if c.what == "the version that wrote the receipt"]
    assert check.status == "unchecked"
    assert check.detail.startswith("jaxsteer 0.0.9 wrote it")
    assert check.what in verify.verdict(checks)


def test_figures_of_another_versions_receipt_are_compared_to_the_last_digit(copied):
    path = as_another_version(copied, lambda p: p["steering"].update(dose=4.00001))
    assert failed(path, folder=copied) == {"the receipt rebuilt from the results"}


def test_a_page_that_another_version_made_is_said_to_be_unchecked(copied):
    drawn = (copied / build.HTML).read_text()
    digest = sha256_bytes((copied / build.JSON).read_bytes())
    path = as_another_version(copied)
    bound = drawn.replace(digest, sha256_bytes(path.read_bytes()))
    (copied / build.HTML).write_text(bound.replace("not confirmed", "confirmed"))
    checks = verify.verify(path)
    assert verify.passed(checks)
    assert "receipt.html shows this receipt" in verify.verdict(checks).partition("Not checked")[2]


def test_a_page_that_another_version_made_the_same_way_is_checked(copied):
    path = as_another_version(copied)
    drawn = page.html(statement.load(path), sha256_bytes(path.read_bytes()))
    (copied / build.HTML).write_text(drawn)
    [check] = [c for c in verify.verify(path) if "receipt.html" in c.what]
    assert check.status == "ok"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"_type": 1e999}',
        b'{"a": NaN}',
        b"1" * 5000,
    ],
)
def test_what_is_not_a_receipt_is_refused_in_one_line(tmp_path, raw):
    (tmp_path / "receipt.json").write_bytes(raw)
    with pytest.raises(UserError) as caught:
        verify.verify(tmp_path / "receipt.json")
    assert "\n" not in str(caught.value)


def test_other_statements_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps({"_type": "https://in-toto.io/Statement/v1", "predicateType": "x"}))
    with pytest.raises(UserError, match="of another kind"):
        verify.verify(path)
    older = {"predicateType": "urn:jaxsteer:refusal-receipt:v1"}
    path.write_text(json.dumps({"_type": "https://in-toto.io/Statement/v1", **older}))
    with pytest.raises(UserError, match=r"or version .*v1.*with the jaxsteer that wrote it"):
        verify.verify(path)
    with pytest.raises(UserError, match="cannot read"):
        verify.verify(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot read"):
        verify.verify(tmp_path)


def test_a_page_drawn_from_another_receipt_is_a_mismatch(copied, tmp_path):
    other = made.folder(tmp_path / "other", study=made.study(claims=[]))
    build.write(other)
    shutil.copy(other / build.HTML, copied)
    [check] = [c for c in verify.verify(copied / build.JSON) if "receipt.html" in c.what]
    assert (check.status, check.detail) == ("mismatch", "it was made from another receipt.json")


def test_a_page_is_bound_to_the_bytes_of_its_receipt(finished):
    digest = sha256_bytes((finished / build.JSON).read_bytes())
    assert digest in (finished / build.HTML).read_text()


def mutate(value, draw):
    """One random change somewhere in a JSON value."""
    spots = []

    def walk(at):
        for key in at if isinstance(at, dict) else range(len(at)):
            spots.append((at, key))
            if isinstance(at[key], dict | list):
                walk(at[key])

    walk(value)
    at, key = draw.choice(spots)
    odd = [None, True, -1, 0, 1, 1e308, 0.5, "", "x", "\x1b[31m", "<script>", [], {}, [[]], 10**30,
           {"a": 1}, "0" * 64]  # fmt: skip
    kind = draw.randrange(4)
    if kind == 0:
        del at[key]
    elif kind == 1 and isinstance(at, dict):
        at[f"{key}x"] = at.pop(key)
    elif kind == 2 and isinstance(at, list):
        at.append(at[key])
    else:
        at[key] = draw.choice([o for o in odd if o != at[key] or type(o) is not type(at[key])])
    return value


@pytest.mark.parametrize("count", [20, pytest.param(350, marks=pytest.mark.slow)])
def test_mutated_receipts_never_pass_and_never_crash(copied, count):
    path = copied / build.JSON
    text = path.read_text()
    draw = random.Random(2)
    for _ in range(count):
        value = mutate(json.loads(text), draw)
        path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        assert outcome(path) != "ok"


@pytest.mark.parametrize("count", [10, pytest.param(250, marks=pytest.mark.slow)])
def test_mutated_receipts_with_new_digests_never_pass_with_their_results(copied, count):
    path = copied / build.JSON
    (copied / build.HTML).unlink()
    text = path.read_text()
    draw = random.Random(3)
    for _ in range(count):
        value = mutate(json.loads(text), draw)
        if isinstance(value.get("predicate"), dict):
            if value == json.loads(text):
                continue
            value["predicate"]["digest"] = {"sha256": statement.digest(value)}
        path.write_text(statement.canonical_text(value))
        if path.read_text() != text:
            assert outcome(path, folder=copied) != "ok"


def test_half_a_character_where_a_number_belongs_is_not_the_shape_of_a_receipt(copied):
    def broken(value):
        outcomes = value["predicate"]["conditions"][2]["outcomes"]["strongreject"]
        outcomes["counts"]["bypass"] = "\ud800"

    with pytest.raises(UserError, match="not shaped like a receipt"):
        statement.load(forge(copied, broken))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n"), [("run.json", 90), ("setup.json", 30), ("summary.json", 15)]
)
def test_mutated_records_never_crash_a_build_or_pass(copied, name, n):
    path = copied / name
    text = path.read_text()
    draw = random.Random(name)
    for _ in range(n):
        path.write_text(json.dumps(mutate(json.loads(text), draw), indent=2))
        assert outcome(copied / build.JSON, folder=copied) != "ok"


VALUES = [None, "", "x", "refusal", 1, -1, 2.5, float("nan"), float("inf"), True, [1.0], b"x"]


def damage(frame, draw):
    """A table with one random change: a column, a cell or a row; None if none came of it."""
    name = draw.choice(frame.columns)
    kind = draw.randrange(5)
    if kind == 0:
        return frame.drop(name)
    if kind == 1:
        return frame.with_columns(pl.Series(name, [draw.choice(VALUES)] * frame.height))
    if kind == 2:
        return pl.concat([frame, frame.slice(draw.randrange(frame.height), 1)])
    if kind == 3:
        gone = draw.randrange(frame.height)
        return frame.with_row_index("i").filter(pl.col("i") != gone).drop("i")
    column = frame[name].to_list()
    column[draw.randrange(len(column))] = draw.choice(VALUES)
    changed = frame.with_columns(pl.Series(name, column, strict=False))
    return None if changed.equals(frame) or changed.schema[name] == pl.Object else changed


@pytest.mark.parametrize("name", ["responses", "judges/llama-guard", "judges/leakage"])
@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_damaged_tables_never_crash_a_build_or_pass(tmp_path, name, count):
    folder = made.folder(tmp_path / "made")
    verdicts = made.guard(pl.read_parquet(folder / "responses.parquet")).cast(SCHEMA)
    (folder / "judges").mkdir()
    for judge in ("llama-guard", "leakage"):
        verdicts.write_parquet(folder / f"judges/{judge}.parquet")
    results.refresh_summary(folder)
    build.write(folder)
    assert outcome(folder / build.JSON, folder=folder) == "ok"
    frame = pl.read_parquet(folder / f"{name}.parquet")
    draw = random.Random(name)
    for _ in range(count):
        changed = damage(frame, draw)
        if changed is not None:
            changed.write_parquet(folder / f"{name}.parquet")
            assert outcome(folder / build.JSON, folder=folder) != "ok"
