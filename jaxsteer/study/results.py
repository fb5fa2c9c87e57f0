"""A results folder: what was run, finished rows in shards, and the whole read back for all readers.

run.json                what was run: the run record
setup.json              selection tables
directions.safetensors  directions with provenance
prompts.parquet         the prompts that are reported on, with their texts
responses.parquet       one line per row, as the run labelled it
judges/JUDGE.parquet    later verdicts, one line per judged row
summary.json            rates per condition and prompt family
shards/                 finished batches, from which an interrupted run continues

A run writes its record once. Each operation of a condition in it is a value (what is done, with
which direction, at which layers). Code compares operations; the words that `describe` makes of them
are for people only.

A shard is written aside, synced and renamed, so a process that is killed loses only the rows it had
not finished. Its name holds the hash of its content, so several processes can write to one folder.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import jax
import msgspec
import polars as pl
from msgspec import Meta

from jaxsteer.data import prompts
from jaxsteer.data.prompts import Kind, Prompt
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.files import (
    atomic_path,
    canonical_json,
    meant,
    read_json,
    read_table,
    sha256_bytes,
    sha256_json,
    table_bytes,
    write_json,
)
from jaxsteer.judges.verdicts import LABELS, label_table, read_all
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Interventions, Scope, Tap
from jaxsteer.stats import wilson
from jaxsteer.study.selection import Candidates
from jaxsteer.study.spec import StudySpec, portable
from jaxsteer.words import layer_list

RUN = "run.json"
FORMAT: Final = "jaxsteer-run-4"
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", description="hex sha256")]
# No study has more rows or layers; a loop over a larger, damaged number would never end.
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Layers = tuple[Count, ...]
# The columns that readers rely on, and those that may have null cells.
SCHEMA = {
    "row_id": pl.String, "condition": pl.String, "base": pl.String, "seed": pl.Int64,
    "scale": pl.Float64, "mode": pl.String, "prompt_id": pl.String, "family": pl.String,
    "kind": pl.String, "category": pl.String, "response": pl.String, "n_tokens": pl.Int64,
    "stopped": pl.Boolean, "label": pl.String, "judge": pl.String,
    "cancels_steering": pl.Boolean, "steered_tokens": pl.Int64, "change": pl.Float64,
}  # fmt: skip
MAY_BE_NULL = {"seed", "scale"}


# -- The run record --------------------------------------------------------------------------------


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the structs that a receipt holds too; an unknown key is an error."""


class Add(Part, frozen=True, tag_field="operation", tag="add"):
    """A multiple of a direction is added.

    Attributes:
      direction: its name.
      layers: 0-based blocks.
      scale: multiples of the natural norm; negative subtracts.
      tap: where in the block.
      measured_at: the layer whose vector is used at all layers; null uses each layer's own.
      norm_of: the direction whose norm the vector was given first, or null.
      norm_at: the layer of that norm; null uses each layer's own.
    """

    direction: str
    layers: Layers
    scale: float
    tap: Tap = "resid_post"
    measured_at: Count | None = None
    norm_of: str | None = None
    norm_at: Count | None = None


class Project(Part, frozen=True, tag_field="operation", tag="project"):
    """A direction is projected out; several at one place are removed as one subspace.

    Attributes:
      direction, layers, tap, measured_at: as in `Add`.
      everywhere: at the embedding and at both taps of all layers, so that no write to the
        residual stream keeps any of the direction.
    """

    direction: str
    layers: Layers
    tap: Tap = "resid_post"
    measured_at: Count | None = None
    everywhere: bool = False


Operation = Add | Project


class Condition(Part, frozen=True):
    """One condition of a run.

    Attributes:
      name: unique in the study: `MODE: BASE xSCALE #SEED`, parts that do not apply left out.
      base: the name in the spec (with `, unsteered` for a twin); claims name this.
      seed: of the random direction, or null.
      scale: strength of a repeat over `scales`, or null.
      mode: persona mode of the system prompt, or "".
      operations: what is applied; none is the plain model.
      scope: which tokens are steered.
      benign: whether the sets that are not harmful run under it too.
      cancels_steering: the projection undoes the addition by algebra, whatever the model does.
      unsteered_twin_of: name of the knockout this is the control of, or "".
      system_sha256: of the whole system prompt.
      prompts: number of prompts of each harmful set, the first by rank; null is all.
    """

    name: str
    base: str
    seed: int | None
    scale: float | None
    mode: str
    operations: tuple[Operation, ...]
    scope: Scope
    benign: bool
    cancels_steering: bool
    unsteered_twin_of: str
    system_sha256: Sha256
    prompts: Count | None = None


