"""What a study needs before its rows run: directions, layers and the persona's strength.

HarmBench's standard behaviours are split by hash: the first part trains the refusal direction, the
second selects its layer, the third the persona's layer and strength. Nothing here sees a prompt
that is reported on. Each step is saved when it is done, so an interrupted setup goes on:

    directions.safetensors  directions so far, with provenance
    setup.json              the selection tables and the choices
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions import direction as directions
from jaxsteer.directions import extraction
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.extraction import Random, Settings, Trait, UserPersona
from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, sha256_bytes, write_json
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.progress import Progress
from jaxsteer.study import selection
from jaxsteer.study.layer_expr import depth
from jaxsteer.study.spec import SelectionSpec, StudySpec

VERSION = "2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The result.

    Attributes:
      directions: by name, random ones included.
      layers: layer numbers by name (`steer`, `refusal`, and the spec's own).
      dose: persona strength in natural norms.
      record: the selection tables and choices, JSON-able.
    """

    directions: dict[str, Direction]
    layers: dict[str, int]
    dose: float
    record: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """HarmBench and our harmless prompts, divided by use; no prompt serves twice.

    Attributes:
      harmful_train, harmless_train: make the refusal direction.
      harmful_validation, harmless_validation: score its layer.
      selection: HarmBench prompts for the persona's layer and strength.
    """

    harmful_train: list[Prompt]
    harmless_train: list[Prompt]
    harmful_validation: list[Prompt]
    harmless_validation: list[Prompt]
    selection: list[Prompt]


def split(chosen: SelectionSpec, study: str) -> Split:
    """Divide the prompts, the same way in every study.

    Raises:
      UserError: the spec asks for more prompts than there are.
    """
    harmful = data.sample(data.harmbench(), 0, extraction.SPLIT_SEED)
    harmless = data.sample(data.harmless(), 0, extraction.SPLIT_SEED)
    train, validation = chosen.refusal_train, chosen.refusal_validation
    for name, needed, there in (
        ("HarmBench", train + validation + chosen.prompts, len(harmful)),
        ("harmless", train + validation, len(harmless)),
    ):
        if needed > there:
            raise UserError(
                f"study {study}: [selection] asks for {needed} {name} prompts (refusal_train, "
                f"refusal_validation, prompts), there are {there}"
            )
    harmful_train, harmless_train = extraction.refusal_prompts(train, validation)
    return Split(
        harmful_train=harmful_train,
        harmless_train=harmless_train,
        harmful_validation=harmful[train : train + validation],
        harmless_validation=harmless[:validation],
        selection=harmful[train + validation : train + validation + chosen.prompts],
    )


def key(spec: StudySpec, model: ChatModel) -> str:
    """Identity of everything the setup depends on."""
    kinds = spec.directions.values()
    traits = sorted(kind.trait for kind in kinds if isinstance(kind, Trait | UserPersona))
    value = [
        VERSION,
        model.weights_sha256,
        model.tokenizer_sha256,
        data.policy(spec.system).sha256,
        [data.trait(name).sha256 for name in traits],
        canonical_json(data.roles()),
        [p.id for p in (*data.harmless(), *data.harmbench())],
        msgspec.to_builtins([spec.directions, spec.selection, spec.layers, spec.dose]),
        _random_seeds(spec),
    ]
    return sha256_bytes(canonical_json(value).encode())


def _random_seeds(spec: StudySpec) -> list[int]:
    return sorted({seed for item in spec.condition for seed in item.random_seeds})


