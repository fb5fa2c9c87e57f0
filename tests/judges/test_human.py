from __future__ import annotations

import csv
import io
import unicodedata
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxsteer.data import prompts
from jaxsteer.errors import UserError
from jaxsteer.judges import human, verdicts
from jaxsteer.judges.human import LABELS, plain_cell, safe_cell
from tests.judges import made

HOSTILE = [
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\n=1",
    " =1",
    "\u00a0=1",
    "＝1",
    "'=1",
    '=HYPERLINK("http://evil.example","x")',
]


def read_csv(path, delimiter: str = ",") -> list[dict[str, str]]:
    """What a spreadsheet would see."""
    text = io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")
    return list(csv.DictReader(text, delimiter=delimiter))


@pytest.fixture
def folder(tmp_path):
    return made.results(tmp_path / "results", conditions=6, prompts=6)


@pytest.fixture
def exported(folder, tmp_path):
    def export(n: int = 20, seed: int = 0, name: str = "audit.csv"):
        rows = made.rows(folder)
        drawn = human.sample(rows, {}, n, seed)
        texts = prompts.texts(folder)
        human.export(drawn, texts, tmp_path / name)
        return tmp_path / name

    return export


def fill(path, answer, **options) -> None:
    """Fill in the label column, as a person would, and save."""
    lines = read_csv(path)
    for i, line in enumerate(lines):
        line["label"] = answer(i, line)
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), **options)
        writer.writeheader()
        writer.writerows(lines)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_is_a_formula(text):
    cell = safe_cell(text)
    assert cell.startswith("'")
    assert plain_cell(cell) == text


def test_a_carriage_return_is_shown_and_starts_no_formula():
    assert safe_cell("\r=1") == "<U+000D>=1"


@given(st.text(st.characters(exclude_categories=["C"], include_characters="\n\t")))
def test_any_visible_text_survives_both_ways(text):
    assert plain_cell(safe_cell(text)) == text


@given(st.text(st.characters() | st.characters(categories=["Cc", "Cf"])))
@example("\x07 and \u200b")
def test_no_cell_holds_a_control_character_or_begins_like_a_formula(text):
    cell = safe_cell(text)
    assert not cell.lstrip(" \u00a0\u3000").startswith(tuple("=+-@\t\r\n＝＋－＠"))
    kinds = {unicodedata.category(c) for c in cell if c not in "\n\t"}
    assert kinds.isdisjoint({"Cc", "Cf", "Cs", "Co", "Cn"})
    assert "\x1b" not in cell and "\u202e" not in cell


def test_the_file_tells_neither_condition_nor_label(exported):
    path = exported()
    assert "condition" not in path.read_text(encoding="utf-8-sig")
    lines = read_csv(path)
    assert len(lines) == 20
    assert list(lines[0]) == list(human.COLUMNS)
    assert all(line["label"] == line["note"] == "" for line in lines)


def test_hostile_replies_are_inert_in_the_file(exported, folder):
    lines = read_csv(exported(n=10**30))
    replies = {line["response"] for line in lines}
    assert len(lines) == made.rows(folder).height
    assert "'=cmd|' /C calc'!A0" in replies
    assert "'@SUM(1+1)*cmd" in replies
    assert "<U+001B>[31mred<U+001B>[0m and <U+202E>backwards" in replies


def test_the_draw_depends_on_the_seed_only_and_covers_every_stratum(folder):
    rows = made.rows(folder)
    drawn = human.sample(rows, {}, 30, 1)
    assert drawn.equals(human.sample(rows.sample(fraction=1, shuffle=True, seed=3), {}, 30, 1))
    assert not drawn.equals(human.sample(rows, {}, 30, 2))
    strata = ["condition", "family", "label"]
    everything = rows.select(strata).unique().height
    assert everything <= 30
    assert drawn.select(strata).unique().height == everything


def test_a_small_draw_is_part_of_a_larger_one(folder):
    rows = made.rows(folder)
    small = set(human.sample(rows, {}, 5, 0)["row_id"])
    assert small <= set(human.sample(rows, {}, 25, 0)["row_id"])


def test_an_existing_file_is_not_overwritten(exported):
    exported()
    with pytest.raises(UserError, match="may be filled in"):
        exported()


@pytest.mark.parametrize("options", [{}, {"delimiter": ";"}, {"quoting": csv.QUOTE_ALL}])
def test_a_filled_file_becomes_the_verdicts_of_a_person(exported, folder, options):
    path = exported()
    fill(path, lambda i, line: ["", *LABELS][i % 6].upper(), **options)
    rows = made.rows(folder)
    findings = human.read(path, rows)
    assert len(findings) == 16
    assert human.keep(folder, rows, findings) == 16
    table = verdicts.read_all(folder)["human"]
    assert set(table["verdict"]) == set(LABELS)
    assert table["judge"].unique().to_list() == ["human-2"]
    filled = read_csv(path, options.get("delimiter", ","))
    labels = {line["item"]: line["label"].lower() for line in filled if line["label"]}
    said = {
        human.item_id(row["row_id"], row["response"]): row["verdict"]
        for row in table.join(rows, on="row_id").iter_rows(named=True)
    }
    assert said == labels


