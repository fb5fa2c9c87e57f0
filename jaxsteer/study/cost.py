"""What a study would cost, without running it: rows, tokens, programs, memory, time.

The rows are those of `check`, so nothing is extracted. The time is a rough estimate: the
arithmetic of prefill and decode over the speed of a matrix product of the same shape, measured
here and now for a moment.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxsteer.directions.direction import Direction
from jaxsteer.generation import engine as rows
from jaxsteer.generation.layer_sharing import STEP, entries_at_once, kinds
from jaxsteer.generation.packing import Lanes
from jaxsteer.generation.prefill import stages
from jaxsteer.model import sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.weights import param_shapes
from jaxsteer.study import planned, validate
from jaxsteer.study.record import Add, Condition
from jaxsteer.study.spec import StudySpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a study.

    Attributes:
      conditions: number of conditions, twins and repeats included.
      rows: number of (condition, prompt) rows.
      prompt_tokens: real prompt tokens of all rows.
      computed_tokens: prompt tokens as computed: padding and short batches' fillers included, what
        rows share counted once, and a share of the layers as that share of a token.
      new_tokens: most tokens that can be generated.
      widths: of the lanes of the prompts' own tokens, for each of which prefill compiles.
      weights_bytes: memory of the parameters, of all devices together.
      cache_bytes: memory of the slots' keys and values, likewise.
      seconds: rough time of the rows on one device in float32, without setup and compilation, every
        reply at full length.
      open_choices: what the setup still has to choose before the rows run.
    """

    conditions: int
    rows: int
    prompt_tokens: int
    computed_tokens: int
    new_tokens: int
    widths: tuple[int, ...]
    weights_bytes: int
    cache_bytes: int
    seconds: float
    open_choices: tuple[str, ...]


def plan(spec: StudySpec, model: ChatModel, *, limit: int | None = None) -> Plan:
    """Plan a study.

    Raises:
      UserError: as running it would, for what is wrong in the spec or with its prompts.
    """
    config = model.config
    asked = validate.study(spec, model, planned.prompts(spec, limit))
    compiled = validate.deepest(spec, config.n_layers)
    stand_ins = _stand_ins(compiled, config)
    mesh = sharding.mesh_of(model.params)
    batch = rows.slots_for(spec.decoding.batch, len(asked), sharding.data_of(mesh))
    new = spec.decoding.max_new_tokens
    packed = rows.pack(asked, config.max_position - new)
    widths = sorted({len(lane) for lane in packed.tokens})
    known = kinds(planned.stacked(compiled, stand_ins, config))
    begun = -(-max((request.shared for request in asked), default=0) // STEP) * STEP
    computed = _computed(config, known, asked, packed, begun, entries_at_once(mesh))
    longest = max((len(request.tokens) - request.shared for request in asked), default=0)
    weights, cache = memory(model, batch, rows.cache_slots(begun, longest, new))
    prefill_rate, decode_rate = speeds(config, batch)
    return Plan(
        conditions=len(compiled),
        rows=len(asked),
        prompt_tokens=sum(len(request.tokens) for request in asked),
        computed_tokens=round(computed),
        new_tokens=len(asked) * new,
        widths=tuple(widths),
        weights_bytes=weights,
        cache_bytes=cache,
        seconds=computed / prefill_rate + -(-len(asked) // batch) * new / decode_rate,
        open_choices=validate.open_choices(spec),
    )


def _stand_ins(compiled: Sequence[Condition], config: ModelConfig) -> dict[str, Direction]:
    """Directions that only have the right shape."""
    generator = np.random.Generator(np.random.PCG64(0))
    names = {op.direction for condition in compiled for op in condition.operations}
    names |= {
        op.norm_of
        for condition in compiled
        for op in condition.operations
        if isinstance(op, Add) and op.norm_of
    }
    return {
        name: Direction(
            name=name,
            vectors=generator.standard_normal((config.n_layers, config.d_model)).astype(np.float32),
            provenance={},
        )
        for name in sorted(names)
    }


def memory(model: ChatModel, batch: int, slots: int) -> tuple[int, int]:
    """Bytes of the parameters and of all rows' keys and values, on all devices together.

    What a mesh cannot split is on several devices, and counts as often.

    Args:
      model: its parameters where they will be.
      batch: number of rows.
      slots: of each row's cache.
    """
    config, mesh = model.config, sharding.mesh_of(model.params)
    kept: tuple[int, ...] = (batch, config.n_kv_heads, slots, config.head_dim)
    devices = 1
    if mesh is not None:
        kept = NamedSharding(mesh, sharding.spec(sharding.CACHE, config, mesh)).shard_shape(kept)
        devices = mesh.size
    itemsize = model.params["embed"]["embedding"].dtype.itemsize
    cache = 2 * config.n_layers * math.prod(kept) * itemsize
    return sharding.nbytes(model.params) * devices, cache * devices


def _computed(
    config: ModelConfig,
    known: Sequence[Sequence[int]],
    asked: Sequence[rows.Request],
    packed: Lanes,
    begun: int,
    batch: int,
) -> float:
    """Prompt tokens through the whole model that prefill comes to, its sharing counted.

    Args:
      config: the model's configuration.
      known: from `kinds`.
      asked: all rows.
      packed: their lanes.
      begun: width of the shared beginnings; 0 if there are none.
      batch: lanes, or beginnings, at a time.
    """
    whole = 0.0
    for first, last in stages(config.n_layers):
        beginnings: set[Hashable] = set()
        read: dict[int, set[Hashable]] = {}
        for row, request in enumerate(asked):
            kind = known[last][request.condition]
            read.setdefault(packed.width(row), set()).add((kind, packed.lane[row]))
            beginnings.add((kind, tuple(request.tokens[: request.shared])))
        padded = sum(-(-len(some) // batch) * batch * width for width, some in read.items())
        padded += -(-len(beginnings) // batch) * batch * begun
        whole += padded * (last - first) / config.n_layers
    return whole


def n_params(config: ModelConfig) -> int:
    """Number of parameters, a tied head counted once."""
    return sum(int(np.prod(shape)) for shape in param_shapes(config).values())


def speeds(config: ModelConfig, batch: int) -> tuple[float, float]:
    """Prefill tokens per second and decode steps per second (each of `batch` rows), rough.

    A token costs 2 operations per parameter. Both rates come from an MLP-shaped float32 product
    with as many rows as prefill (256) and decode (`batch`) have.
    """
    parameters = n_params(config)

    def rate(rows: int) -> float:
        x = jnp.ones((rows, config.d_model))
        w = jnp.ones((config.d_model, config.d_ff))
        product = jax.jit(jnp.matmul)
        product(x, w).block_until_ready()
        started, runs = time.perf_counter(), 0
        while time.perf_counter() - started < 0.2:
            product(x, w).block_until_ready()
            runs += 1
        seconds = (time.perf_counter() - started) / runs
        return 2 * rows * config.d_model * config.d_ff / seconds

    return rate(256) / (2 * parameters), rate(batch) / (2 * parameters * batch)
