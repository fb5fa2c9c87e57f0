"""Have SkyPilot's own parser read the tasks that `jaxsteer launch` makes: `make sky-check`.

Run by the Python of .venv-sky, where SkyPilot is and this package is not.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import sky

ZONE = ("--zone", "us-west4-a")
STORE = ("--store", "gs://some-bucket")
# Arguments of `launch`; the accelerator, whether it is a spot machine, what is mounted.
CASES = [
    (("--tpu", "v5e-8", *ZONE), "tpu-v5litepod-8", False, []),
    (("--tpu", "v5e-8", *ZONE, *STORE, "--spot"), "tpu-v5litepod-8", True, ["/store"]),
    (("--tpu", "v6e-64", *ZONE, *STORE, "--spot"), "tpu-v6e-64", True, ["/store"]),
    (("--tpu", "v5p-128", *ZONE, "--store", "/mnt/nfs"), "tpu-v5p-128", False, []),
    (("--tpu", "v4-32", *ZONE, *STORE, "--full"), "tpu-v4-32", False, ["/store"]),
]


def check(file: Path, accelerator: str, spot: bool, mounted: list[str]) -> None:
    task = sky.Task.from_yaml(str(file))
    (wanted,) = task.resources
    assert wanted.accelerators == {accelerator: 1}, wanted.accelerators
    assert wanted.use_spot is spot and wanted.zone == "us-west4-a", wanted
    # SkyPilot keeps what it is given, and would fill in its own guess.
    assert wanted.accelerator_args["runtime_version"], wanted
    assert list(task.storage_mounts) == mounted, task.storage_mounts
    assert task.envs["STUDY"] == "smollm2-demo" and "HF_TOKEN" in task.secrets
    assert task.num_nodes == 1 and task.setup and task.run


def main(jaxsteer: str) -> None:
    failed = 0
    shipped = Path(__file__).parent.parent / "jaxsteer/cloud/sweep.yaml"
    check(shipped, "tpu-v5litepod-8", False, [])
    with tempfile.TemporaryDirectory() as folder:
        for number, (arguments, *expected) in enumerate(CASES):
            command = [jaxsteer, "launch", "smollm2-demo", *arguments, "--dry-run"]
            file = Path(folder) / f"{number}.yaml"
            file.write_text(
                subprocess.run(command, capture_output=True, check=True, text=True).stdout
            )
            try:
                check(file, *expected)
            except Exception as error:
                failed += 1
                print(f"{' '.join(arguments)}: {type(error).__name__}: {error}")
    print(f"{len(CASES) + 1 - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(sys.argv[1])
