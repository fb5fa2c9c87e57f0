"""A GPU or TPU: the demo study and the paper's table, absolute times and shares of its ceilings.

    python -m tests.bench.accelerator CHECKPOINT STUDY

prints one JSON object, or why nothing was measured, and writes the rows for HF beside STUDY.
Weights are bfloat16, which `jaxsteer convert` makes for such a device.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.engine import Request
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.decoder import exact_products, graph
from jaxsteer.model.interventions import Add, Operation, compile_conditions
from tests.bench import figures, ours, tpu, workload
from tests.bench.ceilings import best
from tests.bench.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; by default sizes that suit a GPU or TPU.

    Attributes:
      batches: slots for the demo study, one run each.
      matrix: rows and columns of the product that is the ceiling of computing.
      read: bytes of the array whose reading is the ceiling of memory.
      config: of the large model, whose weights are random.
      prompts: of the table.
      conditions: of the table.
      prefix: tokens of the system prompt that the table's rows share.
      new_tokens: of each of the table's replies.
      slots: for the table.
    """

    batches: Sequence[int] = (64, 256, 1024)
    matrix: int = 8192
    read: int = 2**31
    config: ModelConfig = dataclasses.field(default_factory=lambda: tpu.config_of("llama-3.1-8b"))
    prompts: int = 313
    conditions: int = 11
    prefix: int = 48
    new_tokens: int = 150
    slots: int = 256


def in_bfloat16(model: ChatModel) -> ChatModel:
    """The model with its parameters rounded."""
    params = jax.tree.map(lambda kernel: kernel.astype(jnp.bfloat16), model.params)
    return dataclasses.replace(model, params=params, definition=graph(model.config, jnp.bfloat16))


def ceilings(sizes: Sizes, slots: int) -> dict[str, Any]:
    """Products of bfloat16 in operations/s, large ones and of `slots` rows, and bytes/s read."""

    @jax.jit
    def product(a: Any, b: Any) -> Any:
        with exact_products():
            return a @ b

    def rate(count: int) -> float:
        a = jnp.ones((count, sizes.matrix), jnp.bfloat16)
        b = jnp.ones((sizes.matrix, sizes.matrix), jnp.bfloat16)
        return 2 * count * sizes.matrix**2 / best(lambda: product(a, b).block_until_ready(), 7)

    total = jax.jit(jnp.sum)
    held = jnp.ones((sizes.read // 4,), jnp.float32)
    return {
        "matmul": rate(sizes.matrix),
        "matmul_rows": {str(slots): rate(slots)},
        "read": sizes.read / best(lambda: total(held).block_until_ready(), 7),
    }


def study(model: ChatModel, work: Workload, batch: int) -> dict[str, Any]:
    """The demo study with so many slots: seconds, compile left out, and what the device held."""
    every = range(len(work.requests))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        tokens = ours.replies(model, work, every, batch, work.decoding)
        seconds.append(time.perf_counter() - start)
    new = sum(map(len, tokens))
    return {
        "slots": batch,
        "seconds": seconds[1],
        "first_s": seconds[0],
        "new_tokens": new,
        "rate": new / seconds[1],
        "peak_bytes": _peak(),
    }


def phases(model: ChatModel, work: Workload, sizes: Sizes, batch: int) -> dict[str, Any]:
    """Prefill and decode alone with so many slots, as shares of the device's ceilings."""
    found = ours.phases(SimpleNamespace(model=model, work=work), batch)
    return figures.shares(found, [ceilings(sizes, batch)])


def table(model: ChatModel, sizes: Sizes) -> dict[str, Any]:
    """The paper's table on random weights: seconds of a few rows, which compile, and of all.

    Conditions add at layers from the middle on; no token ends a reply.
    """
    config = sizes.config
    large = workload.random_model(model, config, jnp.bfloat16)
    draw = np.random.default_rng(0)
    direction = draw.standard_normal((config.n_layers, config.d_model)).astype(np.float32)
    middle = config.n_layers // 2
    conditions: list[list[Operation]] = [[]]
    for c in range(1, sizes.conditions):
        at = middle + c % (config.n_layers - middle)
        conditions.append([Add(direction=direction, layers=(at,), scale=0.1)])
    prefix = draw.integers(3, config.vocab_size, sizes.prefix).tolist()
    # About as long as harmful requests are.
    own = [draw.integers(3, config.vocab_size, n) for n in draw.integers(12, 100, sizes.prompts)]
    requests = [
        Request(
            tokens=prefix + prompt.tolist(),
            condition=c,
            row_id=c * sizes.prompts + i,
            shared=sizes.prefix,
        )
        for c in range(len(conditions))
        for i, prompt in enumerate(own)
    ]
    stacked = compile_conditions(
        conditions, ["all"] * len(conditions), n_layers=config.n_layers, d_model=config.d_model
    )

    def timed(skip: Collection[int] = ()) -> float:
        start = time.perf_counter()
        decoding = Decoding(max_new_tokens=sizes.new_tokens, eos=())
        run = engine.run(large, requests, stacked, decoding, batch=sizes.slots, skip=skip)
        done = sum(map(len, run))
        assert done == len(requests) - len(skip)
        return time.perf_counter() - start

    first = timed(range(sizes.slots, len(requests)))
    return {
        "rows": len(requests),
        "slots": sizes.slots,
        "new_tokens": sizes.new_tokens,
        "first_s": first,
        "seconds": timed(),
        "peak_bytes": _peak(),
    }


def measure(model: ChatModel, work: Workload, sizes: Sizes | None = None) -> dict[str, Any]:
    """All of it on JAX's first device."""
    sizes = sizes or Sizes()
    small = in_bfloat16(model)
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind} ({device.platform})",
        "platform": device.platform,
        "study": [_said(study(small, work, batch)) for batch in sizes.batches],
        "phases": [_said(phases(small, work, sizes, batch)) for batch in sizes.batches],
        "table": _said(table(model, sizes)),
    }


def _said(found: dict[str, Any]) -> dict[str, Any]:
    """What was found, said at once: all of it takes minutes."""
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def _peak() -> int | None:
    # Of the whole process so far; a CPU does not count it.
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def main(checkpoint: str, setup: str) -> None:
    """Measure, if there is something to measure."""
    if jax.default_backend() == "cpu":
        print(
            json.dumps({"skipped": "JAX has only a CPU here; pip install -e '.[cuda]' for a GPU"})
        )
        return
    from jaxsteer.data.wheels import use_compile_cache

    use_compile_cache()
    model, out = ChatModel.load(Path(checkpoint), verify=False), Path(setup).parent
    work = workload.demo(model, Path(setup))
    work.job.save(out / "job")
    workload.hf_folder(model, Path(checkpoint) / "tokenizer", out / "hf")
    print(json.dumps(measure(model, work)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(*sys.argv[1:])
