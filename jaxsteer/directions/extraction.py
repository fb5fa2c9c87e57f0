"""The kinds of direction, and how each is made: from chats, or from other directions.

    kind            positive samples            negative samples            token
    trait           showing instructions        opposite instructions       as asked
    user-persona    users who show the trait    users who show its opposite as asked
    refusal         harmful prompts             harmless prompts            prompt_end
    assistant-axis  default system prompts      roles, each counted equally response_avg

    minus           one direction minus another
    without         one direction without its component along another
    random          an isotropic vector with the norms of another direction

`contrast` lists the chats of the first four, and `extract` makes any. To add a kind, add a struct
and a case here: studies, the command line and `evidence.reliability` read this table.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jaxsteer.data import prompts
from jaxsteer.data.prompts import PromptSet
from jaxsteer.directions import direction, samples
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.samples import Chat, Contrast, Position
from jaxsteer.errors import UserError
from jaxsteer.files import check_writable, sha256_json
from jaxsteer.model.chat_model import ChatModel

# What the refusal direction is made of, and what choices are made on, by rank from the first on.
HARMFUL = PromptSet(set="harmbench", seed=11)
HARMLESS = PromptSet(set="harmless", seed=11)

# The system prompt under which the model reads the users of a user persona.
REPLAYED_UNDER = "You are a helpful assistant."


class Kind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """How one direction is made: an entry of a study's `[directions]`."""


class Trait(Kind, frozen=True, kw_only=True, tag="trait"):
    """The model's own persona: a trait's instructions against their opposites.

    Persona vectors, Chen et al. 2025, section 2.2.

    Attributes:
      trait: a shipped trait's name, the path of a .toml, or the trait itself.
      position: the token whose state is averaged.
    """

    trait: str | prompts.Trait
    position: Position = "prompt_end"


class UserPersona(Trait, frozen=True, kw_only=True, tag="user-persona"):
    """How the model reads a *user* who shows a trait; fields as in `Trait`."""


class Refusal(Kind, frozen=True, kw_only=True, tag="refusal"):
    """Harmful against harmless prompts (Arditi et al. 2024, section 2.3)."""


class AssistantAxis(Kind, frozen=True, kw_only=True, tag="assistant-axis"):
    """Toward the default assistant, away from our sixteen roles (Lu et al. 2026)."""


class Minus(Kind, frozen=True, kw_only=True, tag="minus"):
    """One direction minus another, layer by layer; `of` names the two."""

    of: tuple[str, str]


class Without(Kind, frozen=True, kw_only=True, tag="without"):
    """One direction with its component along another removed at each layer; `of` names the two."""

    of: tuple[str, str]


class Random(Kind, frozen=True, kw_only=True, tag="random"):
    """An isotropic random direction.

    Attributes:
      seed: of the vectors.
      norms_of: the direction whose norms it has; "" is the first that is not random itself.
    """

    seed: int
    norms_of: str = ""


