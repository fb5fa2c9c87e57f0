"""Run a study on a TPU VM or a pod slice, with SkyPilot: `sweep.yaml` filled in.

What can be wrong and shows without a model is refused before money is spent: SkyPilot takes any
accelerator's name, and Google answers minutes later.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError

# Where `make sky` puts SkyPilot: its own environment, since it needs older click and uvicorn.
OWN = Path(".venv-sky/bin/sky")
BUCKET = "/store"

# By generation: what Google calls it, and the software of its machines
# (https://cloud.google.com/tpu/docs/runtimes).
GENERATIONS = {
    "v4": ("v4", "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", "v2-alpha-tpuv5"),
    "v6e": ("v6e", "v2-alpha-tpuv6e"),
}
# v5e and v6e count chips, v4 and v5p cores, two to a chip.
_CHIPS = (1, 4, 8, 16, 32, 64, 128, 256)
_CORES = (8, 16, 32, 64)
_MOST_CORES = {"v4": 8192, "v5p": 12288}
# Chips of each machine of a slice: what libtpu's own topologies say, from v5e:4x4 to v5e:16x16, of
# v6e and of v4. Google's page of v5e counts hosts of eight chips; each is two such machines.
_OF_SLICE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu:
    """A TPU machine, or a slice of a pod.

    Attributes:
      accelerator: its name in SkyPilot.
      runtime: the software version of the machine.
      single: whether it is one machine.
    """

    accelerator: str
    runtime: str
    single: bool

    @property
    def chips(self) -> int:
        """Chips of one machine, which are all that a mesh can have."""
        _, generation, size = self.accelerator.split("-")
        return int(size) // (2 if generation in _MOST_CORES else 1) if self.single else _OF_SLICE


def tpu(text: str) -> Tpu:
    """Look a TPU up by its name: generation and size, as in `v5e-8`.

    >>> tpu("v5e-8").accelerator, tpu("v6e-64").single
    ('tpu-v5litepod-8', False)

    Raises:
      UserError: there is none of that name.
    """
    name = text.removeprefix("tpu-").replace("v5litepod", "v5e")
    generation, _, digits = name.partition("-")
    if generation not in GENERATIONS or not re.fullmatch(r"[1-9]\d*", digits):
        known = ", ".join(GENERATIONS)
        raise UserError(f"there is no TPU {text!r}; write generation-size ({known}), such as v5e-8")
    size = int(digits)
    if generation in _MOST_CORES:
        most = _MOST_CORES[generation]
        there = size in _CORES or (size % 128 == 0 and size <= most)
        sizes = f"{', '.join(map(str, _CORES))} cores, and by 128 to {most}"
    else:
        there = size in _CHIPS
        sizes = f"{', '.join(map(str, _CHIPS))} chips"
    if not there:
        raise UserError(f"there is no TPU {text!r}; {generation} comes in {sizes}")
    google, runtime = GENERATIONS[generation]
    return Tpu(accelerator=f"tpu-{google}-{size}", runtime=runtime, single=size <= 8)


def idle_chips(machine: Tpu, used: int) -> str | None:
    """A sentence about chips that are paid for and would stand idle; None when there are none.

    Args:
      machine: what to run on.
      used: chips of each host's mesh; 1 without one.

    Raises:
      UserError: more than the machine has.
    """
    chips = machine.chips
    if used > chips:
        larger = " or a larger --tpu" if machine.single else ""
        raise UserError(
            f"a mesh of {used} chips does not fit a machine of {machine.accelerator}, which has "
            f"{chips}; ask for a smaller --mesh{larger}"
        )
    if used == chips:
        return None
    said = f"--mesh model={chips} or data={chips} would use all"
    if machine.single:
        return f"{used} of {chips} chips would be used; {said}"
    few = "one" if used == 1 else used
    return f"every host of the slice would use {few} of its chips; {said} {chips}"


def task(
    study: str,
    *,
    name: str,
    machine: Tpu,
    zone: str,
    store: str | None,
    spot: bool,
    model: str,
    options: str,
) -> dict[str, Any]:
    """The SkyPilot task for a study.

    Args:
      study: a shipped study's name, or a file below the working directory.
      name: the results folder's name.
      machine: what to run on.
      zone: of Google Cloud, such as us-west4-a.
      store: gs://BUCKET, or a path that every host has; None keeps results on the machine.
      spot: whether the machine may be taken away.
      model: `smollm2-135m`, a hub id, or the path of a checkpoint on the machine.
      options: more options of `jaxsteer sweep`.

    Raises:
      UserError: a zone or store that is none, or results that would be lost.
    """
    import yaml

    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone):
        raise UserError(f"{zone!r} is no zone of Google Cloud; write it as us-west4-a")
    if store is None and (spot or not machine.single):
        why = "a spot machine's disk goes with it" if spot else "the hosts of a slice share results"
        raise UserError(f"{why}; give --store gs://BUCKET, or a path that every host has")
    if store is not None and not re.fullmatch(
        r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9]|/[\w./-]+", store
    ):
        raise UserError(
            f"store {store!r} is neither gs://BUCKET, in small letters, nor an absolute path"
        )
    filled = yaml.safe_load((resources.files("jaxsteer.cloud") / "sweep.yaml").read_text("utf-8"))
    filled["resources"] |= {
        "infra": f"gcp/{zone.rpartition('-')[0]}/{zone}",
        "accelerators": machine.accelerator,
        "accelerator_args": {"runtime_version": machine.runtime},
        "use_spot": spot,
    }
    out = f"results/{name}"
    if store is not None and store.startswith("gs://"):
        filled["file_mounts"] = {BUCKET: {"source": store, "mode": "MOUNT"}}
        out = f"{BUCKET}/{out}"
    elif store is not None:
        out = f"{store}/{out}"
    filled["envs"] |= {
        "STUDY": study,
        "MODEL": model,
        "OUT": out,
        "OPTIONS": options,
    }
    return filled


def text(filled: dict[str, Any]) -> str:
    """A task as SkyPilot reads it."""
    import yaml

    class Blocks(yaml.SafeDumper):
        """Writes scripts line by line."""

    def block(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Blocks.add_representer(str, block)
    return yaml.dump(filled, Dumper=Blocks, sort_keys=False, width=100)


def command(file: Path, *, spot: bool, kept: bool, token: bool) -> list[str]:
    """The SkyPilot command that launches a task file; it asks before it spends.

    Args:
      file: the task.
      spot: a managed job, which is started again when it was preempted.
      kept: whether the results outlive the machine, which then goes when it is done.
      token: whether to hand on $HF_TOKEN.
    """
    sky = str(OWN) if OWN.is_file() else shutil.which("sky") or "sky"
    handed = ["--secret", "HF_TOKEN"] if token else []
    if spot:
        return [sky, "jobs", "launch", str(file), *handed]
    idle = ["--idle-minutes-to-autostop", "10", *(["--down"] if kept else [])]
    return [sky, "launch", "--cluster", "jaxsteer-sweep", *idle, str(file), *handed]


def installed() -> None:
    """Check that SkyPilot is there.

    Raises:
      UserError: it is not.
    """
    if not OWN.is_file() and shutil.which("sky") is None:
        raise UserError(
            "SkyPilot is not installed; `make sky` puts it into .venv-sky, apart from this one"
        )
