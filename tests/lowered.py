"""Compile the programs of a tiny model for data=4,model=2, for `test_lowering`; print JSON.

In a process of its own: the devices are virtual CPU devices, whose number is fixed when JAX starts,
and shapes without values would not pass the type checks of the other tests.

    python -m tests.lowered
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

if __name__ == "__main__":
    # Not on import: a test run that collects this file would have eight devices, too.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    )

from jaxsteer import lowering
from jaxsteer.generation import prefill
from jaxsteer.model import sharding
from jaxsteer.model.config import ModelConfig, RopeConfig

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=64,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=12,
    d_ff=48,
    norm_eps=1e-6,
    rope=RopeConfig(theta=1e4),
    qkv_bias=False,
    tied=False,
    max_position=512,
)
BATCH, BEGINNING, LONGEST, NEW = 16, 16, 32, 8


def reading(sweep: lowering.Sweep) -> dict[str, Any]:
    """The programs that read prompts."""
    prefix = sweep.prefix(BEGINNING)
    levels = sweep.levels(LONGEST, prefix)
    room = sweep.room(BEGINNING, LONGEST)
    layers = prefill.stages(CONFIG.n_layers)[0]
    calls = {
        "segment": sweep.segment(levels[0].stream, layers, LONGEST, prefix),
        "gather": sweep.gather(levels[1], layers, prefix, room),
        "choose": sweep.first_token(levels, LONGEST, prefix, room),
    }
    return {name: dataclasses.asdict(lowering.compiled(*call)) for name, call in calls.items()}


if __name__ == "__main__":
    sweep = lowering.Sweep(CONFIG, sharding.mesh("data=4,model=2"), NEW)
    state = sweep.state(BATCH, BEGINNING, LONGEST)
    program = lowering.compiled(*sweep.advance(state))
    json.dump(
        {
            "reading": reading(sweep),
            "params": sharding.nbytes(sweep.params),
            "cache": sharding.nbytes(state.cache),
            "state": sharding.nbytes(state),
            "program": dataclasses.asdict(program),
        },
        sys.stdout,
    )
