"""Convert a Hugging Face model (folder, hub id or GGUF file) into a jaxsteer checkpoint.

Tensors are read one at a time into the output, so memory peaks at the output plus one tensor.
No torch, no pickle, no remote code.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import sha256_file, write_json
from jaxsteer.model import checkpoint, config, weights
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.tokenizer import Tokenizer
from jaxsteer.progress import Progress

FLOATS: dict[str, Any] = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SOURCE_DTYPES = ("float64", "float32", "float16", "bfloat16")
GGUF_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"
# How text is cut before merging, by llama.cpp's name of it.
GGUF_SPLITS = ("llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen", "smollm", "gpt-2")
# What is fetched from the hub, and looked at in a folder.
SOURCE_FILES = ("*.json", "*.safetensors", "*.jinja")
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip

Tensor = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]


def resolve_dtype(dtype: str) -> str:
    """The dtype to convert to: `auto` is bfloat16 on a GPU or TPU and float32 on a CPU.

    A GPU and a TPU multiply bfloat16 many times faster than exact float32, and decoding takes as
    long as reading the weights. A CPU gains nothing from bfloat16.

    Raises:
      UserError: neither `auto` nor float32 nor bfloat16.
    """
    import jax

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
    local = path.suffix == ".gguf" or path.is_dir()
    if local and revision is not None:
        raise UserError(f"--revision is for hub ids, and {source} is local; leave it out")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no file {path}; give the path of a .gguf file")
        return _convert_gguf(path, out, dtype, quiet)
    if local:
        about = {"kind": "folder", "name": path.resolve().name}
        return _convert_hf(path, out, dtype, about, quiet)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        folder = hub_folder(str(source), revision)
        about = {"kind": "hub", "name": str(source), "revision": folder.name}
        return _convert_hf(folder, out, dtype, about, quiet)
    raise UserError(f"no model at {source}; give a folder, a .gguf file or a hub id (org/name)")


def hub_commit(name: str) -> str | None:
    """The commit of a hub model's main branch; None if the hub does not tell."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(name, timeout=10).sha
    except Exception:
        # Its own, requests' and httpx's errors: no network, no such model, no access to it.
        return None


def hub_folder(name: str, revision: str | None) -> Path:
    """Fetch a model's files from the hub, or take what its client has kept of them.

    Returns:
      Their folder, named after the commit.

    Raises:
      UserError: the model cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(SOURCE_FILES),
                # Subfolders and "consolidated" files hold the same weights in other forms.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except Exception as error:
        # The hub client raises its own, requests' and httpx's errors; the user needs one line.
        first = (
            str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        )
        raise UserError(
            f"cannot fetch {name} from the hub ({first}); check the name and the network, or give "
            "a local folder"
        ) from None


def fill(
    target: ModelConfig,
    tensors: Iterator[Tensor],
    form: Literal["hf", "gguf"],
    dtype: str,
    where: str,
    *,
    quiet: bool = True,
) -> dict[str, np.ndarray]:
    """Read every tensor once into the parameter it belongs to.

    Args:
      target: the configuration to fill.
      tensors: (name, shape, read) triples; `read` is called for one tensor at a time.
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
    kind = FLOATS[dtype]
    problems: list[str] = []
    heads: list[np.ndarray] = []
    for name, _, read in _counted(
        tensors, Progress(where, len(entries), unit="tensors", quiet=quiet)
    ):
        # Rotary frequencies follow from the config, whose reader has looked at the latter.
        if name.endswith("rotary_emb.inv_freq") or name == ROPE_FACTORS:
            continue
        if target.tied and name == "lm_head.weight":
            heads.append(read().astype(kind))
            continue
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{name} is in the source and has no place in the model")
            continue
        try:
            value = weights.turn(read(), entry.rule, target)
        except (ValueError, OSError) as error:
            problems.append(f"{name} cannot be read ({error})")
            continue
        if value.dtype.name not in SOURCE_DTYPES:
            problems.append(f"{name} has type {value.dtype.name}, not {', '.join(SOURCE_DTYPES)}")
            continue
        if value.shape != shapes[entry.target]:
            problems.append(f"{name} has shape {value.shape}, expected {shapes[entry.target]}")
            continue
        params[entry.target] = value.astype(kind, order="C", copy=False)
    missing = [entry.source for entry in entries.values() if entry.target not in params]
    reported = {problem.split(" ")[0] for problem in problems}
    problems += [f"{name} is missing" for name in missing if name not in reported]
    embedding = params.get("embed/embedding")
    if heads and embedding is not None and not np.array_equal(heads[0], embedding):
        problems.append("lm_head.weight differs from the embedding of a tied model")
    if problems:
        shown = "; ".join(problems[:12])
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise UserError(f"{where}: weights do not fit the config: {shown}{more}")
    return params


def _counted(tensors: Iterator[Tensor], progress: Progress) -> Iterator[Tensor]:
    with progress:
        for tensor in tensors:
            yield tensor
            progress.advance(1)


