"""Layer sharing: rows are one entry of a prefill batch until their interventions differ.

Two rows with the same prompt whose interventions agree below a layer have the same residual stream
there, keys and values included. Prefill goes through the layers in groups (`prefill`). Before each
group, rows that have been the same so far become one entry, and so do rows whose prompts are in the
same packed sequence (`packing`). In a study that steers at resid_post.17 of 30 layers, 24
conditions cost as much as one up to layer 15, and those that only differ from layer 21 on are one
entry until there.

Three conditions, two packed sequences p and q; conditions 1 and 2 steer alike in the first group:

    before the first group      p012  q012
    before the second group     p0  q0  p12  q12
    before the third group      p0  q0  p1  q1  p2  q2
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxsteer.errors import heed_stop
from jaxsteer.generation import prefill
from jaxsteer.generation.prefill import LayerOutput, Prefix, PromptBatch, SequenceBatch, take
from jaxsteer.generation.requests import (
    BATCH_ALONE,
    WIDTH,
    PackedPrompts,
    Request,
    fitted,
    grouped,
    one_each,
    parts,
    together,
)
from jaxsteer.model import sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.decoder import blocks_graph
from jaxsteer.model.interventions import Interventions, compile_conditions
from jaxsteer.words import still

# Rows of a finished batch, and entries of a batch on a mesh: enough tokens for full speed, few
# enough that the last batch wastes little.
BATCH = sharding.PROMPT_BATCH
# Tokens up to which `BATCH` is that size: rows that are longer would take too much memory.
USUAL = 512
# Tokens of a prompt up to which nothing is said while it is read.
SILENT = 1024
# The width of prefixes is a multiple of this.
PREFIX_MULTIPLE = 16

# The entry of each output so far that a row was part of.
Path = tuple[int, ...]


def layer_groups(n_layers: int) -> list[tuple[int, int]]:
    """First layer and last + 1 of each group: at most ten groups, of one size where possible.

    More groups would share more layers, and cost more calls than that saves.

    >>> layer_groups(32)[:2], len(layer_groups(32)), len(layer_groups(30))
    ([(0, 4), (4, 8)], 8, 10)
    >>> layer_groups(31)[-2:]
    [(24, 28), (28, 31)]
    """
    least = -(-n_layers // 10)
    size = next((s for s in range(least, 2 * least) if n_layers % s == 0), least)
    return [(first, min(first + size, n_layers)) for first in range(0, n_layers, size)]


def equivalence_classes(interventions: Interventions) -> list[list[int]]:
    """[depth][condition]: conditions of one class do the same to prompts in the layers below depth.

    Three conditions that add nothing, v at layer 1, and w at layer 1, in a model of two layers:
        [[0, 0, 0], [0, 0, 0], [0, 1, 2]]
    """
    sites = {tap: jax.tree.map(np.asarray, site) for tap, site in interventions.sites.items()}
    on_prompt = [bool(on) for on in np.asarray(interventions.on_prompt)]

    def arrays(condition: int, taps: Sequence[str], layer: int) -> bytes:
        # Conditions that leave prompts alone do the same to them, whatever their arrays hold.
        some = [sites[tap] for tap in taps if tap in sites and on_prompt[condition]]
        return b"".join(leaf[condition, layer].tobytes() for leaf in jax.tree.leaves(some))

    def numbered(keys: Sequence[Hashable]) -> list[int]:
        numbers: dict[Hashable, int] = {}
        return [numbers.setdefault(key, len(numbers)) for key in keys]

    conditions = range(len(on_prompt))
    found = [numbered([(on_prompt[c], arrays(c, ["embed"], 0)) for c in conditions])]
    for layer in range(sites["resid_post"].add.shape[1]):
        taps, above = ["resid_mid", "resid_post"], found[-1]
        found.append(numbered([(above[c], arrays(c, taps, layer)) for c in conditions]))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """The prompts of a run, and all that reading them takes.

    Attributes:
      model: the model that reads them.
      requests: all rows.
      interventions: stacked conditions, host arrays.
      probes: unit directions whose projections are recorded.
      packed: where each row's own tokens are.
      prefixes: prefixes that have been run; None for none.
      prefix: index into `prefixes`, by row; the same for all prompts of a packed sequence and
        condition.
      capture: keep the stream at `resid_post` (see `prefill.states`).
    """

    model: ChatModel
    requests: Sequence[Request]
    interventions: Interventions
    probes: Float[np.ndarray, "layer probe d_model"]
    packed: PackedPrompts
    prefixes: Prefix | None = None
    prefix: Sequence[int] = ()
    capture: bool = False

    @functools.cached_property
    def classes(self) -> list[list[int]]:
        """`equivalence_classes` of the interventions."""
        return equivalence_classes(self.interventions)

    def interventions_of(self, rows: Sequence[int]) -> Interventions:
        """The interventions of some rows."""
        return self.interventions.rows(np.array([self.requests[row].condition for row in rows]))

    def prefixes_of(self, rows: Sequence[int], some: Prefix | None) -> Prefix | None:
        """Those of `prefixes`, or of a part of them, that some rows start with."""
        return some and take(some, np.array([self.prefix[row] for row in rows], np.int32))

    def placed(self, tree: Any) -> Any:
        """Arrays with a leading axis of rows or entries, on the model's devices."""
        return sharding.place(tree, self.model.config, self.model.mesh)


