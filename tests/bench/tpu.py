"""Does a study of a full-size model fit a TPU slice that is not attached? `make tpu-check`.

XLA's TPU compiler runs on any Linux machine and needs only the name of a slice. The two programs of
a sweep that take its time are compiled from shapes, without weights: a group of layers that reads a
batch of packed prompts, and the decode loop. The compiler says what memory they need on a chip, and
how many operations they run and bytes they access:

    left    = HBM - (weights + decoding rows + prompts in flight + temporaries)
    seconds from max(operations / peak, bytes that have to be read / bandwidth)
            to   operations / peak + bytes accessed / bandwidth

The first bound overlaps everything perfectly, the second nothing. Links between chips are not
counted. The table is the paper's: 313 prompts x 11 conditions x 150 tokens, every reply at full
length, no prompt shared by two conditions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from jaxsteer.errors import UserError
from jaxsteer.generation import decode, prefill
from jaxsteer.generation.decode import Decoding, Sampling
from jaxsteer.generation.engine import cache_slots
from jaxsteer.generation.layer_sharing import layer_groups
from jaxsteer.model import sharding
from jaxsteer.model.config import ModelConfig, from_hf
from jaxsteer.model.decoder import Realised, blocks_graph, graph
from jaxsteer.model.interventions import Project, compile_conditions
from jaxsteer.model.weights import nest, param_shapes
from tests.bench import hbm

GIB = 2**30
DTYPE = jnp.bfloat16
# Tokens of a system prompt and the longest prompt of StrongREJECT together, and of a usual prompt.
LONGEST, USUAL = 304, 112
ROWS, NEW_TOKENS = 313 * 11, 150
MODELS = ("llama-3.1-8b", "qwen2.5-7b")
SLICES = ("v5e:2x4", "v6e:2x4", "v4:2x2x1")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, from Google's data sheets (cloud.google.com/tpu/docs/v5e and so on).

    Attributes:
      hbm: bytes that a program may use, as the compiler says when they are exceeded.
      bandwidth: of HBM, bytes a second.
      peak: bfloat16 operations a second.
      options: of the compiler.
    """

    hbm: float
    bandwidth: float
    peak: float
    options: dict[str, str] = dataclasses.field(default_factory=dict)


