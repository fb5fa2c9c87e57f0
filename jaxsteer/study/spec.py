"""What a study file may say: the structs behind the TOML, and its loading.

Only the form is checked here (keys, types, names that clash or dangle); what needs the model, such
as whether a layer exists, is checked by `conditions`. See `data/studies/smollm2-demo.toml` for a
study with every part explained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from jaxsteer.directions.extraction import InStudy, Minus, Without
from jaxsteer.errors import UserError
from jaxsteer.study.layer_expr import LAYER_NAME

STUDIES = Path(__file__).parent.parent / "data" / "studies"


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every struct: an unknown key is an error, never ignored."""


class DataSpec(Spec, frozen=True, kw_only=True):
    """Which prompts are reported on.

    Attributes:
      harmful: number of StrongREJECT prompts, chosen by hash rank; 0 takes all 313.
      benign: number of our benign prompts, likewise chosen; 0 takes none.
      seed: of the choice.
    """

    harmful: int
    benign: int
    seed: int = 0


class SelectionSpec(Spec, frozen=True, kw_only=True):
    """The selection rules' inputs; every prompt they see is HarmBench or our harmless set.

    Attributes:
      prompts: HarmBench prompts on which the persona's layer and strength are chosen.
      layers: candidate layers of the persona, as fractions of depth.
      scales: candidate strengths, in natural norms.
      max_new_tokens: reply length during selection.
      max_degenerate: largest tolerated rise of the degenerate rate over the unsteered one.
      refusal_train: prompts a side for the refusal direction.
      refusal_validation: prompts a side that score its layer.
      refusal_layers: candidate layers of the refusal direction, as fractions of depth.
      refusal_openings: texts whose first tokens open a refusal in this model family.
      kl_limit: largest tolerated KL on harmless prompts, in nats.
      allow_near_miss: take the nearest candidate when none passes, and record why.
    """

    prompts: int
    layers: list[float]
    scales: list[float]
    max_new_tokens: int = 24
    max_degenerate: float = 0.1
    refusal_train: int = 128
    refusal_validation: int = 16
    refusal_layers: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    refusal_openings: tuple[str, ...] = ("I",)
    kl_limit: float = 0.1
    allow_near_miss: bool = False


