"""Convert a Hugging Face model (folder, hub id or GGUF file) into a jaxsteer checkpoint.

Tensors are read one at a time into the output, so memory peaks at the output plus one tensor.
No torch, no pickle, no remote code.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import ml_dtypes
import msgspec
import numpy as np

from jaxsteer.errors import UserError, one_line
from jaxsteer.files import sha256_file
from jaxsteer.model import checkpoint, weights
from jaxsteer.model.config import ModelConfig, from_hf
from jaxsteer.model.tokenizer import Tokenizer
from jaxsteer.words import Progress

FLOATS: dict[str, Any] = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SOURCE_DTYPES = ("float64", "float32", "float16", "bfloat16")
# What is fetched from the hub, and what a folder's conversion may depend on.
SOURCE_FILES = ("*.json", "*.safetensors", "*.jinja")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model to convert, checked as far as that is possible without reading its weights.

    Attributes:
      kind: `folder`, `hub` or `gguf`.
      name: of the folder, of the hub's model, or of the file.
      revision: of a hub model, the commit.
      config: its configuration.
      form: which names its tensors have, see `weights.table`.
      tensors: its tensors, to be read one at a time.
      eos_token_ids: token ids that end a reply.
      tokenizer: its tokenizer, with the chat template.
      files: every file that it is read from.
    """

    kind: str
    name: str
    revision: str | None = None
    config: ModelConfig
    form: Literal["hf", "gguf"]
    tensors: Iterator[weights.Tensor]
    eos_token_ids: list[int]
    tokenizer: Tokenizer
    files: Sequence[Path]


def resolve_dtype(dtype: str) -> str:
    """The dtype to convert to: `auto` is bfloat16 on a GPU or TPU and float32 on a CPU.

    A GPU and a TPU multiply bfloat16 many times faster than exact float32, and decoding takes as
    long as reading the weights. A CPU gains nothing from bfloat16.

    Raises:
      UserError: neither `auto` nor float32 nor bfloat16.
    """
    if dtype == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r} is not supported; supported: auto, {', '.join(FLOATS)}")
    return dtype


def convert(
    source: str | Path, out: Path, dtype: str, revision: str | None = None, *, quiet: bool = True
) -> Path:
    """Convert `source` and write the checkpoint `out`.

    Args:
      source: a folder with config.json and safetensors (single or sharded), a .gguf file, or a
        hub id such as `org/name` (the only case that uses the network).
      out: the checkpoint folder to make.
      dtype: of the converted parameters, float32 or bfloat16; see `resolve_dtype` for `auto`.
      revision: of a hub id: branch, tag or commit; None is the main branch.
      quiet: show no progress.

    Returns:
      `out`.

    Raises:
      UserError: an unsupported model or quantisation; a tokenizer that cannot be read or has no
        chat template; missing, truncated, misshapen or unread tensors, all listed at once.
    """
    dtype = resolve_dtype(dtype)
    path = Path(source)
    if revision is not None and (path.suffix == ".gguf" or path.is_dir()):
        raise UserError(f"--revision is for hub ids, and {source} is local; leave it out")
    if path.suffix == ".gguf":
        from jaxsteer.model import gguf

        found = gguf.read(path)
    elif path.is_dir():
        found = read_folder(path)
    elif HUB_ID.fullmatch(str(source)):
        folder = hub_folder(str(source), revision)
        found = dataclasses.replace(
            read_folder(folder), kind="hub", name=str(source), revision=folder.name
        )
    else:
        raise UserError(f"no model at {source}; give a folder, a .gguf file or a hub id (org/name)")
    params = fill(found.config, found.tensors, found.form, dtype, found.name, quiet=quiet)
    checkpoint.save(
        out,
        found.config,
        params,
        write_tokenizer=found.tokenizer.save,
        eos_token_ids=found.eos_token_ids,
        source=checkpoint.Origin(
            kind=found.kind,
            name=found.name,
            revision=found.revision,
            files={file.name: sha256_file(file) for file in sorted(found.files)},
        ),
    )
    return out


