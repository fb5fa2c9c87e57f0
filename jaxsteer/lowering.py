"""The programs of a sweep, compiled for a mesh without a weight: shapes, types and shardings only.

What a run would hold is worked out by the run's own functions: `jax.eval_shape` takes a batch of
prompts through `prefill` and into `slots`, and `parallel` says where each array would lie.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsteer import hlo
from jaxsteer.generation import decode, layer_sharing, prefill
from jaxsteer.generation.engine import cache_slots
from jaxsteer.generation.generate import Decoding, Sampling
from jaxsteer.generation.prefix import Prefix
from jaxsteer.model import sharding
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.decoder import blocks_graph, graph
from jaxsteer.model.interventions import Interventions, Project, compile_conditions
from jaxsteer.model.weights import nest, param_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program on one device.

    Attributes:
      held: bytes of its arguments.
      made: bytes of its results that are not written over its arguments.
      temporaries: bytes it needs while it runs.
      once: cost of running it, without its decode loop.
      turn: cost of one turn of that loop.
      seconds: how long it took to compile.
    """

    held: int
    made: int
    temporaries: int
    once: hlo.Cost
    turn: hlo.Cost
    seconds: float


def compiled(program: Callable[..., Any], *arguments: Any) -> Program:
    """Compile a jitted function for the devices that its arguments lie on.

    Raises:
      jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED if it cannot fit, whatever it shares with.
    """
    started = time.perf_counter()
    done = program.lower(*arguments).compile()  # type: ignore[attr-defined]
    memory = done.memory_analysis()
    once, turn = hlo.costs(done.as_text())
    return Program(
        held=memory.argument_size_in_bytes,
        made=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        once=once,
        turn=turn,
        seconds=time.perf_counter() - started,
    )


