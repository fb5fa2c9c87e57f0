"""Convert a Hugging Face model (folder, hub id or GGUF file) into a jaxsteer checkpoint.

Config and tokenizer are read and checked first. Tensors are then read one at a time into the
output, so memory peaks at the output plus one tensor. No torch, no pickle, no remote code.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxsteer.errors import UserError, heed_stop, one_line
from jaxsteer.files import T, read_json, sha256_file
from jaxsteer.model import checkpoint, weights
from jaxsteer.model.config import ModelConfig, from_hf, ignored
from jaxsteer.model.tokenizer import Tokenizer
from jaxsteer.model.weights import Tensor
from jaxsteer.words import Progress

FLOATS: dict[str, Any] = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SOURCE_DTYPES = ("float64", "float32", "float16", "bfloat16")
# From the hub, small files are fetched and checked before the weights.
SMALL_FILES = ("*.json", "*.jinja")
WEIGHTS = "*.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ENDINGS = ("generation_config.json", "config.json")
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
NAMED = (
    *ENDINGS, INDEX, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What may be asked of a conversion.

    Attributes:
      accept_unknown: keys of the config that are unknown and left out, on the user's word.
      untie: use the output head that the file holds, though its config ties it to the embedding.
      adapter: folder or hub id of a LoRA adapter, which is merged into the weights.
      template: a file with the chat template to use, or the name of one of several.
      arguments: values of variables of the chat template.
    """

    accept_unknown: Sequence[str] = ()
    untie: bool = False
    adapter: str = ""
    template: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What was asked for, by name; of local files and folders no more than the name."""
        asked = {name: value for name, value in dataclasses.asdict(self).items() if value}
        paths = {key: Path(asked[key]) for key in ("adapter", "template") if key in asked}
        return asked | {key: path.name for key, path in paths.items() if path.exists()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model to convert, of which everything but the weights has been read.

    Attributes:
      kind: `folder`, `hub` or `gguf`.
      name: of the folder, of the hub's model, or of the file.
      revision: of a hub model, the commit.
      config: its configuration.
      tokenizer: its tokenizer, with the chat template.
      ends: token ids that end a reply, as far as its files name them.
      files: the files that it has been read from.
      weights: finds its tensors, each to be read when it is needed, and the files they are in.
      ignored: keys of its config, with their values, that do not enter the computation.
      notes: sentences on what a user would not expect of it.
    """

    kind: str
    name: str
    revision: str | None = None
    config: ModelConfig
    tokenizer: Tokenizer
    ends: set[int]
    files: list[Path]
    weights: Callable[[], tuple[list[Tensor], list[Path]]]
    ignored: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


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
    source: str | Path,
    out: Path,
    dtype: str,
    revision: str | None = None,
    options: Options | None = None,
    *,
    quiet: bool = True,
) -> Path:
    """Convert `source` and write the checkpoint `out`.

    Args:
      source: a folder with config.json and safetensors (single or sharded), a .gguf file, or a
        hub id such as `org/name` (the only case that uses the network).
      out: the checkpoint folder to make.
      dtype: of the converted parameters, float32 or bfloat16; see `resolve_dtype` for `auto`.
      revision: of a hub id: branch, tag or commit; None is the main branch.
      options: what else is asked of the conversion.
      quiet: show no progress.

    Returns:
      `out`.

    Raises:
      UserError: an unsupported model, quantisation or adapter; a tokenizer that cannot be read, has
        no chat template or does not fit the model; missing, truncated, misshapen or unread
        tensors, all listed at once.
    """
    dtype, options, path = resolve_dtype(dtype), options or Options(), Path(source)
    if revision is not None and (path.suffix == ".gguf" or path.is_dir()):
        raise UserError(f"--revision is for hub ids, and {source} is local; leave it out")
    if path.suffix == ".gguf":
        from jaxsteer.model import gguf

        found = gguf.read(path, options)
    elif path.is_dir():
        found = read_folder(path, options)
    elif HUB_ID.fullmatch(str(source)):
        found = read_hub(str(source), revision, options)
    else:
        raise UserError(f"no model at {source}; give a folder, a .gguf file or a hub id (org/name)")
    ends = sorted(found.ends | found.tokenizer.ends())
    if not ends:
        raise UserError(f"{found.name}: nothing in its files says which token ends a reply")
    notes = [*found.notes, *found.tokenizer.check(found.config.vocab_size, ends, found.name)]
    lora = _adapter_folder(options.adapter, found) if options.adapter else None
    heed_stop()
    tensors, files = found.weights()
    if lora is not None:
        tensors = [*weights.merged(tensors, weights.load_adapter(lora), options.adapter)]
    params = fill(found.config, tensors, dtype, found.name, quiet=quiet)
    files = [*found.files, *files, *([Path(options.template)] if options.template else [])]
    hashes = {file.name: sha256_file(file) for file in sorted(files) if file.is_file()}
    if lora is not None:
        hashes |= {f"adapter/{name}": sha256_file(lora / name) for name in weights.ADAPTER_FILES}
    checkpoint.save(
        out,
        found.config,
        params,
        write_tokenizer=found.tokenizer.save,
        eos_token_ids=ends,
        source=checkpoint.Origin(
            kind=found.kind,
            name=found.name,
            revision=found.revision,
            files=hashes,
            options=options.record(),
        ),
        ignored=found.ignored,
        notes=notes,
    )
    return out