class DecodingSpec(Spec, frozen=True, kw_only=True):
    """Decoding; temperature 0 is greedy. `batch` rows run together."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 256


class OperationSpec(Spec, frozen=True, kw_only=True):
    """One operation on the residual stream: exactly one of `add` and `project` names a direction.

    Attributes:
      add: direction to add.
      project: direction to remove.
      at: layers at `resid_post`: `steer`, `steer+2`, `20`, `22,24`, `steer+1..last`.
      scale: of `add`: natural norms; "dose" is the study's dose, "each" the condition's `scales`.
      norm_of: rescale the vector to this direction's norm first (at `norm_at`).
      norm_at: layer of `norm_of`; the layer of application by default.
      everywhere: of `project`: at embed, every resid_mid and every resid_post instead of `at`.
      measured_at: layer whose vector is used; by default each layer uses its own.
    """

    add: str = ""
    project: str = ""
    at: str = ""
    scale: float | str = 1.0
    norm_of: str = ""
    norm_at: str = ""
    everywhere: bool = False
    measured_at: str = ""


class ConditionSpec(Spec, frozen=True, kw_only=True):
    """A named condition.

    Attributes:
      name: unique in the study.
      ops: what is applied; none is the plain model.
      scope: which tokens are touched.
      benign: whether the benign prompts run under it too.
      random_seeds: repeat it per seed, with direction `random` replaced by that seed's vector.
      scales: repeat it per strength, which operations name as scale = "each".
    """

    name: str
    ops: list[OperationSpec] = []
    scope: Literal["all", "prompt", "response"] = "all"
    benign: bool = False
    random_seeds: list[int] = []
    scales: list[float] = []


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
    margin: float = 0.15
    at: str = "steer"


class ClaimSpec(Spec, frozen=True, kw_only=True):
    """A claim, confirmed when all of its tests are: fixed before the run, so a receipt can say."""

    name: str
    says: str
    tests: list[TestSpec]


class StudySpec(Spec, frozen=True, kw_only=True):
    """A whole study file.

    Attributes:
      name: names the results folder.
      about: one sentence on the question.
      system: safety policy, the system prompt of every condition (after the mode's, if any).
      data: prompts.
      decoding: how replies are generated.
      directions: how each is made, by the name that conditions use; `random` is always there.
      selection: how open layers and the dose are chosen; needed when any is open.
      layers: layers by a name such as `late` or `late-two`. A fraction (0.3) is a share of depth,
        a whole number (20) a block. `steer` and `refusal` are chosen by the selection rules unless
        given here.
      dose: strength of the persona in natural norms; chosen by the selection rule unless given.
      modes: persona system prompts that every condition is crossed with, by name or path likewise.
      condition: the conditions.
      claim: planned comparisons.
    """

    name: str
    about: str = ""
    system: str
    data: DataSpec
    decoding: DecodingSpec
    directions: dict[str, InStudy] = {}
    selection: SelectionSpec | None = None
    layers: dict[str, int | float] = {}
    dose: float | None = None
    modes: list[str] = []
    condition: list[ConditionSpec]
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
        spec = msgspec.toml.decode(path.read_bytes(), type=StudySpec)
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


def _problems(spec: StudySpec) -> Iterator[str]:
    yield from _value_problems(spec)
    names = [condition.name for condition in spec.condition]
    for group, found in (("condition", names), ("claim", [claim.name for claim in spec.claim])):
        for name in found:
            if found.count(name) > 1:
                yield f"{group} {name!r} appears twice; rename one"
    order = list(spec.directions)
    for name, direction in spec.directions.items():
        if re.fullmatch(r"random(-\d+)?", name):
            yield f"directions.{name}: that name is of the random controls; choose another"
        # They are made in the order of the file.
        for other in direction.of if isinstance(direction, Minus | Without) else ():
            if other not in spec.directions:
                yield f"directions.{name}.of names {other!r}, which is no direction here"
            if other not in order[: order.index(name)]:
                yield f"directions.{name}.of names {other!r}, which is not before it; list it first"
    known = {*spec.directions, "random"}
    for condition in spec.condition:
        yield from _repeat_problems(condition)
        for op in condition.ops:
            for name in filter(None, (op.add, op.project, op.norm_of)):
                if name not in known:
                    yield (
                        f"condition {condition.name!r}: unknown direction {name!r}; the study "
                        f"has {', '.join(sorted(known))}"
                    )
    for claim in spec.claim:
        for problem in _claim_problems(spec, claim):
            yield f"claim {claim.name!r} {problem}"


def _repeat_problems(condition: ConditionSpec) -> Iterator[str]:
    # Repeats that differ in name only would be reported as different strengths or seeds.
    where = f"condition {condition.name!r}"
    scaled = [op for op in condition.ops if op.add and op.scale in ("each", "-each")]
    if condition.scales and not scaled:
        yield f'{where} has scales and adds nothing with scale = "each"; add that, or drop scales'
    # Not as norm_of: every seed has the same norms.
    random = [op for op in condition.ops if "random" in (op.add, op.project)]
    if condition.random_seeds and not random:
        yield (
            f'{where} has random_seeds and neither adds nor projects "random"; do that, or drop '
            "random_seeds"
        )


def _claim_problems(spec: StudySpec, claim: ClaimSpec) -> Iterator[str]:
    # A claim that no rows could decide would be told as "not tested" when all rows have run.
    if not claim.tests:
        yield "has no tests; add one, or remove it"
    benign = {condition.name: condition.benign for condition in spec.condition}
    # Twins are made later; a claim may name one.
    comparable = {name + tail for name in benign for tail in ("", ", unsteered")}
    for test in claim.tests:
        pool = spec.directions if test.expect == "cosine-above" else comparable
        lowest = {"few-raised": 0, "cosine-above": -1}.get(test.expect)
        for name in (test.treated, test.control):
            if name not in pool:
                yield f"names {name!r}, which the study does not have"
            elif test.expect != "cosine-above" and test.family == "benign":
                if name not in benign:
                    yield f"compares benign prompts, which a twin such as {name!r} does not run"
                elif not benign[name]:
                    yield f"compares benign prompts; give {name!r} benign = true, to run them"
                if not spec.data.benign:
                    yield "compares benign prompts, and data.benign is 0"
        if test.treated == test.control:
            yield f"compares {test.treated!r} with itself"
        # At a margin on the edge, every outcome passes or none.
        if lowest is not None and not lowest < test.margin < 1:
            yield f"has a margin of {test.margin:g}; {test.expect} needs one between {lowest} and 1"


def _value_problems(spec: StudySpec) -> Iterator[str]:
    # What TOML's types cannot say. The name becomes a folder.
    if not spec.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        yield f"name {spec.name!r} may hold letters, digits and . _ - only"
    if not spec.condition:
        yield "no [[condition]]; a study needs at least one"
    for key, value in leaves(msgspec.to_builtins(spec)):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key} is {value}, expected a finite number"
    decoding = spec.decoding
    for key, value, low in (
        ("data.harmful", spec.data.harmful, 0),
        ("data.benign", spec.data.benign, 0),
        ("decoding.max_new_tokens", decoding.max_new_tokens, 1),
        ("decoding.batch", decoding.batch, 1),
        ("decoding.temperature", decoding.temperature, 0),
    ):
        if not value >= low:
            yield f"{key} is {value}, expected at least {low}"
    # A logit over less is too large for float32, and then every token is the first.
    if 0 < decoding.temperature < 1e-6:
        yield f"decoding.temperature is {decoding.temperature}; take 0 (greedy) or at least 1e-6"
    # JAX makes its keys from 32 bits.
    if not -(2**31) <= decoding.seed < 2**31:
        yield f"decoding.seed is {decoding.seed}, expected from {-(2**31)} to {2**31 - 1}"
    if not 0 < decoding.top_p <= 1:
        yield f"decoding.top_p is {decoding.top_p}, expected above 0 and at most 1"
    if spec.selection is not None:
        chosen = spec.selection
        for key in ("prompts", "max_new_tokens", "refusal_train", "refusal_validation"):
            if getattr(chosen, key) < 1:
                yield f"selection.{key} is {getattr(chosen, key)}, expected at least 1"
        for key in ("layers", "scales", "refusal_layers", "refusal_openings"):
            if not getattr(chosen, key):
                yield f"selection.{key} is empty; give at least one"
        if "" in chosen.refusal_openings:
            yield "selection.refusal_openings holds an empty text; remove it"
    for name, layer in spec.layers.items():
        if not re.fullmatch(LAYER_NAME, name) or re.search(r"-\d+$", name) or name == "last":
            yield (
                f"layers: {name!r} is no name for a layer; take letters, digits, _ and -, a letter "
                "first, and not `last` or what reads as an offset, such as steer-2"
            )
        if isinstance(layer, float) and not 0 <= layer <= 1:
            yield f"layers.{name} is {layer}; a fraction of depth lies between 0 and 1"
        if isinstance(layer, int) and layer < 0:
            yield f"layers.{name} is {layer}; blocks count from 0"
    for condition in spec.condition:
        # The last token is emitted and not read by the model.
        if condition.scope == "response" and condition.ops and decoding.max_new_tokens == 1:
            yield (
                f"condition {condition.name!r}: scope response changes nothing with "
                "max_new_tokens = 1; make it 2 or more"
            )
        for seed in condition.random_seeds:
            where = f"condition {condition.name!r}"
            # The table of replies holds them in 64 bits.
            if not 0 <= seed < 2**63:
                yield f"{where}: random_seeds holds {seed}, expected from 0 to {2**63 - 1}"
            if not spec.directions:
                yield f"{where}: random_seeds need a direction in [directions] to take norms from"


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a study's plain form, with its key: `condition['persona'].ops[0].scale`."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            name = item["name"] if isinstance(item, dict) and "name" in item else i
            yield from leaves(item, f"{key}[{name!r}]")
    else:
        yield key, value
