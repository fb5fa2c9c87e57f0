"""What a study needs before its rows run: directions, layers and the persona's strength.

Layers and strength are selected on HarmBench and our harmless prompts, never on a prompt that is
reported on. Each step is saved when it is done, so an interrupted setup continues:

    directions.safetensors  the directions so far, with provenance
    setup.json              the candidates so far with their scores, then the choices
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions import direction as directions
from jaxsteer.directions import extraction
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.extraction import FromChats, InStudy, Random, Settings
from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, sha256_bytes, write_json
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.study import selection
from jaxsteer.study.conditions import depth, resolve_layers
from jaxsteer.study.selection import DoseCandidate, RefusalCandidate
from jaxsteer.study.spec import StudySpec
from jaxsteer.words import Progress

VERSION = "2"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """setup.json.

    Attributes:
      key: hash of everything the setup depends on.
      refusal_candidates: the layers the refusal direction's was chosen from; none if it is fixed.
      refusal_near_miss: why the chosen one did not pass, if it did not.
      dose_candidates: the layers and strengths the persona's were chosen from; none if fixed.
      layers: layer numbers by name (`steer`, `refusal`, and the spec's own).
      dose: the persona's strength in natural norms.
      directions: sha256 of each direction by name; None until the setup is complete.
    """

    key: str
    refusal_candidates: tuple[RefusalCandidate, ...] = ()
    refusal_near_miss: tuple[str, ...] = ()
    dose_candidates: tuple[DoseCandidate, ...] = ()
    layers: dict[str, int] = {}
    dose: float = 1.0
    directions: dict[str, str] | None = None

    def save(self, out: Path) -> None:
        """Write it to a results folder."""
        write_json(out / "setup.json", msgspec.to_builtins(self))


class Setup(NamedTuple):
    """What a study runs with.

    Attributes:
      directions: by name, random ones included.
      record: the choices and how they were made.
    """

    directions: dict[str, Direction]
    record: Record


class Split(NamedTuple):
    """Token ids of the prompts that choices are made on; others make the refusal direction.

    Attributes:
      harmful, harmless: score the layer of the refusal direction.
      persona: HarmBench prompts that score the persona's layer and strength.
    """

    harmful: list[list[int]]
    harmless: list[list[int]]
    persona: list[list[int]]


def split(spec: StudySpec, model: ChatModel) -> Split:
    """Take the prompts of the selection, which are ranked the same way in every study.

    HarmBench in order of rank: refusal_train prompts that make the refusal direction, then
    refusal_validation that score its layer, then those of the persona. Of our harmless prompts the
    validation's come first.

    Raises:
      UserError: the spec asks for more prompts than exist.
    """
    chosen, system = spec.selection, data.policy(spec.system).text
    harmful = data.sample(data.harmbench(), 0, extraction.SPLIT_SEED)
    harmless = data.sample(data.harmless(), 0, extraction.SPLIT_SEED)
    train, validation = chosen.refusal_train, chosen.refusal_train + chosen.refusal_validation
    end = validation + chosen.prompts
    for name, needed, there in (("HarmBench", end, harmful), ("harmless", validation, harmless)):
        if needed > len(there):
            raise UserError(
                f"study {spec.name}: [selection] asks for {needed} {name} prompts (refusal_train, "
                f"refusal_validation, prompts), there are {len(there)}"
            )

    def ids(prompts: Sequence[Prompt]) -> list[list[int]]:
        return [model.tokenizer.chat(prompt.text, system) for prompt in prompts]

    return Split(
        harmful=ids(harmful[train:validation]),
        harmless=ids(harmless[: chosen.refusal_validation]),
        persona=ids(harmful[validation:end]),
    )


def key(spec: StudySpec, model: ChatModel) -> str:
    """Hash of everything the setup depends on.

    Raises:
      UserError: no such policy or trait.
    """
    settings = extraction_settings(spec)
    value = [
        VERSION,
        model.weights_sha256,
        model.tokenizer_sha256,
        data.policy(spec.system).sha256,
        [
            extraction.contrast(kind, settings).source_sha256
            for kind in spec.directions.values()
            if isinstance(kind, FromChats)
        ],
        [p.id for p in (*data.harmless(), *data.harmbench())],
        msgspec.to_builtins([spec.directions, spec.selection, spec.layers, spec.dose]),
        _random_seeds(spec),
    ]
    return sha256_bytes(canonical_json(value).encode())


def prepare(spec: StudySpec, model: ChatModel, out: Path) -> Setup:
    """Make a study's setup in its results folder, or read it.

    Raises:
      UserError: a file that cannot be read, or no candidate passes.
    """
    record, path = read_record(out), out / "directions.safetensors"
    if record is None or record.key != key(spec, model):
        record = Record(key=key(spec, model))
        path.unlink(missing_ok=True)
        # Saved first, so that an interrupted setup finds its own directions again.
        record.save(out)
    found = _directions(spec, model, path)
    dose = 1.0 if spec.dose is None else spec.dose
    record = replace(record, layers=named_layers(spec, model), dose=dose)
    if open_choices(spec):
        record = _chosen(spec, model, found, record, out)
    record = replace(record, directions=hashes(found))
    record.save(out)
    return Setup(directions=found, record=record)


def read(spec: StudySpec, model: ChatModel, out: Path) -> Setup | None:
    """The setup that another process made in the folder; None until it is complete."""
    record, path = read_record(out), out / "directions.safetensors"
    if record is None or record.key != key(spec, model):
        return None
    found = directions.load(path) if path.is_file() else {}
    return Setup(directions=found, record=record) if hashes(found) == record.directions else None


def read_record(out: Path) -> Record | None:
    """setup.json of a results folder, complete or not; None when there is none.

    Raises:
      UserError: the file cannot be read.
    """
    path = out / "setup.json"
    try:
        # Not msgspec's own reader: a score may be NaN.
        return msgspec.convert(json.loads(path.read_text(encoding="utf-8")), Record)
    except FileNotFoundError:
        return None
    except (msgspec.ValidationError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run again") from None


def hashes(found: Mapping[str, Direction]) -> dict[str, str]:
    """sha256 of each direction, by name."""
    return {name: direction.sha256 for name, direction in sorted(found.items())}


def extraction_settings(spec: StudySpec) -> Settings:
    """What the study's directions have in common: its system prompt and its refusal prompts."""
    train, validation = spec.selection.refusal_train, spec.selection.refusal_validation
    return Settings(policy=spec.system, refusal_prompts=train, skipped=validation)


def open_choices(spec: StudySpec) -> dict[str, Sequence[float]]:
    """What the selection still has to choose of `steer`, `dose` and `refusal`: its candidates."""
    persona, refusal = "persona" in spec.directions, "refusal" in spec.directions
    still: dict[str, Sequence[float]] = {}
    if persona and "steer" not in spec.layers:
        still["steer"] = spec.selection.layers
    if persona and spec.dose is None:
        still["dose"] = spec.selection.scales
    if refusal and "refusal" not in spec.layers:
        still["refusal"] = spec.selection.refusal_layers
    return still


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
    found = directions.load(path) if path.is_file() else {}
    base = "persona" if "persona" in spec.directions else next(iter(spec.directions), "")
    kinds: dict[str, InStudy | Random] = {**spec.directions}
    kinds |= {f"random-{s}": Random(seed=s, norms_of=base) for s in _random_seeds(spec)}
    missing = [name for name in kinds if name not in found]
    if missing:
        done, settings = len(kinds) - len(missing), extraction_settings(spec)
        with Progress("directions", len(kinds), done, unit="directions") as progress:
            for name in missing:
                found[name] = extraction.extract(
                    model, name, kinds[name], found=found, settings=settings
                )
                directions.save(path, list(found.values()))
                progress.advance(1)
    return found


def _chosen(
    spec: StudySpec, model: ChatModel, found: Mapping[str, Direction], record: Record, out: Path
) -> Record:
    """The record with all open choices made; candidates are scored once, and saved."""
    still, chosen, n_layers = open_choices(spec), spec.selection, model.config.n_layers
    prompts, fixed = split(spec, model), dict(record.layers)
    if "refusal" in still:
        if not record.refusal_candidates:
            refusals = selection.refusal_candidates(
                model,
                found["refusal"],
                prompts.harmful,
                prompts.harmless,
                [depth(share, n_layers) for share in still["refusal"]],
                openings(spec, model),
                kl_limit=chosen.kl_limit,
            )
            record = replace(record, refusal_candidates=refusals)
            record.save(out)
        near_miss = chosen.allow_near_miss
        best = selection.choose_refusal(record.refusal_candidates, allow_near_miss=near_miss)
        fixed["refusal"] = best.layer
        record = replace(record, layers=fixed, refusal_near_miss=best.reasons)
    if still.keys() & {"steer", "dose"}:
        if not record.dose_candidates:
            layers = [depth(share, n_layers) for share in still.get("steer", ())]
            doses = selection.dose_candidates(
                model,
                found["persona"],
                prompts.persona,
                layers or [fixed["steer"]],
                still.get("dose", [record.dose]),
                max_new_tokens=chosen.max_new_tokens,
                batch=spec.decoding.batch,
            )
            record = replace(record, dose_candidates=doses)
            record.save(out)
        cell = selection.choose_dose(record.dose_candidates, chosen.max_degenerate)
        fixed["steer"] = cell.layer
        record = replace(record, layers=fixed, dose=cell.scale)
    return record
