"""Several devices: a `data` x `model` mesh, and how every array is sharded over it.

Rows are split over `data`; the model's heads, MLP and vocabulary over `model` (q, k, v, gate and up
by columns, o and down by rows, so that a block is summed across devices only twice: Shoeybi et al.
2019). Arrays name their dimensions by letters: parameters in `weights.dimensions`, keys and values
in the metadata of the dataclass field that holds them. `SPLIT` maps letters to mesh axes; N and K
are split between heads only. Only the inputs of programs are placed: `jax.jit` propagates their
shardings. A dimension that the `model` axis does not divide is replicated, and `notes` says so.

On a mesh data=2,model=4, a cache [row, kv_head, slot, head_dim] of 64 rows and 8 key-value heads is
split into 8 pieces of 32 rows and 2 heads. Without a mesh everything is on one device.

The mesh spans the devices of this process. Processes divide the rows of a study, not the mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsteer.errors import UserError
from jaxsteer.model import weights
from jaxsteer.model.config import ModelConfig

AXES = ("data", "model")
# Prompts are read this many at a time: the data axis divides it.
PROMPT_BATCH = 16

# Arrays of a batch: B is the row, and the dimensions after it are never split.
ROWS = "B"
CACHE = "BKSH"
# For `dataclasses.field(metadata=...)`: the field holds keys and values of a batch.
KEYS_AND_VALUES: Mapping[str, str] = {"dimensions": CACHE}

# The dimensions that the model axis splits: the field of the config that has to divide, what it
# counts, and the arrays with that dimension. N and K are split between heads only.
_MODEL = {
    "N": ("n_heads", "{} query heads", "q and o projections are"),
    "K": ("n_kv_heads", "{} key-value heads", "k and v projections and the cache are"),
    "F": ("d_ff", "an MLP width of {}", "MLP kernels are"),
    "V": ("vocab_size", "a vocabulary of {}", "the token table and the head are"),
}
# Which axis of the mesh splits a dimension; every other dimension is replicated.
SPLIT: Mapping[str, str] = {"B": "data"} | dict.fromkeys(_MODEL, "model")


def parse(text: str) -> dict[str, int]:
    """Read the size of a mesh.

    >>> parse("data=2,model=4")
    {'data': 2, 'model': 4}
    >>> parse("model=8")
    {'data': 1, 'model': 8}

    Raises:
      UserError: anything else, or a data axis that does not divide `PROMPT_BATCH`.
    """
    sizes = dict.fromkeys(AXES, 1)
    seen = []
    for part in text.split(","):
        name, _, count = part.strip().partition("=")
        size = int(count) if re.fullmatch("[0-9]{1,6}", count) else 0
        if name not in AXES or name in seen or size < 1:
            raise UserError(f"mesh {text!r} is not understood; write it as data=2,model=4")
        seen.append(name)
        sizes[name] = size
    if PROMPT_BATCH % sizes["data"]:
        raise UserError(
            f"mesh {text}: prompts are read {PROMPT_BATCH} at a time, which data={sizes['data']} "
            "does not divide; make data 1, 2, 4, 8 or 16"
        )
    return sizes


def mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the option `--mesh`.

    Args:
      text: as `parse` reads it.
      devices: None for those of this process; the first ones are used if there are more.

    Raises:
      UserError: as `parse`, or too few devices.
    """
    sizes = parse(text)
    found = list(jax.local_devices() if devices is None else devices)
    needed = sizes["data"] * sizes["model"]
    if needed > len(found):
        kind = found[0].platform.upper()
        raise UserError(
            f"mesh {text} needs {needed} devices and there "
            f"{'is' if len(found) == 1 else 'are'} {len(found)} ({kind}); ask for a smaller --mesh"
        )
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * 2
    try:
        return jax.make_mesh(shape, AXES, types, devices=found[:needed])
    except (AssertionError, NotImplementedError):
        # JAX makes only meshes that are a rectangle of TPU chips, which neither 3 of 8 chips nor
        # 16 x 4 of 8 x 8 are. Any order of devices is correct, if slower.
        return Mesh(np.array(found[:needed]).reshape(shape), AXES, axis_types=types)