def fill(
    target: ModelConfig,
    tensors: Iterator[weights.Tensor],
    form: Literal["hf", "gguf"],
    dtype: str,
    where: str,
    *,
    quiet: bool = True,
) -> dict[str, np.ndarray]:
    """Read every tensor once into the parameter it belongs to.

    Args:
      target: the configuration to fill.
      tensors: the source's tensors, read one at a time.
      form: naming scheme of the source.
      dtype: of the result.
      where: the source's name in errors.
      quiet: show no progress.

    Raises:
      UserError: every unread source tensor, unfilled target and shape mismatch in one message.
    """
    entries = {entry.source: entry for entry in weights.table(target, form)}
    shapes = weights.param_shapes(target)
    params: dict[str, np.ndarray] = {}
    problems: dict[str, str] = {}
    head: np.ndarray | None = None
    with Progress(where, len(entries), unit="tensors", quiet=quiet) as progress:
        for name, read in weights.separate(tensors, target):
            progress.advance(1)
            if target.tied and name == "lm_head.weight":
                head = read().astype(FLOATS[dtype])
                continue
            entry = entries.pop(name, None)
            if entry is None:
                problems[name] = "is in the source and has no place in the model"
                continue
            try:
                value = weights.transform(read(), entry.rule, target)
            except (ValueError, OSError) as error:
                problems[name] = f"cannot be read ({error})"
                continue
            if value.dtype.name not in SOURCE_DTYPES:
                problems[name] = f"has type {value.dtype.name}, not {', '.join(SOURCE_DTYPES)}"
            elif value.shape != shapes[entry.target]:
                problems[name] = f"has shape {value.shape}, expected {shapes[entry.target]}"
            else:
                params[entry.target] = value.astype(FLOATS[dtype], order="C", copy=False)
    problems |= dict.fromkeys(entries, "is missing")
    if head is not None and not np.array_equal(head, params.get("embed/embedding", head)):
        problems["lm_head.weight"] = "differs from the embedding of a tied model"
    if problems:
        listed = [f"{name} {problem}" for name, problem in problems.items()]
        more = f"; and {len(listed) - 12} more" if len(listed) > 12 else ""
        raise UserError(f"{where}: weights do not fit the config: {'; '.join(listed[:12])}{more}")
    return params


def _hub() -> Any:
    # Imported late, and without its advice on tokens and caches; failures it raises.
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()
    return huggingface_hub


def hub_commit(name: str) -> str | None:
    """The commit of a hub model's main branch; None if the hub does not answer with one."""
    try:
        return _hub().HfApi().model_info(name, timeout=10).sha
    except Exception:
        # Its own errors and those of the HTTP client: no network, no such model, no access to it.
        return None


def hub_folder(name: str, revision: str | None) -> Path:
    """Fetch a model's files from the hub; without the hub, use those in its client's cache.

    Returns:
      Their folder, named after the commit.

    Raises:
      UserError: the model cannot be fetched.
    """
    # Subfolders and "consolidated" files hold the same weights in other forms.
    wanted = {"allow_patterns": [*SOURCE_FILES], "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        return Path(_hub().snapshot_download(name, revision=revision, **wanted))
    except Exception as error:
        # The hub client raises its own errors and those of the HTTP client.
        raise UserError(
            f"cannot fetch {name} from the hub ({one_line(error)}); check the name and the "
            "network, or give a local folder"
        ) from None


def read_folder(folder: Path) -> Source:
    """Read a folder with config.json, safetensors (one file, or shards and their index), tokenizer.

    Raises:
      UserError: an unsupported config, or a file that is missing, unreadable or without a value
        that is needed.
    """
    config = from_hf(_read(folder / "config.json", dict), f"{folder.name}/config.json")
    shards = _shards(folder)
    # Before the weights are read, and before a checkpoint is replaced by one that would not load.
    tokenizer = Tokenizer.load(folder)
    endings = ("generation_config.json", "config.json")
    named = (*endings, INDEX, *TOKENIZER_FILES)
    files = [folder / name for name in named if (folder / name).is_file()]
    stated = [_read(file, _Ending).eos_token_id for file in files if file.name in endings]
    eos = next((ids for ids in stated if ids is not None), [])
    if eos == []:
        raise UserError(f"{folder}: no eos_token_id in generation_config.json or config.json")
    return Source(
        kind="folder",
        name=folder.resolve().name,
        config=config,
        form="hf",
        tensors=_tensors(shards),
        eos_token_ids=eos if isinstance(eos, list) else [eos],
        tokenizer=tokenizer,
        files=[*files, *shards],
    )


class _Ending(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


T = TypeVar("T")


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None


def _shards(folder: Path) -> list[Path]:
    names = {"model.safetensors"}
    if (folder / INDEX).is_file():
        names = set(_read(folder / INDEX, _Index).weight_map.values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
        raise UserError(f"{pickles[0]} is a pickle file, not supported; get safetensors or GGUF")
    if missing:
        raise UserError(f"{folder / missing[0]} is missing; download the model again")
    return sorted(folder / name for name in names)


def _tensors(shards: Sequence[Path]) -> Iterator[weights.Tensor]:
    from safetensors import SafetensorError, safe_open

    for path in shards:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (the handle is no mapping)
                    # Old Llamas store rotary frequencies, which follow from the config.
                    if not name.endswith("rotary_emb.inv_freq"):
                        yield name, functools.partial(file.get_tensor, name)
        except SafetensorError as error:
            raise UserError(
                f"{path} is damaged or truncated ({error}); download it again"
            ) from None
