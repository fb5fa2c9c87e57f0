"""What a study needs before its rows run: policy, directions, layers and strengths.

All are selected on prompts of their own (HarmBench and our harmless ones, unless the study gives
others), never on a prompt that is reported on. A study under whose policy the untouched model
refuses harmful prompts hardly more than harmless ones stops here. Each step is saved when it is
done, so an interrupted setup continues:

    directions.safetensors  the directions so far, with provenance
    setup.json              the candidates so far with their scores, then the choices
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions import direction as directions
from jaxsteer.directions import extraction
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.extraction import FromChats, InStudy, Random, Settings
from jaxsteer.errors import UserError
from jaxsteer.files import read_json, sha256_json, write_json
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Add, Project
from jaxsteer.study import selection
from jaxsteer.study.conditions import depth, resolve_layers
from jaxsteer.study.selection import Candidates, Rater, Rates, RestoringCandidate
from jaxsteer.study.spec import CHOOSE, AddSpec, StudySpec, portable
from jaxsteer.words import Progress

VERSION = "3"

# Folder of a results folder with sums of the directions' samples, until they are measured.
SAMPLES = "samples"


class Record(Candidates, frozen=True, kw_only=True):
    """setup.json.

    Attributes:
      key: hash of everything the setup depends on.
      policy: name of the policy.
      layers: layer numbers by name (`steer`, `refusal`, and the spec's own).
      dose: the persona's strength in natural norms.
      refusal_dose: strength of the refusal direction at `late_refusal`.
      directions: sha256 of each direction by name; None until the setup is complete.
    """

    key: str
    policy: str = ""
    layers: dict[str, int] = msgspec.field(default_factory=dict)
    dose: float = 1.0
    refusal_dose: float = 1.0
    directions: dict[str, str] | None = None

    @property
    def candidates(self) -> Candidates:
        """The candidates alone."""
        return msgspec.convert(self, Candidates, from_attributes=True)

    def save(self, out: Path) -> None:
        """Write it to a results folder."""
        write_json(out / "setup.json", msgspec.to_builtins(self))


class Setup(NamedTuple):
    """What a study runs with.

    Attributes:
      spec: the study, its policy filled in.
      directions: by name, random ones included.
      record: the choices and how they were made.
    """

    spec: StudySpec
    directions: dict[str, Direction]
    record: Record


class Split(NamedTuple):
    """Token ids of the prompts that choices are made on; others make the refusal direction.

    Attributes:
      harmful, harmless: score the layer of the refusal direction.
      persona: harmful prompts that score all other choices.
      ordinary: as many harmless prompts, which score the policy.
    """

    harmful: list[list[int]]
    harmless: list[list[int]]
    persona: list[list[int]]
    ordinary: list[list[int]]


def selected(spec: StudySpec) -> tuple[list[Prompt], list[Prompt]]:
    """The harmful and the harmless prompts of the selection and of the refusal direction, by rank.

    Raises:
      UserError: the spec asks for more prompts than exist, or a file cannot be read.
    """
    chosen = spec.selection
    validation = chosen.refusal_train + chosen.refusal_validation
    made = []
    for which, needed in (
        (chosen.harmful, validation + chosen.prompts),
        (chosen.harmless, max(validation, chosen.prompts)),
    ):
        found = data.read(which)
        if conversation := next((p for p in found if p.turns), None):
            raise UserError(
                f"study {spec.name}: row {conversation.row} of {which.name} is a conversation; "
                "[selection] takes single prompts"
            )
        if needed > len(found):
            raise UserError(
                f"study {spec.name}: [selection] asks for {needed} {which.name} prompts "
                f"(refusal_train, refusal_validation, prompts), there are {len(found)}"
            )
        made.append(found[:needed])
    return made[0], made[1]


def prompts(spec: StudySpec, limit: int | None = None) -> dict[str, list[Prompt]]:
    """The prompts reported on, by set; `limit` replaces the number of each harmful set.

    Raises:
      UserError: as `data.read`, or a prompt that is in two sets, or that the selection uses too.
    """
    found = {
        each.name: data.read(each, limit if each.kind == "harmful" else None)
        for each in spec.prompts
    }
    chosen = zip(("harmful", "harmless"), selected(spec), strict=True)
    used = {f"the {name} prompts of [selection]": some for name, some in chosen} | found
    seen: dict[str, tuple[str, int]] = {}
    for name, some in used.items():
        for prompt in some:
            place = name, prompt.row
            other = seen.setdefault(" ".join(prompt.text.casefold().split()), place)
            if other[0] != name:
                raise UserError(
                    f"study {spec.name}: row {prompt.row} of {name} is also row {other[1]} of "
                    f"{other[0]}; take it out of one of the two"
                )
    return found


def split(spec: StudySpec, model: ChatModel) -> Split:
    """Take the prompts of the selection, which are ranked the same way in every study.

    Harmful ones in order of rank: refusal_train prompts that make the refusal direction, then
    refusal_validation that score its layer, then those of the persona. Of the harmless prompts the
    validation's come first.

    Raises:
      UserError: as `selected`.
    """
    chosen, system = spec.selection, data.policy(spec.system).text
    harmful, harmless = selected(spec)
    train, validation = chosen.refusal_train, chosen.refusal_train + chosen.refusal_validation

    def ids(prompts: Sequence[Prompt]) -> list[list[int]]:
        return [model.tokenizer.chat(prompt.asked, system) for prompt in prompts]

    return Split(
        harmful=ids(harmful[train:validation]),
        harmless=ids(harmless[: chosen.refusal_validation]),
        persona=ids(harmful[validation:]),
        ordinary=ids(harmless[: chosen.prompts]),
    )


def policies(spec: StudySpec) -> dict[str, StudySpec]:
    """The study under each policy that it may run under, by the policy's name."""
    chosen = spec.selection.policies if spec.system == CHOOSE else (spec.system,)
    return {data.policy(policy).name: replace(spec, system=policy) for policy in chosen}


def key(spec: StudySpec, model: ChatModel) -> str:
    """Hash of everything the setup depends on.

    Raises:
      UserError: no such policy or trait.
    """
    sources = [
        extraction.contrast(kind, extraction_settings(each)).source_sha256
        for each in policies(spec).values()
        for kind in spec.directions.values()
        if isinstance(kind, FromChats)
    ]
    value = [
        VERSION,
        model.weights_sha256,
        model.tokenizer_sha256,
        [data.policy(each.system).sha256 for each in policies(spec).values()],
        sources,
        [[p.id, p.text] for some in selected(spec) for p in some],
        msgspec.to_builtins([spec.directions, portable(spec).selection, spec.layers, spec.dose]),
        [spec.refusal_dose, spec.allow_uninformative, open_choices(spec), _random_seeds(spec)],
    ]
    return sha256_json(value)


def prepare(spec: StudySpec, model: ChatModel, out: Path) -> Setup:
    """Make a study's setup in its results folder, or read it.

    Raises:
      UserError: a file that cannot be read, a study that would say nothing, or no candidate passes.
    """
    record, path = read_record(out), out / "directions.safetensors"
    if record is None or record.key != key(spec, model):
        record = Record(key=key(spec, model))
        path.unlink(missing_ok=True)
        # Saved first, so that an interrupted setup finds its own directions again.
        record.save(out)
    record = _with_policy(spec, model, record, out)
    spec = policies(spec)[record.policy]
    found = _directions(spec, model, path)
    record = _Choices(spec, model, found, record, out).made()
    record = replace(record, directions=hashes(found))
    record.save(out)
    return Setup(spec, found, record)


def read(spec: StudySpec, model: ChatModel, out: Path) -> Setup | None:
    """The setup that another process made in the folder; None until it is complete."""
    record, path = read_record(out), out / "directions.safetensors"
    if record is None or record.key != key(spec, model) or record.directions is None:
        return None
    found = directions.load(path) if path.is_file() else {}
    found = {name: made for name, made in found.items() if name in record.directions}
    made = Setup(policies(spec)[record.policy], found, record)
    return made if hashes(found) == record.directions else None


def read_record(out: Path) -> Record | None:
    """setup.json of a results folder, complete or not; None when there is none.

    Raises:
      UserError: the file cannot be read.
    """
    path = out / "setup.json"
    return read_json(path, Record, "remove it and run again") if path.exists() else None


def hashes(found: Mapping[str, Direction]) -> dict[str, str]:
    """sha256 of each direction, by name."""
    return {name: direction.sha256 for name, direction in sorted(found.items())}


def extraction_settings(spec: StudySpec) -> Settings:
    """What the study's directions have in common: its system prompt and its refusal prompts."""
    chosen = spec.selection
    return Settings(
        policy=spec.system,
        refusal_prompts=chosen.refusal_train,
        skipped=chosen.refusal_validation,
        harmful=chosen.harmful,
        harmless=chosen.harmless,
    )


def open_choices(spec: StudySpec) -> list[str]:
    """What the selection still has to choose, in the order in which it does."""
    persona, refusal = "persona" in spec.directions, "refusal" in spec.directions
    both = persona and refusal
    places = [op.at or "" for item in spec.condition for op in item.ops]
    units = [op.unit for item in spec.condition for op in item.ops if isinstance(op, AddSpec)]

    def named(layer: str) -> bool:
        return any(re.search(rf"(?<![\w-]){layer}(?!\w)", at) for at in places)

    is_open = {
        "policy": spec.system == CHOOSE,
        "refusal": refusal and "refusal" not in spec.layers,
        "steer": persona and "steer" not in spec.layers,
        "dose": persona and spec.dose is None,
        "window": persona and "window" not in spec.layers and named("window"),
        "late_refusal": both and "late_refusal" not in spec.layers and named("late_refusal"),
        "refusal_dose": both and spec.refusal_dose is None and "refusal_dose" in units,
    }
    return [name for name, holds in is_open.items() if holds]


def named_layers(spec: StudySpec, model: ChatModel) -> dict[str, int]:
    """The layers that the spec fixes, by name.

    Raises:
      UserError: the model has no such layer.
    """
    n_layers, where = model.config.n_layers, f"study {spec.name}: layers"
    return {
        name: depth(value, n_layers)
        if isinstance(value, float)
        else resolve_layers(str(value), {}, n_layers, f"{where}.{name}")[0]
        for name, value in spec.layers.items()
    }


def openings(spec: StudySpec, model: ChatModel) -> list[int]:
    """The tokens that open a refusal.

    Raises:
      UserError: a text that gives no token.
    """
    first = []
    for text in spec.selection.refusal_openings:
        tokens = model.tokenizer.hf.encode(text, add_special_tokens=False)
        if not tokens:
            raise UserError(
                f"study {spec.name}: selection.refusal_openings holds {text!r}, which is not a "
                f"token of {model.name}; remove it"
            )
        first.append(tokens[0])
    return first


def _random_seeds(spec: StudySpec) -> list[int]:
    return sorted({seed for item in spec.condition for seed in item.random_seeds})


def _directions(spec: StudySpec, model: ChatModel, path: Path) -> dict[str, Direction]:
    """The study's directions, each saved when it is made."""
    there = directions.load(path) if path.is_file() else {}
    base = "persona" if "persona" in spec.directions else next(iter(spec.directions), "")
    kinds: dict[str, InStudy | Random] = {**spec.directions}
    kinds |= {f"random-{s}": Random(seed=s, norms_of=base) for s in _random_seeds(spec)}
    # Not what `extract` added to the file.
    found = {name: there[name] for name in kinds if name in there}
    missing = [name for name in kinds if name not in found]
    if missing:
        done, settings = len(kinds) - len(missing), extraction_settings(spec)
        with Progress("directions", len(kinds), done, unit="directions") as progress:
            for name in missing:
                kept = path.with_name(SAMPLES) / f"{name}.safetensors"
                found[name] = extraction.extract(
                    model, name, kinds[name], found=found, settings=settings, keep=kept
                )
                directions.add(path, found[name], model)
                progress.advance(1)
    return found


def _with_policy(spec: StudySpec, model: ChatModel, record: Record, out: Path) -> Record:
    """The record with the study's policy, and how the untouched model answers under it.

    Raises:
      UserError: it does not tell harmful prompts from harmless ones.
    """
    if not record.policies:
        # In order of length: of equal ones the first is taken.
        each = sorted(policies(spec).values(), key=lambda each: len(data.policy(each.system).text))
        prompts = {data.policy(study.system).name: split(study, model) for study in each}
        asked = {name: (found.persona, found.ordinary) for name, found in prompts.items()}
        scored = selection.policy_candidates(_rater(spec, model), asked)
        record = replace(record, policies=scored)
        record.save(out)
    best = selection.choose_policy(record.policies)
    reason = selection.uninformative(best, spec.selection.least_youden)
    if reason and not spec.allow_uninformative:
        raise UserError(f"study {spec.name}: {reason}, or set allow_uninformative = true")
    return replace(record, policy=best.policy)


def _rater(spec: StudySpec, model: ChatModel) -> Rater:
    return Rater(model, spec.selection.max_new_tokens, spec.decoding.batch)


class _Choices:
    """The choices of a study in the making; candidates are scored once, and saved."""

    def __init__(
        self, spec: StudySpec, model: ChatModel, found: Mapping[str, Direction], record: Record,
        out: Path,
    ) -> None:  # fmt: skip
        self.spec, self.model, self.found, self.record, self.out = spec, model, found, record, out
        self.chosen, self.still = spec.selection, open_choices(spec)
        self.prompts, self.rater = split(spec, model), _rater(spec, model)
        self.layers, self.dose = named_layers(spec, model), spec.dose
        self.refusal_dose = spec.refusal_dose

    def made(self) -> Record:
        """The record with all open choices made."""
        if "refusal" in self.still:
            self._refusal()
        if {"steer", "dose"} & {*self.still}:
            self._persona()
        if "window" in self.still:
            self._window()
        if {"late_refusal", "refusal_dose"} & {*self.still}:
            self._late_refusal()
        doses = [1.0 if dose is None else dose for dose in (self.dose, self.refusal_dose)]
        return replace(self.record, layers=self.layers, dose=doses[0], refusal_dose=doses[1])

    def _scored(self, field: str, score: Callable[[], Sequence[Any]]) -> Any:
        """The candidates in a field of the record, scored now if it has none."""
        if not getattr(self.record, field):
            self.record = replace(self.record, **{field: score()})
            self.record.save(self.out)
        return getattr(self.record, field)

    def _depths(self, shares: Sequence[float]) -> list[int]:
        return [depth(share, self.model.config.n_layers) for share in shares]

    def _refusal(self) -> None:
        candidates = self._scored(
            "refusals",
            lambda: selection.refusal_candidates(
                self.model,
                self.found["refusal"],
                self.prompts.harmful,
                self.prompts.harmless,
                self._depths(self.chosen.refusal_layers),
                openings(self.spec, self.model),
                kl_limit=self.chosen.kl_limit,
            ),
        )
        near_miss = self.chosen.allow_near_miss
        best = selection.choose_refusal(candidates, allow_near_miss=near_miss)
        self.layers["refusal"] = best.layer
        self.record = replace(self.record, refusal_near_miss=best.reasons)

    def _persona(self) -> None:
        layers = self._depths(self.chosen.layers)
        layers = layers if "steer" in self.still else [self.layers["steer"]]
        scales = self.chosen.scales if self.dose is None else (self.dose,)
        grid = selection.additions(self.found["persona"].vectors, layers, scales)
        candidates = self._scored(
            "doses", lambda: selection.dose_candidates(self.rater, self.prompts.persona, grid)
        )
        best = selection.choose_dose(candidates, self.chosen.max_degenerate)
        self.layers["steer"], self.dose = best.layer, best.scale

    def _restoring(
        self, field: str, grid: selection.Grid, title: str
    ) -> tuple[RestoringCandidate, tuple[str, ...]]:
        vectors, dose = self.found["persona"].vectors, 1.0 if self.dose is None else self.dose
        persona = Add(direction=vectors, layers=(self.layers["steer"],), scale=dose)
        prompts, chosen = self.prompts.persona, self.chosen
        candidates = self._scored(
            field,
            lambda: selection.restoring_candidates(
                self.rater, persona, prompts, grid, title, plain=self._nothing_done(dose)
            ),
        )
        limits, near_miss = (chosen.max_degenerate, chosen.max_change), chosen.allow_near_miss
        return selection.choose_restoring(candidates, *limits, allow_near_miss=near_miss)

    def _nothing_done(self, dose: float) -> RestoringCandidate | None:
        """The persona, and the model alone, without an operation; None if no stage rated them."""
        if self.record.windows:
            return next(c for c in self.record.windows if not c.width)
        rates = {
            (c.layer, c.scale): Rates(refusal=c.refusal, degenerate=c.degenerate)
            for c in self.record.doses
        }
        if not rates:
            return None
        steered, alone = rates[self.layers["steer"], dose], rates[0, 0.0]
        return RestoringCandidate(layer=0, width=0, scale=0.0, steered=steered, alone=alone)

    def _window(self) -> None:
        steer, vectors = self.layers["steer"], (self.found["persona"].vectors,)
        grid = {
            (first, width, 0.0): [
                Project(
                    directions=vectors, layers=tuple(range(first, first + width)), measured_at=steer
                )
            ]
            for first in (steer + start for start in self.chosen.windows.starts)
            for width in self.chosen.windows.widths
            if first + width <= self.model.config.n_layers
        }
        best, why = self._restoring("windows", grid, "window")
        self.layers |= {"window": best.layer, "window_last": best.layer + best.width - 1}
        self.record = replace(self.record, window_near_miss=why)

    def _late_refusal(self) -> None:
        vectors, fixed = self.found["refusal"].vectors, self.layers.get("late_refusal")
        layers = self._depths(self.chosen.late.layers) if fixed is None else [fixed]
        scales = self.chosen.late.scales
        if "refusal_dose" not in self.still:
            scales = (self.refusal_dose or 1.0,)
        grid = selection.additions(vectors, layers, scales)
        best, why = self._restoring("late", grid, "late refusal")
        self.layers["late_refusal"], self.refusal_dose = best.layer, best.scale
        self.record = replace(self.record, late_near_miss=why)
