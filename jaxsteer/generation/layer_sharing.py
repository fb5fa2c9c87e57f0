"""Which rows share which layers: prompts run as one until their interventions differ.

Two rows with the same prompt whose interventions agree below a layer have the same residual
stream there, keys and values included. Prefill goes through the layers in segments (`prefill`), and
before each one rows that are still the same are one entry, and those whose prompts are side by side
in one lane (`lanes`). In a study that steers at resid_post.17 of 30 layers, 24 conditions on one
lane cost one lane's work up to layer 15, and those that only differ from layer 21 on are one until
then.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from jaxsteer.generation import packing as lanes
from jaxsteer.generation import prefill
from jaxsteer.generation.packing import Lanes
from jaxsteer.generation.prefill import Level
from jaxsteer.generation.prefix import Prefix, take
from jaxsteer.model import sharding
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.decoder import Decoder, Params, blocks_graph
from jaxsteer.model.interventions import Interventions, compile_conditions

# Entries of a batch on a mesh, and rows that are finished together: enough tokens for full speed,
# few enough that a last batch wastes little.
BATCH = sharding.TOGETHER
# Entries of a batch on one device: fewer keep it as busy.
BATCH_ALONE = 8
# The width of shared beginnings is a multiple of this.
STEP = 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """Rows to prefill, and all that it takes; the lists have one entry per row.

    Attributes:
      definition: from `model.graph`.
      config: the model's configuration.
      params: its parameters.
      interventions: stacked conditions, host arrays.
      probes: unit directions whose projections are recorded.
      conditions: index into `interventions`.
      lanes: where each prompt is, without its shared beginning; of one lane and condition, all
        have the same one.
      prefix: shared beginnings, already run; None for none.
      beginning: which of them each row has.
    """

    definition: nnx.GraphDef[Decoder]
    config: ModelConfig
    params: Params
    interventions: Interventions
    probes: Float[np.ndarray, "layer probe d_model"]
    conditions: Sequence[int]
    lanes: Lanes
    prefix: Prefix | None
    beginning: Sequence[int]

    def prefix_of(
        self, rows: Sequence[int], batch: int, layers: tuple[int, int] | None = None
    ) -> Prefix | None:
        """The beginnings of some rows, filled up to `batch`; of some layers, their cache only."""
        if self.prefix is None:
            return None
        some = self.prefix
        if layers is not None:
            some = dataclasses.replace(some, cache=some.cache[slice(*layers)], realised={})
        return take(some, _filled([self.beginning[i] for i in rows], batch))

    def interventions_of(self, rows: Sequence[int], batch: int) -> Interventions:
        """The interventions of some rows, filled up to `batch`."""
        return self.interventions.rows(_filled([self.conditions[i] for i in rows], batch))

    def placed(self, tree: Any) -> Any:
        """Row-leading arrays, on the devices of the parameters."""
        return sharding.place(tree, self.config, sharding.mesh_of(self.params))

    def lanes_of(
        self, rows: Sequence[int], width: int, batch: int
    ) -> tuple[Int[np.ndarray, "entry token"], Int[np.ndarray, "entry token"]]:
        """Tokens and owners of the lanes of some rows, filled up to `batch`."""
        return self.lanes.filled([self.lanes.lane[i] for i in rows], width, batch)

    def members_of(self, rows: Sequence[int], batch: int) -> Int[np.ndarray, " entry"]:
        """Which of its lane's prompts each row's is; 1 for fillers."""
        return np.array([self.lanes.member[i] for i in rows] + [1] * (batch - len(rows)), np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows that have been through all layers.

    Attributes:
      rows: which, at most `BATCH`.
      levels: what `embed` and each segment left.
      places: the entry of each row's lane at each level; fillers are at 0.
      member: which of the lane's prompts each row's is, from 1.
      real: which tokens of the lane are each row's.
    """

    rows: list[int]
    levels: list[Level]
    places: Int[np.ndarray, "level row"]
    member: Int[np.ndarray, " row"]
    real: Bool[np.ndarray, "row token"]


def entries_at_once(mesh: Mesh | None) -> int:
    """How many lanes, or beginnings, go through a segment at a time."""
    return BATCH_ALONE if mesh is None else BATCH


def _filled(numbers: Sequence[int], batch: int) -> Int[np.ndarray, " entry"]:
    return np.array([*numbers] + [0] * (batch - len(numbers)), np.int32)


def kinds(interventions: Interventions) -> list[list[int]]:
    """[depth][condition]: conditions of one number do the same to prompts below that depth.

    Three conditions that add nothing, v at layer 1, and w at layer 1, in a model of two layers:
        [[0, 0, 0], [0, 0, 0], [0, 1, 2]]
    """
    sites = {tap: jax.tree.map(np.asarray, site) for tap, site in interventions.sites.items()}
    n_layers = sites["resid_post"].add.shape[1]
    touched = np.asarray(interventions.on_prompt)
    digests = [hashlib.sha256(bytes([int(on)])) for on in touched]

    def take_in(taps: Sequence[str], layer: int) -> None:
        for condition, digest in enumerate(digests):
            # A condition that leaves prompts alone does the same to all of them, whatever it is.
            for tap in [t for t in taps if t in sites and touched[condition]]:
                for leaf in jax.tree.leaves(sites[tap]):
                    digest.update(leaf[condition, layer].tobytes())

    found = []
    take_in(["embed"], 0)
    for layer in range(n_layers + 1):
        numbers: dict[bytes, int] = {}
        found.append([numbers.setdefault(d.digest(), len(numbers)) for d in digests])
        if layer < n_layers:
            take_in(["resid_mid", "resid_post"], layer)
    return found


