"""A study file: the structs behind its TOML, and loading it.

The structs give keys, types and ranges. `load` also checks that the parts of a file fit together;
`validate` checks what depends on the model, such as whether a layer exists. The file
`data/studies/smollm2-demo.toml` is a study with every part explained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jaxsteer.directions.extraction import InStudy, Minus, Without
from jaxsteer.errors import UserError

STUDIES = Path(__file__).parent.parent / "data" / "studies"
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Finite = Annotated[float, Meta(ge=-1e308, le=1e308)]
Share = Annotated[float, Meta(ge=0, le=1)]
Text = Annotated[str, Meta(min_length=1)]
# A single layer: neither a window nor a list.
Layer = Annotated[str, Meta(pattern="^[^.,]+$")]
# JAX makes random keys from 32 bits.
Seed = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
# The table of replies stores these in 64 bits.
RandomSeed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
# A study's `system` that is to be chosen.
CHOOSE = "choose"
# The end of the names of the controls that conditions get without their additions.
UNSTEERED = ", unsteered"
# A pattern that takes as little as it can: in `late-2`, the name is `late` and -2 an offset.
LAYER_NAME = r"[^\W\d][\w-]*?"


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every struct: an unknown key is an error, never ignored."""


class DataSpec(Spec, frozen=True, kw_only=True):
    """Which prompts are reported on.

    Attributes:
      harmful: number of StrongREJECT prompts, chosen by hash rank; 0 is all 313.
      benign: number of our benign prompts, chosen in the same way; 0 is none.
      seed: of the choice.
      compared: number of the benign prompts, the first of them, on whose replies the divergence
        from the untouched model is measured (see `impact`); 0 measures none.
      questions: number of our questions with checkable answers that are asked under the conditions
        that run benign prompts, chosen in the same way; 0 asks none.
    """

    harmful: Count
    benign: Count
    seed: int = 0
    compared: Count = 0
    questions: Count = 0


class WindowsSpec(Spec, frozen=True, kw_only=True):
    """Candidate windows: first layer in layers after `steer`, and number of layers."""

    starts: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (1, 2, 3, 4)
    widths: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (1, 2, 3, 4)


class LateSpec(Spec, frozen=True, kw_only=True):
    """Candidate places to add refusal late: shares of depth, and strengths in natural norms."""

    layers: Annotated[tuple[Share, ...], Meta(min_length=1)] = (0.7, 0.8, 0.9)
    scales: Annotated[tuple[Finite, ...], Meta(min_length=1)] = (1.0, 2.0, 4.0)


class SelectionSpec(Spec, frozen=True, kw_only=True):
    """What the selection rules choose from; they use HarmBench and our harmless prompts only.

    Attributes:
      prompts: HarmBench prompts on which policy, persona, window and late refusal are chosen, and
        harmless prompts on which the policy is.
      policies: candidate policies of a study with system = "choose".
      least_youden: the least that the untouched model must tell harmful from harmless prompts by,
        as the refusal rate of the ones minus that of the others.
      layers: candidate layers of the persona, as fractions of depth.
      scales: candidate strengths, in natural norms.
      max_new_tokens: reply length during selection.
      max_degenerate: largest tolerated rise of the degenerate rate over the unsteered one.
      refusal_train: prompts a side for the refusal direction.
      refusal_validation: prompts a side that score its layer.
      refusal_layers: candidate layers of the refusal direction, as fractions of depth.
      refusal_openings: texts whose first tokens open a refusal in this model family.
      kl_limit: largest tolerated KL on harmless prompts, in nats.
      windows: candidates of `window`, where the persona is projected out.
      late: candidates of `late_refusal`, where the refusal direction is added.
      max_change: largest tolerated change of the refusal rate by either of them without persona.
      allow_near_miss: take the nearest candidate when none passes, and record why.
    """

    prompts: Positive = 32
    policies: tuple[str, ...] = ()
    least_youden: Share = 0.1
    layers: Annotated[tuple[Share, ...], Meta(min_length=1)] = (0.5, 0.6, 0.7)
    scales: Annotated[tuple[Finite, ...], Meta(min_length=1)] = (1.0, 2.0, 4.0)
    max_new_tokens: Positive = 24
    max_degenerate: Finite = 0.1
    refusal_train: Positive = 128
    refusal_validation: Positive = 16
    refusal_layers: Annotated[tuple[Share, ...], Meta(min_length=1)] = (0.3, 0.4, 0.5, 0.6, 0.7)
    refusal_openings: Annotated[tuple[Text, ...], Meta(min_length=1)] = ("I",)
    kl_limit: Finite = 0.1
    windows: WindowsSpec = WindowsSpec()
    late: LateSpec = LateSpec()
    max_change: Share = 0.1
    allow_near_miss: bool = False


