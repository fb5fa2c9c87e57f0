"""The checkpoint folder: parameters in Orbax, tokenizer, config, and a manifest of hashes.

NAME/config.json      `config.ModelConfig`
NAME/manifest.json    its source, and the sha256 of all other files and every parameter
NAME/params/          Orbax
NAME/tokenizer/       tokenizer.json, tokenizer_config.json, chat template
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxsteer.errors import UserError, heed_stop, one_line
from jaxsteer.files import one_at_a_time, read_json, sha256_file, sha256_json, write_json, writing
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.sharding import param_shardings
from jaxsteer.model.weights import flatten, nest, param_shapes

FORMAT: Literal["jaxsteer-checkpoint-1"] = "jaxsteer-checkpoint-1"
Dtype = Literal["float32", "bfloat16"]


class Origin(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a checkpoint was converted from.

    Attributes:
      kind: `folder`, `hub` or `gguf`.
      name: of the folder, of the hub's model, or of the file.
      revision: of a hub model, the commit.
      files: sha256 of every file that was read, by name.
      options: what was asked of the conversion, by the names of `convert.Options`.
    """

    kind: str
    name: str
    revision: str | None = None
    files: dict[str, str]
    options: dict[str, Any] = {}


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint's description of itself; hashes are hex sha256.

    Attributes:
      format: of the folder, `FORMAT`.
      source: what it was converted from.
      dtype: of all parameters.
      eos_token_ids: token ids that end a reply.
      config_sha256: of config.json.
      tokenizer_files: of each of the tokenizer's files, by name.
      tokenizer_sha256: of the canonical JSON of `tokenizer_files`.
      weights_sha256: of the canonical JSON of `params`.
      params: `array_sha256` of every parameter, by path.
      ignored: keys of the source's config, with their values, that do not enter the computation.
      notes: sentences on what a user would not expect of the model or its chat template.
    """

    format: Literal["jaxsteer-checkpoint-1"]
    source: Origin
    dtype: Dtype
    eos_token_ids: list[int]
    config_sha256: str
    tokenizer_files: dict[str, str]
    tokenizer_sha256: str
    weights_sha256: str
    params: dict[str, str]
    ignored: dict[str, Any] = {}
    notes: list[str] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
      config: the model's configuration.
      params: nested dict of arrays, paths as in `weights.param_shapes`.
      manifest: the manifest as read.
    """

    config: ModelConfig
    params: dict[str, Any]
    manifest: Manifest


def array_sha256(value: np.ndarray) -> str:
    """Identity of an array: dtype, shape and bytes.

    Raises:
      Stopped: a stop signal was heard: the arrays of a large model take minutes.
    """
    heed_stop()
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
    source: Origin,
    ignored: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write a checkpoint whole or not at all: into a folder beside it, which is then renamed.

    Args:
      out: the folder to make; a checkpoint that is there is replaced, anything else refused.
      config: the model's configuration.
      params: arrays by path, all of one dtype.
      write_tokenizer: writes the tokenizer's files into the folder it is given.
      eos_token_ids: ids that end a reply.
      source: what the parameters were converted from.
      ignored: as in `Manifest`.
      notes: as in `Manifest`.

    Raises:
      UserError: `out` exists and is not a checkpoint, or the disk is full or read-only.
    """
    if out.exists() and not (out / "manifest.json").is_file():
        raise UserError(f"{out} exists and is not a checkpoint; remove it or choose another --out")
    with writing(out), _beside(out) as folder:
        tokenizer = folder / "made/tokenizer"
        tokenizer.mkdir(parents=True)
        write_tokenizer(tokenizer)
        made = tokenizer.parent
        write_json(made / "config.json", msgspec.to_builtins(config))
        _check_space(made / "space", sum(value.nbytes for value in params.values()))
        _save_params(made / "params", params)
        hashes = {path: array_sha256(value) for path, value in sorted(params.items())}
        files = {file.name: sha256_file(file) for file in sorted(tokenizer.iterdir())}
        manifest = Manifest(
            format=FORMAT,
            source=source,
            dtype=cast(Dtype, params["embed/embedding"].dtype.name),
            eos_token_ids=eos_token_ids,
            config_sha256=sha256_file(made / "config.json"),
            tokenizer_files=files,
            tokenizer_sha256=sha256_json(files),
            weights_sha256=sha256_json(hashes),
            params=hashes,
            ignored=dict(ignored or {}),
            notes=[*notes],
        )
        write_json(made / "manifest.json", msgspec.to_builtins(manifest))
        if out.exists():
            out.rename(folder / "old")
        made.rename(out)


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, for one process at a time; removed at the end."""
    folder = out.parent / f".{out.name}.converting"
    with one_at_a_time(out):
        try:
            _remove(folder, out)  # the files of a conversion that was killed
            folder.mkdir()
            yield folder
        finally:
            _remove(folder, out)


