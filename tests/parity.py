"""Measure how far jaxsteer is from HF transformers on torch, and write the table.

    python -m tests.parity docs/parity.md

Tests check the limits; this states the figures. Two tiny random models are measured in both dtypes
(llama3 rope, grouped queries, an untied head, a head_dim other than d_model / n_heads; biases and a
tied head), and one of every family in float32. The real SmolLM2 is large enough for rounding errors
to add up.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from jaxsteer.files import write_text
from jaxsteer.generation.requests import bucket, left_pad
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Cap, Operation, Project
from tests import oracle, reference, tiny
from tests.conftest import chats, gguf_path

NEW_TOKENS = 48
PROMPTS = 16
DTYPES: tuple[str, ...] = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """What two sets of logits [token, vocab] of the same tokens differ by.

    Attributes:
      highest: max |diff|.
      mean: mean |diff|.
      argmax: number of tokens whose argmax is the same.
      tokens: number of tokens.
    """

    highest: float
    mean: float
    argmax: int
    tokens: int

    @classmethod
    def of(cls, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Difference:
        gaps = [np.abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        same = [(a.argmax(-1) == b.argmax(-1)).sum() for a, b in zip(ours, theirs, strict=True)]
        return cls(
            highest=float(max(gap.max() for gap in gaps)),
            mean=float(np.mean(np.concatenate([gap.mean(-1) for gap in gaps]))),
            argmax=int(sum(same)),
            tokens=sum(map(len, gaps)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table: a model, a dtype, steered or not.

    Attributes:
      name: model and dtype, and whether it is steered.
      prefill: differences at every prompt token.
      decode: differences at every decode step.
      greedy: replies identical to HF's own greedy ones.
      replies: how many there are.
    """

    name: str
    prefill: Difference
    decode: Difference
    greedy: int
    replies: int


