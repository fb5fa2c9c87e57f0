"""What a model is converted from: a Hugging Face folder or hub id, read here, or a GGUF (`gguf`).

No torch, no pickle, no remote code.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from jaxsteer.errors import UserError, one_line
from jaxsteer.files import write_json
from jaxsteer.model.config import ModelConfig, from_hf
from jaxsteer.model.tokenizer import Tokenizer

# What is fetched from the hub, and what a folder's conversion may depend on.
SOURCE_FILES = ("*.json", "*.safetensors", "*.jinja")
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip

# A tensor's name, and the function that reads it.
Tensor = tuple[str, Callable[[], np.ndarray]]


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
      write_tokenizer: writes the tokenizer's files into a folder.
      files: every file that it is read from.
    """

    kind: str
    name: str
    revision: str | None = None
    config: ModelConfig
    form: Literal["hf", "gguf"]
    tensors: Iterator[Tensor]
    eos_token_ids: list[int]
    write_tokenizer: Callable[[Path], object]
    files: Sequence[Path]


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
    patterns = list(SOURCE_FILES)
    # Subfolders and "consolidated" files hold the same weights in other forms.
    unwanted = ["*/*", "consolidated*"]
    try:
        return Path(
            _hub().snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=unwanted
            )
        )
    except Exception as error:
        # The hub client raises its own errors and those of the HTTP client.
        raise UserError(
            f"cannot fetch {name} from the hub ({one_line(error)}); check the name and the "
            "network, or give a local folder"
        ) from None


def read_hub(name: str, revision: str | None = None) -> Source:
    """Fetch and read a hub model, as `hub_folder` and `read_folder`."""
    folder = hub_folder(name, revision)
    return dataclasses.replace(read_folder(folder), kind="hub", name=name, revision=folder.name)


def read_folder(folder: Path) -> Source:
    """Read a folder with config.json, safetensors (one file, or shards and their index), tokenizer.

    Raises:
      UserError: an unsupported config, or a file that is missing, unreadable or without a value
        that is needed.
    """
    config = from_hf(_read(folder / "config.json", dict), f"{folder.name}/config.json")
    shards = _shards(folder)
    # Before the weights are read, and before a checkpoint is replaced by one that would not load.
    Tokenizer.load(folder)
    named = ("generation_config.json", "config.json", INDEX, *TOKENIZER_FILES)
    files = [folder / name for name in named if (folder / name).is_file()]
    eos = None
    for file in files:
        if eos is None and file.name in named[:2]:
            eos = _read(file, _Ending).eos_token_id
    if eos is None or eos == []:
        raise UserError(f"{folder}: no eos_token_id in generation_config.json or config.json")
    return Source(
        kind="folder",
        name=folder.resolve().name,
        config=config,
        form="hf",
        tensors=_tensors(shards),
        eos_token_ids=eos if isinstance(eos, list) else [eos],
        write_tokenizer=functools.partial(_copy_tokenizer, folder),
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
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if missing and pickles:
        raise UserError(f"{pickles[0]} is a pickle, which is not read; get safetensors or GGUF")
    if missing:
        raise UserError(f"{folder / missing[0]} is missing; download the model again")
    return sorted(folder / name for name in names)


def _tensors(shards: Sequence[Path]) -> Iterator[Tensor]:
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


def _copy_tokenizer(folder: Path, to: Path) -> None:
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)
    config = to / "tokenizer_config.json"
    if config.is_file():
        # Code named by a repository is not run, so the pointer to it is not kept.
        values = _read(config, dict)
        write_json(config, {key: value for key, value in values.items() if key != "auto_map"})