CHIPS = {
    # Its two cores act as one device.
    "v4": Chip(30.75 * GIB, 1228e9, 275e12, {"chip_config_name": "megacore"}),
    "v5e": Chip(15.75 * GIB, 819e9, 197e12),
    "v6e": Chip(31.24 * GIB, 1640e9, 918e12),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the compiler says of a program on one device.

    Attributes:
      memory: bytes of temporaries, and of results that are not written over arguments.
      made: bytes of those results alone.
      operations: floating-point operations, with the body of an open loop once.
      accessed: bytes read from and written to memory: by the compiler's count or, of a program
        with an open loop, those of HBM in one step of it (`hbm.step_bytes`).
    """

    memory: int
    made: int
    operations: float
    accessed: float

    def seconds(self, chip: Chip, read: int) -> tuple[float, float]:
        """From everything overlapped to nothing; `read` bytes have to be read in any case."""
        computing = self.operations / chip.peak
        at_least = max(computing, read / chip.bandwidth)
        return at_least, max(at_least, computing + self.accessed / chip.bandwidth)


def compiled(program: Any, *arguments: Any, steps: int = 0) -> Cost:
    """Compile a jitted function for the devices of its arguments.

    Args:
      program: the function.
      arguments: shapes and static values.
      steps: of its open loop, 0 if it has none.

    Raises:
      UserError: what the compiler refuses, such as more memory than the chip has.
    """
    try:
        done = program.lower(*arguments).compile()
    except RuntimeError as error:
        raise UserError(str(error).splitlines()[0]) from error
    memory, cost = done.memory_analysis(), done.cost_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    accessed = hbm.step_bytes(done.as_text(), steps) if steps else cost["bytes accessed"]
    return Cost(memory.temp_size_in_bytes + made, made, cost["flops"], accessed)


class Sweep:
    """Shapes of a sweep in bfloat16: each row adds and projects at `resid_post`, with one probe."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.decoding = Decoding(max_new_tokens=NEW_TOKENS, eos=(0, 1))
        shardings = sharding.param_shardings(config, mesh)
        self.params = nest(
            (path, jax.ShapeDtypeStruct(shape, DTYPE, sharding=shardings[path]))
            for path, shape in param_shapes(config).items()
        )
        size = {"n_layers": config.n_layers, "d_model": config.d_model}
        project = Project(directions=(np.ones(tuple(size.values()), np.float32),), layers=(0,))
        self.interventions = compile_conditions([[project]], ["all"], **size)

    def array(self, dtype: Any, *shape: int, letters: str = sharding.ROWS) -> Any:
        """An array with the sharding of a run, by its dimension letters; of rows by default."""
        split = sharding.spec(letters, self.config, self.mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, split))

    def intervened(self, count: int, layers: int) -> Any:
        """The interventions of some rows in the first layers."""
        some = self.interventions.layers(0, layers)
        return jax.tree.map(lambda leaf: self.array(leaf.dtype, count, *leaf.shape[1:]), some)

    def prefill(self, width: int) -> tuple[Any, ...]:
        """The program that reads a batch of packed prompts in a group of layers."""
        first, last = layer_groups(self.config.n_layers)[0]
        count = sharding.PROMPT_BATCH
        return (
            prefill.run_layers,
            blocks_graph(self.config, last - first, DTYPE),
            prefill.group_params(self.params, first, last),
            self.array(DTYPE, count, width, self.config.d_model),
            prefill.SequenceBatch(
                parent=self.array(jnp.int32, count),
                segment_ids=self.array(jnp.int32, count, width),
                prefix=None,
                interventions=self.intervened(count, last - first),
            ),
            self.array(jnp.float32, last - first, 1, self.config.d_model, letters=""),
            np.int32(first),
        )

    def state(self, count: int) -> decode.DecodeState:
        """The rows that decode together, with room for the longest prompt and its reply."""
        c, slots = self.config, cache_slots(LONGEST, NEW_TOKENS)
        kv = self.array(DTYPE, count, c.n_kv_heads, slots, c.head_dim, letters=sharding.CACHE)
        realised = Realised(
            steered=self.array(jnp.int32, count, c.n_layers),
            **dict.fromkeys(("change", "norm"), self.array(jnp.float32, count, c.n_layers)),
            **dict.fromkeys(("before", "after"), self.array(jnp.float32, count, c.n_layers, 1)),
        )
        by_tap = {"resid_post": realised}
        return decode.DecodeState(
            live=self.array(bool, count),
            **dict.fromkeys(("emitted", "last", "position", "start"), self.array(jnp.int32, count)),
            tokens=self.array(jnp.int32, count, NEW_TOKENS),
            logits=self.array(jnp.float32, count, NEW_TOKENS, 0),
            cache=[(kv, kv)] * c.n_layers,
            held=self.array(bool, count, slots),
            **dict.fromkeys(("prompt", "response"), by_tap),
            interventions=self.intervened(count, c.n_layers),
            ids=self.array(jnp.uint32, count),
        )

    def decode(self, state: decode.DecodeState) -> tuple[Any, ...]:
        """The program that runs a chunk of steps."""
        definition, layers = graph(self.config, DTYPE), self.config.n_layers
        probes = self.array(jnp.float32, layers, 1, self.config.d_model, letters="")
        return decode.advance, definition, self.decoding, self.params, state, probes, Sampling()


def config_of(model: str) -> ModelConfig:
    """The configuration of a preset, or of the path of a `config.json`."""
    path = Path(__file__).with_name(f"{model}.json") if model in MODELS else Path(model)
    return from_hf(json.loads(path.read_text(encoding="utf-8")), str(path))