def descend(
    work: Work, rows: Sequence[int], width: int, *, batch: int = 0, together: int = BATCH
) -> Iterator[Batch]:
    """Take rows through all layers, depth first: memory holds one batch per segment.

    Args:
      work: what the rows are.
      rows: which of them to run; their lanes have that width.
      width: tokens of a lane.
      batch: entries of a batch; 0 for `entries_at_once`.
      together: most rows of each result.
    """
    descent = _Descent(
        work=work,
        width=width,
        batch=batch or entries_at_once(sharding.mesh_of(work.params)),
        together=together,
        known=kinds(work.interventions),
        stages=prefill.stages(work.config.n_layers),
    )
    yield from descent.below(0, [], {i: () for i in rows})


# Not functions within `descend`: one that calls itself is a cycle, which would hold the work's
# arrays until Python looks for cycles.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Descent:
    """How rows go down.

    Attributes:
      work: what the rows are.
      width: tokens of a lane.
      batch: entries of a batch.
      together: most rows of each result.
      known: from `kinds`.
      stages: first and last + 1 of each segment's layers.
    """

    work: Work
    width: int
    batch: int
    together: int
    known: list[list[int]]
    stages: list[tuple[int, int]]

    def _run(
        self, level: int, above: Level | None, entries: list[list[int]], parent: list[int]
    ) -> Level:
        work, batch = self.work, self.batch
        first = [members[0] for members in entries]
        tokens, owner = work.lanes_of(first, self.width, batch)
        done = work.interventions_of(first, batch)
        if above is None:
            return prefill.embed(work.definition, work.params, *work.placed((tokens, owner, done)))
        start, end = self.stages[level - 1]
        begun = work.prefix_of(first, batch, (start, end))
        return prefill.segment(
            blocks_graph(work.config, end - start, above.stream.dtype),
            prefill.part(work.params, start, end),
            above.stream,
            *work.placed((_filled(parent, batch), owner, begun, done.layers(start, end))),
            work.probes[start:end],
        )

    def below(
        self, level: int, levels: list[Level], places: dict[int, tuple[int, ...]]
    ) -> Iterator[Batch]:
        """From here down: `places` says where each row is at every level so far."""
        work, together = self.work, self.together
        if level > len(self.stages):
            ordered = list(places)
            for at in range(0, len(ordered), together):
                some = ordered[at : at + together]
                where = np.zeros((len(levels), together), np.int32)
                where[:, : len(some)] = np.array([places[i] for i in some]).T
                _, owner = work.lanes_of(some, self.width, together)
                member = work.members_of(some, together)
                real = owner == member[:, None]
                yield Batch(rows=some, levels=levels, places=where, member=member, real=real)
            return
        depth = 0 if level == 0 else self.stages[level - 1][1]
        kind = {i: self.known[depth][work.conditions[i]] for i in places}
        # Kind by kind, so that a full batch stays one kind and its children fill theirs.
        entries: dict[tuple[int, int], list[int]] = {}
        for i in sorted(places, key=kind.__getitem__):
            entries.setdefault((kind[i], work.lanes.lane[i]), []).append(i)
        listed = list(entries.values())
        for at in range(0, len(listed), self.batch):
            few = listed[at : at + self.batch]
            parent = [places[members[0]][-1] if level else 0 for members in few]
            done = self._run(level, levels[-1] if level else None, few, parent)
            inside = {i: (*places[i], place) for place, members in enumerate(few) for i in members}
            yield from self.below(level + 1, [*levels, done], inside)


def fill(
    definition: nnx.GraphDef[Decoder],
    config: ModelConfig,
    params: Params,
    beginnings: Sequence[Sequence[int]],
    conditions: Sequence[int],
    interventions: Interventions | None,
    probes: Float[np.ndarray, "layer probe d_model"],
) -> Prefix:
    """Run the beginnings of prompts, each under one condition; an empty one is all padding.

    Args:
      definition: from `model.graph`.
      config: the model's configuration.
      params: the model's parameters.
      beginnings: token ids.
      conditions: index into `interventions` of each.
      interventions: stacked conditions; None runs the plain model.
      probes: unit directions whose projections are recorded.

    Returns:
      One entry per beginning and fillers up to a full batch, all in one width: the longest,
      rounded up to a multiple of 16.
    """
    if interventions is None:
        interventions = compile_conditions(
            [[]], ["all"], n_layers=config.n_layers, d_model=config.d_model
        )
    width = -(-max(1, *map(len, beginnings)) // STEP) * STEP
    work = Work(
        definition=definition,
        config=config,
        params=params,
        interventions=interventions,
        probes=probes,
        conditions=conditions,
        lanes=lanes.alone(beginnings, width),
        prefix=None,
        beginning=[],
    )
    parts, order = [], []
    for done in descend(work, range(len(beginnings)), width):
        parts.append(prefill.beginnings(done.levels, done.places, done.member, done.real))
        order += done.rows + [-1] * (BATCH - len(done.rows))
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return take(joined, np.argsort([n if n >= 0 else len(order) for n in order], kind="stable"))
