"""Compile the sweep for TPUs that are not there: what fits, how fast, how large a batch.

XLA's TPU compiler runs on any Linux machine and needs only the name of a slice. So the programs of
a real sweep (`slots.advance`, and what `prefill` is made of) are compiled for full-size
models without a weight, and what the compiler says is set against what the chip can do:

    left        = HBM - (weights + cache + what else the program holds + its temporaries)
    step        = estimated cycles / clock + what the links need for the exchanged bytes
    bound       = (weights + cache, each read once) / HBM bandwidth
    table       = batches of rows x new tokens x step + batches of prompts x segments
                  + batches of rows x putting them together

Nothing here was measured on a TPU; every number is the compiler's or a data sheet's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from jaxsteer import hlo, lowering
from jaxsteer.chips import HOP, Chip, chip_of, devices
from jaxsteer.errors import UserError
from jaxsteer.generation import packing as lanes
from jaxsteer.generation import prefill
from jaxsteer.generation.decode import CHUNK
from jaxsteer.generation.layer_sharing import BATCH
from jaxsteer.model import sharding
from jaxsteer.model.config import ModelConfig
from jaxsteer.published import MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A study to foretell: by default the paper's table, in prompts as long as StrongREJECT's.

    Attributes:
      prompts: number of prompts.
      conditions: number of conditions.
      new_tokens: tokens of each reply; all replies count as that long.
      beginning: padded tokens of the system prompt that rows share.
      prompt: tokens of a usual prompt; lanes hold as many as fit.
      longest: padded tokens of the longest prompt, for which every slot has room.
    """

    prompts: int = 313
    conditions: int = 11
    new_tokens: int = 150
    beginning: int = 48
    prompt: int = 64
    longest: int = 256

    @property
    def rows(self) -> int:
        """Number of (condition, prompt) rows."""
        return self.prompts * self.conditions

    @property
    def width(self) -> int:
        """Tokens of a lane of usual prompts, as `lanes.pack` makes them."""
        return min(lanes.WIDTH, self.longest)

    @property
    def lanes(self) -> int:
        """How many lanes the rows' prompts fill.

        >>> Table(prompts=313, conditions=11, prompt=64).lanes
        1722
        """
        return math.ceil(self.rows / max(1, min(lanes.MEMBERS, self.width // self.prompt)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One model on one slice; memory is per chip and in bytes.

    Attributes:
      model: name in `MODELS`.
      topology: chip and shape of the slice.
      mesh: sizes of the data and the model axis.
      batch: rows that decode together.
      weights: parameters.
      cache: keys and values of the chip's rows.
      other: what else stays: interventions, buffers, beginnings, prompts on their way to a slot.
      temporaries: what the dearest program takes while it runs.
      left: of HBM; negative if it does not fit.
      step_seconds: one new token for every row, as the compiler estimates.
      exchange_seconds: the part of it that links need; overlap with the rest is not counted on.
      chunk_seconds: what entering and leaving a chunk of steps costs, once per chunk.
      bound_seconds: reading weights and cache once at full bandwidth.
      exchanges: what devices exchange in a step.
      exchanged_bytes: their results on one device, added up.
      lane: tokens of a lane of prompts.
      prefill_seconds: a batch of lanes through all layers.
      together_seconds: putting a batch of rows together once their prompts are read.
      largest_batch: rows that fit, confirmed by compiling, at most the table's; None if it was not
        asked for.
      table_rows: rows of the table.
      table_seconds: the whole table: compiled estimate, every reply at full length.
      compile_seconds: of all programs of this check.
      notes: what the model axis could not split.
    """

    model: str
    topology: str
    mesh: dict[str, int]
    batch: int
    weights: int
    cache: int
    other: int
    temporaries: int
    left: int
    step_seconds: float
    exchange_seconds: float
    chunk_seconds: float
    bound_seconds: float
    exchanges: tuple[hlo.Exchange, ...]
    exchanged_bytes: int
    lane: int
    prefill_seconds: float
    together_seconds: float
    largest_batch: int | None
    table_rows: int
    table_seconds: float
    compile_seconds: float
    notes: tuple[str, ...]

    @property
    def holds_table(self) -> bool:
        """Whether the table bounds the largest batch, and not the memory."""
        multiple = _multiple(self.mesh)
        return self.largest_batch == self.table_rows // multiple * multiple

    @property
    def fits(self) -> bool:
        """Whether the chip holds it."""
        return self.left >= 0


class DoesNotFitError(UserError):
    """A program needs more memory than the chip has, whatever else is there."""


def default_mesh(config: ModelConfig, count: int) -> dict[str, int]:
    """The mesh for a slice: up to four devices share a model, whose heads they divide.

    >>> default_mesh(MODELS["llama-3.1-8b"], 8)
    {'data': 2, 'model': 4}

    The data axis has to divide `parallel.TOGETHER`, so of a large slice only a part is used:

    >>> default_mesh(MODELS["llama-3.1-8b"], 256)
    {'data': 16, 'model': 4}
    """
    model = max(m for m in (1, 2, 4) if count % m == 0 and config.n_kv_heads % m == 0)
    return {"data": math.gcd(count // model, sharding.TOGETHER), "model": model}


def exchange_seconds(exchanges: tuple[hlo.Exchange, ...], model: int, chip: Chip) -> float:
    """What the links of a ring of `model` chips need, both ways around it.

    Every chip passes on (n - 1) / n of a result for an all-gather, a reduce-scatter or an
    all-to-all, and twice that for an all-reduce; a result is at its last chip after n / 2 hops.
    All exchanges are counted as along the model axis, which has nearly all of their bytes.
    """
    if model == 1:
        return 0.0
    seconds = 0.0
    for e in exchanges:
        passes = 2 if e.kind == "all-reduce" else 1
        moved = e.nbytes * (1 if e.kind == "collective-permute" else (model - 1) / model)
        hops = 1 if e.kind == "collective-permute" else model / 2
        seconds += e.times * passes * (moved / (2 * chip.link) + hops * HOP)
    return seconds


def largest(
    batches: tuple[int, int], needed: tuple[int, int], room: int, multiple: int, most: int
) -> int:
    """The largest batch whose bytes fit, from the bytes of two batches and a straight line.

    >>> largest((64, 128), (1000, 1640), 2000, 8, 10000)
    160

    Args:
      batches: two batch sizes.
      needed: bytes of each.
      room: bytes there are.
      multiple: what it has to be a multiple of.
      most: a limit that is of no use to exceed.
    """
    slope = (needed[1] - needed[0]) / (batches[1] - batches[0])
    rows = batches[0] + (room - needed[0]) / slope if slope > 0 else most
    return max(0, int(min(rows, most) // multiple * multiple))


def table_seconds(
    table: Table, batch: int, step: float, chunk: float, prefill_batch: float, together: float
) -> tuple[float, float]:
    """Seconds to decode a table and to read its prompts.

    All replies have full length, so that slots are all full but in the last turn; conditions share
    nothing but their system prompt.

    Args:
      table: what to run.
      batch: rows that decode together.
      step: seconds of a step.
      chunk: seconds of entering and leaving a chunk of steps.
      prefill_batch: seconds of a batch of lanes through all layers.
      together: seconds of putting a batch of rows together.
    """
    steps = table.new_tokens - 1
    decode = math.ceil(table.rows / batch) * (steps * step + math.ceil(steps / CHUNK) * chunk)
    read = math.ceil(table.lanes / BATCH) * prefill_batch
    return decode, read + math.ceil(table.rows / BATCH) * together


def mesh_on(model: str, topology: str, mesh: str | None, batch: int) -> Mesh:
    """The mesh of a model on a slice.

    Args:
      model: name in `MODELS`.
      topology: chip and shape of the slice.
      mesh: as `parallel.parse` reads it; None for `default_mesh`.
      batch: rows that decode together.

    Raises:
      UserError: an unknown model, topology or mesh, one that does not go with the others, or no TPU
        compiler.
    """
    if model not in MODELS:
        raise UserError(f"model {model!r} is not known here; there are {', '.join(MODELS)}")
    found = devices(topology)
    if mesh is None:
        mesh = sharding.written(default_mesh(MODELS[model], len(found)))
    spread = sharding.mesh(mesh, found)
    sharding.check_batch(batch, spread)
    return spread


def check(
    model: str,
    topology: str,
    *,
    mesh: str | None = None,
    batch: int = 256,
    table: Table | None = None,
    search: bool = True,
) -> Check:
    """Compile a sweep for a slice.

    Args:
      model: name in `MODELS`.
      topology: chip and shape of the slice.
      mesh: as `parallel.parse` reads it; None for `default_mesh`.
      batch: rows that decode together.
      table: the study to foretell.
      search: also look for the largest batch, which compiles decoding twice more.

    Raises:
      UserError: as `mesh_on`.
      DoesNotFitError: a program that does not fit even before anything else is in the memory.
    """
    table = table or Table()
    spread = mesh_on(model, topology, mesh, batch)
    config, chip, sizes = MODELS[model], chip_of(topology), dict(spread.shape)
    shape = sharding.written(sizes)
    sweep = lowering.Sweep(config, spread, table.new_tokens)
    seconds = 0.0

    def program(*call: Any) -> lowering.Program:
        nonlocal seconds
        try:
            done = lowering.compiled(*call)
        except RuntimeError as error:
            raise _refused(error, model, topology, shape) from None
        seconds += done.seconds
        return done

    state = sweep.state(batch, table.beginning, table.longest)
    decode = program(*sweep.advance(state))
    prefix = sweep.prefix(table.beginning)
    stages = prefill.stages(config.n_layers)
    room = sweep.room(table.beginning, table.longest)

    def reading(width: int) -> _Reading:
        levels = sweep.levels(width, prefix)
        return _Reading(
            levels=sharding.nbytes(levels),
            segment=program(*sweep.segment(levels[0].stream, stages[0], width, prefix)),
            gather=program(*sweep.gather(levels[1], stages[0], prefix, room)),
            choose=program(*sweep.first_token(levels, width, prefix, room)),
        )

    # Time goes by usual lanes, memory by the longest prompt's.
    usual = reading(table.width)
    widest = usual if table.width == table.longest else reading(table.longest)

    weights, cache = sharding.nbytes(sweep.params), sharding.nbytes(state.cache)
    held = sharding.nbytes(state)
    # Beside the slots, while they decode too: beginnings, a batch's levels, and its rows that wait.
    beside = sharding.nbytes(prefix) + widest.levels
    beside += len(stages) * widest.gather.made + widest.choose.made
    temporaries = max(decode.temporaries + decode.made, widest.temporaries)
    left = chip.hbm - weights - held - beside - temporaries

    most = None
    if search:
        stays = weights + beside
        most = _search(sweep, table, chip, batch, decode, widest, stays, state, program)

    model_axis = sizes["model"]
    exchanged = exchange_seconds(decode.turn.exchanges, model_axis, chip)
    step = decode.turn.cycles / chip.clock + exchanged

    def alone(p: lowering.Program) -> float:
        return p.once.cycles / chip.clock + exchange_seconds(p.once.exchanges, model_axis, chip)

    chunk = alone(decode)
    through = len(stages) * alone(usual.segment)
    together = len(stages) * alone(usual.gather) + alone(usual.choose)
    decoding, reading_seconds = table_seconds(table, batch, step, chunk, through, together)
    # Every step reads all weights but the token table, of which it reads the rows it needs.
    read = weights - sharding.nbytes(sweep.params["embed"]) * (not config.tied) + cache
    return Check(
        model=model,
        topology=topology,
        mesh=sizes,
        batch=batch,
        weights=weights,
        cache=cache,
        other=held - cache + beside,
        temporaries=temporaries,
        left=left,
        step_seconds=step,
        exchange_seconds=exchanged,
        chunk_seconds=chunk,
        bound_seconds=read / chip.bandwidth,
        exchanges=decode.turn.exchanges,
        exchanged_bytes=sum(e.nbytes * e.times for e in decode.turn.exchanges),
        lane=table.width,
        prefill_seconds=through,
        together_seconds=together,
        largest_batch=most,
        table_rows=table.rows,
        table_seconds=decoding + reading_seconds,
        compile_seconds=seconds,
        notes=tuple(sharding.notes(config, spread)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reading:
    """Programs that read prompts in lanes of one width.

    Attributes:
      levels: bytes of what a batch of lanes leaves at all levels.
      segment: some layers.
      gather: putting rows together at a level.
      choose: the first tokens.
    """

    levels: int
    segment: lowering.Program
    gather: lowering.Program
    choose: lowering.Program

    @property
    def temporaries(self) -> int:
        """Bytes that the dearest of them needs while it runs."""
        return max(p.temporaries for p in (self.segment, self.gather, self.choose))


def _search(
    sweep: lowering.Sweep,
    table: Table,
    chip: Chip,
    batch: int,
    decode: lowering.Program,
    reading: _Reading,
    stays: int,
    state: Any,
    program: Callable[..., lowering.Program],
) -> int:
    """The largest batch that fits: foretold from two, then compiled, and made smaller until so.

    No larger than the table, which would leave slots empty.
    """

    def needed(state: Any, decode: lowering.Program) -> int:
        return (
            stays
            + sharding.nbytes(state)
            + max(decode.temporaries + decode.made, reading.temporaries)
        )

    multiple = _multiple(sweep.mesh.shape)
    other = max(batch // 2 // multiple * multiple, multiple)
    if other == batch:
        other = 2 * batch
    second = sweep.state(other, table.beginning, table.longest)
    bytes_of = (needed(state, decode), needed(second, program(*sweep.advance(second))))
    rows = largest((batch, other), bytes_of, chip.hbm, multiple, table.rows)
    while rows > 0:
        full = sweep.state(rows, table.beginning, table.longest)
        try:
            if needed(full, program(*sweep.advance(full))) <= chip.hbm:
                return rows
        except DoesNotFitError:
            # Out of memory already while it was compiled.
            pass
        rows = rows * 15 // 16 // multiple * multiple
    return 0


def _multiple(mesh: Mapping[str, int]) -> int:
    # What the search goes by: eight rows a chip of the data axis.
    return 8 * mesh["data"]


def _refused(error: RuntimeError, model: str, topology: str, mesh: str) -> UserError:
    reason = str(error).splitlines()[0]
    if "RESOURCE_EXHAUSTED" not in reason:
        raise error
    return DoesNotFitError(
        f"{model} does not fit {topology} on mesh {mesh}: {reason.split(': ')[-1].rstrip('.')}; "
        "choose a smaller --batch, a larger model axis or a larger slice"
    )
