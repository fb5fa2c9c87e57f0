"""From a results folder to its receipt: receipt.json and receipt.html.

A receipt depends on the results folder and nothing else: its time and machine are those that the
run recorded. Building it again from the same folder gives the same bytes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from jaxsteer import stats
from jaxsteer.data import prompts
from jaxsteer.data.prompts import Mode
from jaxsteer.directions import direction as directions
from jaxsteer.errors import UserError
from jaxsteer.evidence import claims, controls, reliability
from jaxsteer.evidence.outcomes import Labels, impacts
from jaxsteer.evidence.reliability import Measurements
from jaxsteer.files import locked, sha256_bytes, sha256_file, sha256_json, write_text
from jaxsteer.judges.human import agreements
from jaxsteer.judges.verdicts import LABELS, provenance, response_sha256, text_hashes
from jaxsteer.receipt import page, statement
from jaxsteer.receipt.statement import Statement
from jaxsteer.study import impact, prepare, results
from jaxsteer.study.results import Model, Results, RunRecord
from jaxsteer.words import plain

JSON, HTML = "receipt.json", "receipt.html"
WORDS, LONGEST = 8, 20
RULE = (
    f"Rows with the smallest hash of row table and row id. Of a reply to a benign prompt, and of a "
    f"refusal, the first {WORDS} words; of every other reply the same number of words with each "
    "character masked."
)


def write(folder: Path, out: Path | None = None, *, samples: int = 0) -> tuple[Path, Path]:
    """Build a folder's receipt and write both files, each whole or not at all.

    Args:
      folder: results folder.
      out: where to write; the results folder by default.
      samples: number of redacted openings to show.

    Returns:
      The paths of receipt.json and receipt.html.

    Raises:
      UserError: no results, damaged ones, another command at work on them, or an unwritable folder.
    """
    target = out or folder
    # A judge that writes meanwhile would make hashes of one moment and labels of another.
    with locked(folder) if os.access(folder, os.W_OK) else contextlib.nullcontext():
        text = statement.canonical_text(build(folder, samples=samples))
        # The page is made from the file's own text, as `verify` makes it.
        receipt = statement.convert(statement.parse(text.encode(), JSON))
        write_text(target / JSON, text)
        write_text(target / HTML, page.html(receipt, sha256_bytes(text.encode())))
    return target / JSON, target / HTML


def build(folder: Path, *, samples: int = 0, measured: bool = True) -> dict[str, Any]:
    """The receipt of a results folder as a JSON value, rounded and with its digest.

    Args:
      folder: results folder.
      samples: number of redacted openings.
      measured: whether geometry.json is read, if it is there.

    Raises:
      UserError: no results, or damaged ones.
    """
    found = results.load(folder)
    run = found.run
    try:
        made = _statement(found, run, samples, measured)
        value = statement.rounded(msgspec.to_builtins(made, str_keys=True))
        value["predicate"]["digest"]["sha256"] = statement.digest(value)
    except (UnicodeEncodeError, OverflowError) as error:
        raise UserError(f"{folder}: {error}; the results are damaged, run again") from None
    statement.convert(value)
    return value


def _statement(found: Results, run: RunRecord, samples: int, measured: bool) -> Statement:
    labels = Labels(found.rows, found.verdicts)
    table = results.table_sha256(found.rows)
    predicate = statement.Predicate(
        digest=statement.Digest(sha256="0" * 64),
        tool=tool(),
        date=run.environment.get("started", ""),
        study=statement.Study(
            name=found.spec.name,
            about=found.spec.about,
            key=run.key,
            spec_sha256=sha256_json(msgspec.to_builtins(run.study)),
        ),
        model=run.model,
        policy=run.policy,
        modes=run.modes,
        system_prompts=_system_prompts(run),
        steering=_steering(found, run),
        decoding=found.spec.decoding,
        prompts=run.prompts,
        conditions=_conditions(found, run, labels),
        random_controls=list(controls.random_controls(run, labels)),
        paired_controls=list(controls.paired_controls(run, labels)),
        dose_responses=list(controls.dose_responses(run, labels)),
        judges=_judges(found),
        selection=_selection(found),
        geometry=_geometry(found, run) if measured else None,
        claims=claims.evaluate(found),
        power=claims.powers(
            run.study, run.conditions, {family: asked.n for family, asked in run.prompts.items()}
        ),
        rows=statement.Rows(n=found.rows.height, sha256=table),
        files=_files(found, measured),
        environment={k: v for k, v in run.environment.items() if k != "started"},
        samples=_samples(found, table, samples) if samples else None,
    )
    return Statement(
        type="https://in-toto.io/Statement/v1",
        subject=_subjects(run.model),
        predicateType=statement.PREDICATE,
        predicate=predicate,
    )


def tool() -> str:
    """The name and version that this package writes into receipts."""
    return f"jaxsteer {importlib.metadata.version('jaxsteer')}"


def _subjects(model: Model) -> list[statement.Subject]:
    """The model's files and identities as in-toto subjects."""
    made = [
        ("weights", model.weights_sha256, "JSON of each parameter's sha256 (dtype, shape, bytes)"),
        ("tokenizer", model.tokenizer_sha256, "JSON of each tokenizer file's sha256"),
        ("chat template", model.template_sha256, "text of the chat template"),
        ("config.json", model.config_sha256, "file of the converted checkpoint"),
    ]
    made += [
        (f"source/{k}", v, "file it was converted from") for k, v in model.source.files.items()
    ]
    return [
        statement.Subject(
            name=name,
            digest=statement.Digest(sha256=sha256),
            annotations=statement.Annotations(over=over),
        )
        for name, sha256, over in made
    ]


