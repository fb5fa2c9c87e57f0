"""jaxsteer behind the same method as its peers, and what it compiles."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.requests import shared_length
from jaxsteer.model.chat_model import ChatModel
from tests.bench import workload
from tests.bench.figures import Work
from tests.bench.workload import Workload


class Ours:
    """`engine.run` over rows of the demo study; writes the job for the peers when it is made.

    Attributes:
      programs: made since then, or read from the cache of compiled ones.
    """

    def __init__(self, checkpoint: Path, results: Path, out: Path):
        self.model = ChatModel.load(checkpoint, verify=False)
        self.work = workload.demo(self.model, results)
        self.work.job.save(out / "job")
        if not (out / "hf/config.json").is_file():
            workload.hf_folder(self.model, checkpoint / "tokenizer", out / "hf")
        self.programs = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration: float, **_: Any) -> None:
        self.programs += event == "/jax/core/compile/backend_compile_duration"

    def run(
        self, chosen: Sequence[int], batch: int, new_tokens: int | None = None
    ) -> list[list[int]]:
        """Reply tokens of each row, in the order given; `batch` is the study's own for 0."""
        decoding = self.work.decoding
        if new_tokens:
            decoding = dataclasses.replace(decoding, max_new_tokens=new_tokens)
        return replies(self.model, self.work, chosen, batch or self.work.batch, decoding)

    def small(self, chosen: Sequence[int]) -> list[list[int]]:
        """Reply tokens of rows that are a run of their own, as when a notebook asks for them."""
        some = [self.work.requests[row] for row in chosen]
        shared = shared_length([request.tokens for request in some])
        work = dataclasses.replace(
            self.work, requests=[dataclasses.replace(one, shared=shared) for one in some]
        )
        return replies(self.model, work, range(len(some)), work.batch, work.decoding)

    def long(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The reply to one long prompt."""
        return long_reply(self.model, prompt, new_tokens)


def long_reply(model: ChatModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The reply to one prompt that nothing steers, ended by no token."""
    request = engine.Request(tokens=list(prompt), condition=0, row_id=0)
    decoding = Decoding(max_new_tokens=new_tokens, eos=())
    ((reply,),) = filter(None, engine.run(model, [request], None, decoding, batch=1))
    return np.asarray(reply.tokens).tolist()


def replies(
    model: ChatModel, work: Workload, chosen: Sequence[int], batch: int, decoding: Decoding
) -> list[list[int]]:
    """Reply tokens of chosen rows: the call that a run of the study makes, other rows skipped."""
    found: dict[int, list[int]] = {}
    for finished in engine.run(
        model,
        work.requests,
        work.interventions,
        decoding,
        probes=work.probes,
        batch=batch,
        skip=set(range(len(work.requests))) - set(chosen),
    ):
        found |= {reply.index: np.asarray(reply.tokens).tolist() for reply in finished}
    return [found[row] for row in chosen]


def phases(ours: Ours, batch: int, new_tokens: tuple[int, int] = (17, 49)) -> dict[str, Any]:
    """Tokens and best-of-three seconds of prefill alone and of decode alone, all slots full.

    The rows share nothing: one condition that acts before the first block, different prompts. Their
    lengths are quantiles of the lengths of the study's rows without prefixes, so they are packed as
    in the study. With no token that ends a reply, runs of more and of fewer new tokens differ only
    by decode steps.
    """
    work, batch = ours.work, batch or ours.work.batch
    number = next(
        (c for c, sites in enumerate(work.job.conditions) if sites and sites[0].layer == 0), 0
    )
    own = sorted(len(request.tokens) - request.shared for request in work.requests)
    lengths = [own[(2 * i + 1) * len(own) // (2 * batch)] for i in range(batch)]
    known = np.unique(np.concatenate(work.job.tokens))
    draw = np.random.default_rng(0)
    plain = [
        engine.Request(tokens=draw.choice(known, length).tolist(), condition=number, row_id=i)
        for i, length in enumerate(lengths)
    ]
    alone = dataclasses.replace(work, requests=plain)
    counts = sorted({1, *new_tokens})
    times: dict[int, list[float]] = {count: [] for count in counts}
    # Round by round, the first of which compiles: a disturbance then affects all lengths alike.
    for _ in range(4):
        for count in counts:
            start = time.perf_counter()
            replies(ours.model, alone, range(batch), batch, Decoding(max_new_tokens=count, eos=()))
            times[count].append(time.perf_counter() - start)
    seconds = {count: min(some[1:]) for count, some in times.items()}
    few, many = new_tokens
    total = sum(lengths)
    # The mean length of the prompt around a token: a long prompt has more tokens.
    found = sum(length**2 for length in lengths) / total
    return {
        "slots": batch,
        "prompt_tokens": total,
        "prefill_s": seconds[1],
        "new_tokens": batch * (many - few),
        "decode_s": seconds[many] - seconds[few],
        "all_seconds": times,
        "work": dataclasses.asdict(
            Work.of(
                ours.model.config,
                prompt=found,
                context=total / batch + sum(new_tokens) / 2,
                itemsize=ours.model.params["embed"]["embedding"].dtype.itemsize,
            )
        ),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide speed."""
    return {name: importlib.metadata.version(name) for name in ("jaxsteer", "jax", "jaxlib")}