def _remove(folder: Path, out: Path) -> None:
    # Stopped between two renames: the old checkpoint is still the valid one.
    if (folder / "old").exists() and not out.exists():
        (folder / "old").rename(out)
    shutil.rmtree(folder, ignore_errors=True)


def _orbax() -> Any:
    # Imported late, since that takes a second. The errors that it raises repeat its log.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import orbax.checkpoint

    return orbax.checkpoint


def _check_space(path: Path, size: int) -> None:
    """Reserve `size` bytes and free them: on a full disk Orbax prints pages of errors."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    path.unlink()


def _save_params(path: Path, params: Mapping[str, np.ndarray]) -> None:
    orbax = _orbax()
    # By default every array is copied first, which takes the model's memory a second time.
    handlers = orbax.type_handlers.create_type_handler_registry(
        (np.ndarray, orbax.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, orbax.type_handlers.ArrayHandler()),
    )
    # Uncompressed: decompressing takes longer than reading, and weights hardly shrink.
    handler = orbax.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=handlers)

    def write() -> None:
        with orbax.AsyncCheckpointer(handler) as checkpointer:
            checkpointer.save(path.absolute(), nest(params.items()))

    try:
        # In another thread, since in a notebook the main one already runs an event loop.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(write).result()
    except Exception as error:
        # Tensorstore reports a full disk as a ValueError.
        raise OSError(0, one_line(error)) from None


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
      UserError: not a checkpoint, or one of another format.
    """
    return read_json(path / "manifest.json", Manifest, _again(path))


def _again(path: Path) -> str:
    return f"convert the model again into {path}"


def _check_file(file: Path, sha256: str | None, checkpoint: Path) -> None:
    if not file.is_file() or sha256_file(file) != sha256:
        raise UserError(f"{file} is missing or does not match the manifest; {_again(checkpoint)}")


def load(
    path: Path,
    *,
    verify: bool = True,
    weights: bool = True,
    mesh: Mesh | None = None,
) -> Checkpoint:
    """Load a checkpoint, each device reading its own pieces.

    Args:
      path: the folder.
      verify: recompute the hash of every parameter too, one at a time on the host.
      weights: without them, every parameter is a shape.
      mesh: the devices to spread the parameters over; None for this process's first one.

    Raises:
      UserError: not a checkpoint, or a file or parameter that does not match the manifest.
    """
    manifest = read_manifest(path)
    _check_file(path / "config.json", manifest.config_sha256, path)
    config = read_json(path / "config.json", ModelConfig, _again(path))
    tokenizer = path / "tokenizer"
    for name in sorted({*manifest.tokenizer_files, *(file.name for file in tokenizer.glob("*"))}):
        _check_file(tokenizer / name, manifest.tokenizer_files.get(name), path)
    shapes = param_shapes(config)
    one_device = SingleDeviceSharding(jax.local_devices()[0])
    placed = dict.fromkeys(shapes, one_device) if mesh is None else param_shardings(config, mesh)
    target = nest(
        (name, jax.ShapeDtypeStruct(shape, jnp.dtype(manifest.dtype), sharding=placed[name]))
        for name, shape in shapes.items()
    )
    if not weights:
        return Checkpoint(config=config, params=target, manifest=manifest)
    try:
        orbax = _orbax()
        # This process alone: by default all processes of a study would read together.
        own = jax.process_index()
        alone = orbax.options.MultiprocessingOptions(primary_host=own, active_processes={own})
        with orbax.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
            params = checkpointer.restore((path / "params").absolute(), target)
    except Exception as error:
        # Orbax and tensorstore raise many types of error for a damaged store.
        raise UserError(
            f"{path}/params cannot be read ({one_line(error)}); {_again(path)}"
        ) from None
    if verify:
        _verify(path, params, manifest)
    return Checkpoint(config=config, params=params, manifest=manifest)


def _verify(path: Path, params: dict[str, Any], manifest: Manifest) -> None:
    found = {name: array_sha256(_on_host(value)) for name, value in flatten(params).items()}
    wrong = [name for name, sha256 in found.items() if sha256 != manifest.params.get(name)]
    if sha256_json(manifest.params) != manifest.weights_sha256:
        wrong.append("manifest")
    if wrong:
        what = ", ".join(wrong[:3])
        raise UserError(f"{path}/params: {what} does not match its sha256; {_again(path)}")


def _on_host(value: jax.Array) -> np.ndarray:
    if len(value.devices()) == 1 and jax.default_backend() == "cpu":
        return np.asarray(value)
    # Otherwise np.asarray stores a host copy inside the array: read a temporary copy instead.
    return np.asarray(jnp.copy(value))
