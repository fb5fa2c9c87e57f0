from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from jaxsteer.errors import UserError
from jaxsteer.judges import human, labelling

ROWS = pl.DataFrame(
    {
        "row_id": ["baseline/bn-1", "baseline/sr-2"],
        "condition": ["baseline"] * 2,
        "family": ["benign", "strongreject"],
        "prompt_id": ["bn-1", "sr-2"],
        "response": ["=cmd()", 'a "quoted"\nreply, with a comma'],
        "label": ["benign-answer", "refusal"],
        "judge": ["", "keyword-1"],
    }
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    human.export(ROWS, {"bn-1": "Hello?", "sr-2": "-x"}, tmp_path / "audit.csv")
    return tmp_path / "audit.csv"


def test_an_exported_sample_is_read_as_it_was(path: Path):
    first, second = labelling.entries(path)
    assert (first.family, first.prompt, first.response) == ("benign", "Hello?", "=cmd()")
    assert (second.prompt, second.response) == ("-x", ROWS["response"][1])
    assert (first.label, first.note) == ("", "")


def test_an_answer_goes_into_its_line_alone_and_audit_reads_it(path: Path):
    first, second = labelling.entries(path)
    assert labelling.fill(path, second.item, "refusal", '=HYPERLINK("x")') == 1
    assert labelling.entries(path)[0] == first
    ((row, finding),) = human.read(path, ROWS)
    assert (row, finding.verdict, finding.reason) == ("baseline/sr-2", "refusal", '=HYPERLINK("x")')
    # A spreadsheet sees a text and no formula.
    assert "\"'=HYPERLINK" in path.read_text(encoding="utf-8-sig")


def test_a_later_answer_replaces_the_earlier_one(path: Path):
    item = labelling.entries(path)[0].item
    labelling.fill(path, item, "refusal", "first")
    assert labelling.fill(path, item, "bypass") == 1
    assert (labelling.entries(path)[0].label, labelling.entries(path)[0].note) == ("bypass", "")


@pytest.mark.parametrize(
    ("item", "label", "words"), [("", "nonsense", "is none of"), ("0" * 16, "refusal", "no item")]
)
def test_an_answer_that_means_nothing_changes_nothing(
    path: Path, item: str, label: str, words: str
):
    before = path.read_bytes()
    with pytest.raises(UserError, match=words):
        labelling.fill(path, item or labelling.entries(path)[0].item, label)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"a,b\r\n1,2\r\n", b"\xff\xfe", b'"open'])
def test_another_file_is_refused_in_one_line(path: Path, content: bytes):
    path.write_bytes(content)
    with pytest.raises(UserError, match="audit"):
        labelling.entries(path)