class Sweep:
    """A sweep of one model on one mesh, in bfloat16.

    Each row brings what a study asks of it at `resid_post`: a vector added, a direction removed;
    and one direction is recorded.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, new_tokens: int):
        self.config, self.mesh = config, mesh
        self.definition = graph(config, jnp.bfloat16)
        self.decoding = Decoding(max_new_tokens=new_tokens, eos=(0, 1))
        lies = sharding.param_shardings(config, mesh)
        self.params = nest(
            (path, jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=lies[path]))
            for path, shape in param_shapes(config).items()
        )
        vector = np.ones((config.n_layers, config.d_model), np.float32)
        self.asked = compile_conditions(
            [[Project(directions=(vector,), layers=(0,))]],
            ["all"],
            n_layers=config.n_layers,
            d_model=config.d_model,
        )

    def lay(self, tree: Any) -> Any:
        """A tree of row-leading shapes as a run would lay it on the mesh."""
        leaves, structure = jax.tree.flatten(tree)
        lies = sharding.shardings(tree, self.config, self.mesh)
        placed = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
            for leaf, where in zip(leaves, lies, strict=True)
        ]
        return jax.tree.unflatten(structure, placed)

    def whole(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        """An array that every device has all of."""
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec())
        )

    def rows(self, count: int, dtype: Any, *shape: int) -> Any:
        """One array of rows."""
        return self.lay(jax.ShapeDtypeStruct((count, *shape), dtype))

    def interventions(self, count: int) -> Interventions:
        """Of that many rows."""
        return self.lay(
            jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype), self.asked)
        )

    def probes(self, layers: int) -> jax.ShapeDtypeStruct:
        """One probe direction in each of some layers."""
        return self.whole(jnp.float32, layers, 1, self.config.d_model)

    def _places(self) -> jax.ShapeDtypeStruct:
        return self.whole(
            jnp.int32, len(prefill.stages(self.config.n_layers)) + 1, layer_sharing.BATCH
        )

    def segment(
        self, stream: Any, layers: tuple[int, int], width: int, prefix: Prefix | None
    ) -> tuple[Any, ...]:
        """The program of some layers over a batch of prompts, and its arguments."""
        first, last = layers
        if prefix is not None:
            prefix = dataclasses.replace(prefix, cache=prefix.cache[first:last], realised={})
        asked = jax.eval_shape(
            lambda i: i.layers(first, last), self.interventions(layer_sharing.BATCH)
        )
        return (
            prefill.segment,
            blocks_graph(self.config, last - first, jnp.bfloat16),
            prefill.part(self.params, first, last),
            stream,
            self.rows(layer_sharing.BATCH, jnp.int32),
            self.rows(layer_sharing.BATCH, jnp.int32, width),
            prefix,
            self.lay(asked),
            self.probes(last - first),
        )

    def levels(self, width: int, prefix: Prefix | None) -> list[prefill.Level]:
        """What a batch of prompts leaves at every level."""
        tokens = self.rows(layer_sharing.BATCH, jnp.int32, width)
        asked = self.interventions(layer_sharing.BATCH)
        embed = functools.partial(prefill.embed, self.definition)
        made = [self.lay(jax.eval_shape(embed, self.params, tokens, tokens, asked))]
        for layers in prefill.stages(self.config.n_layers):
            run, blocks, *arguments = self.segment(made[-1].stream, layers, width, prefix)
            made.append(self.lay(jax.eval_shape(functools.partial(run, blocks), *arguments)))
        return made

    def prefix(self, width: int) -> Prefix:
        """Beginnings of a batch of prompts, already run."""
        real = self.rows(layer_sharing.BATCH, bool, width)
        levels = self.levels(width, None)
        where = (self._places(), self.whole(jnp.int32, layer_sharing.BATCH))
        return self.lay(jax.eval_shape(prefill.beginnings, levels, *where, real))

    def gather(
        self, level: prefill.Level, layers: tuple[int, int], prefix: Prefix, room: int
    ) -> tuple[Any, ...]:
        """The program that puts rows together at one level, and its arguments."""
        begun = prefix.cache[slice(*layers)]
        at = self.whole(jnp.int32, layer_sharing.BATCH)
        real = self.rows(layer_sharing.BATCH, bool, level.stream.shape[1])
        return prefill.gather, level, at, at, real, begun, room

    def first_token(
        self, levels: list[prefill.Level], width: int, prefix: Prefix, room: int
    ) -> tuple[Any, ...]:
        """The program that chooses first tokens, and its arguments."""
        layers = [(0, 0), *prefill.stages(self.config.n_layers)]
        calls = [self.gather(*of, prefix, room) for of in zip(levels, layers, strict=True)]
        changes = [
            self.lay(jax.eval_shape(functools.partial(run, slots=room), *given)[1])
            for run, *given, room in calls
        ]
        return (
            prefill.first_token,
            self.definition,
            self.decoding,
            room,
            self.params,
            levels[-1].stream,
            self.whole(jnp.int32, layer_sharing.BATCH),
            self.rows(layer_sharing.BATCH, bool, width),
            (prefix.real, prefix.realised),
            changes,
            self.interventions(layer_sharing.BATCH),
            self.rows(layer_sharing.BATCH, jnp.uint32),
            Sampling(),
        )

    def room(self, beginning: int, longest: int) -> int:
        """Cache slots of a row: a beginning, the longest prompt and its reply."""
        return cache_slots(beginning, longest, self.decoding.max_new_tokens)

    def state(self, batch: int, beginning: int, longest: int) -> decode.Slots:
        """The slots: so many rows, with room for a beginning, the longest prompt and its reply."""
        prefix = self.prefix(beginning)
        levels = self.levels(longest, prefix)
        finish = functools.partial(
            prefill.finish, self.definition, self.decoding, self.room(beginning, longest)
        )
        prefilled = jax.eval_shape(
            finish,
            self.params,
            levels,
            self._places(),
            self.whole(jnp.int32, layer_sharing.BATCH),
            self.rows(layer_sharing.BATCH, bool, longest),
            prefix,
            self.interventions(layer_sharing.BATCH),
            self.rows(layer_sharing.BATCH, jnp.uint32),
            Sampling(),
        )
        empty = functools.partial(decode.empty, self.config, self.decoding, batch)
        return self.lay(jax.eval_shape(empty, prefilled))

    def advance(self, state: decode.Slots) -> tuple[Any, ...]:
        """The program that decodes, and its arguments."""
        return (
            decode.advance,
            self.definition,
            self.decoding,
            self.params,
            state,
            self.probes(self.config.n_layers),
            Sampling(),
        )
