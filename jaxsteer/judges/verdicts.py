"""Verdicts: what judges say of replies, one Parquet file per judge, kept across interruptions.

    judges/JUDGE.parquet    one line per judged row
        row_id              which reply
        judge               the judge's name and version
        score               its number, null where it gives none
        verdict             its word, null where it could not score the reply
        reason              a short rationale, or why the reply is unscored
        judge_sha256        hash of the judge's model, prompts and settings
        response_sha256     hash of the reply's text, so a verdict on another text is never reused

A description of the judge is in the file's metadata (`provenance`). A file is written aside and
renamed, so a reader always finds it complete.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import polars as pl

from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, read_table, sha256_bytes, sha256_json, write_table

SCHEMA = {
    "row_id": pl.String,
    "judge": pl.String,
    "score": pl.Float64,
    "verdict": pl.String,
    "reason": pl.String,
    "judge_sha256": pl.String,
    "response_sha256": pl.String,
}
# Seconds between two writes of a file while its judge runs.
_SPACING = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One reply to be judged.

    Attributes:
      row_id: CONDITION/PROMPT_ID.
      prompt: the user's message; "" for judges that do not read it. Hostile text.
      response: the reply. Hostile text.
    """

    row_id: str
    prompt: str
    response: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What a judge says of one reply.

    Attributes:
      score: its number, or None.
      verdict: its word, or None where the reply stays unscored.
      reason: a short rationale, or why the reply is unscored.
    """

    score: float | None = None
    verdict: str | None = None
    reason: str = ""


# The replies that a judge is about: all; those to harmful prompts; of these, those that are refused
# or degenerate.
About = Literal["all", "harmful", "failed"]
# Row ids with what a judge says of them.
Findings = Sequence[tuple[str, Finding]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeRecord:
    """Which judge gave a verdict, as its file records it.

    Attributes:
      name: of the judge and of its file.
      version: of its rule.
      settings: everything else that can change a verdict, as JSON values.
      about: the replies that it judges; which they are changes no verdict.
      notes: recorded in the file, but not part of the judge's identity.
    """

    name: str
    version: str
    settings: Mapping[str, Any]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    about: About = "all"

    @property
    def label(self) -> str:
        """Name and version, as labels carry them."""
        return f"{self.name}-{self.version}"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that can change a verdict."""
        return {"judge": self.label, **self.settings}

    @property
    def sha256(self) -> str:
        """Hash of the identity."""
        return sha256_json(self.identity)


def response_sha256(text: str) -> str:
    """Hash of a reply's text."""
    # Lone surrogates cannot be encoded otherwise, and Parquet cannot hold them either.
    return sha256_bytes(text.encode("utf-8", "surrogatepass"))


def text_hashes(texts: Iterable[str]) -> list[str]:
    """`response_sha256` of each text."""
    return [response_sha256(text) for text in texts]


def read(path: Path) -> pl.DataFrame:
    """Read one judge's verdicts.

    Raises:
      UserError: a damaged file, other columns, or not one verdict per row.
    """
    again = "remove it and judge again"
    table = read_table(path, again)
    for name, kind in SCHEMA.items():
        if table.schema.get(name) != kind:
            raise UserError(f"{path} has no column {name} of type {kind}; {again}")
    if table["row_id"].null_count() or table["row_id"].is_duplicated().any():
        raise UserError(f"{path} holds a verdict without a row, or two on one row; {again}")
    return table.select(list(SCHEMA))


def read_all(results: Path) -> dict[str, pl.DataFrame]:
    """Every judge's verdicts in a results folder, by the judge's name (the file's stem).

    Raises:
      UserError: a damaged file.
    """
    return {path.stem: read(path) for path in sorted((results / "judges").glob("*.parquet"))}


def provenance(path: Path) -> dict[str, Any]:
    """What the judge was, from the file's metadata; {} if that holds nothing readable."""
    try:
        metadata = pl.read_parquet_metadata(io.BytesIO(path.read_bytes()))
        found = json.loads(metadata.get("jaxsteer_judge", "{}"))
    except (pl.exceptions.PolarsError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Store:
    """One judge's verdicts on disk: `with Store(...) as store: store.add([...])`.

    Verdicts are written every few seconds and at the end, also after an error. A killed process
    loses the verdicts since the last write, but not an endpoint's replies: the client caches each.
    """

    def __init__(
        self,
        results: Path,
        judge: JudgeRecord,
        responses: pl.DataFrame,
        *,
        fresh: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Open or create a judge's file.

        Args:
          results: results folder.
          judge: the judge whose verdicts are stored.
          responses: row_id and response of the rows as they are now.
          fresh: replace the verdicts in the file, whichever judge gave them.
          clock: seconds; for tests.

        Raises:
          UserError: the file holds another judge's verdicts, or is damaged.
        """
        self.path = results / "judges" / f"{judge.name}.parquet"
        self.judge, self.clock = judge, clock
        self.written_at = float("-inf")
        self.pending: list[dict[str, Any]] = []
        self.texts = dict(zip(responses["row_id"], text_hashes(responses["response"]), strict=True))
        self.table = pl.DataFrame(schema=SCHEMA)
        if self.path.is_file() and not fresh:
            self.table = self._still_valid(read(self.path))

    def _still_valid(self, found: pl.DataFrame) -> pl.DataFrame:
        """The verdicts on texts that have not changed since; another judge's are an error."""
        ours = pl.col("judge_sha256").eq_missing(self.judge.sha256)
        # A row that another judge could not score holds nothing that would be lost.
        found = found.filter(ours | pl.col("verdict").is_not_null())
        if found.select(ours.all()).item():
            texts = pl.Series(
                [self.texts.get(row_id) for row_id in found["row_id"]], dtype=pl.String
            )
            return found.filter(pl.col("response_sha256") == texts)
        before, now = provenance(self.path), self.judge.identity
        changed = [
            f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}"
            for key in sorted({*before, *now} - {"notes"})
            if before.get(key) != now.get(key)
        ]
        raise UserError(
            f"{self.path} holds verdicts of another judge ({'; '.join(changed) or 'it differs'}); "
            "give --fresh to replace them"
        )

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    def judged(self) -> set[str]:
        """Row ids with a verdict on disk."""
        return set(self.table.filter(pl.col("verdict").is_not_null())["row_id"])

    def tried(self) -> set[str]:
        """Row ids with a verdict, or a reason why there is none, on disk."""
        return set(self.table["row_id"])

    def add(self, findings: Findings) -> None:
        """Take the findings on some rows; a new one replaces the old one on the same row."""
        constant = {"judge": self.judge.label, "judge_sha256": self.judge.sha256}
        self.pending += [
            {"row_id": row_id, "response_sha256": self.texts[row_id]}
            | constant
            | dataclasses.asdict(finding)
            for row_id, finding in findings
        ]
        if self.clock() - self.written_at >= _SPACING:
            self.write()

    def write(self) -> None:
        """Write what is pending."""
        if not self.pending:
            return
        new = pl.DataFrame(self.pending, schema=SCHEMA).unique("row_id", keep="last")
        table = pl.concat([self.table.join(new, on="row_id", how="anti"), new]).sort("row_id")
        provenance = canonical_json({**self.judge.identity, "notes": dict(self.judge.notes)})
        write_table(self.path, table, {"jaxsteer_judge": provenance})
        self.table, self.pending = table, []
        self.written_at = self.clock()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
