"""Run many (condition, prompt) rows through the compiled program, a batch at a time.

The batch size is fixed and short batches are filled with padding rows, so that a row is computed
by the same program whoever its neighbours are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float

from jaxsteer import chat
from jaxsteer.activations import batches
from jaxsteer.chatmodel import ChatModel
from jaxsteer.generate import Decoding, Replies, Rows, Sampling, generate, no_probes
from jaxsteer.interventions import Interventions
from jaxsteer.model import Realised
from jaxsteer.prefix import Prefix, fill, take


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One row to run.

    Attributes:
      tokens: prompt ids.
      condition: index into the stacked interventions.
      row_id: stable 32-bit number of the row, folded into the sampling seed.
      shared: how many leading tokens to run once for all requests of this condition that begin
        with the same ones; 0 runs each prompt whole.
    """

    tokens: Sequence[int]
    condition: int = 0
    row_id: int = 0
    shared: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """One row's result, on the host.

    Attributes:
      index: position of its request in the list given to `run`.
      n_prompt: number of prompt tokens.
      tokens: generated ids, the ending token left out.
      text: the decoded reply.
      stopped: whether an end-of-sequence token ended it.
      prompt: realised change over the prompt per tap, leaves [layer, ...].
      response: the same over the generated tokens.
      logits: what each token, and the ending one, was chosen from; None unless asked for.
    """

    index: int
    n_prompt: int
    tokens: np.ndarray
    text: str
    stopped: bool
    prompt: dict[str, Realised]
    response: dict[str, Realised]
    logits: Float[np.ndarray, "chosen vocab"] | None = None


def run(
    model: ChatModel,
    requests: Sequence[Request],
    interventions: Interventions,
    decoding: Decoding,
    *,
    probes: Float[np.ndarray, "layer probe d_model"] | None = None,
    sampling: Sampling | None = None,
    batch: int = 32,
) -> Iterator[list[Reply]]:
    """Yield finished batches, shortest prompts first; see `Reply.index` for the order given.

    Raises:
      UserError: a prompt that does not fit the model's context with its reply.
    """
    config = model.config
    if probes is None:
        probes = no_probes(config.n_layers, config.d_model)
    limit = config.max_position - decoding.max_new_tokens
    for request in requests:
        chat.bucket(len(request.tokens), limit)
    prefix, beginning = _beginnings(model, requests, interventions, probes)
    own = [list(request.tokens[request.shared :]) for request in requests]
    for width, members in batches([len(tokens) for tokens in own], limit, batch):
        filler = batch - len(members)
        tokens, real = chat.left_pad([own[i] for i in members] + [[]] * filler, width)
        rows = Rows(
            tokens=tokens,
            real=real,
            interventions=interventions.rows(
                np.array([requests[i].condition for i in members] + [0] * filler)
            ),
            ids=np.array([requests[i].row_id for i in members] + [0] * filler, np.uint32),
            prefix=prefix
            and take(prefix, np.array([beginning[i] for i in members] + [0] * filler)),
        )
        replies = generate(
            model.definition, decoding, model.params, rows, probes, sampling or Sampling()
        )
        replies = jax.tree.map(np.asarray, replies)
        yield [
            _reply(model, i, len(requests[i].tokens), slot, replies, decoding.keep_logits)
            for slot, i in enumerate(members)
        ]


def _beginnings(
    model: ChatModel,
    requests: Sequence[Request],
    interventions: Interventions,
    probes: Float[np.ndarray, "layer probe d_model"],
) -> tuple[Prefix | None, list[int]]:
    """Run every distinct shared beginning once; which one each request has."""
    if not any(request.shared for request in requests):
        return None, []
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    beginning = [
        numbers.setdefault((r.condition, tuple(r.tokens[: r.shared])), len(numbers))
        for r in requests
    ]
    prefix = fill(
        model.definition,
        model.params,
        [tokens for _, tokens in numbers],
        [condition for condition, _ in numbers],
        interventions,
        probes,
    )
    return prefix, beginning


def _reply(
    model: ChatModel, index: int, n_prompt: int, slot: int, replies: Replies, keep_logits: bool
) -> Reply:
    length, stopped = int(replies.length[slot]), bool(replies.stopped[slot])
    tokens = np.asarray(replies.tokens[slot, :length])
    return Reply(
        index=index,
        n_prompt=n_prompt,
        tokens=tokens,
        text=model.tokenizer.decode(tokens),
        stopped=stopped,
        prompt=jax.tree.map(lambda a: a[slot], replies.prompt),
        response=jax.tree.map(lambda a: a[slot], replies.response),
        logits=np.array(replies.logits[slot, : length + stopped]) if keep_logits else None,
    )


def total_change(reply: Reply) -> float:
    """Norm of the realised change, summed over the reply's tokens, layers and taps."""
    both = [*reply.prompt.values(), *reply.response.values()]
    return float(sum(float(realised.change.sum()) for realised in both))
