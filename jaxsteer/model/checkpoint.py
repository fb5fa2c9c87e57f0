"""The checkpoint folder: parameters in Orbax, tokenizer, config, and a manifest of hashes.

NAME/config.json      the HF form of the config
NAME/manifest.json    where it came from, and the sha256 of everything beside it
NAME/params/          Orbax
NAME/tokenizer/       tokenizer.json, tokenizer_config.json, chat template
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, sha256_bytes, sha256_file, write_json
from jaxsteer.model.config import ModelConfig, from_hf, to_hf
from jaxsteer.model.weights import flatten, nest, param_shapes

FORMAT = "jaxsteer-checkpoint-1"
# How the names of folders end in which a checkpoint is being made.
UNFINISHED = ".converting"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest must hold to be loaded; see `save`."""

    format: str
    source: dict[str, Any]
    dtype: str
    eos_token_ids: list[int]
    config_sha256: str
    tokenizer_files: dict[str, str]
    tokenizer_sha256: str
    weights_sha256: str
    params: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
      config: the model's configuration.
      params: nested dict of arrays, paths as in `weights.param_shapes`.
      tokenizer_dir: folder of the tokenizer's files.
      eos_token_ids: ids that end a reply.
      manifest: the manifest as read.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer_dir: Path
    eos_token_ids: list[int]
    manifest: dict[str, Any]


