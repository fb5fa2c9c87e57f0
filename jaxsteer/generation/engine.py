"""Run many (condition, prompt) rows through the compiled programs, as fast as they end.

What rows have in common is run once (`prefix`: a system prompt; `depth`: layers below the first
where conditions differ), short prompts side by side (`lanes`), then `slots` decode together and are
refilled as rows end (`decks`). All sizes follow from the whole list of rows and never from who is
left or beside whom, so an interrupted run goes on in the same programs and ends in the same
results.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Collection, Generator, Sequence

import jax
import numpy as np
from jaxtyping import Float

from jaxsteer.errors import UserError
from jaxsteer.generation import memory, packing, padding, prefill, scheduler
from jaxsteer.generation.generate import Decoding, Sampling, no_probes
from jaxsteer.generation.layer_sharing import BATCH, Work, descend, fill
from jaxsteer.generation.packing import Lanes
from jaxsteer.generation.prefix import Prefix
from jaxsteer.generation.scheduler import Ended, Reader, Seat
from jaxsteer.model import sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.decoder import Realised
from jaxsteer.model.interventions import Interventions

# Cache slots are a multiple of this: a TPU copies a cache of other lengths at every look.
SLOT_MULTIPLE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One row to run.

    Attributes:
      tokens: prompt ids.
      condition: index into the stacked interventions.
      row_id: stable 32-bit number of the row, folded into the sampling seed.
      shared: how many leading tokens to run once for all requests of this condition that begin
        with the same ones, at most all but one; 0 runs each prompt whole.
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


def cache_slots(beginning: int, longest: int, new_tokens: int) -> int:
    """How long a row's cache is: a beginning, the longest prompt and its reply, in whole parts.

    >>> cache_slots(48, 87, 40)
    176
    """
    prompt = -(-longest // prefill.PART) * prefill.PART
    return -(-(beginning + prompt + new_tokens) // SLOT_MULTIPLE) * SLOT_MULTIPLE


def slots_for(batch: int, rows: int, multiple: int = 1) -> int:
    """Number of slots for some rows: `batch`, or a half, a quarter... that still holds them all.

    An empty slot costs as much as a full one; halves, so that few sizes are ever compiled. All are
    of a multiple, rounded up, and so is half of an odd number.

    >>> slots_for(64, 100), slots_for(64, 32), slots_for(64, 12), slots_for(64, 12, multiple=32)
    (64, 32, 16, 32)
    >>> slots_for(30, 100, multiple=4)
    32
    >>> slots_for(10001, 6)
    10
    """
    batch = -(-batch // multiple) * multiple
    while (half := -(-batch // (2 * multiple)) * multiple) >= rows and half < batch:
        batch = half
    return batch


def pack(requests: Sequence[Request], limit: int) -> Lanes:
    """The lanes of the requests' own tokens, their shared beginnings left out.

    Side by side are prompts that run under the same conditions and begin with the same tokens: so a
    lane under a condition has one beginning, and no prompt is run where it was not asked for.

    Args:
      requests: all rows of a run.
      limit: most tokens of a prompt.

    Raises:
      UserError: a prompt that is too long.
    """
    asked: dict[tuple[int, ...], set[int]] = {}
    for request in requests:
        asked.setdefault(tuple(request.tokens), set()).add(request.condition)
    return packing.pack(
        [request.tokens[request.shared :] for request in requests],
        [(tuple(r.tokens[: r.shared]), tuple(sorted(asked[tuple(r.tokens)]))) for r in requests],
        limit,
    )


def run(
    model: ChatModel,
    requests: Sequence[Request],
    interventions: Interventions,
    decoding: Decoding,
    *,
    probes: Float[np.ndarray, "layer probe d_model"] | None = None,
    sampling: Sampling | None = None,
    batch: int = 32,
    skip: Collection[int] = (),
) -> Generator[list[Reply], None, None]:
    """Yield rows as they end, those of one chunk of steps at a time; see `Reply.index`.

    Args:
      model: the model to run.
      requests: all rows, those to skip too: they decide sizes and what is shared.
      interventions: stacked conditions, host arrays.
      decoding: static decoding settings.
      probes: unit directions whose projections are recorded; None for none.
      sampling: dynamic sampling settings, unread when greedy.
      batch: most slots: rows that decode together; on a mesh, as many more as its data axis asks.
      skip: indices of requests that need no run.

    Raises:
      UserError: a prompt that does not fit the model's context with its reply, that is empty, or of
        which all is shared.
    """
    config = model.config
    if probes is None:
        probes = no_probes(config.n_layers, config.d_model)
    sampling = sampling or Sampling()
    batch = slots_for(batch, len(requests), sharding.data_of(sharding.mesh_of(model.params)))
    limit = config.max_position - decoding.max_new_tokens
    padding.check_lengths((len(request.tokens) for request in requests), limit)
    for index, request in enumerate(requests):
        if not request.tokens:
            raise UserError(f"request {index} has no tokens; a prompt needs at least one")
        if not request.shared < len(request.tokens):
            raise UserError(
                f"row {request.row_id} shares all {len(request.tokens)} of its tokens; a reply "
                "begins after one that is the row's own"
            )
    todo = [i for i in range(len(requests)) if i not in skip]
    if not todo:
        return
    prompts = _Prompts(model, requests, interventions, decoding, probes, sampling, limit)
    count = scheduler.count(batch, model.params)
    size = batch // count
    # An interrupted run may have left few rows: an empty slot costs as much as a full one.
    needed = min(count, -(-len(todo) // size))
    readers = [prompts.read(some) for some in prompts.dealt(todo, needed)]
    try:
        running = scheduler.run(model, readers, decoding, probes, sampling, size)
        with contextlib.closing(running):
            for ended in running:
                yield [_reply(model, requests[row.seat.index], row) for row in ended]
    finally:
        # What they hold is freed first.
        del prompts, readers
        memory.give_back()


class _Prompts:
    """Prompts read in batches: shared beginnings first, then each row's own tokens."""

    def __init__(
        self,
        model: ChatModel,
        requests: Sequence[Request],
        interventions: Interventions,
        decoding: Decoding,
        probes: np.ndarray,
        sampling: Sampling,
        limit: int,
    ):
        self.model, self.requests = model, requests
        self.decoding, self.sampling = decoding, sampling
        prefix, beginning = _beginnings(model, requests, interventions, probes)
        packed = pack(requests, limit)
        self.buckets = [padding.bucket(len(r.tokens) - r.shared, limit) for r in requests]
        self.work = Work(
            definition=model.definition,
            config=model.config,
            params=model.params,
            interventions=interventions,
            probes=probes,
            conditions=[request.condition for request in requests],
            lanes=packed,
            prefix=prefix,
            beginning=beginning,
        )
        begun = 0 if prefix is None else prefix.real.shape[1]
        longest = max(len(r.tokens) - r.shared for r in requests)
        self.slots = cache_slots(begun, longest, decoding.max_new_tokens)

    def dealt(self, todo: Sequence[int], count: int) -> list[list[int]]:
        """Rows in so many parts: whole lanes, in turns by length."""
        lane = self.work.lanes.lane
        ordered = dict.fromkeys(lane[i] for i in sorted(todo, key=lambda i: self.buckets[i]))
        part = {number: n % count for n, number in enumerate(ordered)}
        return [[i for i in todo if part[lane[i]] == n] for n in range(count)]

    def read(self, todo: Sequence[int]) -> Reader:
        """Prefill requests `todo`, shortest first, all rows of some lanes before the next.

        Lanes of many conditions come before those of few: such as part alike fill batches.
        """
        lane = self.work.lanes.lane
        conditions = Counter(n for n, _ in set(zip(lane, self.work.conditions, strict=True)))
        ordered = sorted(todo, key=lambda i: (-conditions[lane[i]], self.buckets[i]))
        widths = {i: self.work.lanes.width(i) for i in ordered}
        for width in sorted(set(widths.values())):
            for done in descend(self.work, [i for i in ordered if widths[i] == width], width):
                ids = [self.requests[i].row_id for i in done.rows]
                real, prefix, asked, numbers = self.work.placed(
                    (
                        done.real,
                        self.work.prefix_of(done.rows, BATCH),
                        self.work.interventions_of(done.rows, BATCH),
                        np.array(ids + [0] * (BATCH - len(ids)), np.uint32),
                    )
                )
                prefilled = prefill.finish(
                    self.model.definition,
                    self.decoding,
                    self.slots,
                    self.model.params,
                    done.levels,
                    done.places,
                    done.member,
                    real,
                    prefix,
                    asked,
                    numbers,
                    self.sampling,
                )
                realised = jax.device_get(prefilled.realised)
                seats = []
                for row, i in enumerate(done.rows):
                    change = jax.tree.map(lambda leaf, row=row: leaf[row], realised)
                    seats.append(Seat(index=i, row=row, prompt=change))
                yield prefilled, seats
                # Or it would be held while the next is made.
                del prefilled


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
        model.config,
        model.params,
        [tokens for _, tokens in numbers],
        [condition for condition, _ in numbers],
        interventions,
        probes,
    )
    return prefix, beginning


def _reply(model: ChatModel, request: Request, row: Ended) -> Reply:
    return Reply(
        index=row.seat.index,
        n_prompt=len(request.tokens),
        tokens=row.tokens,
        text=model.tokenizer.decode(row.tokens),
        stopped=row.stopped,
        prompt=row.seat.prompt,
        response=row.response,
        logits=row.logits,
    )


def check_finite(reply: Reply, what: str) -> None:
    """Refuse a reply whose residual stream was NaN or infinite: its tokens mean nothing.

    Args:
      reply: a row's result.
      what: whose it is, in words.

    Raises:
      UserError: it was.
    """
    if not np.isfinite(total_change(reply)):
        raise UserError(
            f"{what}: the residual stream left the range of numbers (NaN or infinite); lower the "
            "strength, or convert the model again if it happens without any"
        )


def total_change(reply: Reply) -> float:
    """Norm of the realised change, summed over the reply's tokens, layers and taps."""
    both = [*reply.prompt.values(), *reply.response.values()]
    return float(sum(float(realised.change.sum()) for realised in both))