class DecodingSpec(Spec, frozen=True, kw_only=True):
    """Decoding; temperature 0 is greedy. `batch` rows run together."""

    max_new_tokens: Positive
    temperature: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Seed = 0
    batch: Positive = 256


class AddSpec(Spec, frozen=True, kw_only=True, tag_field="operation", tag="add"):
    """Add a direction: `{ add = "persona", at = "steer", scale = "dose" }` in TOML.

    Attributes:
      direction: its name.
      at: layers at `resid_post`: `steer`, `steer+2`, `20`, `22,24`, `steer+1..last`.
      scale: strength, in `unit`.
      unit: natural norms of the direction, the study's `dose` or `refusal_dose` (TOML's scale =
        "dose" or "-dose"), or each of the condition's `scales` ("each" or "-each").
      measured_at: layer whose vector is used; by default each layer uses its own.
      norm_of: rescale the vector to the norm of the direction of this name first.
      norm_at: the layer of that norm; by default each layer's own.
    """

    direction: str
    at: str
    scale: Finite = 1.0
    unit: Literal["norm", "dose", "refusal_dose", "each"] = "norm"
    measured_at: Layer | None = None
    norm_of: str | None = None
    norm_at: Layer | None = None


class ProjectSpec(Spec, frozen=True, kw_only=True, tag_field="operation", tag="project"):
    """Project a direction out: `{ project = "persona", at = "steer+1..last" }` in TOML.

    Attributes:
      direction, measured_at: as in `AddSpec`.
      at: as in `AddSpec`; None, TOML's everywhere = true, is at the embedding, every resid_mid and
        every resid_post.
    """

    direction: str
    at: str | None
    measured_at: Layer | None = None


OperationSpec = AddSpec | ProjectSpec


class ConditionSpec(Spec, frozen=True, kw_only=True):
    """A named condition.

    Attributes:
      name: unique in the study.
      ops: what is applied; none is the plain model.
      scope: which tokens are steered.
      benign: whether the benign prompts run under it too.
      prompts: run it on so many of the harmful prompts only, the first by rank; by default on all.
      random_seeds: repeat it per seed, with direction `random` replaced by that seed's vector.
      scales: repeat it per strength, which operations name as scale = "each".
    """

    name: str
    ops: list[OperationSpec] = []
    scope: Literal["all", "prompt", "response"] = "all"
    benign: bool = False
    prompts: Positive | None = None
    random_seeds: list[RandomSeed] = []
    scales: list[Finite] = []


class TestSpec(Spec, frozen=True, kw_only=True):
    """One planned comparison; a condition with seeds or strengths means each of its repeats.

    Attributes:
      treated: condition compared.
      control: condition it is compared with, on the same prompts.
      expect: `lower` or `higher`: the paired rates differ so (exact McNemar, Holm over the
        study). `few-raised`: at most a share `margin` of the prompts has the outcome under
        `treated` and not under `control` (upper Wilson bound). `cosine-above`: the cosine of the
        directions named in `treated` and `control` at layer `at` exceeds `margin`.
      outcome: label whose rate is compared.
      family: prompts compared on.
      margin: of `few-raised` and `cosine-above`.
      at: of `cosine-above`.
    """

    treated: str
    control: str
    expect: Literal["lower", "higher", "few-raised", "cosine-above"]
    outcome: Literal["refusal", "bypass", "degenerate"] = "refusal"
    family: Literal["strongreject", "benign"] = "strongreject"
    margin: Annotated[float, Meta(gt=-1, lt=1)] = 0.15
    at: str = "steer"


