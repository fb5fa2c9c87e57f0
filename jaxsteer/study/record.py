"""The run record: what was run, with every operation of every condition, as written to run.json.

A run writes its record once, and everything that reads results reads this. Each operation is a
value (what is done, with which direction, at which layers). Code compares operations; the words
that `describe` makes of them are for people only.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import jax
import msgspec
from msgspec import Meta

from jaxsteer.data import prompts
from jaxsteer.data.prompts import Kind, Prompt
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.files import read_json, sha256_json, write_json
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Interventions, Scope, Tap
from jaxsteer.study.selection import Candidates
from jaxsteer.study.spec import StudySpec, portable
from jaxsteer.words import layer_list

FILE = "run.json"
FORMAT: Final = "jaxsteer-run-4"
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", description="hex sha256")]
# No study has more rows or layers; a loop over a larger, damaged number would never end.
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Layers = tuple[Count, ...]


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


def make(identity: Mapping[str, Any]) -> RunRecord:
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


def write(folder: Path, record: RunRecord) -> None:
    """Write a folder's run.json, whole or not at all."""
    write_json(folder / FILE, msgspec.to_builtins(record))


def read(folder: Path) -> RunRecord | None:
    """The record in a folder's run.json, or None when there is no such file.

    Raises:
      UserError: the format differs, a field is missing or mistyped, or two conditions have one
        name.
    """
    path, again = folder / FILE, "run the study with --fresh, or choose another --out"
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
      UserError: as `read`.
    """
    held = read(folder)
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
