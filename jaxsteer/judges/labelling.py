"""A person labels an audit sample one reply at a time; the answers go into the audit CSV.

The file is the one that `audit.export` writes and `audit.read` takes back, so it can be filled in
here, in a spreadsheet, or in both.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path

from jaxsteer.errors import UserError
from jaxsteer.files import write_text
from jaxsteer.judges.human import COLUMNS, LABELS, plain_cell, safe_cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the file.

    Attributes:
      item: which row and reply, as `audit.item_id`.
      label: what was said of it, or "".
      note: a person's remark.
      family: prompt family.
      prompt, response: hostile text.
    """

    item: str
    label: str
    note: str
    family: str
    prompt: str
    response: str


def entries(path: Path) -> list[Entry]:
    """Every line of an audit CSV, in its order.

    Raises:
      UserError: unreadable, or not such a file.
    """
    return [
        Entry(**dict(zip(COLUMNS, map(plain_cell, line), strict=True))) for line in _lines(path)
    ]


def fill(path: Path, item: str, label: str, note: str = "") -> int:
    """Write one answer into the file, whole or not at all; returns how many lines have a label.

    Raises:
      UserError: an unknown label or item, or a file that cannot be read or written.
    """
    if label not in LABELS:
        raise UserError(f"label {label[:20]!r} is none of {', '.join(LABELS)}")
    lines = _lines(path)
    at = [line for line in lines if line[0] == item]
    if not at:
        raise UserError(f"{path} has no item {item[:20]!r}; export the sample again")
    for line in at:
        line[1:3] = [label, safe_cell(note)]
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerows([list(COLUMNS), *lines])
    write_text(path, "\ufeff" + out.getvalue())
    return sum(bool(line[1].strip()) for line in lines)


def _lines(path: Path) -> list[list[str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        found = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}); export the sample again") from None
    if not found or tuple(found[0]) != COLUMNS or any(len(x) != len(COLUMNS) for x in found[1:]):
        raise UserError(
            f"{path} is no audit sample as exported (columns {', '.join(COLUMNS)}); if a "
            "spreadsheet saved it, take it in with `jaxsteer audit import`"
        )
    return found[1:]