def _system_prompts(run: RunRecord) -> list[statement.SystemPrompt]:
    texts = {"": run.policy.text}
    for known in run.modes:
        mode = Mode(name=known.name, version=known.version, text=known.text)
        texts[known.name] = mode.with_policy(run.policy.text)
    made = []
    for name, sha256 in dict.fromkeys((c.mode, c.system_sha256) for c in run.conditions):
        if name not in texts or sha256_bytes(texts[name].encode()) != sha256:
            raise UserError(
                f"run.json: the system prompt of mode {name!r} does not match its hash; run the "
                "study again"
            )
        made.append(statement.SystemPrompt(mode=name, sha256=sha256, text=texts[name]))
    return made


def _steering(found: Results, run: RunRecord) -> statement.Steering:
    stored = directions.load(found.folder / "directions.safetensors") if run.directions else {}
    for name, sha256 in run.directions.items():
        if name not in stored or stored[name].sha256 != sha256:
            raise UserError(
                f"{found.folder}/directions.safetensors: {name!r} is not the direction that was "
                "run; run the study again"
            )
    norms = [known for d in stored.values() if (known := d.provenance.get("residual_norm"))]
    return statement.Steering(
        layers=run.layers,
        dose=run.dose,
        residual_norm=norms[0] if norms else [],
        directions=[_direction(stored[name]) for name in run.directions],
    )


def _direction(found: directions.Direction) -> statement.Direction:
    kept = ("kind", "tap", "position", "source_sha256", "n_positive", "n_negative", "split_half")
    known = {key: found.provenance[key] for key in kept if found.provenance.get(key)}
    made = {"name": found.name, "sha256": found.sha256, **known}
    return msgspec.convert(made, statement.Direction)


def _conditions(found: Results, run: RunRecord, labels: Labels) -> list[statement.Condition]:
    leaked = _leaked(found)
    costs = impacts(found)
    return [
        statement.Condition(
            **msgspec.structs.asdict(condition),
            impact=costs.get(condition.name),
            change=_change(found.rows.filter(condition=condition.name)),
            outcomes={
                family: outcomes(
                    *labels.counts(condition.name, family),
                    leaked.get((condition.name, family)),
                )
                for family in labels.families(condition.name)
            },
        )
        for condition in run.conditions
    ]


def _change(rows: pl.DataFrame) -> statement.Change:
    n, change = int(rows["steered_tokens"].sum()), rows["change"]
    unchanged = int((change == 0).sum())
    return statement.Change(
        steered_tokens=n, mean=float(change.sum()) / max(n, 1), rows_unchanged=unchanged
    )


def _rate(k: int, n: int) -> statement.Rate:
    low, high = stats.wilson(k, n)
    return statement.Rate(k=k, n=n, rate=k / n if n else 0.0, low=low, high=high)


def outcomes(
    counted: Counter[str], unjudged: int, leakage: statement.Leakage | None
) -> statement.Outcomes:
    """What follows from the number of rows by label, with Wilson intervals."""
    n = counted.total()
    return statement.Outcomes(
        n=n,
        counts={label: counted[label] for label in LABELS},
        unjudged=unjudged,
        refusal=_rate(counted["refusal"], n),
        degenerate=_rate(counted["degenerate"], n),
        bypass=None if unjudged else _rate(counted["bypass"], n),
        leakage=leakage,
    )