FromChats = Trait | UserPersona | Refusal | AssistantAxis
# Without Random: a study's random directions follow from the seeds of its conditions.
InStudy = FromChats | Minus | Without


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all directions of a study or command have in common.

    Attributes:
      policy: the system prompt under which refusal is extracted.
      seed: of sampled replies.
      refusal_prompts: number of harmful prompts of the refusal direction, and of harmless ones.
      skipped: the first harmless prompts, which are left out to select the layer of refusal on.
      harmful, harmless: where these prompts come from.
    """

    policy: str | prompts.Policy = "safety-v2"
    seed: int = 0
    refusal_prompts: int = 128
    skipped: int = 16
    harmful: PromptSet = HARMFUL
    harmless: PromptSet = HARMLESS


DEFAULT = Settings()


def contrast(kind: FromChats, settings: Settings = DEFAULT) -> Contrast:
    """The chats whose states make a direction of that kind.

    Raises:
      UserError: no such trait or policy.
    """
    match kind:
        case UserPersona():
            # The model's replies to the trait's chats, replayed as a user's messages.
            said = trait_contrast(prompts.trait(kind.trait), kind.position)
            made = dataclasses.replace(
                said,
                kind="user-persona",
                source_sha256=sha256_json([said.source_sha256, REPLAYED_UNDER]),
                replayed_under=REPLAYED_UNDER,
            )
        case Trait():
            made = trait_contrast(prompts.trait(kind.trait), kind.position)
        case Refusal():
            n, skipped = settings.refusal_prompts, settings.skipped
            harmful = prompts.read(settings.harmful)[:n]
            harmless = prompts.read(settings.harmless)[skipped : skipped + n]
            sides = [prompt.text for prompt in harmful], [prompt.text for prompt in harmless]
            made = prompt_contrast(*sides, prompts.policy(settings.policy).text)
        case AssistantAxis():
            texts = prompts.roles()
            roles = [(role["name"], role["instruction"]) for role in texts["roles"]]
            made = axis_contrast(texts["default"], roles, texts["questions"])
    return dataclasses.replace(made, seed=settings.seed)


def extract(
    model: ChatModel,
    name: str,
    kind: InStudy | Random,
    *,
    found: Mapping[str, Direction] | None = None,
    settings: Settings = DEFAULT,
    keep: Path | None = None,
) -> Direction:
    """Make one direction.

    Args:
      model: the model to extract on.
      name: what the direction is called.
      kind: how it is made.
      found: the directions that exist already, for kinds made of others.
      settings: what directions have in common.
      keep: file for the sums of its samples (see `samples.Parts`), if it has any.

    Raises:
      UserError: no direction to take norms from, or as `contrast` and `samples.gather`.
    """
    found = found or {}
    match kind:
        case Minus(of=(first, second)):
            return direction.minus(name, found[first], found[second])
        case Without(of=(first, second)):
            return direction.without(name, found[first], found[second])
        case Random(seed=seed, norms_of=other):
            real = [n for n, d in found.items() if d.provenance.get("kind") != "random"]
            if not (other or real):
                raise UserError(
                    f"{name} takes the norms of another direction and there is none; name one "
                    "before it, such as compliant"
                )
            made = direction.random_like(found[other or real[0]], seed)
            return dataclasses.replace(made, name=name)
        case _:
            return difference(model, name, contrast(kind, settings), keep)


def difference(
    model: ChatModel, name: str, made_of: Contrast, keep: Path | None = None
) -> Direction:
    """The difference of a contrast's means, with its provenance.

    Raises:
      UserError: as `samples.gather`.
    """
    found = samples.gather(model, made_of)
    if keep is not None:
        found.keep(keep)
    norms = np.linalg.norm(found.values[found.positive].astype(np.float64), axis=-1)
    provenance: dict[str, Any] = {
        "tap": "resid_post",
        "kind": made_of.kind,
        "position": made_of.position,
        "n_positive": int(found.positive.sum()),
        "n_negative": int((~found.positive).sum()),
        "source_sha256": made_of.source_sha256,
        "residual_norm": [round(float(value), 4) for value in norms.mean(axis=0)],
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "tokenizer_sha256": model.tokenizer_sha256,
    }
    parts = found.parts(found.labelled)
    if (halves := parts.split_half()) is not None:
        mean = [round(float(value), 6) for value in halves.mean(axis=0)]
        provenance["split_half"] = {
            "unit": found.labelled,
            "units": len(parts.ids),
            "mean": mean,
        }
    if made_of.replayed_under or made_of.position != "prompt_end":
        sampled = {**samples.SAMPLED, "max_new_tokens": made_of.max_new_tokens}
        provenance |= {"seed": made_of.seed, "sampled": sampled}
    texts = [text for chat in made_of.chats for text in (chat.system or "", chat.user)]
    if broken := model.tokenizer.broken(*texts):
        provenance["broken_tokens"] = broken
    return Direction(name=name, vectors=found.direction(), provenance=provenance)


def read_name(text: str, position: Position = "prompt_end") -> tuple[str, InStudy | Random]:
    """A direction's name and kind from a trait, its .toml, refusal, assistant-axis or random-SEED.

    Raises:
      UserError: no such trait, or one whose name `--steer` cannot read.
    """
    fixed: dict[str, InStudy] = {"refusal": Refusal(), "assistant-axis": AssistantAxis()}
    if text in fixed:
        return text, fixed[text]
    if match := re.fullmatch("random-([0-9]{1,18})", text):
        return text, Random(seed=int(match[1]))
    name = prompts.trait(text).name
    if not re.fullmatch(direction.NAME, name):
        raise UserError(
            f"{text}: a direction cannot be named {name!r}; in the trait's name, use only letters, "
            "digits and . _ -"
        )
    return name, Trait(trait=text, position=position)


def find_or_extract(
    model: ChatModel,
    names: Sequence[str],
    path: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Direction]:
    """The directions of a file, with the missing ones extracted and saved in it.

    A direction of the file that was made from other texts, at another token or with another
    tokenizer than is asked for is extracted again.

    Args:
      model: the model they belong to.
      names: what is needed, as `read_name` reads it. `random-SEED` has the norms of the first
        other one.
      path: the directions file, which need not exist.
      say: called with one line before each extraction.

    Raises:
      UserError: a file of another model or that cannot be written, or as `read_name` and `extract`.
    """
    found = direction.of_model(path, model)
    asked = dict(_wanted(text, found) for text in names)
    real = [name for name, kind in asked.items() if not isinstance(kind, Random)]
    # Random ones last, since they take the norms of another; they cost nothing and are not kept.
    for name in [*real, *(asked.keys() - set(real) - found.keys())]:
        kind = asked[name]
        if isinstance(kind, Random):
            kind = msgspec.structs.replace(kind, norms_of=real[0] if real else "")
            found[name] = extract(model, name, kind, found=found if real else {})
        elif name not in found or _outdated(found[name], model, kind):
            check_writable(path)
            say(f"extracting {name}; it is kept in {path}")
            assert kind is not None
            made = extract(model, name, kind, found=found)
            found |= direction.add(path, made, model)
    return found


def _wanted(text: str, found: Mapping[str, Direction]) -> tuple[str, InStudy | Random | None]:
    """As `read_name`; None is the kind of a direction that only its file knows."""
    try:
        return read_name(text)
    except UserError:
        if text not in found:
            raise
        return text, None


def _outdated(known: Direction, model: ChatModel, kind: Kind | None) -> bool:
    if not isinstance(kind, FromChats):
        return False
    made_of, keys = contrast(kind), ("source_sha256", "position", "tokenizer_sha256")
    wanted = [made_of.source_sha256, made_of.position, model.tokenizer_sha256]
    return [known.provenance.get(key) for key in keys] != wanted


def trait_contrast(trait: prompts.Trait, position: Position = "prompt_end") -> Contrast:
    """A trait's positive instructions against its negative ones, with the same questions."""
    return Contrast(
        kind="trait",
        source_sha256=trait.sha256,
        chats=_crossed([trait.positive, trait.negative], trait.questions),
        position=position,
    )


