"""From a study's spec to its conditions and rows: layers resolved, repeats and twins made.

A projection that contains the vector just added at the same tap gives exactly what projecting
without adding gives, (I - uu^T)(h + a u) = (I - uu^T) h, so such a condition is marked
`cancels_steering`. Every knockout (a condition that adds and projects) gets its twin without
steering, named `NAME, unsteered`, because only the difference between the two is evidence. A
repeat with a random direction has none: it is a control itself.

A row is a condition with a prompt. It asks the model for one reply (`requests`), and leaves one
line in the table (`line`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions.direction import Direction, layers
from jaxsteer.errors import UserError
from jaxsteer.files import sha256_bytes, stable_id
from jaxsteer.generation import engine
from jaxsteer.generation.engine import Reply, Request
from jaxsteer.generation.requests import shared_lengths
from jaxsteer.judges.verdicts import label
from jaxsteer.model import interventions
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Interventions, Layers
from jaxsteer.study.results import Add, Condition, Operation, Project, unsteered
from jaxsteer.study.spec import UNSTEERED, AddSpec, OperationSpec, StudySpec

# From a layer expression to its layers.
Resolve = Callable[[str], tuple[int, ...]]
Row = tuple[Condition, Prompt]


def depth(fraction: float, n_layers: int) -> int:
    """The 0-based layer nearest to a fraction of depth: 0 is the first block, 1 the last."""
    return round(fraction * (n_layers - 1))


def resolve_layers(at: str, named: Mapping[str, int], n_layers: int, where: str) -> tuple[int, ...]:
    """The layers of an expression, as `direction.layers`, all of which the model has.

    Args:
      at: the expression.
      named: layers by name, to which `last` is added.
      n_layers: blocks of the model.
      where: begins the message of an error.

    Raises:
      UserError: as `direction.layers`, or a layer that the model does not have.
    """
    found = layers(at, {**named, "last": n_layers - 1}, f"{where}: ")
    for layer in found:
        if not 0 <= layer < n_layers:
            raise UserError(
                f"{where}: unknown layer resid_post.{layer} (from {at!r}); this model has "
                f"resid_post.0 to resid_post.{n_layers - 1}"
            )
    return found


def condition_name(base: str, mode: str, scale: float | None, seed: int | None) -> str:
    """The name of one repeat of a condition.

    >>> condition_name("random", "calm", 0.5, 3)
    'calm: random x0.5 #3'
    """
    before = f"{mode}: " if mode else ""
    strength = "" if scale is None else f" x{scale:g}"
    return f"{before}{base}{strength}" + ("" if seed is None else f" #{seed}")


def system_prompts(spec: StudySpec) -> dict[str, str]:
    """The whole system prompt of each mode; of "" where the study has no modes.

    Raises:
      UserError: an unknown mode or policy.
    """
    policy = data.policy(spec.system).text
    found = {mode.name: mode.with_policy(policy) for mode in map(data.mode, spec.modes)}
    return found or {"": policy}


def conditions(
    spec: StudySpec,
    layers: Mapping[str, int],
    dose: float,
    n_layers: int,
    refusal_dose: float = 1.0,
) -> list[Condition]:
    """The spec's conditions: repeats over modes, strengths and seeds, then the twins.

    Whether one cancels its own steering depends on the directions: see `mark_cancelling`.

    Args:
      spec: the study.
      layers: by name: the spec's own, `steer` and `refusal`.
      dose: what the strength "dose" means, in natural norms.
      n_layers: blocks of the model.
      refusal_dose: what the strength "refusal_dose" means, likewise.

    Raises:
      UserError: an unknown layer, mode or policy, additions of nothing only, or a repeated seed,
        strength or mode.
    """
    systems = system_prompts(spec)
    found: list[Condition] = []
    modes = [data.mode(mode).name for mode in spec.modes] or [""]
    if len(set(modes)) < len(modes):
        same = max(modes, key=modes.count)
        raise UserError(f"study {spec.name}: two modes are named {same!r}; rename one")
    for mode, item in itertools.product(modes, spec.condition):
        scales: list[float | None] = [*item.scales] or [None]
        seeds: list[int | None] = [*item.random_seeds] or [None]
        for scale, seed in itertools.product(scales, seeds):
            name = condition_name(item.name, mode, scale, seed)
            where = f"study {spec.name}, condition {name!r}"
            place: dict[str, Any] = {"named": layers, "n_layers": n_layers, "where": where}
            resolve = functools.partial(resolve_layers, **place)
            units = {"norm": 1.0, "dose": dose, "refusal_dose": refusal_dose, "each": scale or 0.0}
            made = tuple(_operation(op, seed, units, resolve) for op in item.ops)
            if made and all(isinstance(op, Add) and op.scale == 0 for op in made):
                raise UserError(f"{where}: a strength of 0 changes nothing; drop it")
            found.append(
                Condition(
                    name=name,
                    base=item.name,
                    seed=seed,
                    scale=scale,
                    mode=mode,
                    operations=made,
                    scope=item.scope,
                    benign=item.benign,
                    cancels_steering=False,
                    unsteered_twin_of="",
                    system_sha256=sha256_bytes(systems[mode].encode()),
                    prompts=item.prompts,
                )
            )
    names = [condition.name for condition in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"study {spec.name}: {min(twice)!r} repeats a seed, scale or mode")
    return found + _twins(found)


def unsteered_twin(conditions: Sequence[Condition], condition: Condition) -> Condition | None:
    """The control of a knockout: the same projection in the same mode, without the addition.

    Knockouts that differ in what they add share one. Random directions are controls themselves, and
    have none.
    """
    kept = unsteered(condition.operations) if condition.seed is None else ()
    wanted = (condition.mode, condition.scope, condition.prompts, kept)
    twins = (c for c in conditions if (c.mode, c.scope, c.prompts, c.operations) == wanted)
    return next(twins, None) if kept else None


def _twins(found: Sequence[Condition]) -> list[Condition]:
    twins: list[Condition] = []
    for condition in found:
        kept = unsteered(condition.operations) if condition.seed is None else ()
        if kept and unsteered_twin([*found, *twins], condition) is None:
            name, base = condition.name + UNSTEERED, condition.base + UNSTEERED
            twin = replace(condition, name=name, base=base, operations=kept, benign=False)
            twins.append(replace(twin, unsteered_twin_of=condition.name))
    return twins


def _operation(
    op: OperationSpec, seed: int | None, units: Mapping[str, float], resolve: Resolve
) -> Operation:
    def named(direction: str) -> str:
        return f"random-{seed}" if direction == "random" else direction

    def one(at: str | None) -> int | None:
        return None if at is None else resolve(at)[0]

    if isinstance(op, AddSpec):
        return Add(
            direction=named(op.direction),
            layers=resolve(op.at),
            scale=op.scale * units[op.unit],
            measured_at=one(op.measured_at),
            norm_of=named(op.norm_of) if op.norm_of else None,
            norm_at=one(op.norm_at),
        )
    return Project(
        direction=named(op.direction),
        layers=resolve("0..last" if op.at is None else op.at),
        measured_at=one(op.measured_at),
        everywhere=op.at is None,
    )


def operations(
    condition: Condition, directions: Mapping[str, Direction]
) -> list[interventions.Operation]:
    """A condition's operations with the vectors of their directions."""
    made: list[interventions.Operation] = []
    for op in condition.operations:
        vectors = directions[op.direction].vectors
        place: dict[str, Any] = {"layers": op.layers, "tap": op.tap, "measured_at": op.measured_at}
        if isinstance(op, Add):
            if op.norm_of is not None:
                vectors = _rescaled(vectors, directions[op.norm_of].vectors, op.norm_at)
            made.append(interventions.Add(direction=vectors, scale=op.scale, **place))
        elif op.everywhere:
            made += interventions.everywhere(vectors, op.measured_at)
        else:
            made.append(interventions.Project(directions=(vectors,), **place))
    return made


