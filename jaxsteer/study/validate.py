"""Whether a model can run a study to its end, asked before anything is run or replaced.

Prompts are tokenised for real. A layer that is still to be chosen is each of its candidates in
turn, so nothing is computed on the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions.extraction import Refusal, Trait, UserPersona
from jaxsteer.errors import UserError
from jaxsteer.generation import padding
from jaxsteer.generation.engine import Request
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.study import prepare
from jaxsteer.study.conditions import conditions
from jaxsteer.study.layer_expr import depth, read_layer, resolve_layers, windows
from jaxsteer.study.planned import cross, requests
from jaxsteer.study.record import Condition
from jaxsteer.study.spec import SelectionSpec, StudySpec


def study(
    spec: StudySpec, model: ChatModel, families: Mapping[str, Sequence[Prompt]]
) -> list[Request]:
    """Every row of the study, as it will be asked of the model.

    Raises:
      UserError: as setting the study up and running it would, for what is wrong in the spec, with
        what it names, or with its prompts.
    """
    without_model(spec)
    prepare.named_layers(spec, model)
    still = open_choices(spec)
    if spec.selection is not None:
        _check_selection(spec, spec.selection, model, still)
    choices = _compiled(spec, model.config.n_layers)
    compiled = next(choices)
    _check_claims(spec, itertools.chain([compiled], choices), model.config.n_layers)
    asked = requests(spec, model, compiled, cross(compiled, families))
    tokens = [request.tokens for request in asked]
    _check_fit(spec, model, "decoding", spec.decoding.max_new_tokens, tokens)
    return asked


def without_model(spec: StudySpec) -> list[str]:
    """Check what needs neither a model nor a public prompt set; returns the files a study names.

    Raises:
      UserError: a trait, mode or policy that is none, a choice left open without [selection], a
        layer to choose from that is no fraction of depth, or the name of a layer that is none.
    """
    kinds = spec.directions.values()
    traits = [kind.trait for kind in kinds if isinstance(kind, Trait | UserPersona)]
    for name in traits:
        data.trait(name)
    for name in spec.modes:
        data.mode(name)
    data.policy(spec.system)
    for name, kind in spec.directions.items():
        if isinstance(kind, Refusal):
            prepare.selection_of(spec, f"direction {name!r}")
    _check_fractions(spec, open_choices(spec))
    _check_layer_names(spec)
    return [name for name in (*traits, *spec.modes) if name.endswith(".toml")]


def open_choices(spec: StudySpec) -> tuple[str, ...]:
    """What the selection rules still have to choose.

    Raises:
      UserError: the spec has no [selection] to choose it by.
    """
    choices = {
        "layer of the persona": "persona" in spec.directions and "steer" not in spec.layers,
        "dose": "persona" in spec.directions and spec.dose is None,
        "layer of refusal": "refusal" in spec.directions and "refusal" not in spec.layers,
    }
    found = tuple(name for name, is_open in choices.items() if is_open)
    if found and spec.selection is None:
        fixed = {"layer of the persona": "layers.steer", "layer of refusal": "layers.refusal"}
        raise UserError(
            f"study {spec.name}: {found[0]} is open; add [selection], or give "
            f"{fixed.get(found[0], 'dose')} a value"
        )
    return found


def _check_selection(
    spec: StudySpec, chosen: SelectionSpec, model: ChatModel, still: Sequence[str]
) -> None:
    prompts = prepare.split(chosen, spec.name)
    system = data.policy(spec.system).text
    if "layer of refusal" in still:
        prepare.openings(spec.name, chosen, model)
    if "layer of the persona" in still or "dose" in still:
        asked = prepare.ids(model, prompts.persona, system)
        _check_fit(spec, model, "selection", chosen.max_new_tokens, asked)


def _check_fractions(spec: StudySpec, still: Sequence[str]) -> None:
    shares: dict[str, Sequence[float]] = {}
    if spec.selection is not None and "layer of refusal" in still:
        shares["refusal_layers"] = spec.selection.refusal_layers
    if spec.selection is not None and "layer of the persona" in still:
        shares["layers"] = spec.selection.layers
    for key, fractions in shares.items():
        for share in fractions:
            if not 0 <= share <= 1:
                raise UserError(
                    f"study {spec.name}: selection.{key} holds {share}; a fraction of depth lies "
                    "between 0 and 1"
                )


def _check_layer_names(spec: StudySpec) -> None:
    """Refuse names that no model's layers will have; which numbers there are, a model knows."""
    known = _layers(spec, n_layers=1)[0]
    asked = [
        (f"condition {condition.name!r}", at)
        for condition in spec.condition
        for op in condition.ops
        for at in (op.at, op.measured_at, op.norm_at)
        if at
    ]
    tests = [(f"claim {claim.name!r}", test) for claim in spec.claim for test in claim.tests]
    asked += [(where, test.at) for where, test in tests if test.expect == "cosine-above"]
    for where, at in asked:
        for text in itertools.chain(*windows(at)):
            read_layer(text, known, f"study {spec.name}, {where}")


