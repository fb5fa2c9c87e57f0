"""Run tiny models on meshes of eight virtual CPU devices, for `test_sharding`, in its own process.

The number of devices is fixed when JAX starts, so these runs cannot share a process with the other
tests; all of them share one, since JAX and the models load slowly. The results go to a file.

    python -m tests.meshes OUT NAME=CHECKPOINT...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Not on import: a test run that collects this file would have eight devices, too.
    # Compiling is nearly all of the time, and the programs are tiny: little optimisation is best.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    )

import jax
import numpy as np

from jaxsteer.directions import samples
from jaxsteer.generation import decode, prefill
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.engine import Request, run
from jaxsteer.generation.prefill import Prefix
from jaxsteer.model import sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Add, Cap, Project, compile_conditions
from jaxsteer.model.weights import flatten
from tests import reference

MESHES = ("data=8,model=1", "data=4,model=2", "data=2,model=4", "data=1,model=8", "data=1,model=1")
# Long enough that neighbouring slots read it together, where a device has four.
SYSTEM = [3, 9, 33, 4, 17, *range(20, 39)]
PROMPTS = [[3, 9, 33], [5] * 14, list(range(3, 17)), [41, 8, 8, 9], [7], [8, 60, 22, 3, 3, 19]]
CONDITIONS = 4


def conditions(model: ChatModel) -> Any:
    """No intervention, and every operation at every tap."""
    rng = np.random.default_rng(0)
    shape = (model.config.n_layers, model.config.d_model)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    listed = [
        [],
        [Add(direction=a, layers=(0,), scale=2.0, tap="embed")],
        [Project(directions=(a, b), layers=(0, 2), tap="resid_mid")],
        [Add(direction=c, layers=(1,), scale=2.0), Cap(direction=b, layers=(1,), high=-0.2)],
    ]
    return compile_conditions(
        listed, ["all"] * len(listed), n_layers=shape[0], d_model=model.config.d_model
    )


def requests() -> list[Request]:
    """Every prompt under every condition, behind a shared prefix."""
    return [
        Request(tokens=SYSTEM + prompt, condition=condition, shared=len(SYSTEM))
        for prompt in PROMPTS
        for condition in range(CONDITIONS)
    ]


DECODING = Decoding(max_new_tokens=6, eos=(63,), keep_logits=True)


def replies(model: ChatModel) -> dict[str, Any]:
    """What the engine replies in 8 slots, and how much of a slot's arrays one device has."""
    advance, shards = decode.advance, set[tuple[int, ...]]()

    def watched(*given: Any) -> Any:
        state = given[3]
        for leaf in (state.cache[0][0], state.tokens, state.interventions.on_prompt):
            shards.add(leaf.sharding.shard_shape(leaf.shape))
        return advance(*given)

    decode.advance = watched
    found = run(model, requests(), conditions(model), DECODING, batch=8)
    rows = sorted((reply for some in found for reply in some), key=lambda reply: reply.index)
    decode.advance = advance
    return {
        "tokens": [row.tokens.tolist() for row in rows],
        "logits": [[] if row.logits is None else row.logits.tolist() for row in rows],
        "shards": sorted(shards),
    }


def stepwise(model: ChatModel) -> list[list[int]]:
    """The same rows on the plain stepwise path."""
    rows = reference.replies(model, requests(), conditions(model), DECODING)
    return [row.tokens for row in rows]


def captured(model: ChatModel) -> dict[str, Any]:
    """Captures of the prompts behind their shared prefix, and how many rows a device reads."""
    read, rows = prefill.run_layers, []

    def watched(*args: Any, **options: Any) -> Any:
        ids = jax.numpy.asarray(args[3].segment_ids)
        rows.extend(piece.data.shape[0] for piece in ids.addressable_shards)
        return read(*args, **options)

    prefill.run_layers = watched
    prompts = [SYSTEM + prompt for prompt in PROMPTS]
    found = samples.forward(
        model,
        prompts,
        [[]] * len(prompts),
        ("prompt_end",),
        shared=[len(SYSTEM)] * len(prompts),
    )
    streams = {row: stream.tolist() for row, stream, _ in found}
    prefill.run_layers = read
    return {"rows": rows, "streams": [streams[row] for row in range(len(prompts))]}


def pieces(model: ChatModel) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """Device number and shape of every piece of every parameter."""
    return {
        path: [(shard.device.id, shard.data.shape) for shard in value.addressable_shards]
        for path, value in flatten(model.params).items()
    }


def memory(model: ChatModel) -> list[int]:
    """Bytes of the parameters and of a cache of 8 rows, 32 slots each, on all devices together."""
    config = model.config
    shape = (8, config.n_kv_heads, 32, config.head_dim)
    cache = [(jax.numpy.zeros(shape), jax.numpy.zeros(shape)) for _ in range(config.n_layers)]
    spread = sharding.place(
        Prefix(cache=cache, real=np.ones((8, 32)), realised={}), config, model.mesh
    )

    def allocated(tree: Any) -> int:
        pieces = (piece for leaf in jax.tree.leaves(tree) for piece in leaf.addressable_shards)
        return sum(piece.data.nbytes for piece in pieces)

    return [allocated(model.params), allocated(spread.cache)]


def main(out: Path, folders: dict[str, Path]) -> None:
    """Run the models on one device and on meshes, and write the results."""
    found: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        for shape in ("", *MESHES):
            mesh = sharding.mesh(shape) if shape else None
            model = ChatModel.load(folder, mesh=mesh)
            found[f"{name} {shape}"] = {
                "pieces": pieces(model),
                "memory": memory(model),
                "notes": sharding.notes(model.config, mesh) if mesh else [],
                "replies": replies(model),
                "stepwise": None if shape else stepwise(model),
                "captured": captured(model) if shape in ("", "data=4,model=2") else None,
            }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), {k: Path(v) for k, v in (a.split("=", 1) for a in sys.argv[2:])})