# -- safetensors ---------------------------------------------------------------------------------


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        placed = _json(index).get("weight_map", {})
        if not isinstance(placed, dict) or not all(isinstance(n, str) for n in placed.values()):
            raise UserError(f"{index}: weight_map names no file for each tensor; download it again")
        files = [folder / name for name in sorted(set(placed.values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            pickles = sorted(folder.glob("pytorch_model*.bin"))
            if pickles:
                raise UserError(
                    f"{pickles[0]} is a pickle, which is not read; get the model as safetensors "
                    "or GGUF"
                )
            raise UserError(f"{file} is missing; download the model again")
    return files


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


def _safetensors(files: list[Path]) -> Iterator[Tensor]:
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (the handle is no mapping)
                    shape = tuple(file.get_slice(name).get_shape())
                    yield name, shape, functools.partial(file.get_tensor, name)
        except SafetensorError as error:
            raise UserError(
                f"{path} is damaged or truncated ({error}); download it again"
            ) from None


def _convert_hf(folder: Path, out: Path, dtype: str, about: dict[str, Any], quiet: bool) -> Path:
    raw = _json(folder / "config.json")
    target = config.from_hf(raw, f"{folder.name}/config.json")
    files = _safetensors_files(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}/tokenizer.json is missing; jaxsteer reads fast tokenizers only")
    for name in TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            _json(folder / name)
    # Before the weights are read, and before anything is replaced by what would not load.
    Tokenizer.load(folder)
    generation = folder / "generation_config.json"
    eos = (_json(generation) if generation.is_file() else {}).get("eos_token_id")
    eos = raw.get("eos_token_id") if eos is None else eos
    if eos is None:
        raise UserError(f"{folder}: no eos_token_id in generation_config.json or config.json")
    eos_ids = eos if isinstance(eos, list) else [eos]
    if not eos_ids or not all(type(i) is int for i in eos_ids):
        raise UserError(
            f"{folder}: eos_token_id {eos!r} is no token id or list of them; correct it"
        )
    params = fill(target, _safetensors(files), "hf", dtype, folder.name, quiet=quiet)

    def write_tokenizer(to: Path) -> None:
        for name in TOKENIZER_FILES:
            if not (folder / name).is_file():
                continue
            if name == "tokenizer_config.json":
                # Code named by a repository is not run, so the pointer to it is not kept.
                write_json(
                    to / name, {k: v for k, v in _json(folder / name).items() if k != "auto_map"}
                )
            else:
                shutil.copyfile(folder / name, to / name)

    names = ["config.json", generation.name, INDEX, *TOKENIZER_FILES, *(f.name for f in files)]
    hashed = [folder / name for name in sorted(names) if (folder / name).is_file()]
    about = {**about, "files": {file.name: sha256_file(file) for file in hashed}}
    checkpoint.save(
        out,
        target,
        params,
        write_tokenizer=write_tokenizer,
        eos_token_ids=eos_ids,
        source=about,
    )
    return out


# -- GGUF ----------------------------------------------------------------------------------------


def _gguf_tensors(reader: Any, where: str) -> Iterator[Tensor]:
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in GGUF_TYPES:
            raise UserError(
                f"{where}: tensor {tensor.name} has type {kind}, which is not supported; "
                f"supported: {', '.join(GGUF_TYPES)}"
            )
        # GGUF lists the innermost axis first.
        shape = tuple(int(n) for n in reversed(tensor.shape))
        yield tensor.name, shape, functools.partial(_dequantised, tensor, shape)


def _dequantised(tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    from gguf.quants import dequantize

    return dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def _convert_gguf(path: Path, out: Path, dtype: str, quiet: bool) -> Path:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:
        # The reader raises whatever numpy does on short data.
        raise UserError(
            f"{path} is damaged, truncated or no GGUF ({error}); get it again"
        ) from None
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    factors = next((np.array(t.data) for t in reader.tensors if t.name == ROPE_FACTORS), None)
    target = config.from_gguf(fields, shapes, path.name, factors)
    tokenizer = _gguf_tokenizer(fields, path.name)
    params = fill(target, _gguf_tensors(reader, path.name), "gguf", dtype, path.name, quiet=quiet)
    checkpoint.save(
        out,
        target,
        params,
        write_tokenizer=lambda folder: tokenizer.save_pretrained(str(folder)),
        eos_token_ids=[int(fields["tokenizer.ggml.eos_token_id"])],
        source={"kind": "gguf", "name": path.name, "files": {path.name: sha256_file(path)}},
    )
    return out


def _gguf_tokenizer(fields: dict[str, Any], where: str) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    for name in ("tokens", "model", "eos_token_id"):
        if f"tokenizer.ggml.{name}" not in fields:
            raise UserError(f"{where}: metadata tokenizer.ggml.{name} is missing")
    if "tokenizer.chat_template" not in fields:
        raise UserError(f"{where}: it carries no chat template; convert a chat model")
    split = fields.get("tokenizer.ggml.pre")
    if fields["tokenizer.ggml.model"] == "gpt2" and split not in GGUF_SPLITS:
        raise UserError(
            f"{where}: its tokenizer cuts text by {split!r}, which is not supported; supported: "
            f"{', '.join(GGUF_SPLITS)}; convert the Hugging Face weights instead"
        )
    named = GGUF_TOKENIZER_MAPPING["tokenizer"].items()
    ggml = {
        theirs: fields[f"tokenizer.{key}"] for key, theirs in named if f"tokenizer.{key}" in fields
    }
    try:
        backend, _ = convert_gguf_tokenizer(fields["general.architecture"], ggml)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: its tokenizer cannot be built ({error})") from None
    special = {
        f"{name}_token": ggml["tokens"][int(ggml[f"{name}_token_id"])]
        for name in ("bos", "eos", "unk", "pad")
        if f"{name}_token_id" in ggml
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=fields["tokenizer.chat_template"], **special
    )
