"""A study file: the structs behind its TOML, and loading it.

The structs give keys, types and ranges. `load` also checks that the parts of a file fit together;
`run` checks what depends on the model, such as whether a layer exists. The file
`data/studies/smollm2-demo.toml` is a study with every part explained.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Kind, Mode, Policy, PromptSet
from jaxsteer.directions.direction import LAYER_NAME
from jaxsteer.directions.extraction import HARMFUL, HARMLESS, InStudy, Minus, Trait, Without
from jaxsteer.errors import UserError
from jaxsteer.files import writing

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


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every struct: an unknown key is an error, never ignored."""


class ImpactSpec(Spec, frozen=True, kw_only=True):
    """How much is measured of what conditions cost where nothing should change (see `impact`).

    Attributes:
      compared: number of prompts of each benign set, the first of them, on whose replies the
        divergence from the untouched model is measured; 0 measures none.
      questions: number of our questions with checkable answers that are asked under the conditions
        that run benign prompts, chosen by hash rank; 0 asks none.
      seed: of the choice of questions.
    """

    compared: Count = 0
    questions: Count = 0
    seed: int = 0


class WindowsSpec(Spec, frozen=True, kw_only=True):
    """Candidate windows: first layer in layers after `steer`, and number of layers."""

    starts: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (1, 2, 3, 4)
    widths: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (1, 2, 3, 4)


class LateSpec(Spec, frozen=True, kw_only=True):
    """Candidate places to add refusal late: shares of depth, and strengths in natural norms."""

    layers: Annotated[tuple[Share, ...], Meta(min_length=1)] = (0.7, 0.8, 0.9)
    scales: Annotated[tuple[Finite, ...], Meta(min_length=1)] = (1.0, 2.0, 4.0)


