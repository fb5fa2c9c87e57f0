"""What makes a run this run and no other: the record in run.json, and whose a folder is.

The record holds every identity the rows depend on, and its key is their hash. A folder whose
record has another key belongs to another run and is refused, naming what differs.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import msgspec

from jaxsteer.data import prompts
from jaxsteer.data.prompts import Prompt
from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, sha256_bytes, write_json
from jaxsteer.generation.distributed import Hosts
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.study import prepare, results
from jaxsteer.study.conditions import Condition
from jaxsteer.study.planned import SOURCES
from jaxsteer.study.prepare import Setup
from jaxsteer.study.spec import StudySpec, leaves


def asked_for(
    spec: StudySpec, model: ChatModel, families: Mapping[str, Sequence[Prompt]]
) -> dict[str, Any]:
    """What the run was asked for, known before anything is set up."""
    return {
        "study": msgspec.to_builtins(spec),
        "model": model.identity(),
        "policy": _prompt_record(prompts.policy(spec.system)),
        "modes": [_prompt_record(prompts.mode(name)) for name in spec.modes],
        "prompts": {
            family: {
                "n": len(asked),
                "sha256": sha256_bytes(canonical_json([[p.id, p.text] for p in asked]).encode()),
                "source": SOURCES[family],
            }
            for family, asked in families.items()
            if asked
        },
    }


def run_record(
    spec: StudySpec,
    model: ChatModel,
    prepared: Setup,
    compiled: Sequence[Condition],
    families: Mapping[str, Sequence[Prompt]],
) -> dict[str, Any]:
    """What run.json says: every identity the rows depend on, and the machine."""
    identity = {
        **asked_for(spec, model, families),
        "layers": prepared.layers,
        "dose": prepared.dose,
        "directions": prepared.record["directions"],
        "conditions": [
            {
                "name": c.name,
                "base": c.base,
                "seed": c.seed,
                "scale": c.scale,
                "mode": c.mode,
                "sites": list(c.sites),
                "scope": c.scope,
                "benign": c.benign,
                "cancels_steering": c.cancels_steering,
                "unsteered_twin_of": c.unsteered_twin_of,
                "system_sha256": sha256_bytes(c.system.encode()),
            }
            for c in compiled
        ],
    }
    return {
        "format": results.FORMAT,
        "key": sha256_bytes(canonical_json(identity).encode()),
        **identity,
        "environment": environment(),
    }


def _prompt_record(policy: prompts.Policy) -> dict[str, str]:
    return {
        "name": policy.name,
        "version": policy.version,
        "sha256": policy.sha256,
        "text": policy.text,
    }


def environment() -> dict[str, str]:
    """The software and hardware of this process, and the time (UTC)."""
    versions = {name: importlib.metadata.version(name) for name in ("jaxsteer", "flax", "numpy")}
    device = jax.devices()[0]
    return {
        **versions,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{jax.device_count()} x {device.device_kind}",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def claim(path: Path, record: Mapping[str, Any]) -> None:
    """Make the folder this run's, or refuse it as another's, saying what differs."""
    held = prepare.read_record(path)
    if not held:
        write_json(path, record)
    elif held.get("key") != record["key"]:
        parts = ("study", "model", "policy", "modes", "directions", "layers", "dose", "prompts")
        _refuse(path.parent, held, {part: record[part] for part in parts})


def check_asked(
    folder: Path, spec: StudySpec, model: ChatModel, families: Mapping[str, Sequence[Prompt]]
) -> None:
    """Refuse another run's folder before the setup in it is touched."""
    held = prepare.read_record(folder / "run.json")
    if not held:
        return
    asked = asked_for(spec, model, families)
    if _differing(held, asked):
        _refuse(folder, held, asked)
    # Also made from what the study only names: the texts of traits and roles, and which prompts.
    made_from, needed = (
        prepare.read_record(folder / "setup.json").get("key"),
        prepare.key(spec, model),
    )
    if made_from not in (None, needed):
        _refuse(folder, {"directions": made_from}, {"directions": needed})


def _differing(held: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Names of what is not as it was written down, where tuples became lists."""
    return [
        part
        for part, value in record.items()
        if canonical_json(held.get(part)) != canonical_json(value)
    ]


def _refuse(folder: Path, held: Mapping[str, Any], record: Mapping[str, Any]) -> NoReturn:
    differ = _differing(held, record)
    keys = _differing_keys(held.get("study"), record["study"]) if "study" in differ else []
    raise UserError(
        f"{folder} holds another run ({', '.join(differ) or 'conditions'} differ)"
        + (f": {', '.join(keys[:3])}" if keys else "")
        + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        + "; choose another --out, or give --fresh to replace it"
    )


def _differing_keys(held: Any, asked: Any) -> list[str]:
    """Keys of the study that only one of two has, or whose values differ."""
    one, two = dict(leaves(held, "study")), dict(leaves(asked, "study"))
    return [
        key for key in {**one, **two} if not (key in one and key in two and one[key] == two[key])
    ]


def check_claim(path: Path, record: Mapping[str, Any], hosts: Hosts) -> None:
    """Refuse to help with another run than process 0's."""

    def same() -> bool | None:
        return prepare.read_record(path).get("key") == record["key"] or None

    if not hosts.seen(same):
        raise UserError(
            f"process {hosts.process} was asked for another run than process 0 claims in {path}; "
            "give all processes the same command"
        )