def prepare(spec: StudySpec, model: ChatModel, out: Path) -> Setup:
    """Make or read back the setup of a study in its results folder.

    Raises:
      UserError: the spec leaves open what it gives no selection for, or a selection rule finds
        nothing.
    """
    if spec.selection is not None:
        # Asked for now, so that too few prompts are said before an hour of extraction.
        split(spec.selection, spec.name)
    identity = key(spec, model)
    record = read_record(out / "setup.json")
    if record.get("key") != identity:
        record = {"key": identity}
        (out / "directions.safetensors").unlink(missing_ok=True)
        # Says whose the directions are, so that a setup that stops half-way goes on with them.
        write_json(out / "setup.json", record)
    found = _directions(spec, model, out / "directions.safetensors")
    layers, dose = _choices(spec, model, found, record, out / "setup.json")
    record |= {"layers": layers, "dose": dose, "directions": hashes(found)}
    write_json(out / "setup.json", record)
    return Setup(directions=found, layers=layers, dose=dose, record=record)


def read(spec: StudySpec, model: ChatModel, out: Path) -> Setup | None:
    """The setup that another process made in the folder; None until it is there whole."""
    record = read_record(out / "setup.json")
    if record.get("key") != key(spec, model) or "directions" not in record:
        return None
    path = out / "directions.safetensors"
    found = directions.load(path) if path.is_file() else {}
    if hashes(found) != record["directions"]:
        return None
    return Setup(directions=found, layers=record["layers"], dose=record["dose"], record=record)


def hashes(found: Mapping[str, Direction]) -> dict[str, str]:
    """sha256 of each direction, by name."""
    return {name: direction.sha256 for name, direction in sorted(found.items())}


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when there is no such file.

    Raises:
      UserError: the file is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; remove it and run again")
    return value


def _directions(spec: StudySpec, model: ChatModel, path: Path) -> dict[str, Direction]:
    found = directions.load(path) if path.is_file() else {}
    missing = [name for name in spec.directions if name not in found]
    if missing:
        done, settings = len(spec.directions) - len(missing), extraction_settings(spec)
        with Progress("directions", len(spec.directions), done, unit="directions") as progress:
            for name in missing:
                found[name] = extraction.extract(
                    model, name, spec.directions[name], found=found, settings=settings
                )
                directions.save(path, list(found.values()))
                progress.advance(1)
    seeds = [seed for seed in _random_seeds(spec) if f"random-{seed}" not in found]
    for seed in seeds:
        # The study's first, not the file's: what a file holds comes back in another order.
        base = "persona" if "persona" in found else next(iter(spec.directions))
        kind = Random(seed=seed, norms_of=base)
        found[f"random-{seed}"] = extraction.combine(f"random-{seed}", kind, found)
    if seeds:
        directions.save(path, list(found.values()))
    return found


def extraction_settings(spec: StudySpec) -> Settings:
    """What the study's directions have in common: its system prompt, and its refusal prompts."""
    settings = Settings(policy=spec.system)
    if spec.selection is None:
        return settings
    return dataclasses.replace(
        settings,
        refusal_prompts=spec.selection.refusal_train,
        skipped=spec.selection.refusal_validation,
    )


def selection_of(spec: StudySpec, what: str) -> SelectionSpec:
    """The spec's [selection], which `what` needs.

    Raises:
      UserError: there is none.
    """
    if spec.selection is None:
        raise UserError(
            f"study {spec.name}: {what} needs [selection]; add it, or fix the value in [layers] "
            "or dose"
        )
    return spec.selection


def named_layers(spec: StudySpec, model: ChatModel) -> dict[str, int]:
    """The layers that the spec fixes, by name.

    Raises:
      UserError: the model has no such layer.
    """
    n_layers = model.config.n_layers
    layers = {
        name: depth(value, n_layers) if isinstance(value, float) else value
        for name, value in spec.layers.items()
    }
    for name, layer in layers.items():
        if layer >= n_layers:
            raise UserError(
                f"study {spec.name}: layers.{name} is {layer}; {model.name} has resid_post.0 to "
                f"resid_post.{n_layers - 1}"
            )
    return layers


