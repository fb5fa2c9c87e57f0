"""A finished study on disk, read back: the one door for judges, statistics, receipts and notebooks.

run.json                what was run: hashes, layers, strengths, conditions, prompts, machine
setup.json              selection tables
directions.safetensors  directions with provenance
responses.parquet       one line per (condition, prompt) row, as the run labelled it
judges/JUDGE.parquet    later verdicts, one line per judged row
summary.json            rates per condition and prompt family
shards/                 finished batches, from which an interrupted run goes on
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from jaxsteer import tables
from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, write_json
from jaxsteer.judges.labels import LABELS, label_table
from jaxsteer.judges.verdicts import read_all
from jaxsteer.stats import wilson
from jaxsteer.study import record
from jaxsteer.study.record import RunRecord
from jaxsteer.study.spec import StudySpec

COLUMNS = (
    "row_id", "condition", "base", "seed", "scale", "mode", "prompt_id", "family", "category",
    "response", "n_tokens", "stopped", "label", "judge", "cancels_steering", "touched", "change",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """One results folder.

    Attributes:
      folder: where it is.
      run: what was run.
      rows: responses.parquet with the labels that all verdicts so far give.
      verdicts: by judge, what it said of each row it has seen.
    """

    folder: Path
    run: RunRecord
    rows: pl.DataFrame
    verdicts: Mapping[str, pl.DataFrame]

    @property
    def spec(self) -> StudySpec:
        """The study."""
        return self.run.study


def load(folder: Path) -> Results:
    """Read a results folder.

    Raises:
      UserError: not one, unfinished, or damaged.
    """
    run = record.read(folder)
    if run is None:
        raise UserError(f"{folder} holds no run.json; run `jaxsteer sweep` first")
    if not (folder / "responses.parquet").is_file():
        raise UserError(f"{folder} is unfinished; run the same `jaxsteer sweep` again to go on")
    rows, verdicts = _responses(folder / "responses.parquet"), read_all(folder)
    for column, there in (
        ("condition", {condition.name for condition in run.conditions}),
        ("family", set(run.prompts)),
    ):
        foreign = set(rows[column].unique()) - there
        if foreign:
            raise UserError(
                f"{folder}/responses.parquet: {column} {sorted(foreign)[0]!r} is not in run.json; "
                "run the study again"
            )
    return Results(folder=folder, run=run, rows=relabelled(rows, verdicts), verdicts=verdicts)


_TEXTS = (
    "row_id", "condition", "base", "mode", "prompt_id", "family", "response", "label", "judge",
)  # fmt: skip


def _responses(path: Path) -> pl.DataFrame:
    rows, again = tables.read(path, "remove it and run again"), "run the study again"
    missing = [name for name in COLUMNS if name not in rows.columns]
    if missing:
        raise UserError(f"{path} lacks the column {missing[0]!r}; remove it and run again")
    for name in _TEXTS:
        if rows.schema[name] != pl.String or rows[name].null_count():
            raise UserError(f"{path}: column {name} holds other things than texts; {again}")
    for name in ("touched", "n_tokens"):
        if not rows.schema[name].is_integer() or rows[name].null_count() or rows[name].lt(0).any():
            raise UserError(f"{path}: column {name} holds other things than counts; {again}")
    change = rows["change"]
    if not change.dtype.is_float() or change.null_count() or not change.is_finite().all():
        raise UserError(f"{path}: column change holds other things than numbers; {again}")
    cancels = rows["cancels_steering"]
    if cancels.dtype != pl.Boolean or cancels.null_count():
        raise UserError(
            f"{path}: column cancels_steering holds other things than yes or no; {again}"
        )
    if rows["row_id"].n_unique() != rows.height:
        raise UserError(f"{path}: a row is there twice; {again}")
    named = pl.col("condition") + "/" + pl.col("prompt_id") == pl.col("row_id")
    if not rows.select(named.all()).item():
        raise UserError(f"{path}: a row id does not match its condition and prompt; {again}")
    strange = set(rows["label"].unique()) - set(LABELS)
    if strange:
        raise UserError(f"{path}: unknown label {sorted(strange)[0]!r}; {again}")
    return rows


def relabelled(rows: pl.DataFrame, verdicts: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """The rows with `label` and `judge` as the verdicts give them; as they are without any.

    What the run itself said stays in `run_label` and `run_judge`: two judges' verdicts are in it.
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

    `complied` is the share neither refused nor degenerate, whether scored for harm or not;
    `bypass`, `benign_answer` and `unscored` divide it. `mean_change` is the mean norm of the
    realised change per touched token and site.
    """
    summary = []
    for (condition, family), group in rows.group_by("condition", "family", maintain_order=True):
        n = group.height
        counts = dict(group["label"].value_counts().iter_rows())
        share = {name: counts.get(name, 0) / n for name in LABELS}
        low, high = wilson(counts.get("refusal", 0), n)
        summary.append(
            {
                "condition": condition,
                "family": family,
                "n": n,
                "refusal": share["refusal"],
                "refusal_low": low,
                "refusal_high": high,
                "degenerate": share["degenerate"],
                "complied": (n - counts.get("refusal", 0) - counts.get("degenerate", 0)) / n,
                "bypass": share["bypass"],
                "benign_answer": share["benign-answer"],
                "unscored": share["complied-unscored"],
                "cancels_steering": bool(group["cancels_steering"][0]),
                "mean_change": float(group["change"].sum()) / max(int(group["touched"].sum()), 1),
            }
        )
    return summary


def refresh_summary(folder: Path) -> list[dict[str, Any]]:
    """Recompute summary.json, after new verdicts, and return it."""
    summary = summarise(load(folder).rows)
    write_json(folder / "summary.json", summary)
    return summary
