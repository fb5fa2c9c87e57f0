"""Whether a model can run a study to its end, and at what cost, before anything is run or deleted.

Prompts are tokenised for real, and nothing is computed on the model. A layer that is still to be
chosen is taken once as its deepest candidate and once as its shallowest one: an expression such as
`steer+2` that has a layer at both ends has one in between.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from msgspec.structs import replace

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.errors import UserError
from jaxsteer.generation import engine
from jaxsteer.generation.requests import Request, check_lengths, fitted
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.study import prepare
from jaxsteer.study import spec as specs
from jaxsteer.study.conditions import conditions, cross, depth, requests, resolve_layers
from jaxsteer.study.record import Condition
from jaxsteer.study.spec import StudySpec


def study(
    spec: StudySpec, model: ChatModel, families: Mapping[str, Sequence[Prompt]]
) -> tuple[list[Condition], list[Request]]:
    """Check the study; returns its conditions and what each of its rows will ask of the model.

    Layers that are still open are at their deepest candidates.

    Raises:
      UserError: the errors that preparing and running the study would raise, for what is wrong in
        the spec, with what it names, or with its prompts.
    """
    prepare.key(spec, model)  # Reads the policies and the traits.
    still, n_layers = prepare.open_choices(spec), model.config.n_layers
    under = prepare.policies(spec).values()
    spec = max(under, key=lambda each: len(data.policy(each.system).text))
    dose = 1.0 if spec.dose is None else spec.dose
    room, split = model.config.max_position, prepare.split(spec, model)
    if "refusal" in still:
        prepare.openings(spec, model)
    chosen_on = [*split.persona, *split.ordinary]
    check_lengths(map(len, chosen_on), room - spec.selection.max_new_tokens)
    extremes = [_layers(spec, model, pick) for pick in (max, min)]
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
    asked = requests(spec, model, found[0], cross(found[0], families))
    check_lengths((len(each.tokens) for each in asked), room - spec.decoding.max_new_tokens)
    return found[0], asked


def check(source: str | Path, model: ChatModel) -> list[str]:
    """Everything that is wrong with a study on a model, one line each: FILE:LINE, what, the mend.

    Args:
      source: the study's file or shipped name.
      model: the model, whose weights are not read.

    Raises:
      UserError: no such study, or broken TOML.
    """
    spec, found = specs.examine(source)
    if spec is None:
        return found

    def tried(place: specs.Place, step: Callable[..., Any], *given: Any) -> Any:
        try:
            return step(*given)
        except UserError as error:
            found.append(f"{specs.where(specs.find(source), place)}: {error}")

    for i, prompts in enumerate(spec.prompts):
        tried(("prompts", i), data.read, prompts)
    layers, plain = tried(("layers",), _layers, spec, model, max), replace(spec, modes=[])
    for i, one in enumerate(spec.condition if layers else ()):
        alone = replace(plain, system="generic", condition=[one])
        tried(("condition", i), conditions, alone, layers, 1.0, model.config.n_layers)
    # Each of these needs all before.
    families = found or tried(("selection",), prepare.prompts, spec)
    if not found:
        tried((), study, spec, model, families)
    return list(dict.fromkeys(found))


def _layers(
    spec: StudySpec, model: ChatModel, pick: Callable[[Sequence[float]], float]
) -> dict[str, int]:
    """Layers by name: the fixed ones, and of each open choice the candidate that `pick` takes."""
    still, chosen, n_layers = prepare.open_choices(spec), spec.selection, model.config.n_layers
    shares = {
        "steer": chosen.layers,
        "refusal": chosen.refusal_layers,
        "late_refusal": chosen.late.layers,
    }
    layers = {name: depth(pick(found), n_layers) for name, found in shares.items() if name in still}
    layers |= prepare.named_layers(spec, model)
    if "window" in still:
        first = layers["steer"] + int(pick(chosen.windows.starts))
        if first >= n_layers:
            raise UserError(
                f"study {spec.name}: [selection] windows may begin at resid_post.{first}; this "
                f"model has resid_post.0 to resid_post.{n_layers - 1}"
            )
        last = first + int(pick(chosen.windows.widths)) - 1
        layers |= {"window": first, "window_last": min(last, n_layers - 1)}
    return layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a study.

    Attributes:
      conditions: all conditions, twins and repeats included, with the layers that are still open
        at their deepest candidates.
      prompts: number of prompts by set.
      rows: number of (condition, prompt) rows.
      further: replies to questions, and benign replies that are read again, for benign impact.
      prompt_tokens: prompt tokens of all rows.
      own_tokens: of these, the ones after the prefix that rows share.
      new_tokens: most tokens that can be generated.
      memory: bytes at most, roughly, by what they are for (`engine.memory`).
      seconds: rough time of the rows on one device, without preparation and compilation, every
        reply at full length.
      open_choices: what is selected before the rows run, such as `steer` and `dose`.
    """

    conditions: list[Condition]
    prompts: dict[str, int]
    rows: int
    further: int
    prompt_tokens: int
    own_tokens: int
    new_tokens: int
    memory: dict[str, int]
    seconds: float
    open_choices: list[str]


def plan(spec: StudySpec, model: ChatModel, *, limit: int | None = None) -> Plan:
    """Plan a study; `limit` is a largest number of prompts of each harmful set.

    Raises:
      UserError: as running it would, for what is wrong in the spec or with its prompts.
    """
    config, new = model.config, spec.decoding.max_new_tokens
    families = prepare.prompts(spec, limit)
    found, asked = study(spec, model, families)
    batch = fitted(spec.decoding.batch, len(asked))
    leaves = jax.tree.leaves(model.params)
    own = sum(len(request.own) for request in asked)
    compared = sum(len(families[name][: spec.impact.compared]) for name in spec.sets("benign"))
    # A token costs 2 operations per parameter.
    operations = 2 * sum(leaf.size for leaf in leaves) * (own + len(asked) * new)
    return Plan(
        conditions=found,
        prompts={family: len(prompts) for family, prompts in families.items()},
        rows=len(asked),
        further=sum(c.benign for c in found) * (spec.impact.questions + compared),
        prompt_tokens=sum(len(request.tokens) for request in asked),
        own_tokens=own,
        new_tokens=len(asked) * new,
        memory=engine.memory(model, asked, new, spec.decoding.batch),
        seconds=operations / _operations_per_second(config, batch),
        open_choices=prepare.open_choices(spec),
    )


def _operations_per_second(config: ModelConfig, rows: int) -> float:
    """Speed of a float32 product of the MLP's shape, with that many rows."""
    x, w = jnp.ones((rows, config.d_model)), jnp.ones((config.d_model, config.d_ff))
    product = jax.jit(jnp.matmul)
    product(x, w).block_until_ready()
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        product(x, w).block_until_ready()
        runs += 1
    return 2 * rows * config.d_model * config.d_ff * runs / (time.perf_counter() - started)