def untouched(config: ModelConfig) -> Interventions:
    """One condition, which leaves the model alone."""
    n_layers, d_model = config.n_layers, config.d_model
    return compile_conditions([[]], ["all"], n_layers=n_layers, d_model=d_model)


def filled(rows: Sequence[int], size: int) -> list[int]:
    """The rows, and the first of them again up to `size`: a batch always has its full shape."""
    return [*rows, *[rows[0]] * (size - len(rows))]


def read(
    prompts: Prompts, rows: Sequence[int], *, size: int = 0, slots: int = 0, finished: int = 0
) -> Iterator[tuple[list[int], PromptBatch]]:
    """Take rows through all layers, depth first, so memory holds one batch per layer group.

    Args:
      prompts: the prompts of a run.
      rows: which to read; their packed sequences have one width.
      size: packed sequences that go through a layer group together; 0 for `BATCH_ALONE`, or
        `BATCH` on a mesh, fewer if they are long, and fewer in a run of fewer.
      slots: length of the caches that will be made of them.
      finished: rows to make a finished batch for, of which it holds at most `BATCH`; 0 for four
        times the packed sequences.

    Yields:
      The rows of a finished batch, fewer if they are long, and what reading them left.
    """
    packed, mesh, data = prompts.packed, prompts.model.mesh, sharding.data_size(prompts.model.mesh)
    width = packed.width(rows[0])
    entries, count = batch_sizes(mesh, width, slots)
    # By sequences, so that further conditions compile nothing; all, not those that are left.
    size = size or fitted(entries, sum(len(tokens) == width for tokens in packed.tokens), data)
    # A few rows, since few sequences may have many conditions.
    sizes = size, fitted(count, finished or 4 * len(packed.tokens), data)
    yield from _deeper(prompts, [], {row: () for row in rows}, sizes)


def batch_sizes(mesh: Mesh | None, width: int, slots: int = 0) -> tuple[int, int]:
    """Most entries of a batch, and most rows of a finished one; arguments as for `read`.

    >>> batch_sizes(None, 128, 192), batch_sizes(None, 1024, 1056), batch_sizes(None, 8192)
    ((8, 16), (1, 7), (1, 1))
    """
    most, usual = (BATCH_ALONE, WIDTH) if mesh is None else (BATCH, USUAL)
    return together(most, width, usual), together(BATCH, max(width, slots), USUAL)


def between(stream: Array, done: int, groups: int) -> None:
    """Between two layer groups: hear a stop signal and, in long prompts, say how far they are."""
    heed_stop()
    if stream.shape[-2] > SILENT:
        jax.block_until_ready(stream)
        still(f"reading a prompt of {stream.shape[-2]:,} tokens: {done / groups:.0%}")


def _deeper(
    prompts: Prompts, outputs: list[LayerOutput], paths: dict[int, Path], sizes: tuple[int, int]
) -> Iterator[tuple[list[int], PromptBatch]]:
    """Take rows through the layers that follow `outputs`; arguments as for `_run`.

    `sizes` are those of a batch of entries, and of a finished batch of rows.
    """
    (entries, count), groups = sizes, layer_groups(prompts.model.config.n_layers)
    if len(outputs) > len(groups):
        for some in parts(list(paths), count):
            yield some, _batch(prompts, filled(some, count), outputs, paths)
        return
    for here in parts(_entries(prompts, len(outputs), paths), entries):
        if outputs:
            between(outputs[-1].stream, len(outputs) - 1, len(groups))
        # Held by no variable here, so that memory never holds the outputs of two batches.
        yield from _deeper(prompts, *_run(prompts, outputs, paths, here, entries), sizes)


def _entries(prompts: Prompts, depth: int, paths: dict[int, Path]) -> list[list[int]]:
    """The rows of each entry of the next layers, after `depth` outputs."""
    groups = layer_groups(prompts.model.config.n_layers)
    classes = prompts.classes[groups[depth - 1][1] if depth else 0]
    of_row = {row: classes[prompts.requests[row].condition] for row in paths}
    # Class by class: a full batch is of one class, and fills batches again where that divides.
    rows = sorted(paths, key=of_row.__getitem__)
    return list(grouped(rows, lambda row: (of_row[row], prompts.packed.sequence[row])).values())