class SelectionSpec(Spec, frozen=True, kw_only=True):
    """What the selection rules choose from.

    Attributes:
      harmful, harmless: the prompts on which choices are made and from which the refusal direction
        is; none of them may be reported on.
      prompts: harmful ones on which policy, persona, window and late refusal are chosen, and
        harmless ones on which the policy is.
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

    harmful: PromptSet = HARMFUL
    harmless: PromptSet = HARMLESS
    prompts: Positive = 32
    policies: tuple[str | Policy, ...] = ()
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
      benign: whether the sets that are not harmful run under it too.
      prompts: run it on so many prompts of each harmful set only, the first by rank; by default on
        all.
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
      prompts: name of the set compared on; by default the first harmful one.
      margin: of `few-raised` and `cosine-above`.
      at: of `cosine-above`.
    """

    treated: str
    control: str
    expect: Literal["lower", "higher", "few-raised", "cosine-above"]
    outcome: Literal["refusal", "bypass", "degenerate"] = "refusal"
    prompts: str = ""
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

    Policies, modes and traits are shipped names or paths, and prompt sets may be files; a path
    begins in the folder of the study's file. `load` puts the texts of the first three in their
    places, so that records and hashes have them whole.

    Attributes:
      name: names the results folder.
      about: one sentence on the question.
      system: safety policy, the system prompt of every condition (after the mode's, if any), or
        "choose".
      prompts: the sets that are reported on.
      impact: what is measured on benign prompts and questions.
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
      modes: persona system prompts that every condition is crossed with.
      condition: the conditions.
      claim: planned comparisons.
    """

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    about: str = ""
    system: str | Policy
    prompts: Annotated[list[PromptSet], Meta(min_length=1)]
    decoding: DecodingSpec
    impact: ImpactSpec = ImpactSpec()
    directions: dict[str, InStudy] = {}
    selection: SelectionSpec = SelectionSpec()
    layers: dict[str, Count | Share] = {}
    dose: Finite | None = None
    refusal_dose: Finite | None = None
    allow_uninformative: bool = False
    modes: list[str | Mode] = []
    condition: Annotated[list[ConditionSpec], Meta(min_length=1)]
    claim: list[ClaimSpec] = []

    def sets(self, kind: Kind) -> list[str]:
        """Names of the prompt sets of a kind, in the order of the file."""
        return [each.name for each in self.prompts if each.kind == kind]

    @property
    def main(self) -> str:
        """Name of the set meant where none is named: the first harmful one, or the first."""
        return (self.sets("harmful") or [self.prompts[0].name])[0]


def shipped() -> list[str]:
    """Names of the studies in the package."""
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


# Keys and list indices that lead to a part of a study's file.
Place = tuple[str | int, ...]
Fault = tuple[Place, str]


def new(folder: Path) -> Path:
    """Write a study to start from, with a policy, prompts and a trait; returns its file.

    Raises:
      UserError: the folder holds something, or cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder")
    with writing(folder, "name another folder"):
        shutil.copytree(STUDIES.parent / "starter", folder, dirs_exist_ok=True)
    return folder / "study.toml"


def load(source: str | Path) -> StudySpec:
    """Read a study by path, or by name from the ones shipped.

    Raises:
      UserError: no such study, broken TOML, or the first of what `examine` finds.
    """
    spec, problems = examine(source)
    if spec is None or problems:
        raise UserError(problems[0])
    return spec


def find(source: str | Path) -> Path:
    """The file of a study."""
    path = Path(source)
    return path if path.suffix == ".toml" else STUDIES / f"{source}.toml"


def examine(source: str | Path) -> tuple[StudySpec | None, list[str]]:
    """A study, and what is wrong with it as far as no model is needed: one line a fault.

    That is an unknown key, a wrong type, a value that makes no sense, a name that is used twice or
    not defined, or a file beside it that cannot be read. With wrong types there is no study.

    Raises:
      UserError: no such study, or broken TOML.
    """
    path = find(source)
    try:
        written = msgspec.toml.decode(path.read_bytes())
    except FileNotFoundError:
        names = ", ".join(shipped())
        raise UserError(f"no study {source}; give a .toml file or one of: {names}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path.name} is not a readable TOML file: {error}") from None
    found = [*_typed(written, path.parent)] or [*_faults(written, StudySpec, ())]
    if found:
        return None, [f"{where(path, place)}: {said}" for place, said in found]
    spec = _completed(msgspec.convert(written, StudySpec), path.parent, found)
    return spec, [f"{where(path, place)}: {said}" for place, said in [*found, *_problems(spec)]]


def where(path: Path, place: Place) -> str:
    """FILE:LINE of a part of a TOML file; of one without a line of its own, what it is in."""
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = [re.escape(key) for key in place if isinstance(key, str)]
    if not keys:
        return path.name
    number = next((key for key in place if isinstance(key, int)), 0)
    heads = [n for n, line in enumerate(lines, 1) if re.match(rf"\[+{keys[0]}[].]", line)]
    head = heads[number] if number < len(heads) else 0
    for n, line in enumerate(lines[head:], head + 1):
        if head and line.startswith("["):
            break
        if re.match(rf"\s*({'|'.join(keys)})\s*=", line):
            return f"{path.name}:{n}"
    return f"{path.name}:{head}" if head else path.name


def _faults(value: Any, kind: Any, place: Place) -> Iterator[Fault]:
    """What keeps a value of TOML from being of a type: at least one for each wrong part."""
    inner = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    found: list[Fault] = []
    if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
        hints = get_type_hints(inner, include_extras=True)
        for name in value:
            if name in hints:
                found += _faults(value[name], hints[name], (*place, name))
            else:
                found.append(((*place, name), f"unknown key {name!r}; use {', '.join(hints)}"))
        fields = msgspec.structs.fields(inner)
        missing = [each.name for each in fields if each.required and each.name not in value]
        found += [(place, f"{name!r} is missing; add it") for name in missing]
    elif isinstance(value, dict) and get_origin(inner) is dict:
        for name in value:
            found += _faults(value[name], get_args(inner)[1], (*place, name))
    elif isinstance(value, list) and get_origin(inner) in (list, tuple):
        for i, item in enumerate(value):
            found += _faults(item, get_args(inner)[0], (*place, i))
    if not found:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            said, _, inside = str(error).partition(" - at `$")
            named = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in place)
            named = (named + inside.rstrip("`")).lstrip(".")
            found = [(place, f"{named}: {said}; jaxsteer/study/spec.py has the keys")]
    yield from found


def _completed(spec: StudySpec, folder: Path, faults: list[Fault]) -> StudySpec:
    """The study with the texts of files beside it, and the set of each test named.

    An unknown name, and a file that cannot be read or is malformed, is added to the faults.
    """

    def own(source: Any, read: Callable[[str], Any], *place: str) -> Any:
        is_path = isinstance(source, str) and data.is_path(source)
        try:
            found = read(str(folder / source) if is_path else source)
        except UserError as error:
            faults.append((place, str(error)))
            return source
        return found if is_path else source

    def found(prompts: PromptSet) -> PromptSet:
        return replace(prompts, file=prompts.file and str(folder / prompts.file))

    def named(claim: ClaimSpec) -> ClaimSpec:
        tests = [replace(test, prompts=test.prompts or spec.main) for test in claim.tests]
        return replace(claim, tests=tests)

    policies = [own(p, data.policy, "selection", "policies") for p in spec.selection.policies]
    spec = replace(
        spec,
        system=CHOOSE if spec.system == CHOOSE else own(spec.system, data.policy, "system"),
        selection=replace(spec.selection, policies=tuple(policies)),
        modes=[own(mode, data.mode, "modes") for mode in spec.modes],
        directions={
            name: replace(kind, trait=own(kind.trait, data.trait, "directions", name))
            if isinstance(kind, Trait)
            else kind
            for name, kind in spec.directions.items()
        },
        claim=list(map(named, spec.claim)),
    )
    return _with_files(spec, found)


def portable(spec: StudySpec) -> StudySpec:
    """The study as records hold it: of a file its name, which is the same on every machine."""

    def named(prompts: PromptSet) -> PromptSet:
        return replace(prompts, file=Path(prompts.file).name)

    return _with_files(spec, named)