def _choices(
    spec: StudySpec,
    model: ChatModel,
    found: Mapping[str, Direction],
    record: dict[str, Any],
    path: Path,
) -> tuple[dict[str, int], float]:
    n_layers = model.config.n_layers
    layers = named_layers(spec, model)
    if "refusal" in found and "refusal" not in layers:
        if "refusal_candidates" not in record:
            chosen = selection_of(spec, "the layer of the refusal direction")
            candidates = _score_refusal(spec, chosen, model, found["refusal"])
            record["refusal_candidates"] = [dataclasses.asdict(c) for c in candidates]
            write_json(path, record)
        candidates = [
            selection.RefusalCandidate(**{**c, "reasons": tuple(c["reasons"])})
            for c in record["refusal_candidates"]
        ]
        near_miss = selection_of(spec, "the refusal layer").allow_near_miss
        best = selection.choose_refusal(candidates, allow_near_miss=near_miss)
        layers["refusal"] = best.layer
        record["refusal_near_miss"] = list(best.reasons)
    dose = spec.dose
    if "persona" in found and ("steer" not in layers or dose is None):
        chosen = selection_of(spec, "the persona's layer and strength")
        if "dose_candidates" not in record:
            grid = [depth(share, n_layers) for share in chosen.layers]
            grid = [layers["steer"]] if "steer" in layers else grid
            scales = chosen.scales if dose is None else [dose]
            cells = _score_doses(spec, chosen, model, found["persona"], grid, scales)
            record["dose_candidates"] = [dataclasses.asdict(c) for c in cells]
            write_json(path, record)
        cells = [selection.DoseCandidate(**c) for c in record["dose_candidates"]]
        cell = selection.choose_dose(cells, chosen.max_degenerate)
        layers["steer"], dose = cell.layer, cell.scale
    return layers, 1.0 if dose is None else dose


def ids(model: ChatModel, prompts: Sequence[Prompt], system: str) -> list[list[int]]:
    """Token ids of each prompt under a system prompt."""
    return [model.tokenizer.chat(p.text, system) for p in prompts]


def openings(study: str, chosen: SelectionSpec, model: ChatModel) -> list[int]:
    """The tokens that open a refusal.

    Raises:
      UserError: a text that is no token to this model.
    """
    first = []
    for text in chosen.refusal_openings:
        tokens = model.tokenizer.hf.encode(text, add_special_tokens=False)
        if not tokens:
            raise UserError(
                f"study {study}: selection.refusal_openings holds {text!r}, which is no token of "
                f"{model.name}; remove it"
            )
        first.append(tokens[0])
    return first


def _score_refusal(
    spec: StudySpec, chosen: SelectionSpec, model: ChatModel, direction: Direction
) -> list[selection.RefusalCandidate]:
    system = data.policy(spec.system).text
    prompts = split(chosen, spec.name)
    layers = [depth(share, model.config.n_layers) for share in chosen.refusal_layers]
    opening = openings(spec.name, chosen, model)
    total = chosen.refusal_validation * (1 + 3 * len(layers))
    with Progress("refusal layer", total, unit="prompts") as progress:
        return selection.refusal_candidates(
            model,
            direction,
            ids(model, prompts.harmful_validation, system),
            ids(model, prompts.harmless_validation, system),
            layers,
            opening,
            kl_limit=chosen.kl_limit,
            report=progress.advance,
        )


def _score_doses(
    spec: StudySpec,
    chosen: SelectionSpec,
    model: ChatModel,
    persona: Direction,
    layers: Sequence[int],
    scales: Sequence[float],
) -> list[selection.DoseCandidate]:
    prompts = split(chosen, spec.name).selection
    total = len(prompts) * (1 + len(layers) * len(scales))
    with Progress("persona layer and strength", total) as progress:
        return selection.dose_candidates(
            model,
            persona,
            ids(model, prompts, data.policy(spec.system).text),
            layers,
            scales,
            max_new_tokens=chosen.max_new_tokens,
            batch=spec.decoding.batch,
            report=progress.advance,
        )