def array_sha256(value: np.ndarray) -> str:
    """Identity of an array: dtype, shape and bytes."""
    digest = hashlib.sha256(f"{value.dtype.name}{tuple(value.shape)}".encode())
    # The bytes in place: a copy of the largest tensor is as large as a small model.
    digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save(
    out: Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    *,
    write_tokenizer: Callable[[Path], object],
    eos_token_ids: list[int],
    source: dict[str, Any],
) -> None:
    """Write a checkpoint whole or not at all: beside its place, then renamed.

    Args:
      out: the folder to make; an existing checkpoint there is replaced, anything else refused.
      config: the model's configuration.
      params: arrays by path, all of one dtype.
      write_tokenizer: writes the tokenizer's files into the folder it is given.
      eos_token_ids: ids that end a reply.
      source: description of the source with the sha256 of each of its files.

    Raises:
      UserError: `out` is something else than a checkpoint, or the disk is full or read-only.
    """
    if out.exists() and not (out / "manifest.json").is_file():
        raise UserError(f"{out} exists and is no checkpoint; remove it or choose another --out")
    try:
        with _beside(out) as folder:
            made = folder / "made"
            tokenizer = made / "tokenizer"
            tokenizer.mkdir(parents=True)
            write_tokenizer(tokenizer)
            write_json(made / "config.json", to_hf(config))
            _claim(made / "space", sum(value.nbytes for value in params.values()))
            _save_params(made / "params", params, out)
            hashes = {path: array_sha256(value) for path, value in sorted(params.items())}
            files = {f.name: sha256_file(f) for f in sorted(tokenizer.iterdir())}
            manifest = {
                "format": FORMAT,
                "source": source,
                "dtype": params["embed/embedding"].dtype.name,
                "eos_token_ids": eos_token_ids,
                "config_sha256": sha256_file(made / "config.json"),
                "tokenizer_files": files,
                "tokenizer_sha256": sha256_bytes(canonical_json(files).encode()),
                "weights_sha256": sha256_bytes(canonical_json(hashes).encode()),
                "params": hashes,
            }
            write_json(made / "manifest.json", manifest)
            if out.exists():
                out.rename(folder / "old")
            made.rename(out)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror}; free space or choose another --out"
        ) from error


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` to make a checkpoint in, removed at the end however that comes.

    What conversions that were killed left there is removed first: a lock says which still run.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for found in out.parent.glob(f".{glob.escape(out.name)}.*{UNFINISHED}"):
        with (found / "lock").open("w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(found, out)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=UNFINISHED, dir=out.parent))
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
    finally:
        _remove(folder, out)


def _remove(folder: Path, out: Path) -> None:
    # Stopped between two renames: what was to be replaced is still the checkpoint.
    if (folder / "old").exists() and not out.exists():
        (folder / "old").rename(out)
    shutil.rmtree(folder, ignore_errors=True)


def _orbax() -> Any:
    # Imported late: orbax takes a second, and what it logs is said again in the one line we raise.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import orbax.checkpoint

    return orbax.checkpoint


def _claim(path: Path, size: int) -> None:
    """Take `size` bytes of disk and give them back: Orbax fails on a full disk for pages on end."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    path.unlink()


def _save_params(path: Path, params: Mapping[str, np.ndarray], out: Path) -> None:
    orbax = _orbax()
    kinds = orbax.type_handlers
    # By default every array is copied first, which is the model a second time. Ours change no more.
    handlers = kinds.create_type_handler_registry(
        (np.ndarray, kinds.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, kinds.ArrayHandler()),
    )
    handler = orbax.PyTreeCheckpointHandler(type_handler_registry=handlers)

    def write() -> None:
        with orbax.AsyncCheckpointer(handler) as checkpointer:
            checkpointer.save(path.absolute(), nest(params.items()))

    try:
        _to_its_end(write)
    except Exception as error:
        # Tensorstore reports a full disk as a ValueError, its reason at the very end.
        reason = _first_line(error).split(": ")[-1].split(" [os_error")[0]
        raise UserError(
            f"cannot write {out}: {reason}; free space or choose another --out"
        ) from None


def _to_its_end(work: Callable[[], None]) -> None:
    """Run `work` in a thread and wait until it ends, then raise what a signal raised meanwhile.

    Orbax runs an event loop, which breaks when a signal's handler raises inside, and threads, which
    would go on writing into a folder that is being removed.
    """
    raised: list[BaseException] = []
    begun, ended = threading.Event(), threading.Event()

    def working() -> None:
        begun.wait()  # until the loop below is there to wait for it
        try:
            work()
        except Exception as error:
            raised.append(error)
        finally:
            ended.set()

    threading.Thread(target=working, daemon=True).start()
    # Not by a join, which takes the thread for dead once it is interrupted.
    while not ended.is_set():
        try:
            begun.set()
            ended.wait()
        except BaseException as stopped:
            raised.insert(0, stopped)
    if raised:
        raise raised[0]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _on_host(value: jax.Array) -> np.ndarray:
    """An array put together on the host from its pieces, which no device ever holds whole."""
    pieces = [shard for shard in value.addressable_shards if shard.replica_id == 0]
    # An accelerator's array keeps what was once read of it on the host: read a copy, and drop it.
    read = [np.asarray(p.data if p.device.platform == "cpu" else jnp.copy(p.data)) for p in pieces]
    if len(pieces) == 1:
        return read[0]
    whole = np.empty(value.shape, value.dtype)
    for piece, part in zip(pieces, read, strict=True):
        whole[piece.index] = part
    return whole


def load(
    path: Path,
    *,
    verify: bool = True,
    shardings: Callable[[ModelConfig], Mapping[str, Sharding]] | None = None,
) -> Checkpoint:
    """Load a checkpoint, each device reading its own pieces.

    Args:
      path: the folder.
      verify: recompute every hash of the manifest, one parameter at a time on the host.
      shardings: from the config to where each parameter lies, by path; None puts all of them on
        this process's first device.

    Raises:
      UserError: not a checkpoint, or a file or parameter that does not match the manifest.
    """
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise UserError(
            f"{path} is not a jaxsteer checkpoint (no manifest.json); make one with "
            "`jaxsteer convert SOURCE --out DIR`"
        )
    again = f"convert the model again into {path}"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        read = msgspec.convert(manifest, Manifest)
        config = from_hf(
            json.loads((path / "config.json").read_text(encoding="utf-8")), f"{path}/config.json"
        )
        if read.format != FORMAT:
            raise UserError(f"{manifest_path}: format {read.format!r} is unknown; {again}")
        dtype = jnp.dtype(read.dtype)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: config or manifest cannot be read ({error}); {again}") from None
    if sha256_file(path / "config.json") != read.config_sha256:
        raise UserError(f"{path}/config.json does not match the manifest; {again}")
    present = [file.name for file in (path / "tokenizer").glob("*")]
    for name in sorted({*read.tokenizer_files, *present}):
        file = path / "tokenizer" / name
        if not file.is_file() or sha256_file(file) != read.tokenizer_files.get(name):
            raise UserError(f"{file} is missing or does not match the manifest; {again}")
    shapes = param_shapes(config)
    lies = (
        dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
        if shardings is None
        else shardings(config)
    )
    target = nest(
        (name, jax.ShapeDtypeStruct(shape, dtype, sharding=lies[name]))
        for name, shape in shapes.items()
    )
    try:
        orbax = _orbax()
        # By itself: Orbax would have all processes that share a study read together.
        own = jax.process_index()
        alone = orbax.options.MultiprocessingOptions(primary_host=own, active_processes={own})
        with orbax.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
            params = checkpointer.restore((path / "params").absolute(), target)
    except Exception as error:
        # Orbax and tensorstore raise many types for a damaged store; all mean the same here.
        reason = _first_line(error)[:160]
        raise UserError(f"{path}/params cannot be read ({reason}); {again}") from None
    if verify:
        wrong = [
            name
            for name, value in flatten(params).items()
            if array_sha256(_on_host(value)) != read.params.get(name)
        ]
        if wrong or sha256_bytes(canonical_json(read.params).encode()) != read.weights_sha256:
            what = ", ".join(wrong[:3]) or "manifest"
            raise UserError(f"{path}/params: {what} does not match its sha256; {again}")
    return Checkpoint(
        config=config,
        params=params,
        tokenizer_dir=path / "tokenizer",
        eos_token_ids=read.eos_token_ids,
        manifest=manifest,
    )