def _with_files(spec: StudySpec, change: Callable[[PromptSet], PromptSet]) -> StudySpec:
    chosen = spec.selection
    harmful, harmless = change(chosen.harmful), change(chosen.harmless)
    return replace(
        spec,
        prompts=[change(prompts) for prompts in spec.prompts],
        selection=replace(chosen, harmful=harmful, harmless=harmless),
    )


def _typed(written: dict[str, Any], folder: Path) -> Iterator[Fault]:
    """Bring the operations of a decoded TOML study into the form of the structs, in place.

    `refusal_openings` may be a file with one a line.
    """
    selection = written.get("selection")
    if isinstance(selection, dict) and isinstance(file := selection.get("refusal_openings"), str):
        try:
            selection["refusal_openings"] = data.read_text(folder / file).splitlines()
        except UserError as error:
            yield ("selection", "refusal_openings"), str(error)
    conditions = written.get("condition")
    for i, condition in enumerate(conditions if isinstance(conditions, list) else ()):
        ops = condition.get("ops") if isinstance(condition, dict) else None
        for j, op in enumerate(ops if isinstance(ops, list) else ()):
            if isinstance(op, dict) and (fault := _operation(op)):
                yield ("condition", i, "ops", j), f"condition {condition.get('name')!r}: {fault}"


def _operation(op: dict[str, Any]) -> str:
    """Bring an operation into the form of its struct, in place; returns what is wrong with it.

    In TOML one key gives its kind and its direction.
    """
    kinds = [kind for kind in ("add", "project") if kind in op]
    if len(kinds) != 1:
        return "an operation needs exactly one of add and project"
    op |= {"operation": kinds[0], "direction": op.pop(kinds[0])}
    if op.pop("everywhere", False):
        if "add" in kinds or "at" in op:
            return "everywhere goes with project, and replaces at"
        op["at"] = None
    if isinstance(scale := op.get("scale"), str):
        op |= {"scale": -1.0 if scale[:1] == "-" else 1.0, "unit": scale.removeprefix("-")}
    return ""


def _problems(spec: StudySpec) -> Iterator[Fault]:
    """How parts of a study do not fit together."""
    for group, named in (
        ("condition", spec.condition),
        ("claim", spec.claim),
        ("prompts", spec.prompts),
        ("policy", spec.selection.policies),
    ):
        found = [each if isinstance(each, str) else each.name for each in named]
        for name in dict.fromkeys(found):
            if found.count(name) > 1:
                last = len(found) - 1 - found[::-1].index(name)
                yield (group, last), f"{group} {name!r} appears twice; rename one"
    for name in spec.layers:
        if not re.fullmatch(LAYER_NAME, name) or re.search(r"-\d+$", name) or name == "last":
            yield (
                ("layers",),
                f"layers: {name!r} cannot name a layer; use letters, digits, _ and -, beginning "
                "with a letter, but not `last` and no end that reads as an offset (steer-2)",
            )
    if (spec.system == CHOOSE) != bool(spec.selection.policies):
        said = 'system = "choose" needs [selection] policies to choose from, and they need it'
        yield ("system",), said
    order = list(spec.directions)
    for name, direction in spec.directions.items():
        place = "directions", name
        if re.fullmatch(r"random(-\d+)?", name):
            yield (
                place,
                f"directions.{name}: this name is kept for the random controls; choose another",
            )
        # They are made in the order of the file.
        for other in direction.of if isinstance(direction, Minus | Without) else ():
            if other not in spec.directions:
                yield place, f"directions.{name}.of names {other!r}, which the study does not have"
            if other not in order[: order.index(name)]:
                yield (
                    place,
                    f"directions.{name}.of names {other!r}, which comes later; list it first",
                )
    for i, condition in enumerate(spec.condition):
        for problem in _condition_problems(spec, condition):
            yield ("condition", i), f"condition {condition.name!r} {problem}"
    for i, claim in enumerate(spec.claim):
        for problem in _claim_problems(spec, claim):
            yield ("claim", i), f"claim {claim.name!r} {problem}"


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
    kinds = {each.name: each.kind for each in spec.prompts}
    others = {name for name, kind in kinds.items() if kind != "harmful"}
    for test in claim.tests:
        cosine = test.expect == "cosine-above"
        for name in (test.treated, test.control):
            if name not in (spec.directions if cosine else comparable):
                yield f"names {name!r}, which the study does not have"
            elif test.prompts in others and not benign.get(name, False):
                run = f"which {name!r} does not run (benign = true)"
                yield f"compares {test.prompts} prompts, {run}"
        if test.prompts not in {"", *kinds}:
            there = ", ".join(kinds)
            yield f"compares {test.prompts!r} prompts, and the study has {there}"
        if test.treated == test.control:
            yield f"compares {test.treated!r} with itself"
        # A margin out of this range is passed by every outcome, or by none.
        if test.expect == "few-raised" and test.margin <= 0:
            yield f"has a margin of {test.margin:g}; few-raised needs one above 0"