def _check_fit(
    spec: StudySpec, model: ChatModel, where: str, new: int, prompts: Sequence[Sequence[int]]
) -> None:
    """Refuse replies that leave no room for their prompt in the model's context."""
    room = model.config.max_position
    if new >= room:
        raise UserError(
            f"study {spec.name}: {where}.max_new_tokens is {new}; the context of {model.name} "
            f"holds {room} tokens, the prompt's among them"
        )
    padding.check_lengths(map(len, prompts), room - new)


def _check_claims(spec: StudySpec, compiled: Iterable[Sequence[Condition]], n_layers: int) -> None:
    """Refuse a claim about what will not be there; its form is checked when the spec is read.

    Which twins are made may depend on the layers that are chosen; none may be of none of them.
    """
    bases, twins = set[str](), dict[str, None]()
    for choice in compiled:
        bases |= {condition.base for condition in choice}
        twins |= dict.fromkeys(c.base for c in choice if c.unsteered_twin_of)
    for claim in spec.claim:
        where = f"study {spec.name}, claim {claim.name!r}"
        for test in claim.tests:
            if test.expect == "cosine-above":
                for layers in _layers(spec, n_layers):
                    resolve_layers(test.at, layers, n_layers, where)
                continue
            for name in (test.treated, test.control):
                if name not in bases:
                    raise UserError(
                        f"{where}: {name!r} is no twin that is made (of a condition that both "
                        "adds and projects, unless the study has an equal one); there are "
                        f"{', '.join(map(repr, twins)) or 'none'}"
                    )


def deepest(spec: StudySpec, n_layers: int) -> list[Condition]:
    """The study's conditions at the deepest choice of layers."""
    return next(_compiled(spec, n_layers))


def _compiled(spec: StudySpec, n_layers: int) -> Iterator[list[Condition]]:
    """The conditions at each choice of layers that the selection may make, the deepest first."""
    dose = 1.0 if spec.dose is None else spec.dose
    for layers in _layers(spec, n_layers):
        yield conditions(spec, layers, dose, n_layers)


def _layers(spec: StudySpec, n_layers: int) -> list[dict[str, int]]:
    """Layers by name, at each choice that the selection may make, the deepest first."""
    candidates: dict[str, Sequence[float]] = {}
    # Chosen for these two only, and where the study does not say it itself.
    still = () if spec.selection is None else open_choices(spec)
    if spec.selection is not None and "layer of the persona" in still:
        candidates["steer"] = spec.selection.layers
    if spec.selection is not None and "layer of refusal" in still:
        candidates["refusal"] = spec.selection.refusal_layers
    choices = {
        name: sorted({depth(share, n_layers) for share in shares}, reverse=True)
        for name, shares in candidates.items()
    }
    for name, layer in spec.layers.items():
        choices[name] = [depth(layer, n_layers) if isinstance(layer, float) else layer]
    return [
        dict(zip(choices, chosen, strict=True)) for chosen in itertools.product(*choices.values())
    ]
