"""What a study needs before its rows run: directions, layers and the persona's strength.

Layers and strength are selected on HarmBench and our harmless prompts, never on a prompt that is
reported on. Each step is saved when it is done, so an interrupted setup continues:

    directions.safetensors  the directions so far, with provenance
    setup.json              the candidates so far with their scores, then the choices
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

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
from jaxsteer.study.layer_expr import depth
from jaxsteer.study.selection import DoseCandidate, RefusalCandidate
from jaxsteer.study.spec import SelectionSpec, StudySpec
from jaxsteer.terminal import Progress

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a study runs with.

    Attributes:
      directions: by name, random ones included.
      record: the choices and how they were made.
    """

    directions: dict[str, Direction]
    record: Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The prompts that choices are made on; the refusal direction is made from others.

    Attributes:
      harmful, harmless: score the layer of the refusal direction.
      persona: HarmBench prompts that score the persona's layer and strength.
    """

    harmful: list[Prompt]
    harmless: list[Prompt]
    persona: list[Prompt]


def split(chosen: SelectionSpec, study: str) -> Split:
    """Take the prompts of the selection, which are ranked the same way in every study.

    HarmBench in order of rank: refusal_train prompts that make the refusal direction, then
    refusal_validation that score its layer, then those of the persona. Of our harmless prompts the
    validation's come first.

    Raises:
      UserError: the spec asks for more prompts than exist.
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
    return Split(
        harmful=harmful[train : train + validation],
        harmless=harmless[:validation],
        persona=harmful[train + validation : train + validation + chosen.prompts],
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
      UserError: something is open that the spec has no [selection] for, or no candidate passes.
    """
    if spec.selection is not None:
        # Too few prompts are an error now, not after an hour of extraction.
        split(spec.selection, spec.name)
    record, path = read_record(out), out / "directions.safetensors"
    if record is None or record.key != key(spec, model):
        record = Record(key=key(spec, model))
        path.unlink(missing_ok=True)
        # Saved first, so that an interrupted setup finds its own directions again.
        record.save(out)
    found = _directions(spec, model, path)
    record = replace(record, layers=named_layers(spec, model))
    if "refusal" in found and "refusal" not in record.layers:
        record = _choose_refusal(spec, model, found["refusal"], record, out)
    if "persona" in found and ("steer" not in record.layers or spec.dose is None):
        record = _choose_dose(spec, model, found["persona"], record, out)
    elif spec.dose is not None:
        record = replace(record, dose=spec.dose)
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
    if spec.selection is None:
        return Settings(policy=spec.system)
    train, validation = spec.selection.refusal_train, spec.selection.refusal_validation
    return Settings(policy=spec.system, refusal_prompts=train, skipped=validation)


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


def ids(model: ChatModel, prompts: Sequence[Prompt], system: str) -> list[list[int]]:
    """Token ids of each prompt under a system prompt."""
    return [model.tokenizer.chat(p.text, system) for p in prompts]


def openings(study: str, chosen: SelectionSpec, model: ChatModel) -> list[int]:
    """The tokens that open a refusal.

    Raises:
      UserError: a text that gives no token.
    """
    first = []
    for text in chosen.refusal_openings:
        tokens = model.tokenizer.hf.encode(text, add_special_tokens=False)
        if not tokens:
            raise UserError(
                f"study {study}: selection.refusal_openings holds {text!r}, which is not a token "
                f"of {model.name}; remove it"
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


def _choose_refusal(
    spec: StudySpec, model: ChatModel, refusal: Direction, record: Record, out: Path
) -> Record:
    chosen = selection_of(spec, "the layer of the refusal direction")
    if not record.refusal_candidates:
        system, prompts = data.policy(spec.system).text, split(chosen, spec.name)
        candidates = selection.refusal_candidates(
            model,
            refusal,
            ids(model, prompts.harmful, system),
            ids(model, prompts.harmless, system),
            [depth(share, model.config.n_layers) for share in chosen.refusal_layers],
            openings(spec.name, chosen, model),
            kl_limit=chosen.kl_limit,
        )
        record = replace(record, refusal_candidates=candidates)
        record.save(out)
    near_miss = chosen.allow_near_miss
    best = selection.choose_refusal(record.refusal_candidates, allow_near_miss=near_miss)
    layers = {**record.layers, "refusal": best.layer}
    return replace(record, layers=layers, refusal_near_miss=best.reasons)


def _choose_dose(
    spec: StudySpec, model: ChatModel, persona: Direction, record: Record, out: Path
) -> Record:
    chosen = selection_of(spec, "the persona's layer and strength")
    if not record.dose_candidates:
        layers = [depth(share, model.config.n_layers) for share in chosen.layers]
        cells = selection.dose_candidates(
            model,
            persona,
            ids(model, split(chosen, spec.name).persona, data.policy(spec.system).text),
            [record.layers["steer"]] if "steer" in record.layers else layers,
            chosen.scales if spec.dose is None else [spec.dose],
            max_new_tokens=chosen.max_new_tokens,
            batch=spec.decoding.batch,
        )
        record = replace(record, dose_candidates=cells)
        record.save(out)
    best = selection.choose_dose(record.dose_candidates, chosen.max_degenerate)
    return replace(record, layers={**record.layers, "steer": best.layer}, dose=best.scale)
