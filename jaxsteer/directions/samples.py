"""The samples behind a direction: one state of the residual stream for each chat of a contrast.

A direction is the difference of means of these samples. `evidence.reliability` halves them and
shuffles their labels.

`forward` and `batches` read the stream at chosen tokens: states for directions, logits for the
selection. Only what is asked for is copied from the device.

`shifts` has persona modes in a vector's units. For each mode and direction v with unit u, at each
layer: the mean over prompts of u . (h_mode - h_none) / |v|, where h is `resid_post` at the last
prompt token and "none" the policy alone on the same prompt. Adding v once there shifts by +1, so a
mode made of words can be compared with a vector.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import msgspec
import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file, save_file

from jaxsteer.data.prompts import Mode, Prompt
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path, stable_id
from jaxsteer.generation import engine, layer_sharing, prefill
from jaxsteer.generation.decode import Decoding, Sampling
from jaxsteer.generation.layer_sharing import Prompts
from jaxsteer.generation.requests import (
    Request,
    check_lengths,
    grouped,
    pack,
    shared_length,
    shared_lengths,
)
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Interventions, Layers
from jaxsteer.words import Progress

Position = Literal["prompt_end", "response_start", "response_avg"]
POSITIONS: tuple[Position, ...] = ("prompt_end", "response_start", "response_avg")
# How replies are sampled, as in persona vectors (Chen et al. 2025).
SAMPLED = {"temperature": 1.0, "top_p": 0.95}
# Standard errors to either end of a 95 % interval.
Z95 = 1.959964


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """One chat, which gives one sample.

    Attributes:
      system: the system prompt; None for none.
      user: the user's message.
      group: the group of samples that it is averaged in; 0 is the positive one.
      units: numbers of its units, in the order of the contrast's names for them.
    """

    system: str | None
    user: str
    group: int
    units: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """The chats behind a direction: mean of group 0 minus the mean of the other groups' means.

    Attributes:
      kind: which kind of direction it makes (see `extraction`).
      source_sha256: hash of the texts the chats are made of.
      chats: the chats, group by group.
      units: names of what chats share, such as a question. Chats of one unit are not independent.
        A unit of the first name is on one side only.
      position: the token whose state is the sample.
      seed: of sampled replies; a response position needs one for each chat.
      max_new_tokens: length of sampled replies.
      replayed_under: a system prompt under which the model's reply to each chat becomes the user's
        message of the chat that is read instead; "" reads the chats themselves.
    """

    kind: str
    source_sha256: str
    chats: Sequence[Chat]
    units: tuple[str, ...] = ("instruction", "question")
    position: Position = "prompt_end"
    seed: int = 0
    max_new_tokens: int = 64
    replayed_under: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """All samples of a contrast.

    Attributes:
      values: `resid_post` at the contrast's position.
      group: the group that each is averaged in; 0 is the positive one.
      units: by name, the number of each sample's unit.
      labelled: the name whose units are on one side only, so that a null may shuffle their labels.
    """

    values: Float[np.ndarray, "sample layer d_model"]
    group: Int[np.ndarray, " sample"]
    units: Mapping[str, Int[np.ndarray, " sample"]]
    labelled: str

    @property
    def positive(self) -> Bool[np.ndarray, " sample"]:
        """Which samples are on the positive side."""
        return self.group == 0

    def direction(self) -> Layers:
        """Mean of group 0 minus the mean of the other groups' means, float32, summed in float64."""
        first, *others = (
            self.values[self.group == one].mean(axis=0, dtype=np.float64)
            for one in np.unique(self.group)
        )
        return (first - np.mean(others, axis=0)).astype(np.float32)

    def parts(self, unit: str) -> Parts:
        """The samples summed by unit and side, in float64."""
        key = 2 * self.units[unit].astype(np.int64) + self.positive
        order = np.argsort(key, kind="stable")
        found, starts, counts = np.unique(key[order], return_index=True, return_counts=True)
        sums = np.zeros((len(found), *self.values.shape[1:]))
        for layer in range(self.values.shape[1]):
            values = self.values[order, layer].astype(np.float64)
            # The common mean drops out of differences; without it they lose fewer digits.
            sums[:, layer] = np.add.reduceat(values - values.mean(axis=0), starts, axis=0)
        return Parts(ids=found // 2, positive=found % 2 > 0, counts=counts, sums=sums)

    def keep(self, path: Path) -> None:
        """Write the sums of all units to a safetensors file, float32."""
        arrays = {
            f"{unit}.{name}": value.astype(np.float32) if name == "sums" else value
            for unit in self.units
            for name, value in vars(self.parts(unit)).items()
        }
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(arrays, temporary)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Samples summed by unit and side: all that halves and relabellings of whole units need.

    Attributes:
      ids: the unit of each part.
      positive: whether its samples are on the positive side.
      counts: its number of samples.
      sums: of its samples, without the mean of all samples.
    """

    ids: Int[np.ndarray, " part"]
    positive: Bool[np.ndarray, " part"]
    counts: Int[np.ndarray, " part"]
    sums: Float[np.ndarray, "part layer d_model"]

    def weights(
        self, positive: Bool[np.ndarray, "repeat part"], kept: Bool[np.ndarray, "repeat part"]
    ) -> Float[np.ndarray, "repeat part"]:
        """Weights of the sums in a difference of means over the samples of the kept parts."""
        up, down = positive & kept, ~positive & kept
        return up / (up @ self.counts)[:, None] - down / (down @ self.counts)[:, None]

    def split_half(
        self, *, halves: int = 100, seed: int = 0, size: int | None = None
    ) -> Float[np.ndarray, "half layer"] | None:
        """Cosines between the directions of two random halves of the units, for each repeat.

        A unit of both sides, such as a question, is in the same half on both. Units of one side
        are halved on each side. With `size`, each half has that many units a side; the rest is
        left out. None where a side has fewer than two units.
        """
        up, down = self.ids[self.positive], self.ids[~self.positive]
        if min(len(up), len(down)) < 2:
            return None
        sides = [up] if np.array_equal(up, down) else [up, down]
        generator = np.random.Generator(np.random.PCG64(seed))
        kept = np.zeros((2, halves, len(self.ids)), bool)
        for repeat in range(halves):
            for side in sides:
                order, n = generator.permutation(side), len(side) // 2 if size is None else size
                kept[0, repeat] |= np.isin(self.ids, order[:n])
                kept[1, repeat] |= np.isin(self.ids, order[n : None if size is None else 2 * n])
        one, two = (self.weights(np.broadcast_to(self.positive, h.shape), h) for h in kept)
        found = []
        for sums in self.sums.transpose(1, 0, 2):
            first, second = one @ sums, two @ sums
            norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
            dots = np.einsum("rd,rd->r", first, second)
            found.append(np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 1e-12))
        return np.stack(found, axis=1)


def kept(path: Path) -> dict[str, Parts]:
    """The sums that `Samples.keep` wrote, by unit."""
    arrays = load_file(path)
    units = dict.fromkeys(name.rpartition(".")[0] for name in arrays)
    fields = [field.name for field in dataclasses.fields(Parts)]
    return {unit: Parts(**{name: arrays[f"{unit}.{name}"] for name in fields}) for unit in units}


def position_weights(
    real: Bool[np.ndarray, " token"], response: int, asked: Sequence[Position]
) -> Float[np.ndarray, "position token"]:
    """Weights over the tokens of a packed sequence: which of a row's states are averaged.

    Args:
      real: which of them are the row's, its response last.
      response: number of response tokens.
      asked: positions.

    A prompt of 2 and a response of 2 tokens, [., p, p, r, r, .] with real [F, T, T, T, T, F]:
        prompt_end      [0, 0, 1, 0, 0, 0]      the last prompt token
        response_start  [0, 0, 0, 1, 0, 0]      the first response token
        response_avg    [0, 0, 0, .5, .5, 0]    every response token, without the ending token

    Raises:
      UserError: a response position asked of an empty response.
    """
    weights = np.zeros((len(asked), len(real)), np.float32)
    end = int(np.flatnonzero(real)[-1]) + 1
    start = end - response
    for i, position in enumerate(asked):
        if position == "prompt_end":
            weights[i, start - 1] = 1
        elif not response:
            raise UserError(f"position {position} needs a response; one row has none")
        elif position == "response_start":
            weights[i, start] = 1
        else:
            weights[i, start:end] = 1 / response
    return weights


def forward(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]] | None = None,
    asked: Sequence[Position] = (),
    *,
    shared: Sequence[int] | None = None,
    interventions: Interventions | None = None,
    condition: int = 0,
) -> Iterator[tuple[int, Float[np.ndarray, "layer position d_model"], Float[np.ndarray, " vocab"]]]:
    """Run every prompt with its response once, packed and in batches as a study's prompts.

    Args:
      model: the model; the rows of a batch are split over its mesh.
      prompts: token ids.
      responses: token ids that follow each prompt; None for none.
      asked: the token positions whose states at `resid_post` are captured.
      shared: the number of leading tokens of each prompt that are run once for all prompts that
        begin with the same ones.
      interventions: conditions, of which one is applied; None runs the plain model.
      condition: index of that one.

    Yields:
      A row's index, its float32 states at `resid_post` at the asked positions, and the logits after
      its last token; in no set order.

    Raises:
      UserError: a row longer than the model's context, or as `position_weights`.
    """
    responses = [[]] * len(prompts) if responses is None else responses
    shared = [0] * len(prompts) if shared is None else shared
    requests = [
        Request(tokens=[*prompt, *response], condition=condition, shared=n)
        for prompt, response, n in zip(prompts, responses, shared, strict=True)
    ]
    arrays = interventions or layer_sharing.untouched(model.config)
    for some, batch in batches(model, requests, arrays, capture=True):
        real = np.asarray(batch.real)
        weights = np.zeros((len(real), len(asked), real.shape[1]), np.float32)
        for i, row in enumerate(some):
            weights[i] = position_weights(real[i], len(responses[row]), asked)
        found = prefill.states(model.definition, model.params, batch, weights)
        states, logits = jax.device_get(found)
        yield from zip(some, states, logits, strict=False)


def batches(
    model: ChatModel,
    requests: Sequence[Request],
    interventions: Interventions,
    *,
    capture: bool = False,
) -> Iterator[tuple[list[int], prefill.PromptBatch]]:
    """Read requests in batches of one width; yields the rows of each batch, and what was read.

    With `capture`, the stream at every `resid_post` is kept.

    Raises:
      UserError: a request longer than the model's context.
    """
    limit = model.config.max_position
    check_lengths((len(request.tokens) for request in requests), limit)
    given = layer_sharing.with_prefixes(
        Prompts(
            model=model,
            requests=requests,
            interventions=interventions,
            probes=prefill.no_probes(model.config),
            packed=pack(requests, limit),
        )
    )
    given = dataclasses.replace(given, capture=capture)
    for rows in grouped(range(len(requests)), given.packed.width).values():
        yield from layer_sharing.read(given, rows)


def sample_replies(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    max_new_tokens: int,
    shared: Sequence[int] | None = None,
) -> list[list[int]]:
    """Unsteered replies, sampled by `SAMPLED`; each depends on its prompt and the seed only.

    `shared` is the number of leading tokens of each prompt that are run once (see `prefix`).
    """
    shared = [0] * len(prompts) if shared is None else shared
    requests = [
        Request(tokens=p, row_id=stable_id(*map(str, p)), shared=n)
        for p, n in zip(prompts, shared, strict=True)
    ]
    decoding = Decoding(max_new_tokens=max_new_tokens, eos=model.eos, sample=True)
    sampling = Sampling(seed=seed, **SAMPLED)
    batches = engine.run(model, requests, None, decoding, sampling=sampling)
    replies = sorted(itertools.chain.from_iterable(batches), key=lambda reply: reply.index)
    return [reply.tokens.tolist() for reply in replies]


def gather(model: ChatModel, contrast: Contrast) -> Samples:
    """All samples of a contrast, in the order of its chats.

    Chats that need a sampled reply and get an empty one are left out.

    Raises:
      UserError: every reply of a group is empty, or a chat is longer than the model's context.
    """
    chats = list(contrast.chats)
    reply_to = functools.partial(
        sample_replies, model, seed=contrast.seed, max_new_tokens=contrast.max_new_tokens
    )
    if contrast.replayed_under:
        texts = map(model.tokenizer.decode, reply_to(_tokens(model, chats)))
        spoken = [
            dataclasses.replace(chat, system=contrast.replayed_under, user=text)
            for chat, text in zip(chats, texts, strict=True)
            if text.strip()
        ]
        _check_groups(chats, spoken)
        chats = spoken
    prompts = _tokens(model, chats)
    shared = shared_lengths(prompts, [chat.system for chat in chats])
    replies: list[list[int]] = [[] for _ in chats]
    if contrast.position != "prompt_end":
        replies = reply_to(prompts, shared=shared)
        kept = [i for i, reply in enumerate(replies) if reply]
        _check_groups(chats, [chats[i] for i in kept])
        chats, prompts = [chats[i] for i in kept], [prompts[i] for i in kept]
        replies, shared = [replies[i] for i in kept], [shared[i] for i in kept]
    values = np.zeros((len(chats), model.config.n_layers, model.config.d_model), np.float32)
    for i, state, _ in forward(model, prompts, replies, [contrast.position], shared=shared):
        values[i] = state[:, 0]
    units = np.array([chat.units for chat in chats])
    return Samples(
        values=values,
        group=np.array([chat.group for chat in chats]),
        units=dict(zip(contrast.units, units.T, strict=True)),
        labelled=contrast.units[0],
    )


def _tokens(model: ChatModel, chats: Sequence[Chat]) -> list[list[int]]:
    return [model.tokenizer.chat(chat.user, chat.system) for chat in chats]


def _check_groups(asked: Sequence[Chat], answered: Sequence[Chat]) -> None:
    """Refuse a group that no chat is left of."""
    groups = {chat.group for chat in answered}
    for chat in asked:
        if chat.group not in groups:
            raise UserError(
                f"every sampled reply under {str(chat.system)[:60]!r} was empty, so there is "
                "nothing to average; take another seed, or the position prompt_end"
            )


class Shift(msgspec.Struct, frozen=True, kw_only=True):
    """One mode along one direction, in natural norms of the direction: an entry of modes.json.

    Attributes:
      mode: the mode's name.
      direction: the direction's name.
      n: number of prompts.
      at: the layer of the next three, such as `resid_post.21`.
      shift: the mean over prompts.
      low, high: its 95 % interval (normal, over prompts); None for a single prompt.
      by_layer: the mean at every layer.
    """

    mode: str
    direction: str
    n: int
    at: str
    shift: float
    low: float | None
    high: float | None
    by_layer: list[float]


def shifts(
    model: ChatModel,
    modes: Sequence[Mode],
    policy: str,
    prompts: Sequence[Prompt],
    directions: Mapping[str, Direction],
    layer: int,
) -> list[Shift]:
    """Measure every mode along every direction; a mode without text is left out, as it is zero.

    Args:
      model: the model that reads the prompts.
      modes: the modes.
      policy: the system prompt that follows a mode's text, and that the mode is compared with.
      prompts: the user's messages.
      directions: by name.
      layer: the layer to give with its interval.
    """
    texts = {mode.name: mode.with_policy(policy) for mode in modes if mode.text}
    with Progress("modes", (1 + len(texts)) * len(prompts), unit="prompts") as progress:
        plain = _last_states(model, policy, prompts, progress)
        found = []
        for name, system in texts.items():
            moved = _last_states(model, system, prompts, progress) - plain
            found += [_shift(name, direction, moved, layer) for direction in directions.values()]
    return found


def _shift(
    mode: str, direction: Direction, moved: Float[np.ndarray, "prompt n_layers d_model"], layer: int
) -> Shift:
    norms, n = np.maximum(np.linalg.norm(direction.vectors, axis=1), 1e-30), len(moved)
    along = np.einsum("pld,ld->pl", moved, direction.unit()) / norms
    mean = along.mean(axis=0)
    half = Z95 * along.std(axis=0, ddof=1)[layer] / np.sqrt(n) if n > 1 else None
    return Shift(
        mode=mode,
        direction=direction.name,
        n=n,
        at=f"resid_post.{layer}",
        shift=float(mean[layer]),
        low=None if half is None else float(mean[layer] - half),
        high=None if half is None else float(mean[layer] + half),
        by_layer=[round(float(value), 5) for value in mean],
    )


def _last_states(
    model: ChatModel, system: str, prompts: Sequence[Prompt], progress: Progress
) -> Float[np.ndarray, "prompt n_layers d_model"]:
    ids = [model.tokenizer.chat(prompt.asked, system) for prompt in prompts]
    shared = [shared_length(ids)] * len(ids)
    states = np.zeros((len(ids), model.config.n_layers, model.config.d_model), np.float64)
    for i, state, _ in forward(model, ids, None, ["prompt_end"], shared=shared):
        states[i] = state[:, 0]
        progress.advance(1)
    return states