def _rescaled(vectors: Layers, like: Layers, at: int | None) -> Layers:
    """The vectors with the norms of `like`, of its layer `at` everywhere if that is given."""
    norms = np.linalg.norm(like.astype(np.float64), axis=1)
    wanted = norms if at is None else np.full(len(norms), norms[at])
    own = np.maximum(np.linalg.norm(vectors.astype(np.float64), axis=1), 1e-30)
    return (vectors * (wanted / own)[:, None]).astype(np.float32)


def stacked(
    found: Sequence[Condition], directions: Mapping[str, Direction], shape: tuple[int, int]
) -> Interventions:
    """The operations of all conditions as arrays, stacked in their order.

    Args:
      found: the conditions.
      directions: by name.
      shape: number of blocks of the model, and width of its residual stream.
    """
    made = [operations(condition, directions) for condition in found]
    scopes, (n_layers, d_model) = [condition.scope for condition in found], shape
    return interventions.compile_conditions(made, scopes, n_layers=n_layers, d_model=d_model)


def mark_cancelling(found: Sequence[Condition], arrays: Interventions) -> list[Condition]:
    """The conditions, those marked that project out all they add at some tap and layer.

    Args:
      found: the conditions.
      arrays: their operations, from `stacked`.
    """
    cancels = np.zeros(len(found), bool)
    for site in arrays.sites.values():
        for c, (added, basis) in enumerate(zip(site.add, site.project, strict=True)):
            added = added.astype(np.float64)
            removed = np.einsum("lkd,lk->ld", basis, np.einsum("lkd,ld->lk", basis, added))
            size = np.linalg.norm(added, axis=1)
            left = np.linalg.norm(added - removed, axis=1)
            cancels[c] |= ((size > 0) & (left <= 1e-5 * size)).any()
    return [
        replace(condition, cancels_steering=bool(cancel))
        for condition, cancel in zip(found, cancels, strict=True)
    ]


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


def row_id(row: Row) -> str:
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
        "row_id": row_id(row),
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
