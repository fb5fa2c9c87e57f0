"""The public face: load a model, take a direction, generate replies under several conditions.

`import jaxsteer as js` gives these names; each is one call into the folders below, which stay
importable. Layers are 0-based blocks, a strength is in natural norms of its direction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl

from jaxsteer.data import prompts as material
from jaxsteer.data.wheels import cache_dir, use_compile_cache
from jaxsteer.directions import extraction
from jaxsteer.directions.direction import Direction, check_model, random_like
from jaxsteer.directions.direction import layers as read_layers
from jaxsteer.directions.direction import load as load_directions
from jaxsteer.errors import UserError
from jaxsteer.files import stable_id
from jaxsteer.generation import engine, stepwise
from jaxsteer.generation.decode import Decoding, Sampling
from jaxsteer.generation.requests import Reply, Request, shared_lengths
from jaxsteer.judges.verdicts import label
from jaxsteer.model import chat_model, sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import (
    Add,
    Cap,
    Interventions,
    Operation,
    Project,
    Scope,
    Tap,
    compile_conditions,
)
from jaxsteer.model.tokenizer import Tokenizer
from jaxsteer.words import say

Layers = int | str | Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A few more letters of a reply that is being written.

    Attributes:
      condition: name of its condition.
      text: what comes next; "" for a token that ends within a letter.
      change: norm of the realised change so far, summed over tokens, layers and taps, in
        residual-stream units.
      norm: norm of the residual stream, summed over the same tokens, layers and taps.
    """

    condition: str
    text: str
    change: float
    norm: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Replies:
    """What `Model.generate` returns: one reply for each condition and prompt.

    Attributes:
      conditions: names, in the order given.
      prompts: the user's turns, in the order given.
      rows: replies, all prompts of the first condition first.
    """

    conditions: tuple[str, ...]
    prompts: tuple[str, ...]
    rows: tuple[Reply, ...]

    def __iter__(self) -> Iterator[tuple[str, str, Reply]]:
        """Yield (condition, prompt, reply)."""
        names = [(c, p) for c in self.conditions for p in self.prompts]
        for (condition, prompt), reply in zip(names, self.rows, strict=True):
            yield condition, prompt, reply

    def table(self) -> pl.DataFrame:
        """One line a reply: condition, prompt, reply, label, change.

        `label` is `refusal` or `degenerate` by the rules that need no model, else
        `complied-unscored`. `change` is the norm of the realised change of the residual stream,
        summed over tokens, layers and taps, in residual-stream units; 0 without an intervention.
        """
        return pl.DataFrame(
            [
                {
                    "condition": condition,
                    "prompt": prompt,
                    "reply": reply.text,
                    "label": label(reply.text, "other")[0],
                    "change": engine.total_change(reply),
                }
                for condition, prompt, reply in self
            ]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(ChatModel):
    """A chat model that generates; fields as in `ChatModel`."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        system: str | None = None,
        conditions: Mapping[str, Sequence[Operation]] | None = None,
        scope: Scope = "all",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch: int = 32,
    ) -> Replies:
        """Reply to every prompt under every condition, all of them in one compiled program.

        Apart from rounding, since sizes follow from the whole list, a reply does not depend on the
        other prompts and conditions. Another condition compiles nothing.

        Args:
          prompts: the user's turns.
          system: the system prompt; None leaves it to the chat template.
          conditions: operations by name (`add`, `project`, `cap`); an empty list is the untouched
            model. None is that one alone, named `plain`.
          scope: which tokens are steered: `all`, `prompt` or `response`.
          max_new_tokens: most tokens of a reply.
          temperature: 0 is greedy decoding.
          top_p: sample from the smallest set of tokens that has this probability (Holtzman 2020).
          seed: of the sampling; a row's draws depend on it, its condition and its prompt alone.
          batch: most rows that decode together.

        Raises:
          UserError: a prompt that is empty or too long; a layer or width that the model does not
            have; an intervention that changed nothing, or so much that the residual stream is no
            longer finite.
        """
        asked = {"plain": []} if conditions is None else conditions
        names = list(asked)
        stacked = self._compiled(asked, scope)
        tokens = [self.tokenizer.chat(prompt, system) for prompt in prompts]
        shared = shared_lengths(tokens, [system] * len(tokens))
        requests = [
            Request(
                tokens=ids,
                condition=index,
                row_id=stable_id(name, prompt),
                shared=common,
            )
            for index, name in enumerate(names)
            for prompt, ids, common in zip(prompts, tokens, shared, strict=True)
        ]
        use_compile_cache()
        decoding = Decoding(max_new_tokens=max_new_tokens, eos=self.eos, sample=temperature > 0)
        sampling = Sampling(seed=seed, temperature=temperature or 1.0, top_p=top_p)
        finished = [
            reply
            for some in engine.run(
                self, requests, stacked, decoding, sampling=sampling, batch=batch
            )
            for reply in some
        ]
        rows = tuple(sorted(finished, key=lambda reply: reply.index))
        for index, name in enumerate(names):
            mine = rows[index * len(prompts) : (index + 1) * len(prompts)]
            _check_changes(name, asked[name], [engine.total_change(reply) for reply in mine])
        return Replies(conditions=tuple(names), prompts=tuple(prompts), rows=rows)

    def stream(
        self,
        prompt: str,
        *,
        system: str | None = None,
        conditions: Mapping[str, Sequence[Operation]] | None = None,
        scope: Scope = "all",
        max_new_tokens: int = 64,
    ) -> Iterator[Piece]:
        """Reply greedily to one prompt, token by token, under one condition after the other.

        Apart from rounding, the tokens are those of `generate`; use this to show tokens as they
        come. Arguments and errors are those of `generate`.
        """
        asked = {"plain": []} if conditions is None else conditions
        stacked = self._compiled(asked, scope)
        tokens = self.tokenizer.chat(prompt, system)
        use_compile_cache()
        decoding = Decoding(max_new_tokens=max_new_tokens, eos=self.eos)
        readings = stepwise.read_each(self, tokens, stacked, decoding)
        texts = [
            _Text(name, *_change(reading)) for name, reading in zip(asked, readings, strict=True)
        ]
        steps = stepwise.reply_each(self, readings)
        for text in texts:
            # All rows run in step; the text of those that are not yet shown waits.
            while not text.ended and (step := next(steps, None)):
                for each, reading in zip(texts, step, strict=True):
                    each.read(self.tokenizer, reading)
                yield from text.taken()
            text.end(self.tokenizer)
            yield from text.taken()
            _check_changes(text.condition, asked[text.condition], [text.change])

    def _compiled(
        self, conditions: Mapping[str, Sequence[Operation]], scope: Scope
    ) -> Interventions:
        return compile_conditions(
            list(conditions.values()),
            [scope] * len(conditions),
            n_layers=self.config.n_layers,
            d_model=self.config.d_model,
        )


class _Text:
    """The text of one reply while it is written.

    Attributes:
      condition: name of its condition.
      change, norm: as of `Piece`.
      ended: whether the reply is complete.
    """

    def __init__(self, condition: str, change: float, norm: float):
        self.condition, self.change, self.norm, self.ended = condition, change, norm, False
        self._ids, self._shown, self._pieces = list[int](), "", list[Piece]()

    def read(self, tokenizer: Tokenizer, reading: stepwise.Reading | None) -> None:
        """Take the next token; None after the last."""
        if reading is None:
            self.ended = True
            return
        change, norm = _change(reading)
        self.change, self.norm = self.change + change, self.norm + norm
        self._ids += reading.tokens
        # A letter may take several tokens: until it is whole it decodes to U+FFFD.
        self._add(tokenizer.reply(self._ids).rstrip("\ufffd"))

    def end(self, tokenizer: Tokenizer) -> None:
        """Take what is left of an incomplete letter too."""
        self._add(tokenizer.reply(self._ids))

    def taken(self) -> list[Piece]:
        """The pieces since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def _add(self, text: str) -> None:
        new, self._shown = text[len(self._shown) :], text
        made = Piece(condition=self.condition, text=new, change=self.change, norm=self.norm)
        self._pieces.append(made)


def _change(reading: stepwise.Reading) -> tuple[float, float]:
    """Norms of the realised change, and of the stream where something changed."""
    found = reading.realised.values()
    changed = sum(float(r.change.sum()) for r in found)
    return changed, sum(float(r.norm[r.change > 0].sum()) for r in found)


def _check_changes(
    condition: str, operations: Sequence[Operation], changes: Sequence[float]
) -> None:
    """Refuse replies from numbers that are not finite, and an intervention without effect."""
    for change in changes:
        engine.check_finite(change, f"condition {condition!r}")
    if operations and changes and not any(change > 0 for change in changes):
        raise UserError(
            f"condition {condition!r} changed nothing in the residual stream: its strength is 0, "
            "or no token of its scope was read"
        )


def load(
    source: str | Path, *, mesh: str | None = None, dtype: str = "auto", verify: bool = True
) -> Model:
    """Load a chat model; what is not a checkpoint yet is converted once and kept.

    Args:
      source: a checkpoint folder; a shipped name (`smollm2-135m`), which is fetched and converted
        the first time; a Hugging Face folder; a .gguf file; or a hub id such as `org/name`.
      mesh: devices to spread it over, such as `data=2,model=4`; None is one device.
      dtype: of the parameters: `float32`, `bfloat16`, or `auto` (see `chat_model.find`).
      verify: recompute every hash of the checkpoint.

    Raises:
      UserError: no such model, one that is not supported, or a damaged file.
    """
    spread = None if mesh is None else sharding.mesh(mesh)
    found = chat_model.find(source, dtype)
    return cast(Model, Model.load(found, mesh=spread, verify=verify))


def policy(name: str) -> str:
    """The text of a shipped safety policy, to be given as a system prompt: `policy("safety-v2")`.

    Raises:
      UserError: no such policy; the message names those there are.
    """
    return material.policy(name).text


def directions_file(model: ChatModel) -> Path:
    """Where a model's directions are kept unless another file is named: in the cache, by weights.

    $JAXSTEER_CACHE or ~/.cache/jaxsteer / directions / NAME-WEIGHTS.safetensors
    """
    return cache_dir() / "directions" / f"{model.name}-{model.weights_sha256[:12]}.safetensors"


def direction(model: ChatModel, what: str | Path, *, name: str = "") -> Direction:
    """A direction of a model: float32 [n_layers, d_model], one vector per block at `resid_post`.

    A trait, `refusal` or `assistant-axis` is extracted the first time and kept in
    `directions_file`; one line on stderr says so. Its natural norm is that of the difference of
    means (Chen et al. 2025, section 2.2; Arditi et al. 2024, section 2.3).

    Args:
      model: from `load`.
      what: a shipped trait such as `compliant`, `refusal`, `assistant-axis`, the
        path of a trait's .toml, or a .safetensors file of `jaxsteer extract`.
      name: which direction of a .safetensors file that holds several.

    Raises:
      UserError: no such trait or file, or directions of another model.
    """
    if str(what).endswith(".safetensors"):
        found = load_directions(Path(what))
        if not name and len(found) == 1:
            name = next(iter(found))
        if name not in found:
            raise UserError(f"{what}: name one of its directions: {', '.join(found)}")
        check_model(found[name], model, str(what))
        return found[name]
    use_compile_cache()
    found = extraction.find_or_extract(model, [str(what)], directions_file(model), say=say)
    return found[extraction.read_name(str(what))[0]]


def random(like: Direction, seed: int = 0) -> Direction:
    """A random direction with the norm of `like` at each layer, float32 [n_layers, d_model]."""
    return random_like(like, seed)


def add(
    direction: Direction,
    *,
    at: Layers,
    scale: float = 1.0,
    tap: Tap = "resid_post",
    measured_at: int | None = None,
) -> Add:
    """Add a direction to the residual stream: h <- h + scale * v, in float32.

    Args:
      direction: from `direction`.
      at: 0-based layers: 20, "21..29", "20, 22..24", or a sequence of numbers.
      scale: multiples of the direction's natural norm.
      tap: `embed`, `resid_mid` or `resid_post`.
      measured_at: use this layer's vector at every layer instead of each layer's own.

    Raises:
      UserError: layers that are not written so.
    """
    return Add(direction=direction.vectors, scale=scale, **_place(at, tap, measured_at))


def project(
    *directions: Direction,
    at: Layers,
    tap: Tap = "resid_post",
    measured_at: int | None = None,
) -> Project:
    """Remove the span of directions from the residual stream: h <- h - U^T (U h), in float32.

    Args:
      directions: made orthonormal together, so that their order does not matter.
      at: layers, as for `add`.
      tap: as for `add`.
      measured_at: as for `add`.

    Raises:
      UserError: layers that are not written so.
    """
    vectors = tuple(direction.vectors for direction in directions)
    return Project(directions=vectors, **_place(at, tap, measured_at))


def cap(
    direction: Direction,
    *,
    at: Layers,
    low: float = -np.inf,
    high: float = np.inf,
    tap: Tap = "resid_post",
    measured_at: int | None = None,
) -> Cap:
    """Clamp the projection onto the unit direction: h <- h + (clip(v.h, low, high) - v.h) v.

    Args:
      direction: from `direction`.
      at: layers, as for `add`.
      low: lower bound in residual-stream units.
      high: upper bound in residual-stream units.
      tap: as for `add`.
      measured_at: as for `add`.

    Raises:
      UserError: layers that are not written so.
    """
    return Cap(direction=direction.vectors, low=low, high=high, **_place(at, tap, measured_at))


def _place(at: Layers, tap: Tap, measured_at: int | None) -> dict[str, Any]:
    layers = read_layers(at) if isinstance(at, int | str) else tuple(at)
    return {"layers": layers, "tap": tap, "measured_at": measured_at}
