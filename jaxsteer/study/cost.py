"""What a study would cost, without running it: rows, tokens, memory and a rough time.

The rows are those of `validate`, so nothing is extracted. The time is the arithmetic of all tokens
over the speed of a matrix product of the same shape, measured here for a moment.
"""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp

from jaxsteer.generation import engine
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.study import rows, validate
from jaxsteer.study.spec import StudySpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a study.

    Attributes:
      conditions: number of conditions, twins and repeats included.
      rows: number of (condition, prompt) rows.
      prompt_tokens: prompt tokens of all rows.
      own_tokens: of these, the ones after the prefix that rows share.
      new_tokens: most tokens that can be generated.
      weights_bytes: size of the parameters.
      cache_bytes: size of the keys and values of the rows that decode together.
      seconds: rough time of the rows on one device, without preparation and compilation, every
        reply at full length.
      open_choices: what is selected before the rows run: `steer`, `dose`, `refusal`.
    """

    conditions: int
    rows: int
    prompt_tokens: int
    own_tokens: int
    new_tokens: int
    weights_bytes: int
    cache_bytes: int
    seconds: float
    open_choices: list[str]


def plan(spec: StudySpec, model: ChatModel, *, limit: int | None = None) -> Plan:
    """Plan a study; `limit` is a number of StrongREJECT prompts instead of the spec's.

    Raises:
      UserError: as running it would, for what is wrong in the spec or with its prompts.
    """
    config, new = model.config, spec.decoding.max_new_tokens
    asked = validate.study(spec, model, rows.prompts(spec, limit))
    batch = engine.slots_for(spec.decoding.batch, len(asked))
    leaves = jax.tree.leaves(model.params)
    own = sum(len(request.own) for request in asked)
    longest = max((len(request.tokens) for request in asked), default=0)
    # Keys and values of one token.
    token_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim * leaves[0].itemsize
    # A token costs 2 operations per parameter.
    operations = 2 * sum(leaf.size for leaf in leaves) * (own + len(asked) * new)
    return Plan(
        conditions=len({request.condition for request in asked}),
        rows=len(asked),
        prompt_tokens=sum(len(request.tokens) for request in asked),
        own_tokens=own,
        new_tokens=len(asked) * new,
        weights_bytes=sum(leaf.nbytes for leaf in leaves),
        cache_bytes=batch * (longest + new) * token_bytes,
        seconds=operations / _operations_per_second(config, batch),
        open_choices=list(validate.open_choices(spec)),
    )


def _operations_per_second(config: ModelConfig, rows: int) -> float:
    """Speed of a float32 product of the MLP's shape, with that many rows."""
    x, w = jnp.ones((rows, config.d_model)), jnp.ones((config.d_model, config.d_ff))
    product = jax.jit(jnp.matmul)
    product(x, w).block_until_ready()
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        product(x, w).block_until_ready()
        runs += 1
    return 2 * rows * config.d_model * config.d_ff * runs / (time.perf_counter() - started)
