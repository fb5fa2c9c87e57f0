"""Convert a Hugging Face model (folder, hub id or GGUF file) into a jaxsteer checkpoint.

Tensors are read one at a time into the output, so memory peaks at the output plus one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import sha256_file
from jaxsteer.model import checkpoint, gguf, sources, weights
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.sources import Tensor
from jaxsteer.progress import Progress

FLOATS: dict[str, Any] = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SOURCE_DTYPES = ("float64", "float32", "float16", "bfloat16")


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
    is_gguf = path.suffix == ".gguf"
    if revision is not None and (is_gguf or path.is_dir()):
        raise UserError(f"--revision is for hub ids, and {source} is local; leave it out")
    if is_gguf:
        if not path.is_file():
            raise UserError(f"no file {path}; give the path of a .gguf file")
        found = gguf.read(path)
    elif path.is_dir():
        found = sources.read_folder(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        found = sources.read_hub(str(source), revision)
    else:
        raise UserError(f"no model at {source}; give a folder, a .gguf file or a hub id (org/name)")
    params = fill(found.config, found.tensors, found.form, dtype, found.name, quiet=quiet)
    checkpoint.save(
        out,
        found.config,
        params,
        write_tokenizer=found.write_tokenizer,
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
    heads: list[np.ndarray] = []
    with Progress(where, len(entries), unit="tensors", quiet=quiet) as progress:
        for name, read in tensors:
            progress.advance(1)
            if target.tied and name == "lm_head.weight":
                heads.append(read().astype(FLOATS[dtype]))
                continue
            if name not in entries:
                problems[name] = "is in the source and has no place in the model"
                continue
            entry = entries[name]
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
    for entry in entries.values():
        if entry.target not in params and entry.source not in problems:
            problems[entry.source] = "is missing"
    embedding = params.get("embed/embedding")
    if heads and embedding is not None and not np.array_equal(heads[0], embedding):
        problems["lm_head.weight"] = "differs from the embedding of a tied model"
    if problems:
        listed = [f"{name} {problem}" for name, problem in problems.items()]
        more = f"; and {len(listed) - 12} more" if len(listed) > 12 else ""
        raise UserError(f"{where}: weights do not fit the config: {'; '.join(listed[:12])}{more}")
    return params