def sources(folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(name, what to convert, how HF loads it) of every model."""
    for name, build in (("tiny Llama", tiny.llama), ("tiny Qwen2", tiny.qwen2)):
        saved = tiny.save(build(), folder / build.__name__)
        yield name, saved, {"pretrained_model_name_or_path": str(saved)}
    path = gguf_path()
    loading = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    yield "SmolLM2-135M-Instruct", path, loading


def hf_model(loading: dict[str, Any], dtype: str) -> Any:
    """HF's model in a dtype, with the attention that is written out."""
    from transformers import AutoModelForCausalLM, GgufConfig

    # Dense weights of that dtype, as ours are, and not products with the packed blocks.
    if "gguf_file" in loading:
        loading = loading | {"quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(
        **loading, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def some_prompts(model: ChatModel) -> list[list[int]]:
    """Chat prompts of the real model; random ids of mixed length for a tiny one."""
    if model.config.vocab_size > 1000:
        return chats(model, PROMPTS)
    draw = np.random.default_rng(0)
    return [draw.integers(3, 64, int(n)).tolist() for n in draw.integers(2, 33, PROMPTS)]


def steering(model: ChatModel) -> list[Operation]:
    """An add, a projection of two directions and a cap, at depths of a third to the last block."""
    draw = np.random.default_rng(1)
    n_layers, width = model.config.n_layers, model.config.d_model
    a, b, c = (draw.standard_normal((n_layers, width)).astype(np.float32) for _ in range(3))
    early, late = n_layers // 3, 2 * n_layers // 3
    return [
        Add(direction=a, layers=(early, late), scale=4.0),
        Project(directions=(a, a + b), layers=(early + 1, n_layers - 1)),
        Cap(direction=c, layers=(late,), low=-0.5, high=0.5),
    ]


def prefill(
    model: ChatModel, prompts: Sequence[Sequence[int]], operations: Sequence[Operation]
) -> list[np.ndarray]:
    """Our logits after every prompt token, from one left-padded batch."""
    width = bucket(max(map(len, prompts)), 4096)
    ids, real = left_pad([list(p) for p in prompts], width)
    stacked = oracle.compiled(model, [operations]).rows(np.zeros(len(prompts), int))
    _, logits = reference.read(model.definition, model.params, ids, real, (), stacked)
    return [np.asarray(logits[i])[real[i]] for i in range(len(prompts))]


def measure(
    name: str,
    model: ChatModel,
    hf: Any,
    operations: Sequence[Operation],
    new_tokens: int = NEW_TOKENS,
) -> Line:
    """One line of the table."""
    prompts = some_prompts(model)
    replies = oracle.ours(model, prompts, [operations], new_tokens=new_tokens, batch=PROMPTS)
    theirs = [
        oracle.steps(hf, prompt, reply, operations)
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    reading = [oracle.logits(hf, prompt, operations) for prompt in prompts]
    with oracle.Hooked(hf, operations):
        own = oracle.greedy(hf, prompts, new_tokens)
    return Line(
        name=name,
        prefill=Difference.of(prefill(model, prompts, operations), reading),
        decode=Difference.of(
            [reply.logits for reply in replies if reply.logits is not None], theirs
        ),
        greedy=sum(r.tokens.tolist() == o for r, o in zip(replies, own, strict=True)),
        replies=len(prompts),
    )


def yardstick(name: str, model: ChatModel, narrow: Any, wide: Any) -> Line:
    """HF's bfloat16 against HF's float32: what the narrower dtype alone costs."""
    prompts = some_prompts(model)
    own = oracle.greedy(narrow, prompts, NEW_TOKENS)
    reading, decoding = [], []
    for hf in (narrow, wide):
        rows = [
            oracle.logits(hf, [*prompt, *reply]) for prompt, reply in zip(prompts, own, strict=True)
        ]
        reading.append([row[: len(p)] for row, p in zip(rows, prompts, strict=True)])
        decoding.append([row[len(p) - 1 :] for row, p in zip(rows, prompts, strict=True)])
    others = oracle.greedy(wide, prompts, NEW_TOKENS)
    return Line(
        name=name,
        prefill=Difference.of(*reading),
        decode=Difference.of(*decoding),
        greedy=sum(a == b for a, b in zip(own, others, strict=True)),
        replies=len(prompts),
    )


def lines(folder: Path) -> Iterator[Line]:
    """Every line, as it is measured."""
    for name, source, loading in sources(folder):
        loaded = {}
        for dtype in DTYPES:
            out = folder / f"{name}-{dtype}"
            model = ChatModel.load(convert(source, out, dtype))
            hf = loaded[dtype] = hf_model(loading, dtype)
            yield measure(f"{name} | {dtype}", model, hf, [])
            yield measure(f"{name}, steered | {dtype}", model, hf, steering(model))
        yield yardstick(
            f"*{name}, HF alone* | *bfloat16 - float32*",
            model,
            loaded["bfloat16"],
            loaded["float32"],
        )


# What the tiny model of each family has that a plain Llama has not.
FEATURES = {
    "llama": "biases everywhere, linear rope",
    "mistral": "sliding window",
    "ministral": "sliding windows in some layers",
    "ministral3": "yarn rope with its scale, sliding window",
    "qwen2": "q, k, v biases, sliding windows in some layers",
    "qwen3": "norms of q and k per head, biases, yarn rope",
    "gemma": "norms that add 1, tanh-GELU, scaled embedding",
    "gemma2": "four norms a layer, soft caps, query scale, sliding windows in some layers",
    "gemma3_text": "as Gemma 2 without soft caps, norms of q and k per head, two ropes",
    "olmo2": "norms after attention and MLP, norms of q and k over all heads, biases",
    "olmo3": "as OLMo 2, with two ropes and sliding windows in some layers",
    "phi3": "joined tensors, sliding window",
    "phi4": "joined tensors, longrope on three quarters of a head",
    "smollm3": "no rope and sliding windows in some layers",
    "granite": "multipliers of embedding, attention, residual and logits",
}


def family_lines(folder: Path) -> Iterator[tuple[str, Line, Line]]:
    """For each family its name, and the lines without steering and with it, in float32."""
    for name in tiny.FAMILIES:
        saved = tiny.save(tiny.family(name), folder / name)
        model = ChatModel.load(convert(saved, folder / f"{name}-out", "float32"))
        hf = hf_model({"pretrained_model_name_or_path": str(saved)}, "float32")
        plain, steered = (measure(name, model, hf, o) for o in ([], steering(model)))
        yield name, plain, steered


def family_table(found: Sequence[tuple[str, Line, Line]]) -> str:
    """A row per family."""
    table = [
        "| model | prefill max | decode max | steered prefill | steered decode | argmax | greedy |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, plain, steered in found:
        parts = [plain.prefill, plain.decode, steered.prefill, steered.decode]
        argmax = f"{sum(p.argmax for p in parts)} / {sum(p.tokens for p in parts)}"
        greedy = f"{plain.greedy + steered.greedy} / {plain.replies + steered.replies}"
        cells = [f"{name}: {FEATURES[name]}", *(f"{part.highest:.1e}" for part in parts)]
        table.append(f"| {' | '.join([*cells, argmax, greedy])} |")
    return "\n".join(table)


def render(measured: Sequence[Line], families: Sequence[tuple[str, Line, Line]]) -> str:
    """The page."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "flax", "numpy", "torch", "transformers")
    )
    table = [
        "| model | dtype | prefill max | mean | argmax | decode max | mean | argmax | greedy |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in measured:
        cells = [line.name]
        for part in (line.prefill, line.decode):
            share = f"{part.argmax} / {part.tokens}"
            cells += [f"{part.highest:.1e}", f"{part.mean:.1e}", share]
        table.append(f"| {' | '.join(cells)} | {line.greedy} / {line.replies} |")
    return f"""# Parity with HF transformers

Written by `make parity` (`python -m tests.parity docs/parity.md`) on
{datetime.date.today().isoformat()}, {platform.machine()} CPU, backend {jax.default_backend()}.
Versions: Python {platform.python_version()}, {versions}.

{chr(10).join(table)}

A row for each family of models, float32, on tiny random models with the features of the family:

{family_table(families)}

How it was measured:

- {PROMPTS} prompts of mixed length, left-padded in one batch, {NEW_TOKENS} new tokens, greedy. HF
  reads each prompt alone and without padding, with eager attention. Both sides read the same
  source files independently.
- *prefill*: |logit difference| at every prompt token. *decode*: the same at every step of the
  compiled decode loop with its cache, against one uncached HF pass over prompt and reply.
  *argmax*: tokens at which both choose the same next token. *greedy*: replies whose
  {NEW_TOKENS} tokens (or fewer, up to the end token) are those of HF's own cached `generate`.
- *steered*: an add at a third and two thirds of depth, a projection of two non-orthogonal
  directions at two layers and a cap, on all tokens; HF does the same in torch forward hooks.
- *HF alone*: HF's bfloat16 against HF's float32, on the replies of the former. It shows what
  bfloat16 costs without jaxsteer; compare the bfloat16 lines with it. jaxsteer keeps norms,
  softmax, rotary embedding, attention scores and interventions in float32, HF rounds some of them.
  A random tiny model has many near ties, so its replies differ sooner.
- Tiny models: random weights, 3 or 4 layers, width 32, windows of 8 tokens. Llama has llama3 rope,
  grouped queries, an untied head and a head_dim that is not d_model / heads; Qwen2 has biases and a
  tied head. SmolLM2 is converted from its pinned Q4_1 GGUF.
"""


def main(path: Path) -> None:
    """Measure everything and write the page."""
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        families = list(family_lines(Path(folder)))
        measured = []
        for line in lines(Path(folder)):
            print(line, file=sys.stderr, flush=True)
            measured.append(line)
    write_text(path, render(measured, families))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