class ClaimSpec(Spec, frozen=True, kw_only=True):
    """A claim, confirmed when all of its tests are: fixed before the run, so a receipt can say.

    Attributes:
      name: unique in the study.
      says: the claim in one sentence.
      tests: what is compared.
      needs: earlier claims that must be confirmed, in the same mode, before this one says
        anything. A test whether refusal returns needs, by itself, the claims on its suppression.
    """

    name: str
    says: str
    tests: list[TestSpec]
    needs: list[str] = []


class StudySpec(Spec, frozen=True, kw_only=True):
    """A whole study file.

    Attributes:
      name: names the results folder.
      about: one sentence on the question.
      system: safety policy, the system prompt of every condition (after the mode's, if any), or
        "choose".
      data: prompts.
      decoding: how replies are generated.
      directions: how each is made, by the name that conditions use; `random` is always there.
      selection: how open layers and the dose are chosen.
      layers: layers by a name such as `late` or `late-two`. A fraction (0.3) is a share of depth,
        a whole number (20) a block. `steer`, `refusal`, `window` (which ends at `window_last`) and
        `late_refusal` are chosen by the selection rules unless given here.
      dose: strength of the persona in natural norms; chosen by the selection rule unless given.
      refusal_dose: strength of the refusal direction at `late_refusal`, likewise.
      allow_uninformative: run it although the untouched model does not tell harmful prompts from
        harmless ones.
      modes: persona system prompts that every condition is crossed with, by name or path likewise.
      condition: the conditions.
      claim: planned comparisons.
    """

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    about: str = ""
    system: str
    data: DataSpec
    decoding: DecodingSpec
    directions: dict[str, InStudy] = {}
    selection: SelectionSpec = SelectionSpec()
    layers: dict[str, Count | Share] = {}
    dose: Finite | None = None
    refusal_dose: Finite | None = None
    allow_uninformative: bool = False
    modes: list[str] = []
    condition: Annotated[list[ConditionSpec], Meta(min_length=1)]
    claim: list[ClaimSpec] = []


def shipped() -> list[str]:
    """Names of the studies in the package."""
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


def load(source: str | Path) -> StudySpec:
    """Read a study by path, or by name from the ones shipped.

    Raises:
      UserError: no such study, broken TOML, an unknown key, a wrong type, a value that makes no
        sense, or a name that is used twice or not defined.
    """
    path = Path(source)
    if path.suffix != ".toml":
        path = STUDIES / f"{source}.toml"
    try:
        spec = msgspec.convert(_typed(msgspec.toml.decode(path.read_bytes())), StudySpec)
    except FileNotFoundError:
        names = ", ".join(shipped())
        raise UserError(f"no study {source}; give a .toml file or one of: {names}") from None
    except msgspec.ValidationError as error:
        raise UserError(f"{path.name}: {error}; jaxsteer/study/spec.py lists the keys") from None
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path.name} is not a readable TOML file: {error}") from None
    for problem in _problems(spec):
        raise UserError(f"{path.name}: {problem}")
    return spec


def _typed(written: dict[str, Any]) -> dict[str, Any]:
    """A decoded TOML study, its operations brought into the form of the structs in place."""
    conditions = written.get("condition")
    for condition in conditions if isinstance(conditions, list) else ():
        if isinstance(condition, dict) and isinstance(ops := condition.get("ops"), list):
            where = f"condition {condition.get('name')!r}"
            condition["ops"] = [_operation(op, where) if isinstance(op, dict) else op for op in ops]
    return written


def _operation(written: dict[str, Any], where: str) -> dict[str, Any]:
    """An operation in the form of its struct; in TOML one key gives its kind and its direction."""
    found = dict(written)
    kinds = [kind for kind in ("add", "project") if kind in found]
    if len(kinds) != 1:
        raise msgspec.ValidationError(f"{where}: an operation needs exactly one of add and project")
    found |= {"operation": kinds[0], "direction": found.pop(kinds[0])}
    if found.pop("everywhere", False):
        if "add" in kinds or "at" in found:
            raise msgspec.ValidationError(f"{where}: everywhere goes with project, and replaces at")
        found["at"] = None
    if isinstance(scale := found.get("scale"), str):
        found |= {"scale": -1.0 if scale[:1] == "-" else 1.0, "unit": scale.removeprefix("-")}
    return found