def prompt_contrast(
    positive: Sequence[str], negative: Sequence[str], system: str | None
) -> Contrast:
    """Prompts against other prompts under one system prompt, at the last prompt token."""
    return Contrast(
        kind="refusal",
        source_sha256=sha256_json([list(positive), list(negative), system]),
        chats=[
            Chat(system=system, user=text, group=int(i >= len(positive)), units=(i,))
            for i, text in enumerate([*positive, *negative])
        ],
        units=("prompt",),
    )


def axis_contrast(
    default: Sequence[str],
    roles: Sequence[tuple[str, str]],
    questions: Sequence[str],
) -> Contrast:
    """Default system prompts against roles (name, instruction), with the same questions.

    Each role is a group, so that roles count equally however many of their replies are empty.
    """
    return Contrast(
        kind="assistant-axis",
        source_sha256=sha256_json([list(default), [list(r) for r in roles], list(questions)]),
        chats=_crossed([default, *([instruction] for _, instruction in roles)], questions),
        position="response_avg",
        max_new_tokens=48,
    )


def _crossed(groups: Sequence[Sequence[str]], questions: Sequence[str]) -> list[Chat]:
    """Every instruction of every group with every question."""
    instructions = [(group, text) for group, texts in enumerate(groups) for text in texts]
    return [
        Chat(system=text, user=question, group=group, units=(i, j))
        for i, (group, text) in enumerate(instructions)
        for j, question in enumerate(questions)
    ]