def _run(
    prompts: Prompts,
    outputs: list[LayerOutput],
    paths: dict[int, Path],
    entries: list[list[int]],
    size: int,
) -> tuple[list[LayerOutput], dict[int, Path]]:
    """Run entries through the next layers: all outputs so far, and the paths of the rows.

    Args:
      prompts: the prompts of a run.
      outputs: of the layers so far.
      paths: by row.
      entries: the rows of each entry.
      size: entries of a batch.
    """
    model = prompts.model
    rows = filled([members[0] for members in entries], size)
    tokens, segment_ids = prompts.packed.batch(rows)
    interventions = prompts.interventions_of(rows)
    if not outputs:
        given = prompts.placed((tokens, segment_ids, interventions))
        done = prefill.embed(model.definition, model.params, *given)
    else:
        first, last = layer_groups(model.config.n_layers)[len(outputs) - 1]
        stream, prefixes = outputs[-1].stream, prompts.prefixes
        batch = SequenceBatch(
            parent=np.array([paths[row][-1] for row in rows], np.int32),
            segment_ids=segment_ids,
            prefix=prompts.prefixes_of(rows, prefixes and prefixes.layers(first, last)),
            interventions=interventions.layers(first, last),
        )
        done = prefill.run_layers(
            blocks_graph(model.config, last - first, stream.dtype),
            prefill.group_params(model.params, first, last),
            stream,
            prompts.placed(batch),
            prompts.probes[first:last],
            np.int32(first),
            prompts.capture,
        )
    after = {row: (*paths[row], e) for e, members in enumerate(entries) for row in members}
    return [*outputs, done], after


def _batch(
    prompts: Prompts, rows: list[int], outputs: list[LayerOutput], paths: dict[int, Path]
) -> PromptBatch:
    """What reading some rows left."""
    segment = np.array([prompts.packed.segment[row] for row in rows], np.int32)
    entry = np.array([paths[row] for row in rows], np.int32)
    _, segment_ids = prompts.packed.batch(rows)
    bare = prompts.prefixes and dataclasses.replace(prompts.prefixes, cache=[])
    given = {
        "real": segment_ids == segment[:, None],
        "prefix": prompts.prefixes_of(rows, bare),
        "interventions": prompts.interventions_of(rows),
        "ids": np.array([prompts.requests[row].row_id for row in rows], np.uint32),
    }
    return PromptBatch(outputs=outputs, entry=entry, segment=segment, **prompts.placed(given))


def with_prefixes(prompts: Prompts) -> Prompts:
    """The prompts with every distinct prefix run, once for each condition that it is read under."""
    if not any(request.shared for request in prompts.requests):
        return prompts
    # One condition more, which leaves prompts alone, for prefixes that are never steered.
    steering = prompts.interventions
    count = len(steering.on_prompt)
    steering = steering.rows(np.array([*range(count), 0]))
    steering = dataclasses.replace(steering, on_prompt=np.append(steering.on_prompt[:count], False))
    asked = [(r.prefix, count if r.plain else r.condition) for r in prompts.requests]
    prefixes, prefix = run_prefixes(prompts.model, asked, steering, prompts.probes)
    return dataclasses.replace(prompts, prefixes=prefixes, prefix=prefix)


def run_prefixes(
    model: ChatModel,
    asked: Sequence[tuple[tuple[int, ...], int]],
    interventions: Interventions | None = None,
    probes: Float[np.ndarray, "layer probe d_model"] | None = None,
) -> tuple[Prefix, list[int]]:
    """Run the prefixes of prompts, equal ones once; an empty one is all padding.

    Args:
      model: the model that reads them.
      asked: token ids and condition of each.
      interventions: stacked conditions; None for one that leaves the model alone.
      probes: unit directions whose projections are recorded; None for none.

    Returns:
      An entry for each distinct prefix and condition, and copies that fill batches, all of one
      width: the longest, rounded up to a multiple of 16. Then the entry of each that was asked.
    """
    index = {distinct: number for number, distinct in enumerate(dict.fromkeys(asked))}
    tokens = [tokens for tokens, _ in index]
    width = -(-max(1, *map(len, tokens)) // PREFIX_MULTIPLE) * PREFIX_MULTIPLE
    requests = [Request(tokens=tokens, condition=condition) for tokens, condition in index]
    prompts = Prompts(
        model=model,
        requests=requests,
        interventions=interventions or untouched(model.config),
        probes=prefill.no_probes(model.config) if probes is None else probes,
        packed=one_each(tokens, width),
    )
    found, place, entries = list[Prefix](), dict[int, int](), 0
    # A batch for as many rows as there are texts: most conditions differ in the last layers, so a
    # larger one would be full of copies.
    for rows, batch in read(prompts, range(len(index)), finished=len(prompts.packed.tokens)):
        found.append(prefill.as_prefix(batch))
        place |= {row: entries + number for number, row in enumerate(rows)}
        entries += len(batch.ids)
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)
    return joined, [place[index[one]] for one in asked]