def _replicated(config: ModelConfig, mesh: Mesh) -> list[str]:
    """Dimensions that the model axis does not divide."""
    return [
        letter
        for letter, (field, _, _) in _MODEL.items()
        if getattr(config, field) % mesh.shape["model"]
    ]


def spec(dimensions: str, config: ModelConfig, mesh: Mesh) -> PartitionSpec:
    """How an array with these dimension letters is split; later dimensions are replicated."""
    replicated = _replicated(config, mesh)
    return PartitionSpec(*(None if d in replicated else SPLIT.get(d) for d in dimensions))


def notes(config: ModelConfig, mesh: Mesh) -> list[str]:
    """What the model axis cannot split, a sentence each; empty when it splits everything."""
    found = []
    for field, words, arrays in map(_MODEL.__getitem__, _replicated(config, mesh)):
        length = words.format(getattr(config, field))
        found.append(
            f"{length} cannot be split in {mesh.shape['model']}: {arrays} whole on every device"
        )
    return found


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each parameter, by path."""
    return {
        path: NamedSharding(mesh, spec(letters, config, mesh))
        for path, letters in weights.dimensions(config).items()
    }


def _dimensions(tree: Any, letters: str = ROWS) -> Iterator[str]:
    """Dimension letters of every leaf in order, as the dataclass fields around it declare them."""
    for node in jax.tree.leaves(tree, is_leaf=dataclasses.is_dataclass):
        if not dataclasses.is_dataclass(node):
            yield letters
            continue
        for field in dataclasses.fields(node):
            declared = field.metadata.get("dimensions", letters)
            yield from _dimensions(getattr(node, field.name), declared)


def shardings(tree: Any, config: ModelConfig, mesh: Mesh) -> list[NamedSharding]:
    """The sharding of each leaf, in order, of a pytree whose leaves have a leading row axis."""
    return [NamedSharding(mesh, spec(letters, config, mesh)) for letters in _dimensions(tree)]


def place(tree: Any, config: ModelConfig, mesh: Mesh | None) -> Any:
    """Put a pytree of row-leading arrays on the mesh; without a mesh it is returned as it is.

    Raises:
      UserError: the data axis does not divide the number of rows.
    """
    if mesh is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        check_batch(np.shape(leaf)[0], mesh)
    return jax.tree.unflatten(structure, jax.device_put(leaves, shardings(tree, config, mesh)))


def constrain(tree: Any, config: ModelConfig, mesh: Mesh | None) -> Any:
    """Inside a jitted function: give row-leading arrays the shardings that `place` gives them.

    For arrays made there. The shardings of inputs are propagated, but zeros have none, and would be
    whole on every device.
    """
    if mesh is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    constrained = jax.lax.with_sharding_constraint(leaves, shardings(tree, config, mesh))
    return jax.tree.unflatten(structure, constrained)


def data_size(mesh: Mesh | None) -> int:
    """Size of the data axis; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["data"]


def check_batch(batch: int, mesh: Mesh | None) -> None:
    """Refuse a batch that the mesh cannot split.

    Raises:
      UserError: the data axis does not divide it.
    """
    data = data_size(mesh)
    if batch % data:
        raise UserError(
            f"a batch of {batch} rows cannot be split over data={data}; make the batch a multiple "
            f"of {data} (such as {-(-batch // data) * data}), or choose another --mesh"
        )


# Bytes of a process on a CPU apart from its arrays, measured with SmolLM2's demo.
PROCESS = 2**30


def check_memory(params: Any, needed: float, mend: str) -> None:
    """Refuse what takes more memory than the devices of the parameters have, all together.

    Args:
      params: the parameters of a model.
      needed: bytes, the parameters included.
      mend: what the user can lower, for the message.

    Raises:
      UserError: it does.
    """
    stats = [device.memory_stats() for device in jax.tree.leaves(params)[0].devices()]
    there = (
        sum(each["bytes_limit"] for each in stats)
        if all(stats)
        else max(0, _of_machine() - PROCESS)
    )
    if needed > there:
        sizes = f"{needed / 2**30:.1f} GiB of memory, and {there / 2**30:.1f} GiB are there"
        raise UserError(f"this takes about {sizes}; {mend}")


def _of_machine() -> int:
    """Bytes of memory of this machine, or of the container that it is."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # The file says `max` where there is no limit.
    with contextlib.suppress(OSError, ValueError):
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return found
