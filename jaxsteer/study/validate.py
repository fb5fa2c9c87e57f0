"""Whether a model can run a study to its end, asked before anything is run or replaced.

Prompts are tokenised for real, and nothing is computed on the model. A layer that is still to be
chosen is taken once as its deepest candidate and once as its shallowest one: an expression such as
`steer+2` that has a layer at both ends has one in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions.extraction import Refusal
from jaxsteer.errors import UserError
from jaxsteer.generation import padding
from jaxsteer.generation.engine import Request
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.study import prepare, rows
from jaxsteer.study.conditions import conditions
from jaxsteer.study.layer_expr import depth, resolve_layers
from jaxsteer.study.spec import StudySpec

Choice = Literal["layers.steer", "dose", "layers.refusal"]


def study(
    spec: StudySpec, model: ChatModel, families: Mapping[str, Sequence[Prompt]]
) -> list[Request]:
    """Every row of the study, as it will be asked of the model.

    Raises:
      UserError: as preparing and running the study would, for what is wrong in the spec, with what
        it names, or with its prompts.
    """
    prepare.key(spec, model)  # Reads the policy and the traits.
    for name, item in spec.directions.items():
        if isinstance(item, Refusal):
            prepare.selection_of(spec, f"direction {name!r}")
    _check_selection(spec, model)
    n_layers, dose = model.config.n_layers, 1.0 if spec.dose is None else spec.dose
    extremes = _extremes(spec, model)
    found = [conditions(spec, layers, dose, n_layers) for layers in extremes]
    for claim in spec.claim:
        where = f"study {spec.name}, claim {claim.name!r}"
        for test in claim.tests:
            if test.expect == "cosine-above":
                for layers in extremes:
                    resolve_layers(test.at, layers, n_layers, where)
                continue
            for name in (test.treated, test.control):
                if not any(c.base == name for every in found for c in every):
                    raise UserError(
                        f"{where}: no condition {name!r} is made; an unsteered twin is made of a "
                        "condition that both adds and projects, unless the study has an equal one"
                    )
    asked = rows.requests(spec, model, found[0], rows.cross(found[0], families))
    _check_fit(spec, model, "decoding", spec.decoding.max_new_tokens, [r.tokens for r in asked])
    return asked


def open_choices(spec: StudySpec) -> list[Choice]:
    """What the selection rules still have to choose, by its key in the study.

    Raises:
      UserError: the spec has no [selection] to choose it by.
    """
    persona, refusal = "persona" in spec.directions, "refusal" in spec.directions
    choices: dict[Choice, bool] = {
        "layers.steer": persona and "steer" not in spec.layers,
        "dose": persona and spec.dose is None,
        "layers.refusal": refusal and "refusal" not in spec.layers,
    }
    found = [name for name, is_open in choices.items() if is_open]
    if found and spec.selection is None:
        raise UserError(
            f"study {spec.name}: {found[0]} is open; add [selection], which chooses it, or give "
            "it a value"
        )
    return found


def _extremes(spec: StudySpec, model: ChatModel) -> list[dict[str, int]]:
    """Layers by name, at the deepest candidates of what is still to choose and the shallowest."""
    fixed, still = prepare.named_layers(spec, model), open_choices(spec)
    candidates: dict[str, Sequence[float]] = {}
    if spec.selection is not None and "layers.steer" in still:
        candidates["steer"] = spec.selection.layers
    if spec.selection is not None and "layers.refusal" in still:
        candidates["refusal"] = spec.selection.refusal_layers
    n_layers = model.config.n_layers
    return [
        {name: depth(pick(shares), n_layers) for name, shares in candidates.items()} | fixed
        for pick in (max, min)
    ]


def _check_selection(spec: StudySpec, model: ChatModel) -> None:
    still, chosen = open_choices(spec), spec.selection
    if chosen is None:
        return
    split = prepare.split(chosen, spec.name)
    if "layers.refusal" in still:
        prepare.openings(spec.name, chosen, model)
    if "layers.steer" in still or "dose" in still:
        asked = prepare.ids(model, split.persona, data.policy(spec.system).text)
        _check_fit(spec, model, "selection", chosen.max_new_tokens, asked)


def _check_fit(
    spec: StudySpec, model: ChatModel, where: str, new: int, prompts: Sequence[Sequence[int]]
) -> None:
    """Refuse replies that leave no room for their prompt in the model's context."""
    room = model.config.max_position
    if new >= room:
        raise UserError(
            f"study {spec.name}: {where}.max_new_tokens is {new}; the context of {model.name} "
            f"holds {room} tokens, prompt included"
        )
    padding.check_lengths(map(len, prompts), room - new)
