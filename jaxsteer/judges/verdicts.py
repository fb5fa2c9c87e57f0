"""Verdicts: what judges said of replies, one Parquet file per judge, kept across interruptions.

    judges/JUDGE.parquet    one line per judged row
        row_id              which reply
        judge               the judge's name and version
        score               its number, null where it has none
        verdict             its word, null where it could not score the reply
        reason              why: a short rationale, or why the reply is unscored
        judge_sha256        hash of the judge's model, prompts and settings
        response_sha256     hash of the reply's text, so a verdict on another text is never reused

What the judge was, in words, is in the file's metadata (`provenance`). The file is replaced as a
whole and atomically, so a reader finds it complete at any moment.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import polars as pl

from jaxsteer import tables
from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, sha256_bytes

SCHEMA = {
    "row_id": pl.String,
    "judge": pl.String,
    "score": pl.Float64,
    "verdict": pl.String,
    "reason": pl.String,
    "judge_sha256": pl.String,
    "response_sha256": pl.String,
}
# Writing may take a twentieth of the time, so at least this many times its own length lies between.
_SPACING = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One reply to be judged.

    Attributes:
      row_id: CONDITION/PROMPT_ID.
      family: the prompt's family.
      prompt: what the user asked; "" for judges that do not read it. Hostile text.
      response: the reply. Hostile text.
    """

    row_id: str
    family: str
    prompt: str
    response: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What a judge says of one reply.

    Attributes:
      score: its number, or None.
      verdict: its word, or None where the reply stays unscored.
      reason: a short rationale, or why it is unscored.
    """

    score: float | None = None
    verdict: str | None = None
    reason: str = ""


def response_sha256(text: str) -> str:
    """Identity of a reply's text."""
    # Lone surrogates cannot be encoded, and Parquet cannot hold them either.
    return sha256_bytes(text.encode("utf-8", "surrogatepass"))


def text_hashes(texts: Iterable[str]) -> list[str]:
    """`response_sha256` of each text."""
    return [response_sha256(text) for text in texts]


def judge_sha256(identity: dict[str, Any]) -> str:
    """Identity of a judge: the hash of everything that can change its verdict."""
    return sha256_bytes(canonical_json(identity).encode())


def empty() -> pl.DataFrame:
    """No verdicts."""
    return pl.DataFrame(schema=SCHEMA)


def read(path: Path) -> pl.DataFrame:
    """Read one judge's verdicts.

    Raises:
      UserError: damaged, other columns, or not one verdict on each row it names.
    """
    table = tables.read(path, "remove it and judge again")
    for name, kind in SCHEMA.items():
        if table.schema.get(name) != kind:
            raise UserError(f"{path} has no column {name} of type {kind}; remove it, judge again")
    if table["row_id"].null_count():
        raise UserError(f"{path} holds a verdict on no row; remove it and judge again")
    if table["row_id"].is_duplicated().any():
        raise UserError(f"{path} holds two verdicts on one row; remove it and judge again")
    return table.select(list(SCHEMA))


def read_all(results: Path) -> dict[str, pl.DataFrame]:
    """Every judge's verdicts in a results folder, by the judge's name (the file's stem).

    Raises:
      UserError: a damaged file.
    """
    return {path.stem: read(path) for path in sorted((results / "judges").glob("*.parquet"))}


def provenance(path: Path) -> dict[str, Any]:
    """What the judge was: its identity in words, from the file's metadata; {} if it has none."""
    try:
        found = json.loads(
            pl.read_parquet_metadata(io.BytesIO(path.read_bytes())).get("jaxsteer_judge", "{}")
        )
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        first = str(error).splitlines()[0][:120]
        raise UserError(f"{path} is damaged ({first}); remove it and judge again") from None
    return found if isinstance(found, dict) else {}


