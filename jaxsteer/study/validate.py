"""Whether a model can run a study to its end, checked before anything is run or deleted.

Prompts are tokenised for real, and nothing is computed on the model. A layer that is still to be
chosen is taken once as its deepest candidate and once as its shallowest one: an expression such as
`steer+2` that has a layer at both ends has one in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.errors import UserError
from jaxsteer.generation import padding
from jaxsteer.generation.engine import Request
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.study import prepare, rows
from jaxsteer.study.conditions import conditions
from jaxsteer.study.layer_expr import depth, resolve_layers
from jaxsteer.study.spec import StudySpec


def study(
    spec: StudySpec, model: ChatModel, families: Mapping[str, Sequence[Prompt]]
) -> list[Request]:
    """Check the study; returns what each of its rows will ask of the model.

    Raises:
      UserError: the errors that preparing and running the study would raise, for what is wrong in
        the spec, with what it names, or with its prompts.
    """
    prepare.key(spec, model)  # Reads the policy and the traits.
    _check_selection(spec, model)
    n_layers, dose = model.config.n_layers, 1.0 if spec.dose is None else spec.dose
    extremes = _extremes(spec, model)
    found = [conditions(spec, layers, dose, n_layers) for layers in extremes]
    names = {condition.base for every in found for condition in every}
    for claim in spec.claim:
        where = f"study {spec.name}, claim {claim.name!r}"
        for test in claim.tests:
            if test.expect == "cosine-above":
                for layers in extremes:
                    resolve_layers(test.at, layers, n_layers, where)
            elif missing := {test.treated, test.control} - names:
                raise UserError(
                    f"{where}: there is no condition {min(missing)!r}; only a condition that "
                    "adds and projects has an unsteered twin, unless the study has an equal one"
                )
    asked = rows.requests(spec, model, found[0], rows.cross(found[0], families))
    room = model.config.max_position - spec.decoding.max_new_tokens
    padding.check_lengths((len(request.tokens) for request in asked), room)
    return asked


def open_choices(spec: StudySpec) -> dict[str, Sequence[float]]:
    """What the selection still has to choose of `steer`, `dose` and `refusal`: its candidates.

    Raises:
      UserError: the spec has no [selection] to choose it by.
    """
    persona, refusal = "persona" in spec.directions, "refusal" in spec.directions
    still = [
        name
        for name, is_open in (
            ("steer", persona and "steer" not in spec.layers),
            ("dose", persona and spec.dose is None),
            ("refusal", refusal and "refusal" not in spec.layers),
        )
        if is_open
    ]
    if not still:
        return {}
    chosen = prepare.selection_of(spec, f"the choice of {still[0]}")
    candidates: dict[str, Sequence[float]] = {
        "steer": chosen.layers,
        "dose": chosen.scales,
        "refusal": chosen.refusal_layers,
    }
    return {name: candidates[name] for name in still}


def _extremes(spec: StudySpec, model: ChatModel) -> list[dict[str, int]]:
    """Layers by name, at the deepest candidates of what is still to choose and the shallowest."""
    fixed, n_layers = prepare.named_layers(spec, model), model.config.n_layers
    shares = {name: found for name, found in open_choices(spec).items() if name != "dose"}
    return [
        {name: depth(pick(found), n_layers) for name, found in shares.items()} | fixed
        for pick in (max, min)
    ]


def _check_selection(spec: StudySpec, model: ChatModel) -> None:
    still, chosen = open_choices(spec), spec.selection
    if chosen is None:
        return
    split = prepare.split(chosen, spec.name)
    if "refusal" in still:
        prepare.openings(spec.name, chosen, model)
    if "steer" in still or "dose" in still:
        asked = prepare.ids(model, split.persona, data.policy(spec.system).text)
        padding.check_lengths(map(len, asked), model.config.max_position - chosen.max_new_tokens)
