"""The demo study's rows, as a run makes them, and the same rows as a job for other libraries."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.engine import Request
from jaxsteer.model import weights
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.decoder import graph
from jaxsteer.model.interventions import Add, Interventions, Operation, Project
from jaxsteer.study import prepare, run, spec
from jaxsteer.study.conditions import conditions, cross, operations, requests, stacked
from tests.bench.job import Job, Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A study ready for `engine.run`.

    Attributes:
      names: of the conditions, in order.
      requests: one per row, conditions in the outer order.
      interventions: the conditions stacked.
      probes: unit directions that a run records projections on [layer, probe, d_model].
      decoding: static settings.
      batch: rows that decode together, as the spec says.
      job: the same rows for other libraries.
    """

    names: list[str]
    requests: list[Request]
    interventions: Interventions
    probes: np.ndarray
    decoding: Decoding
    batch: int
    job: Job


def demo(model: ChatModel, results: Path) -> Workload:
    """The demo study; its setup is read from `results`, or made there.

    Args:
      model: the demo's model.
      results: a results folder of the demo study, or a folder to prepare one in.
    """
    study = spec.load(spec.STUDIES / "smollm2-demo.toml")
    prepared = prepare.prepare(study, model, results)
    study, chosen, n_layers = prepared.spec, prepared.record, model.config.n_layers
    compiled = conditions(study, chosen.layers, chosen.dose, n_layers, chosen.refusal_dose)
    shape = (model.config.n_layers, model.config.d_model)
    crossed = cross(compiled, prepare.prompts(study))
    asked = requests(study, model, compiled, crossed)
    probed = [name for name in run.PROBES if name in prepared.directions]
    probes = np.stack([prepared.directions[name].unit() for name in probed], axis=1)
    return Workload(
        names=[condition.name for condition in compiled],
        requests=asked,
        interventions=stacked(compiled, prepared.directions, shape),
        probes=probes.astype(np.float32),
        decoding=Decoding(max_new_tokens=study.decoding.max_new_tokens, eos=model.eos),
        batch=study.decoding.batch,
        job=Job(
            tokens=[list(request.tokens) for request in asked],
            condition=[request.condition for request in asked],
            conditions=[sites(operations(c, prepared.directions)) for c in compiled],
            max_new_tokens=study.decoding.max_new_tokens,
            eos=list(model.eos),
            batch=study.decoding.batch,
        ),
    )


def sites(operations: Sequence[Operation]) -> list[Site]:
    """Where a condition's operations act, in the order that a forward pass meets the places."""
    found: dict[tuple[int, int, str], Site] = {}
    order = {"embed": -1, "resid_mid": 0, "resid_post": 1}
    for operation in operations:
        assert isinstance(operation, (Add, Project)), "the demo caps nothing"
        for layer in operation.layers:
            measured = layer if operation.measured_at is None else operation.measured_at
            key = (
                order[operation.tap] if operation.tap == "embed" else layer,
                order[operation.tap],
                operation.tap,
            )
            site = found.setdefault(key, Site(tap=operation.tap, layer=layer, added=[], removed=[]))
            if isinstance(operation, Add):
                site.added.append(np.float32(operation.scale) * operation.direction[measured])
            else:
                site.removed.extend(d[measured] for d in operation.directions)
    return [found[key] for key in sorted(found)]


def random_model(model: ChatModel, config: ModelConfig, dtype: DTypeLike) -> ChatModel:
    """A model of other sizes with random weights, under the real one's tokenizer.

    Args:
      model: the real one.
      config: sizes of the other; its vocabulary may be larger than the tokenizer's.
      dtype: of its parameters.
    """

    @functools.partial(jax.jit, static_argnames=("shape",))
    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return (0.05 * jax.random.normal(key, shape)).astype(dtype)

    shapes = weights.param_shapes(config)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = weights.nest(
        (path, draw(key, tuple(shape)))
        for key, (path, shape) in zip(keys, shapes.items(), strict=True)
    )
    return dataclasses.replace(model, config=config, definition=graph(config, dtype), params=params)


def hf_folder(model: ChatModel, tokenizer: Path, out: Path) -> Path:
    """The model's parameters in HF's own format, for whoever loads that.

    Args:
      model: float32 parameters.
      tokenizer: folder of the tokenizer's files.
      out: folder to write.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(tokenizer, out)
    flat = weights.flatten(model.params)
    tensors: dict[str, Any] = {}
    for name, path in weights.table(model.config).items():
        value = np.asarray(flat[path])
        # A transpose is a view, and what is saved is the buffer below it.
        tensors[name] = np.ascontiguousarray(value.T if path.endswith("kernel") else value)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(llama_config(model)))
    return out


def llama_config(model: ChatModel) -> dict[str, Any]:
    """The config.json of a Llama with plain rotary embedding, as SmolLM2 is."""
    c = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_ff,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.attention[0].rope.theta},
        "hidden_act": "silu",
        "tie_word_embeddings": c.tied,
        "max_position_embeddings": c.max_position,
        "dtype": "float32",
        "eos_token_id": list(model.eos),
    }