class Store:
    """One judge's verdicts on disk: `with Store(...) as store: store.add([...])`.

    Verdicts are written as they come, at most a twentieth of the time spent writing, and at the
    end however it comes. A process that is killed outright loses what came since the last write;
    of an endpoint's replies it loses nothing, since those are cached one by one.
    """

    def __init__(
        self,
        results: Path,
        name: str,
        version: str,
        identity: dict[str, Any],
        responses: pl.DataFrame,
        *,
        notes: dict[str, Any] | None = None,
        fresh: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Open or begin a judge's file.

        Args:
          results: results folder.
          name: the judge's name, and the file's.
          version: of the judge's rule.
          identity: everything that can change a verdict; its hash is `judge_sha256`.
          responses: row_id and response of the rows as they are now.
          notes: recorded in the file but no part of the judge's identity.
          fresh: forget verdicts of another judge, or of this one.
          clock: seconds; for tests.

        Raises:
          UserError: the file holds another judge's verdicts, or is damaged.
        """
        self.path = results / "judges" / f"{name}.parquet"
        self.judge = f"{name}-{version}"
        self.identity = {"judge": self.judge, **identity}
        self.sha256 = judge_sha256(self.identity)
        self.notes = notes or {}
        self.clock = clock
        self.wrote_at, self.write_took = float("-inf"), 0.0
        self.pending: list[dict[str, Any]] = []
        self.texts = dict(zip(responses["row_id"], text_hashes(responses["response"]), strict=True))
        self.table = empty()
        if self.path.is_file() and not fresh:
            self.table = self._still_valid(read(self.path))

    def _still_valid(self, found: pl.DataFrame) -> pl.DataFrame:
        """The verdicts that hold: of this judge, and on the texts that are there now."""
        if found["judge_sha256"].is_in([self.sha256]).all():
            current = pl.DataFrame(
                {"row_id": list(self.texts), "response_sha256": list(self.texts.values())},
                schema={"row_id": pl.String, "response_sha256": pl.String},
            )
            return found.join(current, on=["row_id", "response_sha256"], how="semi")
        was = provenance(self.path)
        changed = [
            f"{key} was {_short(was.get(key))}, is {_short(self.identity.get(key))}"
            for key in sorted({*was, *self.identity})
            if was.get(key) != self.identity.get(key) and key not in ("notes",)
        ]
        raise UserError(
            f"{self.path} holds verdicts of another judge ({'; '.join(changed) or 'it differs'}); "
            "give --fresh to replace them"
        )

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.write()

    def judged(self) -> set[str]:
        """Row ids that have a score or a word."""
        return set(self.table.filter(pl.col("verdict").is_not_null())["row_id"]) | {
            line["row_id"] for line in self.pending if line["verdict"] is not None
        }

    def tried(self) -> set[str]:
        """Row ids that were judged or are on record as unscored."""
        return set(self.table["row_id"]) | {line["row_id"] for line in self.pending}

    def add(self, findings: Sequence[tuple[str, Finding]]) -> None:
        """Take the findings on some rows; a new one replaces the old one on the same row."""
        self.pending += [
            {
                "row_id": row_id,
                "judge": self.judge,
                "score": finding.score,
                "verdict": finding.verdict,
                "reason": finding.reason,
                "judge_sha256": self.sha256,
                "response_sha256": self.texts[row_id],
            }
            for row_id, finding in findings
        ]
        if self.clock() - self.wrote_at >= _SPACING * self.write_took:
            self.write()

    def write(self) -> None:
        """Write what is pending."""
        if not self.pending:
            return
        started = self.clock()
        new = pl.DataFrame(self.pending, schema=SCHEMA).unique("row_id", keep="last")
        table = pl.concat([self.table.join(new, on="row_id", how="anti"), new]).sort("row_id")
        metadata = {"jaxsteer_judge": canonical_json({**self.identity, "notes": self.notes})}
        tables.write(self.path, table, metadata)
        self.table, self.pending = table, []
        self.wrote_at = self.clock()
        self.write_took = self.wrote_at - started


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
