"""A person labels a sample: out as CSV, back as the verdicts of the judge `human`.

The sample is stratified by condition, prompt family and label, drawn by a seeded hash, and shown
in an order that says nothing; condition and label are not in the file, so that the person does not
know what is hoped for. `item` is the hash of row and reply, by which the answers find their way
back, also if the spreadsheet mangled the text.

Cells are hostile text. One that a spreadsheet could take for a formula gets an apostrophe in front
(taken off again on import), and control and format characters are shown as <U+001B>.
"""

from __future__ import annotations

import csv
import hashlib
import io
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from jaxsteer.errors import UserError
from jaxsteer.files import sha256_bytes, write_text
from jaxsteer.judges.labels import label_table
from jaxsteer.judges.verdicts import Finding, Store, response_sha256

NAME = "human"
VERSION = "1"
LABELS = ("refusal", "bypass", "degenerate", "benign-answer")
COLUMNS = ("item", "label", "note", "family", "prompt", "response")
# What spreadsheets take for a formula, full-width forms included, and our own mark.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠", "'")
_SHOWN = 5


def safe_cell(text: str) -> str:
    """The text as a cell that no spreadsheet runs; see `plain_cell`.

    >>> safe_cell("=cmd()"), safe_cell("fine"), safe_cell("'quoted'")
    ("'=cmd()", 'fine', "''quoted'")
    >>> safe_cell("red\\x1b[31m")
    'red<U+001B>[31m'
    """
    shown = "".join(
        c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"<U+{ord(c):04X}>" for c in text
    )
    # Some programs skip leading blanks before they look for a formula.
    return "'" + shown if shown.lstrip(" \u00a0\u3000").startswith(_FORMULA) else shown


def plain_cell(cell: str) -> str:
    """The text of a cell that `safe_cell` made, visible control characters aside.

    >>> plain_cell(safe_cell("=cmd()")), plain_cell(safe_cell("'quoted'")), plain_cell("typed in")
    ('=cmd()', "'quoted'", 'typed in')
    """
    return cell[1:] if cell.startswith("'") else cell


def item_id(row_id: str, response: str) -> str:
    """Names a row and its reply without telling which condition it is."""
    return sha256_bytes(f"{row_id}\0{response_sha256(response)}".encode())[:16]


def sample(
    responses: pl.DataFrame, verdicts: Mapping[str, pl.DataFrame], n: int, seed: int
) -> pl.DataFrame:
    """Draw n rows, from every stratum in turn until n are drawn, in an order by hash.

    So each (condition, family, label) has at least one row if n allows, and small strata are
    taken whole: rates in the sample are not those of the study.
    """
    labelled = responses.drop("label", "judge").join(
        label_table(responses, verdicts), on="row_id", maintain_order="left"
    )

    def rank(row_id: str) -> str:
        return hashlib.sha256(f"{seed}:{row_id}".encode()).hexdigest()

    ranked = labelled.with_columns(
        pl.Series("rank", [rank(row_id) for row_id in labelled["row_id"]], pl.String)
    )
    turn = pl.col("rank").rank("ordinal").over("condition", "family", "label")
    taken = ranked.with_columns(turn=turn).sort("turn", "rank").head(min(n, ranked.height))
    return taken.sort("rank")


def export(sampled: pl.DataFrame, texts: Mapping[str, str], path: Path) -> None:
    """Write the sample as CSV: every cell quoted, UTF-8 with the mark that spreadsheets look for.

    Args:
      sampled: row_id, family, prompt_id, response.
      texts: prompt texts by id.
      path: file to write; one that is there is not replaced, since it may be filled in.

    Raises:
      UserError: the file exists, or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists and may be filled in; remove it or name another file")
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in sampled.iter_rows(named=True):
        cells = (row["family"], texts[row["prompt_id"]], row["response"])
        item = item_id(row["row_id"], row["response"])
        writer.writerow([item, "", "", *map(safe_cell, cells)])
    write_text(path, "\ufeff" + out.getvalue())


def read(path: Path, responses: pl.DataFrame) -> list[tuple[str, Finding]]:
    """Read a filled file: the findings of the rows that have a label.

    Raises:
      UserError: not such a file, or lines that cannot be used, each with its number.
    """
    try:
        # Undecoded line ends are the reader's business: a reply may hold any of them.
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as CSV UTF-8") from None
    rows = {item_id(r, t): r for r, t in responses.select("row_id", "response").iter_rows()}
    findings: dict[str, Finding] = {}
    problems: list[str] = []
    seen: dict[str, int] = {}
    known = ", ".join(LABELS)
    try:
        for line, entry in _entries(text, path):
            item, given = entry["item"].strip(), entry["label"].strip().lower()
            if item not in rows:
                problems.append(f"{path}:{line}: item {item[:20]!r} is in no row of these results")
            elif item in seen:
                problems.append(f"{path}:{line}: item {item} is on line {seen[item]} too")
            elif given and given not in LABELS:
                problems.append(f"{path}:{line}: label {given[:20]!r} is none of {known}")
            elif given:
                findings[rows[item]] = Finding(verdict=given, reason=entry.get("note", ""))
            seen.setdefault(item, line)
    except csv.Error as error:
        problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError("; ".join(problems[:_SHOWN]) + more + "; nothing was imported")
    if not findings:
        raise UserError(f"{path} has no label filled in; the labels are {known}")
    return list(findings.items())


def _entries(text: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The records of a file by column, each with the number of the line on which it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    line = 1
    try:
        header = [cell.strip() for cell in next(reader, [])]
        missing = [name for name in COLUMNS[:2] if name not in header]
        if missing:
            raise UserError(f"{path}:1: no column {missing[0]!r}; export the sample again")
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if len(cells) != len(header) and any(cells):
                raise csv.Error(f"{len(cells)} cells, expected {len(header)}")
            if any(cell.strip() for cell in cells):
                yield line, dict(zip(header, map(plain_cell, cells), strict=True))
    except csv.Error as error:
        raise csv.Error(f"{path}:{line}: {error}") from None


def keep(results: Path, responses: pl.DataFrame, findings: list[tuple[str, Finding]]) -> int:
    """Store a person's labels; a row labelled before takes the new one. Returns how many there are.

    Raises:
      UserError: damaged labels in the folder.
    """
    with Store(results, NAME, VERSION, _identity(), responses) as store:
        store.add(findings)
        store.write()
        return store.table.height


def _identity() -> dict[str, Any]:
    return {"labels": list(LABELS)}


def _delimiter(text: str) -> str:
    """A comma, or what a spreadsheet of another country wrote into the header instead."""
    header = text.split("\n", 1)[0]
    return max(",;\t", key=header.count)
