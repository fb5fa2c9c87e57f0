"""What a model is converted from: a Hugging Face folder or hub id, read here, or a GGUF (`gguf`).

No torch, no pickle, no remote code.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxsteer.errors import UserError
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
    # Imported late, and without its advice on tokens and caches; what fails it raises.
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
    """Fetch a model's files from the hub, or take those that its client has kept.

    Returns:
      Their folder, named after the commit.

    Raises:
      UserError: the model cannot be fetched.
    """
    try:
        folder = _hub().snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(SOURCE_FILES),
            # Subfolders and "consolidated" files hold the same weights in other forms.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:
        # The hub client raises its own errors and those of the HTTP client.
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"cannot fetch {name} from the hub ({reason}); check the name and the network, or give "
            "a local folder"
        ) from None
    return Path(folder)


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
    raw = _json(folder / "config.json")
    config = from_hf(raw, f"{folder.name}/config.json")
    shards = _safetensors_files(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}/tokenizer.json is missing; jaxsteer reads fast tokenizers only")
    for name in TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            _json(folder / name)
    # Before the weights are read, and before a checkpoint is replaced by one that would not load.
    Tokenizer.load(folder)
    generation = folder / "generation_config.json"
    eos = (_json(generation) if generation.is_file() else {}).get("eos_token_id")
    eos = raw.get("eos_token_id") if eos is None else eos
    eos_ids: list[Any] = eos if isinstance(eos, list) else [eos]
    if not eos_ids or not all(type(token) is int for token in eos_ids):
        raise UserError(
            f"{folder}: eos_token_id {eos!r} is no token id or list of them; correct it in "
            "generation_config.json or config.json"
        )
    named = ("config.json", generation.name, INDEX, *TOKENIZER_FILES)
    return Source(
        kind="folder",
        name=folder.resolve().name,
        config=config,
        form="hf",
        tensors=_safetensors(shards),
        eos_token_ids=eos_ids,
        write_tokenizer=functools.partial(_copy_tokenizer, folder),
        files=[*(folder / name for name in named if (folder / name).is_file()), *shards],
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download the model again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return value


def _safetensors_files(folder: Path) -> list[Path]:
    files = [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        placed = _json(folder / INDEX).get("weight_map", {})
        if not isinstance(placed, dict) or not all(isinstance(n, str) for n in placed.values()):
            raise UserError(
                f"{folder / INDEX}: weight_map names no file for each tensor; download it again"
            )
        files = [folder / name for name in sorted(set(placed.values()))]
    missing = [file for file in files if not file.is_file()]
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if missing and pickles:
        raise UserError(
            f"{pickles[0]} is a pickle, which is not read; get the model as safetensors or GGUF"
        )
    if missing:
        raise UserError(f"{missing[0]} is missing; download the model again")
    return files


def _safetensors(files: Sequence[Path]) -> Iterator[Tensor]:
    from safetensors import SafetensorError, safe_open

    for path in files:
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
        if name == "tokenizer_config.json" and (folder / name).is_file():
            # Code named by a repository is not run, so the pointer to it is not kept.
            kept = {key: value for key, value in _json(folder / name).items() if key != "auto_map"}
            write_json(to / name, kept)
        elif (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)