def _adapter_folder(name: str, base: Source) -> Path:
    if base.kind == "gguf":
        raise UserError(f"{base.name}: an adapter is merged into Hugging Face weights, not a GGUF")
    hub = not Path(name).is_dir() and HUB_ID.fullmatch(name)
    return hub_folder(name, None, weights.ADAPTER_FILES) if hub else Path(name)


def tied(tensors: Iterable[Tensor], config: ModelConfig, where: str) -> Iterator[Tensor]:
    """The source's tensors, of which one is the embedding and the output head of a tied model.

    Raises:
      UserError: both are there and differ, or a model that is not tied has no output head.
    """
    found = dict(tensors)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not config.tied and embedding in found and head not in found:
        raise UserError(
            f"{where}: there is no {head}, though its config does not tie it to the embedding; get "
            "the whole model, or set tie_word_embeddings to true in config.json if it is tied"
        )
    if config.tied and head in found:
        own = found.pop(head)
        if not np.array_equal(own(), found.setdefault(embedding, own)()):
            raise UserError(
                f"{where}: its {head} differs from the embedding, to which its config ties it; "
                "choose the stored one with --untie, or remove it from the file"
            )
    yield from found.items()


def fill(
    target: ModelConfig,
    tensors: Iterable[Tensor],
    dtype: str,
    where: str,
    *,
    quiet: bool = True,
) -> dict[str, np.ndarray]:
    """Read every tensor once into the parameter it belongs to.

    Args:
      target: the configuration to fill.
      tensors: the source's tensors, read one at a time.
      dtype: of the result.
      where: the source's name in errors.
      quiet: show no progress.

    Raises:
      UserError: every unread source tensor, unfilled target and shape mismatch in one message.
    """
    paths, shapes = weights.table(target), weights.param_shapes(target)
    params: dict[str, np.ndarray] = {}
    problems: dict[str, str] = {}
    with Progress(where, len(paths), unit="tensors", quiet=quiet) as progress:
        for name, read in tied(weights.separate(tensors, target), target, where):
            progress.advance(1)
            path = paths.pop(name, None)
            if path is None:
                problems[name] = "is in the source and has no place in the model"
                continue
            try:
                value = read().T if path.endswith("kernel") else read()
            except (NotImplementedError, ValueError, OSError) as error:
                problems[name] = f"cannot be read ({error})"
                continue
            if value.dtype.name not in SOURCE_DTYPES:
                problems[name] = f"has type {value.dtype.name}, not {', '.join(SOURCE_DTYPES)}"
            elif value.shape != shapes[path]:
                problems[name] = f"has shape {value.shape}, expected {shapes[path]}"
            else:
                params[path] = value.astype(FLOATS[dtype], order="C", copy=False)
    problems |= dict.fromkeys(paths, "is missing")
    if problems:
        listed = [f"{name} {problem}" for name, problem in problems.items()]
        more = f"; and {len(listed) - 12} more" if len(listed) > 12 else ""
        raise UserError(f"{where}: weights do not fit the config: {'; '.join(listed[:12])}{more}")
    return params


def _hub() -> Any:
    # Imported late, and without its advice on tokens and caches; failures it raises.
    import huggingface_hub.errors
    import huggingface_hub.utils.logging

    huggingface_hub.utils.logging.set_verbosity_error()
    return huggingface_hub


def hub_commit(name: str) -> str | None:
    """The commit of a hub model's main branch; None if the hub does not answer with one."""
    try:
        return _hub().HfApi().model_info(name, timeout=10).sha
    except Exception:
        # Its own errors and those of the HTTP client: no network, no such model, no access to it.
        return None