def written(sizes: Mapping[str, int]) -> str:
    """The text of a mesh: data=2,model=4."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def nbytes(tree: Any) -> int:
    """Bytes on one device of arrays that have a shape, a type and a sharding."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def mesh_for(config: ModelConfig, slice_: str, mesh: str | None) -> Mesh:
    """The mesh of a slice; by default up to four chips share a model, whose heads they divide.

    Raises:
      UserError: an unknown slice or mesh, or no TPU compiler.
    """
    try:
        options = CHIPS[slice_.partition(":")[0]].options
        found = topologies.get_topology_desc(slice_, "tpu", **options).devices
    except (KeyError, RuntimeError) as error:
        raise UserError(f"no slice such as {SLICES[0]}, or no libtpu ({error})") from None
    model = max(m for m in (1, 2, 4) if len(found) % m == 0 and config.n_kv_heads % m == 0)
    default = {"data": math.gcd(len(found) // model, sharding.PROMPT_BATCH), "model": model}
    return sharding.mesh(mesh or written(default), found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One model on one mesh.

    Attributes:
      memory: bytes on one chip, by what they are for.
      left: bytes of HBM that stay free; negative if it does not fit.
      step: seconds of one new token for every row, at least and at most.
      efficiency: weights and caches, as a share of all bytes that a step moves from and to HBM.
      table: seconds of the paper's table, at least and at most.
    """

    memory: dict[str, int]
    left: int
    step: tuple[float, float]
    efficiency: float
    table: tuple[float, float]

    def __str__(self) -> str:
        lines = {name: f"{size / GIB:.2f} GiB" for name, size in self.memory.items()}
        lines["left"] = f"{self.left / GIB:.2f} GiB"
        lines["step"] = f"{1e3 * self.step[0]:.1f} to {1e3 * self.step[1]:.1f} ms"
        lines["bytes"] = f"{self.efficiency:.0%} of a step's are weights and caches"
        lines["table"] = f"{self.table[0]:.0f} to {self.table[1]:.0f} s"
        return "\n".join(f"  {name:18s}{value}" for name, value in lines.items())


def check(config: ModelConfig, mesh: Mesh, chip: Chip, rows: int) -> Check:
    """Compile the programs of a sweep whose rows decode so many together.

    Raises:
      UserError: what the compiler refuses, or the mesh cannot split the rows.
    """
    sharding.check_batch(rows, mesh)
    sweep, groups = Sweep(config, mesh), len(layer_groups(config.n_layers))
    state, read = sweep.state(rows), compiled(*sweep.prefill(LONGEST))
    decoded = compiled(*sweep.decode(state), steps=decode.CHUNK)
    weights = nbytes(sweep.params)
    memory = {
        "weights": weights,
        "decoding rows": nbytes(state),
        # Outputs of all layer groups, and the rows that are gathered from them.
        "prompts in flight": groups * read.made + nbytes(sweep.state(sharding.PROMPT_BATCH)),
        "temporaries": max(decoded.memory, read.memory),
    }
    needed = weights + nbytes(state.cache)
    step = decoded.seconds(chip, needed)
    group = read.seconds(chip, weights // groups)
    calls = groups * math.ceil(ROWS * USUAL / (sharding.PROMPT_BATCH * LONGEST))
    steps = math.ceil(ROWS / rows) * NEW_TOKENS
    return Check(
        memory=memory,
        left=int(chip.hbm) - sum(memory.values()),
        step=step,
        efficiency=needed / decoded.accessed,
        table=(calls * group[0] + steps * step[0], calls * group[1] + steps * step[1]),
    )


def larger(config: ModelConfig, mesh: Mesh, chip: Chip, rows: int, found: Check) -> int:
    """A number of rows that fits: as many as `found` leaves room for, fewer until they compile."""
    multiple = 8 * mesh.shape["data"]
    a_row = (found.memory["decoding rows"] + found.memory["temporaries"]) / rows
    trial = int(min(rows + found.left / a_row, ROWS)) // multiple * multiple
    while trial > 0:
        with contextlib.suppress(UserError):
            if check(config, mesh, chip, trial).left >= 0:
                break
        trial = trial * 15 // 16 // multiple * multiple
    return trial


def main() -> None:
    """Check every model on every slice; exit code 1 if one does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=MODELS, help="a preset, or a config.json")
    parser.add_argument("--topology", nargs="+", default=SLICES, help="such as v5e:2x4")
    parser.add_argument("--mesh", help="such as data=2,model=4")
    parser.add_argument("--batch", type=int, default=256, help="rows that decode together")
    parser.add_argument("--no-search", action="store_true", help="look for no larger batch")
    given, failed = parser.parse_args(), False
    for model, slice_ in itertools.product(given.model, given.topology):
        try:
            config = config_of(model)
            mesh, chip = mesh_for(config, slice_, given.mesh), CHIPS[slice_.partition(":")[0]]
            print(f"{model} on {slice_}, {written(mesh.shape)}, {given.batch} rows")
            found = check(config, mesh, chip, given.batch)
            print(found, "" if found.left >= 0 else "\n  does not fit; choose a smaller --batch")
            failed |= found.left < 0
            if not given.no_search:
                print(f"  {'also fits':18s}{larger(config, mesh, chip, given.batch, found)} rows")
        except UserError as error:
            print(f"tpu-check: {model} on {slice_}: {error}", file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    # The TPU compiler is called by name; JAX itself stays on the CPU.
    jax.config.update("jax_platforms", "cpu")
    main()
