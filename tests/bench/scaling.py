"""How cost grows with conditions, rows, layers and width: small random models, real programs.

    python -m tests.bench.scaling CHECKPOINT [STUDY]

prints one JSON object: per axis the points and the fitted exponent.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.engine import Request
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.interventions import Add, compile_conditions
from tests.bench import workload
from tests.bench.figures import exponent

CONDITIONS = (1, 4, 16, 64)
ROWS = (64, 128, 256, 512)
LAYERS = (2, 4, 8)
WIDTHS = (128, 256, 512)
BASE = {"conditions": 4, "rows": 128, "layers": 4, "width": 256}
PROMPT, NEW, BATCH = 24, 16, 32


def small_model(model: ChatModel, layers: int, width: int) -> ChatModel:
    """A model of these sizes with random weights, under the real one's tokenizer."""
    config: ModelConfig = dataclasses.replace(
        model.config,
        vocab_size=2048,
        n_layers=layers,
        d_model=width,
        d_ff=2 * width,
        n_heads=width // 64,
        n_kv_heads=max(width // 128, 1),
        head_dim=64,
    )
    return workload.random_model(model, config, jnp.float32)


def prepared(model: ChatModel, conditions: int, count: int, layers: int, width: int) -> Any:
    """A call that runs `count` rows, spread over conditions that steer different layers."""
    small = small_model(model, layers, width)
    draw = np.random.default_rng(1)
    direction = draw.standard_normal((layers, width)).astype(np.float32)
    stacked = compile_conditions(
        [[Add(direction=direction, layers=(0,), scale=0.1 + 0.01 * c)] for c in range(conditions)],
        ["all"] * conditions,
        n_layers=layers,
        d_model=width,
    )
    requests = [
        Request(tokens=draw.integers(3, 2000, PROMPT).tolist(), condition=i % conditions, row_id=i)
        for i in range(count)
    ]
    # No token ends a reply: the same number of steps at every point.
    decoding = Decoding(max_new_tokens=NEW, eos=())

    def run() -> None:
        done = sum(
            len(some) for some in engine.run(small, requests, stacked, decoding, batch=BATCH)
        )
        assert done == count

    return run


def measure(model: ChatModel) -> dict[str, Any]:
    """Points and exponent of each axis, the others at their base values."""
    return {
        axis: _axis(values, lambda value, axis=axis: prepared(model, **_point(axis, value)))
        for axis, values in (
            ("conditions", CONDITIONS),
            ("rows", ROWS),
            ("layers", LAYERS),
            ("width", WIDTHS),
        )
    }


def _point(axis: str, value: int) -> dict[str, int]:
    point = BASE | {axis: value}
    return {
        "conditions": point["conditions"],
        "count": point["rows"],
        "layers": point["layers"],
        "width": point["width"],
    }


def _axis(values: tuple[int, ...], make: Callable[[int], Callable[[], None]]) -> dict[str, Any]:
    points = []
    for value in values:
        run = make(value)
        run()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        points.append([value, min(seconds)])
    return {
        "points": points,
        "exponent": exponent([x for x, _ in points], [y for _, y in points]),
    }


if __name__ == "__main__":
    from jaxsteer.data.wheels import use_compile_cache

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    use_compile_cache()
    print(json.dumps(measure(ChatModel.load(Path(sys.argv[1]), verify=False))))
