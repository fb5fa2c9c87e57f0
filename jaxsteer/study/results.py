"""A study's results on disk: shards of finished rows, and the whole read back for all readers.

run.json                what was run: the run record
setup.json              selection tables
directions.safetensors  directions with provenance
prompts.parquet         the prompts that are reported on, with their texts
responses.parquet       one line per row, as the run labelled it
judges/JUDGE.parquet    later verdicts, one line per judged row
summary.json            rates per condition and prompt family
shards/                 finished batches, from which an interrupted run continues

A shard is written aside, synced and renamed, so a process that is killed loses only the rows it had
not finished. Its name holds the hash of its content, so several processes can write to one folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from jaxsteer.errors import UserError
from jaxsteer.files import (
    atomic_path,
    canonical_json,
    meant,
    read_table,
    sha256_bytes,
    table_bytes,
    write_json,
)
from jaxsteer.judges.labels import LABELS, label_table
from jaxsteer.judges.verdicts import read_all
from jaxsteer.stats import wilson
from jaxsteer.study import record
from jaxsteer.study.record import RunRecord
from jaxsteer.study.spec import StudySpec

# The columns that readers rely on, and those that may have null cells.
SCHEMA = {
    "row_id": pl.String, "condition": pl.String, "base": pl.String, "seed": pl.Int64,
    "scale": pl.Float64, "mode": pl.String, "prompt_id": pl.String, "family": pl.String,
    "kind": pl.String, "category": pl.String, "response": pl.String, "n_tokens": pl.Int64,
    "stopped": pl.Boolean, "label": pl.String, "judge": pl.String,
    "cancels_steering": pl.Boolean, "steered_tokens": pl.Int64, "change": pl.Float64,
}  # fmt: skip
MAY_BE_NULL = {"seed", "scale"}


def write_shard(folder: Path, key: str, rows: pl.DataFrame) -> None:
    """Add one shard of the run `key`; its name is its content, so writing it again is harmless."""
    data = table_bytes(rows)
    with atomic_path(folder / f"{key[:16]}-{sha256_bytes(data)[:16]}.parquet") as temporary:
        temporary.write_bytes(data)


def read_shards(folder: Path, key: str) -> list[pl.DataFrame]:
    """Every shard of the run `key`.

    Raises:
      UserError: a shard is not Parquet, or its content does not match its name.
    """
    found = []
    for path in sorted(folder.glob(f"{key[:16]}-*.parquet")):
        try:
            data = path.read_bytes()
            if sha256_bytes(data)[:16] != path.stem[-16:]:
                raise OSError("its content does not match its name")
            found.append(pl.read_parquet(io.BytesIO(data)))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it and run again") from None
    return found


def gathered(folder: Path, key: str, names: Sequence[str]) -> pl.DataFrame | None:
    """All rows of the run `key`, in the order of `names`; None while one is missing."""
    found = read_shards(folder, key)
    if not found:
        return None
    # A row may have been run twice, by a process of an interrupted run; both are equal.
    rows = pl.concat(found).unique("row_id")
    if set(names) - set(rows["row_id"]):
        return None
    order = pl.DataFrame({"row_id": names})
    return order.join(rows, on="row_id", how="left", maintain_order="left")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """One results folder.

    Attributes:
      folder: where it is.
      run: what was run.
      rows: responses.parquet with the labels that all verdicts so far give.
      verdicts: by judge, a line for each row it has judged.
    """

    folder: Path
    run: RunRecord
    rows: pl.DataFrame
    verdicts: Mapping[str, pl.DataFrame]

    @property
    def spec(self) -> StudySpec:
        """The study, with its policy filled in."""
        return self.run.spec


def load(folder: Path) -> Results:
    """Read a results folder.

    Raises:
      UserError: not one, unfinished, or damaged.
    """
    run = record.read(folder)
    if run is None:
        raise UserError(f"{folder} holds no run.json{meant(folder)}; run `jaxsteer sweep` first")
    path = folder / "responses.parquet"
    if not path.is_file():
        raise UserError(f"{folder} is unfinished; run the same `jaxsteer sweep` again to continue")
    rows = read_table(path, "remove it and run again")
    if fault := _fault(rows, run):
        raise UserError(f"{path}: {fault}; run the study again")
    verdicts = read_all(folder)
    return Results(folder=folder, run=run, rows=relabelled(rows, verdicts), verdicts=verdicts)


def _fault(rows: pl.DataFrame, run: RunRecord) -> str:
    """What is wrong with the table of a run; "" if nothing is."""
    for name, kind in SCHEMA.items():
        column = rows.get_column(name, default=None)
        if column is None or column.dtype != kind:
            return f"column {name} is missing or of another type than {kind}"
        if column.null_count() and name not in MAY_BE_NULL:
            return f"column {name} has null cells"
    counts = pl.min_horizontal("steered_tokens", "n_tokens") >= 0
    if not rows.select((counts & pl.col("change").is_finite()).all()).item():
        return "column steered_tokens, n_tokens or change holds an impossible number"
    if rows["row_id"].n_unique() != rows.height:
        return "two lines have the same row id"
    if not (rows["condition"] + "/" + rows["prompt_id"] == rows["row_id"]).all():
        return "a row id does not match its condition and prompt"
    for name, known in (
        ("label", set(LABELS)),
        ("condition", {condition.name for condition in run.conditions}),
        ("family", set(run.prompts)),
        ("kind", {known.kind for known in run.prompts.values()}),
    ):
        if strange := set(rows[name].unique()) - known:
            return f"unknown {name} {min(strange)!r}"
    return ""


def relabelled(rows: pl.DataFrame, verdicts: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """The rows with `label` and `judge` as the verdicts give them; as they are without any.

    The run's own labels, which two rules gave, stay in `run_label` and `run_judge`.
    """
    if not verdicts:
        return rows
    given = label_table(rows, verdicts).select("row_id", "label", "judge")
    return rows.rename({"label": "run_label", "judge": "run_judge"}).join(
        given, on="row_id", how="left", maintain_order="left", validate="1:1"
    )


def table_sha256(rows: pl.DataFrame) -> str:
    """Identity of the row table: every row's id, reply, label and judge, in order of row id."""
    digest = hashlib.sha256()
    columns = ["row_id", "prompt_id", "family", "response", "n_tokens", "label", "judge"]
    for row in rows.sort("row_id").select(columns).iter_rows():
        digest.update(canonical_json(row).encode() + b"\n")
    return digest.hexdigest()


def summarise(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Rates per condition and prompt family, refusal with its Wilson 95 % interval.

    `complied` is the share neither refused, degenerate nor unfinished, whether scored for harm or
    not. Unfinished replies are in n, and so in the denominator of every rate.
    """
    summary = []
    for (condition, family), group in rows.group_by("condition", "family", maintain_order=True):
        n, counts = group.height, dict(group["label"].value_counts().iter_rows())
        refused, degenerate, unfinished = (
            counts.get(label, 0) for label in ("refusal", "degenerate", "unfinished")
        )
        low, high = wilson(refused, n)
        summary.append(
            {
                "condition": condition,
                "family": family,
                "n": n,
                "refusal": refused / n,
                "refusal_low": low,
                "refusal_high": high,
                "degenerate": degenerate / n,
                "unfinished": unfinished / n,
                "complied": (n - refused - degenerate - unfinished) / n,
                "cancels_steering": bool(group["cancels_steering"][0]),
            }
        )
    return summary


def refresh_summary(folder: Path) -> list[dict[str, Any]]:
    """Recompute summary.json, after new verdicts, and return it."""
    summary = summarise(load(folder).rows)
    write_json(folder / "summary.json", summary)
    return summary
