"""The rows of a study: every condition with its prompts, and what each asks of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions.direction import Direction
from jaxsteer.files import stable_id
from jaxsteer.generation.engine import Request
from jaxsteer.generation.prefix import shared_lengths
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.interventions import Interventions, compile_conditions
from jaxsteer.study.conditions import operations, system_prompts
from jaxsteer.study.record import Condition
from jaxsteer.study.spec import StudySpec

Planned = tuple[Condition, Prompt]


def prompts(spec: StudySpec, limit: int | None = None) -> dict[str, list[Prompt]]:
    """The prompts reported on, by family; `limit` replaces the spec's number of harmful ones."""
    harmful = spec.data.harmful if limit is None else limit
    benign = spec.data.benign
    return {
        "strongreject": data.sample(data.strongreject(), harmful, spec.data.seed),
        "benign": data.sample(data.benign(), benign, spec.data.seed) if benign else [],
    }


def cross(compiled: Sequence[Condition], families: Mapping[str, Sequence[Prompt]]) -> list[Planned]:
    """Every row of the study, in the order of the table."""
    return [
        (condition, prompt)
        for condition in compiled
        for family, asked in families.items()
        if family != "benign" or condition.benign
        for prompt in asked
    ]


def stacked(
    compiled: Sequence[Condition], directions: Mapping[str, Direction], config: ModelConfig
) -> Interventions:
    """The conditions' operations as arrays, in their order."""
    return compile_conditions(
        [operations(condition, directions) for condition in compiled],
        [condition.scope for condition in compiled],
        n_layers=config.n_layers,
        d_model=config.d_model,
    )


def row_name(condition: str, prompt_id: str) -> str:
    """A row's id: unique in the study and the same in every run."""
    return f"{condition}/{prompt_id}"


def requests(
    spec: StudySpec,
    model: ChatModel,
    compiled: Sequence[Condition],
    planned: Sequence[Planned],
) -> list[Request]:
    """What to run for each row: the prompt's tokens, and how many of them a condition's rows share.

    Raises:
      UserError: a prompt that holds one of the tokenizer's special tokens.
    """
    index = {condition.name: c for c, condition in enumerate(compiled)}
    by_mode = system_prompts(spec)
    systems = [by_mode[condition.mode] for condition, _ in planned]
    known: dict[tuple[str, str], list[int]] = {}
    for system, (_, prompt) in zip(systems, planned, strict=True):
        if (system, prompt.id) not in known:
            known[system, prompt.id] = model.tokenizer.chat(prompt.text, system)
    prompts = [known[system, p.id] for system, (_, p) in zip(systems, planned, strict=True)]
    shared = shared_lengths(prompts, systems)
    return [
        Request(
            tokens=tokens,
            condition=index[condition.name],
            row_id=stable_id(condition.name, prompt.id),
            shared=common,
        )
        for (condition, prompt), tokens, common in zip(planned, prompts, shared, strict=True)
    ]
