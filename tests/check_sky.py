"""Have SkyPilot's own parser read the commands of `make sweep-tpu`: `make sky-check`.

Run by the Python of .venv-sky, which has SkyPilot and not this package.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import sky
from sky.client.cli import command

ROOT = Path(__file__).parent.parent
# Variables of the target; the accelerator they ask for, the software version that SkyPilot puts on
# its machines, and whether they are spot machines.
CASES = (
    (("TPU=v5e-8",), "tpu-v5litepod-8", "v2-alpha-tpuv5", False),
    (
        ("TPU=v5e-8", "SPOT=1", "MODEL=org/a model", "OUT=a b"),
        "tpu-v5litepod-8",
        "v2-alpha-tpuv5",
        True,
    ),
    (("TPU=v6e-64", "SPOT=1", "MESH=model=4"), "tpu-v6e-64", "v2-alpha-tpuv6e", True),
    (("TPU=v5p-128",), "tpu-v5p-128", "v2-alpha-tpuv5", False),
    (("TPU=v4-32",), "tpu-v4-32", "tpu-vm-base", False),
)


def launched(variables: tuple[str, ...]) -> list[str]:
    """The words of the command that the target would run."""
    told = ("ZONE=us-west4-a", "STORE=gs://some-bucket", "STUDY=my study.toml", "PLAN=1")
    done = subprocess.run(
        ["make", "--no-print-directory", "sweep-tpu", *told, *variables],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return shlex.split(done.stdout)


def parsed(words: list[str]) -> sky.Task:
    """The task that SkyPilot makes of a command."""
    parser, arguments = command.launch, words[2:]
    if words[1] == "jobs":
        parser, arguments = command.jobs_launch, words[3:]
    given = parser.make_context("launch", arguments).params
    cloud, region, zone = command._handle_infra_cloud_region_zone_options(
        given["infra"], None, None, None
    )
    same = {name: given[name] for name in ("entrypoint", "gpus", "use_spot", "env", "secret")}
    return command._make_task_or_dag_from_entrypoint_with_overrides(
        **same, cloud=cloud, region=region, zone=zone
    )


def check(variables: tuple[str, ...], accelerator: str, software: str, spot: bool) -> None:
    task = parsed(launched(variables))
    (wanted,) = task.resources
    assert wanted.accelerators == {accelerator: 1}, wanted
    assert wanted.use_spot is spot and wanted.zone == "us-west4-a", wanted
    assert wanted.accelerator_args["runtime_version"] == software, wanted
    assert list(task.storage_mounts) == ["/store"], task.storage_mounts
    assert task.storage_mounts["/store"].source == "gs://some-bucket"
    assert task.envs["STUDY"] == "my study.toml" and "HF_TOKEN" in task.secrets
    for name in ("MODEL", "OUT", "MESH"):
        asked = [text.removeprefix(f"{name}=") for text in variables if text.startswith(name)]
        assert not asked or task.envs[name] == asked[0], task.envs
    assert task.num_nodes == 1 and task.setup and task.run
    print(f"{' '.join(variables)}: read")


if __name__ == "__main__":
    for case in CASES:
        check(*case)
