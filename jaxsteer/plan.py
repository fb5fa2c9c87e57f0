"""What a study would cost, without running it: rows, tokens, programs, memory, time.

Prompts are tokenised for real; the directions are stand-ins of the right shape, so nothing is
extracted. The time is a rough estimate: the arithmetic of prefill and decode over the speed of a
matrix product of the same shape, measured here and now for a moment.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer import chat, run
from jaxsteer.chatmodel import ChatModel
from jaxsteer.conditions import Condition, conditions, depth
from jaxsteer.config import ModelConfig
from jaxsteer.data import Prompt
from jaxsteer.directions import Direction
from jaxsteer.errors import UserError
from jaxsteer.spec import StudySpec
from jaxsteer.weights import param_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a study.

    Attributes:
      conditions: number of conditions, twins and repeats included.
      rows: number of (condition, prompt) rows.
      prompt_tokens: real prompt tokens of all rows.
      padded_tokens: prompt tokens as computed, padding and short batches' fillers included.
      new_tokens: most tokens that can be generated.
      programs: padded prompt widths, each of which compiles one program.
      weights_bytes: memory of the parameters.
      cache_bytes: memory of one batch's keys and values at the widest prompt.
      seconds: rough time of the rows, without setup and compilation, every reply at full length.
      open_choices: what the setup still has to choose before the rows run.
    """

    conditions: int
    rows: int
    prompt_tokens: int
    padded_tokens: int
    new_tokens: int
    programs: tuple[int, ...]
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
    compiled = stand_in_conditions(spec, config)
    planned = run.plan(compiled, run.prompts(spec, limit))
    lengths = _lengths(model, planned)
    batch, new = spec.decoding.batch, spec.decoding.max_new_tokens
    limit_tokens = config.max_position - new
    by_width: dict[int, int] = {}
    for length in lengths:
        width = chat.bucket(length, limit_tokens)
        by_width[width] = by_width.get(width, 0) + 1
    batches = {width: -(-count // batch) for width, count in by_width.items()}
    padded = sum(width * batch * count for width, count in batches.items())
    steps = sum(batches.values()) * new
    itemsize = np.dtype(model.params["embed"]["embedding"].dtype).itemsize
    slots = max(by_width, default=0) + new
    prefill_rate, decode_rate = speeds(config, batch)
    return Plan(
        conditions=len(compiled),
        rows=len(planned),
        prompt_tokens=sum(lengths),
        padded_tokens=padded,
        new_tokens=len(planned) * new,
        programs=tuple(sorted(by_width)),
        weights_bytes=n_params(config) * itemsize,
        cache_bytes=2
        * config.n_layers
        * batch
        * slots
        * config.n_kv_heads
        * config.head_dim
        * itemsize,
        seconds=padded / prefill_rate + steps / decode_rate,
        open_choices=_open(spec),
    )


def stand_in_conditions(spec: StudySpec, config: ModelConfig) -> list[Condition]:
    """The study's conditions over directions that only have the right shape."""
    generator = np.random.Generator(np.random.PCG64(0))
    seeds = {f"random-{seed}" for item in spec.condition for seed in item.random_seeds}
    stand_ins = {
        name: Direction(
            name=name,
            vectors=generator.standard_normal((config.n_layers, config.d_model)).astype(np.float32),
            provenance={},
        )
        for name in [*spec.directions, *sorted(seeds)]
    }
    named: dict[str, int] = {}
    if spec.selection is not None:
        named["steer"] = depth(max(spec.selection.layers), config.n_layers)
        named["refusal"] = depth(max(spec.selection.refusal_layers), config.n_layers)
    for name, layer in spec.layers.items():
        named[name] = depth(layer, config.n_layers) if isinstance(layer, float) else layer
    return conditions(spec, stand_ins, named, 1.0 if spec.dose is None else spec.dose)


def _lengths(model: ChatModel, planned: list[tuple[Condition, Prompt]]) -> list[int]:
    known: dict[tuple[str, str], int] = {}
    for condition, prompt in planned:
        key = (condition.system, prompt.id)
        if key not in known:
            known[key] = len(model.tokenizer.chat(prompt.text, condition.system))
    return [known[condition.system, prompt.id] for condition, prompt in planned]


def _open(spec: StudySpec) -> tuple[str, ...]:
    choices: Mapping[str, bool] = {
        "layer of the persona": "persona" in spec.directions and "steer" not in spec.layers,
        "dose": "persona" in spec.directions and spec.dose is None,
        "layer of refusal": "refusal" in spec.directions and "refusal" not in spec.layers,
    }
    found = tuple(name for name, is_open in choices.items() if is_open)
    if found and spec.selection is None:
        raise UserError(
            f"study {spec.name}: {found[0]} is open; add [selection], or fix it in [layers] or dose"
        )
    return found


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