class Source(Part, frozen=True):
    """What the checkpoint was converted from, with the sha256 of each file.

    Attributes:
      options: what was asked of the conversion, such as an adapter or variables of the chat
        template; left out if nothing was.
    """

    kind: str
    name: str
    files: dict[str, Sha256]
    revision: str = ""
    options: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class Model(Part, frozen=True):
    """The model that was run; the hashes are those of its checkpoint's manifest."""

    name: str
    dtype: str
    source: Source
    weights_sha256: Sha256
    tokenizer_sha256: Sha256
    template_sha256: Sha256
    config_sha256: Sha256


class Text(Part, frozen=True):
    """A policy or persona mode, whole: these texts are the study's own."""

    name: str
    version: str
    sha256: Sha256
    text: str


class Prompts(Part, frozen=True):
    """One prompt set: how many, the hash of their ids and texts, where they come from.

    Attributes:
      own: the study's own file, and no shipped set.
      broken_tokens: control tokens of the model that these prompts spell out, each broken up by a
        space; left out if there is none.
    """

    kind: Kind
    n: Count
    sha256: Sha256
    source: str
    own: bool
    broken_tokens: Count | msgspec.UnsetType = msgspec.UNSET


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One run. The rows depend on everything here but the environment.

    Attributes:
      format: of this file.
      key: hash of everything the rows depend on.
      study: the study as asked for.
      model, policy, modes: what was run, and the texts of its system prompts.
      prompts: by name of the set.
      layers: 0-based layers by name.
      dose, refusal_dose: strengths of persona and late refusal, in natural norms.
      candidates: what policy, layers and strengths were chosen from.
      directions: sha256 of each direction, by name.
      conditions: all of them, in the order of the rows.
      environment: software, hardware and starting time (UTC).
    """

    format: Literal["jaxsteer-run-4"]
    key: Sha256
    study: StudySpec
    model: Model
    policy: Text
    modes: list[Text]
    prompts: dict[str, Prompts]
    layers: dict[str, Count]
    dose: float
    refusal_dose: float
    candidates: Candidates
    directions: dict[str, Sha256]
    conditions: list[Condition]
    environment: dict[str, str]

    @property
    def spec(self) -> StudySpec:
        """The study, with its policy filled in."""
        own = msgspec.convert(self.policy, prompts.Policy, from_attributes=True)
        return msgspec.structs.replace(self.study, system=own)

    def named(self, name: str) -> Condition:
        """The condition of that name."""
        return next(c for c in self.conditions if c.name == name)

    def size(self, condition: Condition, family: str) -> int:
        """Number of prompts of a set that a condition runs on."""
        known = self.prompts.get(family)
        if known is None:
            return 0
        if known.kind == "harmful":
            return min(known.n, condition.prompts or known.n)
        return known.n if condition.benign else 0

    def kind(self, family: str) -> Kind:
        """The kind of a set; of one without prompts, "harmful"."""
        return self.prompts[family].kind if family in self.prompts else "harmful"


class Prepared(NamedTuple):
    """A run with all that its rows need.

    Attributes:
      run: its record.
      model: the model.
      arrays: the record's conditions, stacked in their order.
      directions: by name.
      families: the prompts of each set.
      out: the results folder.
    """

    run: RunRecord
    model: ChatModel
    arrays: Interventions
    directions: Mapping[str, Direction]
    families: Mapping[str, Sequence[Prompt]]
    out: Path


def asked(
    spec: StudySpec, model: ChatModel, families: Mapping[str, Sequence[Prompt]]
) -> dict[str, Any]:
    """The fields of the record that are known before anything is prepared."""
    return {
        "study": portable(spec),
        "model": msgspec.convert(model.identity(), Model),
        "modes": [text_of(prompts.mode(name)) for name in spec.modes],
        "prompts": {
            each.name: Prompts(
                kind=each.kind or "other",
                n=len(families[each.name]),
                sha256=prompts_sha256((p.id, p.text) for p in families[each.name]),
                source=each.source,
                own=not each.set,
                broken_tokens=model.tokenizer.broken(*(p.text for p in families[each.name]))
                or msgspec.UNSET,
            )
            for each in spec.prompts
        },
    }


def set_words(name: str, kind: Kind) -> str:
    """A prompt set in words.

    >>> set_words("strongreject", "harmful"), set_words("benign", "benign")
    ('harmful strongreject', 'benign')
    """
    return name if kind in (name, "other") else f"{kind} {name}"


def prompts_sha256(prompts: Iterable[tuple[str, str]]) -> str:
    """Hash of prompts, each with its id and its text, in their order."""
    return sha256_json([[name, text] for name, text in prompts])


def text_of(found: prompts.Policy | prompts.Mode) -> Text:
    """A policy or mode as the record holds it."""
    return msgspec.convert(found, Text, from_attributes=True)


def make_run(identity: Mapping[str, Any]) -> RunRecord:
    """The record of a run from the fields that identify it; adds format, key and environment."""
    key = sha256_json(msgspec.to_builtins(identity))
    return RunRecord(format=FORMAT, key=key, environment=environment(), **identity)


def environment() -> dict[str, str]:
    """The software and hardware of this process, and the time (UTC)."""
    versions = {name: importlib.metadata.version(name) for name in ("jaxsteer", "flax", "numpy")}
    device = jax.devices()[0]
    return {
        **versions,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{jax.device_count()} x {device.device_kind}",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_run(folder: Path, record: RunRecord) -> None:
    """Write a folder's run.json, whole or not at all."""
    write_json(folder / RUN, msgspec.to_builtins(record))


