"""The samples behind a direction: one state of the residual stream for each chat of a contrast.

A direction is the difference of means of these samples. `evidence.reliability` halves them and
shuffles their labels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jaxsteer.directions import activations
from jaxsteer.directions.activations import Position
from jaxsteer.errors import UserError
from jaxsteer.files import stable_id
from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding, Sampling
from jaxsteer.generation.requests import shared_lengths
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Layers

# How replies are sampled, as in persona vectors (Chen et al. 2025).
SAMPLED = {"temperature": 1.0, "top_p": 0.95}


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
        return _difference(self.values, np.ones(len(self.group)), self.group).astype(np.float32)

    def split_half(self, repeats: int = 100, seed: int = 0) -> Float[np.ndarray, " layer"] | None:
        """Mean cosine of the directions of two random halves of the labelled units, by layer.

        Each side's units are halved, `repeats` times. None where a side has fewer than two units;
        `evidence.reliability` says what it means, and measures more of it.
        """
        ids, at, unit = np.unique(self.units[self.labelled], return_index=True, return_inverse=True)
        group, counts, found = self.group[at], np.bincount(unit), []
        if min((group == 0).sum(), (group > 0).sum()) < 2:
            return None
        sums = np.zeros((len(ids), *self.values.shape[1:]))
        np.add.at(sums, unit, self.values)
        generator = np.random.Generator(np.random.PCG64(seed))
        for _ in range(repeats):
            first = np.zeros(len(ids), bool)
            for side in (np.flatnonzero(group == 0), np.flatnonzero(group > 0)):
                first[generator.permutation(side)[: len(side) // 2]] = True
            one, two = (_difference(sums[h], counts[h], group[h]) for h in (first, ~first))
            norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
            found.append(np.einsum("ld,ld->l", one, two) / np.where(norms > 0, norms, 1.0))
        return np.mean(found, axis=0)


def _difference(
    sums: Float[np.ndarray, "part layer d_model"],
    counts: Shaped[np.ndarray, " part"],
    group: Int[np.ndarray, " part"],
) -> Float[np.ndarray, "layer d_model"]:
    """Mean of group 0 minus the mean of the other groups' means, from sums of so many samples."""
    first, *others = (
        sums[group == one].sum(axis=0, dtype=np.float64) / counts[group == one].sum()
        for one in np.unique(group)
    )
    return first - np.mean(others, axis=0)


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
        engine.Request(tokens=p, row_id=stable_id(*map(str, p)), shared=n)
        for p, n in zip(prompts, shared, strict=True)
    ]
    decoding = Decoding(max_new_tokens=max_new_tokens, eos=model.eos, sample=True)
    replies: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(seed=seed, **SAMPLED)
    for batch in engine.run(model, requests, None, decoding, sampling=sampling):
        for reply in batch:
            replies[reply.index] = reply.tokens.tolist()
    return replies


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
    for i, state, _ in activations.forward(
        model, prompts, replies, [contrast.position], shared=shared
    ):
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