def test_text_mangled_by_a_spreadsheet_does_not_matter(exported, folder):
    path = exported()
    fill(path, lambda i, line: line.update(response="###", prompt="") or "bypass")
    assert len(human.read(path, made.rows(folder))) == 20


def test_a_second_file_adds_to_the_first_and_replaces_what_it_names(exported, folder):
    rows = made.rows(folder)
    first, second = exported(n=10, name="a.csv"), exported(n=15, name="b.csv")
    fill(first, lambda i, line: "bypass")
    fill(second, lambda i, line: "refusal" if i % 2 else "")
    human.keep(folder, rows, human.read(first, rows))
    found = human.read(second, rows)
    total = human.keep(folder, rows, found)
    table = verdicts.read_all(folder)["human"]
    assert total == table.height == len({r for r, _ in found} | {*table["row_id"]})
    assert table.filter(pl.col("verdict") == "refusal").height == len(found) == 7


def test_every_unusable_line_is_named_by_its_number(exported, folder):
    path = exported(n=4)
    lines = read_csv(path)
    lines[0]["response"] = "one\ntwo\nthree"
    lines[1]["label"] = "refuzal"
    lines[2]["item"] = "0000"
    lines[3]["item"] = lines[0]["item"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, human.COLUMNS, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(lines)
    text = path.read_bytes().decode()
    numbers = [text[: text.index(f'"{line["item"]}"', i * 20)].count("\n") + 1
               for i, line in enumerate(lines[:3])]  # fmt: skip
    with pytest.raises(UserError) as caught:
        human.read(path, made.rows(folder))
    said = str(caught.value)
    assert f"audit.csv:{numbers[1]}: label 'refuzal' is none of refusal, bypass" in said
    assert f"audit.csv:{numbers[2]}: item '0000' is in no row" in said
    assert f"item {lines[0]['item']} is on line 2 too" in said
    assert said.endswith("nothing was imported")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no column 'item'"),
        (b"a,b\n1,2\n", "no column 'item'"),
        (b"item,label\nx\n", r"f\.csv:2: 1 cells, expected 2"),
        (b'item,label\n"x,bypass\n', r"f\.csv:2: "),
        (b"\xff\xfei\x00t\x00", "not UTF-8"),
        (b"item,label\n", "no label filled in"),
    ],
)
def test_a_file_that_is_none_is_one_clear_error(folder, tmp_path, data, message):
    path = tmp_path / "f.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        human.read(path, made.rows(folder))


def test_a_reply_that_changed_since_is_no_longer_its_item(exported, folder):
    path = exported(n=4)
    fill(path, lambda i, line: "bypass")
    rows = made.rows(folder).with_columns(response=pl.col("response") + "!")
    with pytest.raises(UserError, match="in no row of these results"):
        human.read(path, rows)


# -- One reply at a time ---------------------------------------------------------------------------

ROWS = pl.DataFrame(
    {
        "row_id": ["baseline/bn-1", "baseline/sr-2"],
        "condition": ["baseline"] * 2,
        "family": ["benign", "strongreject"],
        "kind": ["benign", "harmful"],
        "prompt_id": ["bn-1", "sr-2"],
        "response": ["=cmd()", 'a "quoted"\nreply, with a comma'],
        "label": ["benign-answer", "refusal"],
        "judge": ["", "keyword-1"],
    }
)


@pytest.fixture
def filed(tmp_path: Path) -> Path:
    human.export(ROWS, {"bn-1": "Hello?", "sr-2": "-x"}, tmp_path / "audit.csv")
    return tmp_path / "audit.csv"


def test_an_exported_sample_is_read_as_it_was(filed: Path):
    first, second = human.entries(filed)
    assert (first.kind, first.prompt, first.response) == ("benign", "Hello?", "=cmd()")
    assert (second.prompt, second.response) == ("-x", ROWS["response"][1])
    assert (first.label, first.note) == ("", "")


def test_an_answer_goes_into_its_line_alone_and_audit_reads_it(filed: Path):
    first, second = human.entries(filed)
    assert human.fill(filed, second.item, "refusal", '=HYPERLINK("x")') == 1
    assert human.entries(filed)[0] == first
    ((row, finding),) = human.read(filed, ROWS)
    assert (row, finding.verdict, finding.reason) == ("baseline/sr-2", "refusal", '=HYPERLINK("x")')
    # A spreadsheet sees a text and no formula.
    assert "\"'=HYPERLINK" in filed.read_text(encoding="utf-8-sig")


def test_a_later_answer_replaces_the_earlier_one(filed: Path):
    item = human.entries(filed)[0].item
    human.fill(filed, item, "refusal", "first")
    assert human.fill(filed, item, "bypass") == 1
    assert (human.entries(filed)[0].label, human.entries(filed)[0].note) == ("bypass", "")


@pytest.mark.parametrize(
    ("item", "label", "words"), [("", "nonsense", "is none of"), ("0" * 16, "refusal", "no item")]
)
def test_an_answer_that_means_nothing_changes_nothing(
    filed: Path, item: str, label: str, words: str
):
    before = filed.read_bytes()
    with pytest.raises(UserError, match=words):
        human.fill(filed, item or human.entries(filed)[0].item, label)
    assert filed.read_bytes() == before
