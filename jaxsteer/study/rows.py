"""The rows of a study: each condition with its prompts, and the table line of each.

A row asks the model for one reply (`requests`), and leaves one line in the table (`line`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.errors import UserError
from jaxsteer.files import stable_id
from jaxsteer.generation import engine
from jaxsteer.generation.engine import Reply, Request
from jaxsteer.generation.requests import shared_lengths
from jaxsteer.judges.labels import label
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.study import prepare
from jaxsteer.study.conditions import system_prompts
from jaxsteer.study.record import Condition
from jaxsteer.study.spec import StudySpec

Row = tuple[Condition, Prompt]
# Columns that may be null in every line of a shard.
TYPES = {"steered_tokens": pl.Int64, "seed": pl.Int64, "scale": pl.Float64}


def prompts(spec: StudySpec, limit: int | None = None) -> dict[str, list[Prompt]]:
    """The prompts reported on, by set; `limit` replaces the number of each harmful set.

    Raises:
      UserError: as `data.read`, or a prompt that is in two sets, or that the selection uses too.
    """
    found = {
        each.name: data.read(each, limit if each.kind == "harmful" else None)
        for each in spec.prompts
    }
    chosen = zip(("harmful", "harmless"), prepare.selected(spec), strict=True)
    used = {f"the {name} prompts of [selection]": some for name, some in chosen} | found
    seen: dict[str, tuple[str, int]] = {}
    for name, some in used.items():
        for prompt in some:
            place = name, prompt.row
            other = seen.setdefault(" ".join(prompt.text.casefold().split()), place)
            if other[0] != name:
                raise UserError(
                    f"study {spec.name}: row {prompt.row} of {name} is also row {other[1]} of "
                    f"{other[0]}; take it out of one of the two"
                )
    return found


def cross(found: Sequence[Condition], families: Mapping[str, Sequence[Prompt]]) -> list[Row]:
    """Every row of the study, in the order of the table."""
    return [
        (condition, prompt)
        for condition in found
        for asked in families.values()
        for prompt in _asked(condition, asked)
    ]


def _asked(condition: Condition, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Those prompts of a set that a condition runs on."""
    if all(prompt.kind == "harmful" for prompt in prompts):
        return prompts[: condition.prompts]
    return prompts if condition.benign else []


def name(row: Row) -> str:
    """A row's id, CONDITION/PROMPT: unique in the study and the same in every run."""
    return f"{row[0].name}/{row[1].id}"


def requests(
    spec: StudySpec, model: ChatModel, found: Sequence[Condition], rows: Sequence[Row]
) -> list[Request]:
    """What each row asks of the model: the prompt's tokens, and how many of them rows share.

    Args:
      spec: the study.
      model: the model.
      found: all conditions, in the order of the stacked interventions.
      rows: from `cross`.

    Raises:
      UserError: an empty prompt, or a chat template that refuses one.
    """
    index = {condition.name: c for c, condition in enumerate(found)}
    by_mode = system_prompts(spec)
    asked = [(by_mode[condition.mode], prompt.asked) for condition, prompt in rows]
    tokens = {key: model.tokenizer.chat(key[1], key[0]) for key in dict.fromkeys(asked)}
    prompts = [tokens[key] for key in asked]
    # A conversation whose history is not steered has that as its prefix.
    plain = {
        key: model.tokenizer.before_last(key[1], key[0])
        for key, (_, prompt) in zip(asked, rows, strict=True)
        if prompt.plain_history and not isinstance(key[1], str)
    }
    lengths = shared_lengths(prompts, [key if key in plain else key[0] for key in asked])
    shared = [plain.get(key, n) for key, n in zip(asked, lengths, strict=True)]
    return [
        Request(
            tokens=prompts[i],
            condition=index[condition.name],
            row_id=stable_id(condition.name, prompt.id),
            shared=shared[i],
            plain=asked[i] in plain,
        )
        for i, (condition, prompt) in enumerate(rows)
    ]


def line(row: Row, reply: Reply, probed: Sequence[str]) -> dict[str, Any]:
    """A finished row's line in the table.

    For each probed direction it has the projections of the residual stream before and after the
    operations at every `resid_post`, as means over the tokens of the prompt and of the reply.
    """
    condition, prompt = row
    given, judge = label(reply.text, prompt.kind)
    both = [*reply.prompt.values(), *reply.response.values()]
    made: dict[str, Any] = {
        "row_id": name(row),
        "condition": condition.name,
        "base": condition.base,
        "seed": condition.seed,
        "scale": condition.scale,
        "mode": condition.mode,
        "prompt_id": prompt.id,
        "family": prompt.family,
        "kind": prompt.kind,
        "category": prompt.category,
        "response": reply.text,
        "n_tokens": len(reply.tokens),
        "stopped": reply.stopped,
        "label": given,
        "judge": judge,
        "cancels_steering": condition.cancels_steering,
        # Tokens times sites where something changed, and the summed norm of the change there.
        "steered_tokens": sum(int(found.steered[found.change > 0].sum()) for found in both),
        "change": engine.total_change(reply),
    }
    # The model reads all generated tokens but the last, and that one too before an end token.
    read = len(reply.tokens) - (0 if reply.stopped else 1)
    for phase, realised, tokens in (
        ("prompt", reply.prompt, reply.n_prompt),
        ("response", reply.response, read),
    ):
        stream, count = realised["resid_post"], max(tokens, 1)
        for p, direction in enumerate(probed):
            made[f"{direction}_before_{phase}"] = (stream.before[:, p] / count).tolist()
            made[f"{direction}_after_{phase}"] = (stream.after[:, p] / count).tolist()
    return made