def hub_folder(name: str, revision: str | None, patterns: Sequence[str] = SMALL_FILES) -> Path:
    """Fetch some of a model's files from the hub; without the hub, use those in its client's cache.

    Returns:
      Their folder, named after the commit.

    Raises:
      UserError: the files cannot be fetched.
    """
    hub = _hub()
    # Subfolders and "consolidated" files hold the same weights in other forms.
    wanted = {"allow_patterns": [*patterns], "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        return Path(hub.snapshot_download(name, revision=revision, **wanted))
    except hub.errors.RepositoryNotFoundError as error:
        gated = isinstance(error, hub.errors.GatedRepoError)
        why = f"gives {name} only to users with access; ask for it at https://huggingface.co/{name}"
        raise UserError(
            f"the hub {why if gated else f'shows no model {name}; check the name'}, and log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from None
    except Exception as error:
        # The hub client raises its own errors and those of the HTTP client.
        raise UserError(
            f"cannot fetch {name} from the hub ({one_line(error)}); check the name and the "
            "network, or give a local folder"
        ) from None


def read_hub(name: str, revision: str | None, options: Options) -> Source:
    """As `read_folder`, of a hub model: its weights are fetched when they are asked for."""
    folder = hub_folder(name, revision)
    found = read_folder(folder, options, name)

    def fetched() -> tuple[list[Tensor], list[Path]]:
        hub_folder(name, folder.name, (WEIGHTS,))
        return found.weights()

    return dataclasses.replace(found, kind="hub", revision=folder.name, weights=fetched)


def read_folder(folder: Path, options: Options, name: str = "") -> Source:
    """Read a folder with config.json, safetensors (one file, or shards and their index), tokenizer.

    Raises:
      UserError: an unsupported config, or a file that is missing, unreadable or without a value
        that is needed.
    """
    name = name or folder.resolve().name
    if (folder / weights.ADAPTER_CONFIG).is_file():
        base = _read(folder / weights.ADAPTER_CONFIG, dict).get("base_model_name_or_path")
        raise UserError(
            f"{name} is an adapter of {base}; convert the base with it: jaxsteer convert {base} "
            f"--adapter {name} --out DIR"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name} has no config.json; give a Hugging Face model, or the path of one .gguf file"
        )
    raw = _read(folder / "config.json", dict)
    _check_unquantised(folder, raw, name)
    where = f"{name}/config.json"
    config = from_hf(raw, where, accept=options.accept_unknown)
    tokenizer = Tokenizer.load(folder, options.template, options.arguments)
    files = [folder / file for file in NAMED if (folder / file).is_file()]
    ends: set[int] = set()
    for file in (file for file in files if file.name in ENDINGS):
        ids = _read(file, _Ending).eos_token_id
        # Some configs write -1 for none.
        ends |= {i for i in (ids if isinstance(ids, list) else [ids]) if i is not None and i >= 0}
    return Source(
        kind="folder",
        name=name,
        config=dataclasses.replace(config, tied=False) if options.untie else config,
        tokenizer=tokenizer,
        ends=ends,
        files=files,
        weights=functools.partial(_weights, folder),
        ignored=ignored(raw, where),
    )


def _check_unquantised(folder: Path, config: Mapping[str, Any], name: str) -> None:
    keys = ("quantization_config", "quantization")
    text = config.get("text_config") or {}
    found = next((part[key] for part in (config, text) for key in keys if part.get(key)), None)
    for file in (folder / file for file in QUANTISED_FILES):
        found = found or (_read(file, dict) if file.is_file() else None)
    if found:
        raise UserError(
            f"{name}: its weights are quantised ({found.get('quant_method') or found}), which is "
            "not supported; convert the model that they were made from, or a GGUF file"
        )


class _Ending(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _read(path: Path, kind: type[T]) -> T:
    return read_json(path, kind, "download it again")


def _weights(folder: Path) -> tuple[list[Tensor], list[Path]]:
    single, listed = folder / SINGLE, {}
    if (folder / INDEX).is_file():
        listed = _read(folder / INDEX, _Index).weight_map
    shards = sorted({folder / file for file in listed.values()}) or [single]
    missing = [path.name for path in shards if not path.is_file()]
    if single.is_file() and shards != [single]:
        # transformers reads the single file.
        held = _places([single])
        same = held.keys() == listed.keys() if missing else _equal(held, _places(shards))
        if not same:
            raise UserError(
                f"{folder}: {SINGLE} and {INDEX} name different weights; remove the one that does "
                "not belong to the model"
            )
        shards, missing = [single], []
    if missing and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
        raise UserError(f"{pickles[0]} is a pickle file, not supported; get safetensors or GGUF")
    if missing:
        there = _few([path.name for path in sorted(folder.glob(WEIGHTS))]) or "no weights"
        names = f"{INDEX} names {_few(missing)}" if listed else f"no {SINGLE} and no {INDEX}"
        raise UserError(
            f"{folder}: {names}, and it holds {there}; get the missing files, or the index that "
            "belongs to these"
        )
    places = _places(shards)
    return [(name, functools.partial(_tensor, path, name)) for name, path in places.items()], shards


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _places(shards: Sequence[Path]) -> dict[str, Path]:
    """The file of each tensor."""
    places: dict[str, Path] = {}
    for path in shards:
        try:
            with safe_open(path, framework="numpy") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is damaged or truncated ({one_line(error)}); download it again"
            ) from None
        if double := sorted(places.keys() & names):
            raise UserError(
                f"tensor {double[0]} is in {places[double[0]]} and in {path.name}; get the files "
                "of one version of the model"
            )
        # Old Llamas store rotary frequencies, which follow from the config.
        places |= {name: path for name in names if not name.endswith("rotary_emb.inv_freq")}
    return places


def _tensor(path: Path, name: str) -> np.ndarray:
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)


def _equal(one: Mapping[str, Path], two: Mapping[str, Path]) -> bool:
    return one.keys() == two.keys() and all(
        np.array_equal(_tensor(one[name], name), _tensor(two[name], name)) for name in one
    )