def _problems(spec: StudySpec) -> Iterator[str]:
    """How parts of a study do not fit together, one sentence each."""
    names = [condition.name for condition in spec.condition]
    for group, found in (("condition", names), ("claim", [claim.name for claim in spec.claim])):
        for name in found:
            if found.count(name) > 1:
                yield f"{group} {name!r} appears twice; rename one"
    for name in spec.layers:
        if not re.fullmatch(LAYER_NAME, name) or re.search(r"-\d+$", name) or name == "last":
            yield (
                f"layers: {name!r} cannot name a layer; use letters, digits, _ and -, beginning "
                "with a letter, but not `last` and no end that reads as an offset (steer-2)"
            )
    if (spec.system == CHOOSE) != bool(spec.selection.policies):
        yield 'system = "choose" needs [selection] policies to choose from, and they need it'
    order = list(spec.directions)
    for name, direction in spec.directions.items():
        if re.fullmatch(r"random(-\d+)?", name):
            yield f"directions.{name}: this name is kept for the random controls; choose another"
        # They are made in the order of the file.
        for other in direction.of if isinstance(direction, Minus | Without) else ():
            if other not in spec.directions:
                yield f"directions.{name}.of names {other!r}, which the study does not have"
            if other not in order[: order.index(name)]:
                yield f"directions.{name}.of names {other!r}, which comes later; list it first"
    for condition in spec.condition:
        for problem in _condition_problems(spec, condition):
            yield f"condition {condition.name!r} {problem}"
    for claim in spec.claim:
        for problem in _claim_problems(spec, claim):
            yield f"claim {claim.name!r} {problem}"


def _condition_problems(spec: StudySpec, condition: ConditionSpec) -> Iterator[str]:
    if condition.name.endswith(UNSTEERED):
        yield f"has a name that is kept for automatic controls; end it other than in {UNSTEERED!r}"
    added = [op for op in condition.ops if isinstance(op, AddSpec)]
    named = {op.direction for op in condition.ops}
    for name in named | {op.norm_of for op in added if op.norm_of}:
        if name not in {*spec.directions, "random"}:
            there = ", ".join(spec.directions)
            yield f"names {name!r}, an unknown direction; the study has {there}"
        if name == "random" and not (condition.random_seeds and spec.directions):
            yield "names `random`, which needs random_seeds, and a direction to take its norm from"
    if any(op.norm_at and not op.norm_of for op in added):
        yield "has a norm_at without norm_of; name the direction whose norm is taken"
    # Otherwise repeats with equal operations would be reported as different strengths or seeds.
    if bool(condition.scales) != any(op.unit == "each" for op in added):
        yield 'needs both scales and an addition with scale = "each", or neither'
    if condition.random_seeds and "random" not in named:
        yield "has random_seeds and no operation with `random`; add one, or drop random_seeds"


def _claim_problems(spec: StudySpec, claim: ClaimSpec) -> Iterator[str]:
    # A claim that no row can decide would be "not tested" only after the whole run.
    if not claim.tests:
        yield "has no tests; add one, or remove it"
    earlier = [other.name for other in spec.claim[: spec.claim.index(claim)]]
    for name in claim.needs:
        if name not in earlier:
            yield f"needs {name!r}, which is no claim above it; list that claim first"
    benign = {condition.name: condition.benign for condition in spec.condition}
    # Twins are made later; a claim may name one.
    comparable = {name + tail for name in benign for tail in ("", UNSTEERED)}
    for test in claim.tests:
        cosine = test.expect == "cosine-above"
        for name in (test.treated, test.control):
            if name not in (spec.directions if cosine else comparable):
                yield f"names {name!r}, which the study does not have"
            elif not cosine and test.family == "benign":
                if not benign.get(name, False):
                    yield f"compares benign prompts, which {name!r} does not run (benign = true)"
                if not spec.data.benign:
                    yield "compares benign prompts, and data.benign is 0"
        if test.treated == test.control:
            yield f"compares {test.treated!r} with itself"
        # A margin out of this range is passed by every outcome, or by none.
        if test.expect == "few-raised" and test.margin <= 0:
            yield f"has a margin of {test.margin:g}; few-raised needs one above 0"