def read_run(folder: Path) -> RunRecord | None:
    """The record in a folder's run.json, or None when there is no such file.

    Raises:
      UserError: the format differs, a field is missing or mistyped, or two conditions have one
        name.
    """
    path, again = folder / RUN, "run the study with --fresh, or choose another --out"
    if not path.exists():
        return None
    found = read_json(path, RunRecord, again)
    if len({condition.name for condition in found.conditions}) < len(found.conditions):
        raise UserError(f"{path}: two conditions have one name; {again}")
    return found


def differing(folder: Path, asked: Mapping[str, Any]) -> list[str] | None:
    """The fields of a folder's record that have other values than asked for.

    Args:
      folder: the results folder.
      asked: fields of the record.

    Returns:
      Their names, or None when the folder has no record.

    Raises:
      UserError: as `read_run`.
    """
    held = read_run(folder)
    if held is None:
        return None
    return [name for name, value in asked.items() if getattr(held, name) != value]


def unsteered(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """The operations of a knockout's twin without steering; none where nothing was added, or all.

    >>> add = Add(direction="persona", layers=(3,), scale=4.0)
    >>> [describe(o) for o in unsteered([add, Project(direction="persona", layers=(5,))])]
    ['project persona at resid_post.5']
    """
    kept = tuple(op for op in operations if not isinstance(op, Add))
    return kept if len(kept) < len(operations) else ()


def describe(operation: Operation) -> str:
    """An operation in words.

    >>> describe(Add(direction="persona", layers=(21,), scale=4.0, measured_at=20))
    'add persona at resid_post.21 x4 (measured at resid_post.20)'
    """
    measured = operation.measured_at
    source = "" if measured is None else f" (measured at resid_post.{measured})"
    what = f"{operation.direction} at {spans(operation.layers, operation.tap)}"
    if isinstance(operation, Project):
        done = f"{operation.direction} everywhere" if operation.everywhere else what
        return f"project {done}{source}"
    if operation.norm_of is not None:
        at = "" if operation.norm_at is None else f" at resid_post.{operation.norm_at}"
        source += f" (norm of {operation.norm_of}{at})"
    return f"add {what} x{operation.scale:g}{source}"


def spans(layers: Sequence[int], tap: Tap = "resid_post") -> str:
    """Layers in words.

    >>> spans((22, 24, 25, 26))
    'resid_post.22, resid_post.24..26'
    """
    return ", ".join(f"{tap}.{run}" for run in layer_list(layers).split(", "))


# -- Rows ------------------------------------------------------------------------------------------


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
    run = read_run(folder)
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