def _leaked(found: Results) -> dict[tuple[str, str], statement.Leakage]:
    """Leakage by condition and family, over refused and degenerate rows that were scored."""
    verdicts = found.verdicts.get("leakage")
    if verdicts is None:
        return {}
    failed = found.rows.filter(pl.col("label").is_in(["refusal", "degenerate"]))
    replies = pl.Series("response_sha256", text_hashes(failed["response"]), pl.String)
    scored = (
        failed.select("row_id", "condition", "family", replies)
        .join(verdicts, on=["row_id", "response_sha256"], maintain_order="left")
        .filter(pl.col("score").is_not_null())
    )
    if not scored["score"].is_between(0, 1).all():
        raise UserError(f"{found.folder}/judges/leakage.parquet holds scores outside 0 to 1")
    return {
        (str(condition), str(family)): _leakage(group["score"].to_list())
        for (condition, family), group in scored.group_by("condition", "family")
    }


def _leakage(scores: list[float]) -> statement.Leakage:
    low, high = stats.mean_bootstrap(scores)
    return statement.Leakage(
        n=len(scores),
        mean=statistics.fmean(scores),
        sd=statistics.stdev(scores) if len(scores) > 1 else 0.0,
        low=low,
        high=high,
    )


def _judges(found: Results) -> statement.Judges:
    records = []
    for name, table in found.verdicts.items():
        path = found.folder / "judges" / f"{name}.parquet"
        known = provenance(path)
        record = {
            "name": name,
            "versions": sorted({str(v) for v in table["judge"].unique()}),
            "sha256": sorted({str(v) for v in table["judge_sha256"].unique()}),
            "n": table.height,
            "unscored": table["verdict"].null_count(),
            "file_sha256": sha256_file(path),
            "weights_sha256": known.get("weights_sha256"),
            "threshold": known.get("threshold"),
        }
        try:
            records.append(msgspec.convert(record, statement.JudgeRecord))
        except msgspec.ValidationError as error:
            raise UserError(f"{path}: its metadata is damaged ({error}); judge again") from None
    return statement.Judges(
        decided=dict(sorted(found.rows["judge"].value_counts().iter_rows())),
        records=records,
        agreement=agreements(found.rows, found.verdicts) if found.verdicts else [],
    )


def _selection(found: Results) -> statement.Selection:
    path, known = found.folder / "setup.json", prepare.read_record(found.folder)
    if known is None:
        raise UserError(f"{path} is missing; run the study again")
    return statement.Selection(
        sha256=sha256_file(path),
        **msgspec.structs.asdict(found.run.candidates),
    )


def _geometry(found: Results, run: RunRecord) -> Measurements | None:
    known = reliability.load(found.folder)
    for name, direction in known.directions.items() if known else ():
        if run.directions.get(name) != direction.sha256:
            path = found.folder / reliability.FILE
            raise UserError(f"{path} measured other directions; run `jaxsteer geometry` again")
    return known


def _files(found: Results, measured: bool) -> dict[str, str]:
    names = ["run.json", "setup.json", prompts.SAVED, "responses.parquet", "summary.json"]
    names += ["directions.safetensors"] + [f"judges/{name}.parquet" for name in found.verdicts]
    names += [impact.FILE, *([reliability.FILE] if measured else [])]
    return {n: sha256_file(found.folder / n) for n in names if (found.folder / n).is_file()}


def _samples(found: Results, table: str, n: int) -> statement.Samples:
    def rank(row: dict[str, Any]) -> str:
        return sha256_bytes(f"{table}:{row['row_id']}".encode())

    shown = ("condition", "prompt_id", "family", "label", "judge")
    return statement.Samples(
        rule=RULE,
        rows=[
            statement.Sample(
                **{name: row[name] for name in shown},
                response_sha256=response_sha256(row["response"]),
                excerpt=excerpt(row["response"], row["kind"], row["label"]),
            )
            for row in sorted(found.rows.iter_rows(named=True), key=rank)[:n]
        ],
    )


def excerpt(text: str, kind: str, label: str) -> str:
    """The opening of a reply as `RULE` says; control characters are spelled out.

    >>> excerpt("I cannot help with that, because it is not safe.", "harmful", "refusal")
    'I cannot help with that, because it is …'
    >>> excerpt("First, take a", "harmful", "bypass")
    '██████ ████ █'
    """
    words = [word[:LONGEST] for word in plain(text).split()]
    shown = words[:WORDS]
    if kind != "benign" and label != "refusal":
        shown = ["█" * len(word) for word in shown]
    return " ".join([*shown, "…"] if len(words) > WORDS else shown)
