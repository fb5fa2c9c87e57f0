"""Run many (condition, prompt) rows: prompts to replies, each handed over as soon as it ends.

    requests --check, run prefixes, pack--> prompts
                                               |
                    while slots are free:      v
                    read a batch of prompts (layer sharing, prefill)
                                               |
                                               v  insert
                      +----------------->  slots that decode
                      |                        |
                      |  slots are free        v  advance a chunk of steps
                      +------------------  rows that ended  --emit-->  replies

That is one loop, and iterating over `run` drives it. A CPU runs two of them in threads, each with
half of the rows (`interleave`). A few rows with long prompts run apart from all others, since their
caches are longer (`by_length`). All sizes follow from the whole list of rows, never from which are
left or run beside each other, so an interrupted run continues with the same programs and ends in
the same results.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import jax
import numpy as np
from jaxtyping import Float

from jaxsteer.errors import UserError, heed_stop
from jaxsteer.generation import decode, layer_sharing, prefill
from jaxsteer.generation.decode import DecodeState, Decoding, Sampling
from jaxsteer.generation.layer_sharing import Prompts
from jaxsteer.generation.prefill import take
from jaxsteer.generation.requests import Reply, Request, bucket, fitted, grouped, pack
from jaxsteer.model import decoder, sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.decoder import Params, Past
from jaxsteer.model.interventions import Interventions

# Cache slots are a multiple of this: a TPU copies a cache of other lengths at every step.
SLOT_MULTIPLE = 16
# Fewest slots of one of two loops.
LEAST_SLOTS = 16
# So many slots less to read, over all rows and steps, are worth another decode program on a CPU.
WORTH_COMPILING = 2**21
# Slots that read a long prefix together.
NEIGHBOURS = 4

Loop = Generator[list[Reply], None, None]


def cache_slots(longest: int, new_tokens: int) -> int:
    """Length of a row's cache: the longest prompt, without prefix, in whole chunks, and its reply.

    >>> cache_slots(87, 40)
    128
    """
    prompt = -(-longest // decode.CHUNK) * decode.CHUNK
    return -(-(prompt + new_tokens) // SLOT_MULTIPLE) * SLOT_MULTIPLE


def neighbours(prefix: int, new_tokens: int, slots: int, rows: float) -> int:
    """How many neighbouring slots hold rows of one prefix, and read it together.

    Read together, a prefix takes a quarter of the memory and less than half of the time. But a slot
    that becomes free waits for a row of its neighbours' prefix, which costs more than that where
    replies are long or few rows have the same prefix.

    Args:
      prefix: tokens of the longest prefix.
      new_tokens: most tokens of a reply.
      slots: of one loop and device.
      rows: mean number of rows of a prefix.

    >>> neighbours(370, 24, 64, 40), neighbours(370, 150, 64, 40), neighbours(370, 24, 64, 2)
    (4, 1, 1)
    """
    long = prefix >= 4 * new_tokens and rows >= NEIGHBOURS
    return NEIGHBOURS if long and slots % NEIGHBOURS == 0 else 1


def count_loops(slots: int, params: Params) -> int:
    """How many loops share the slots: two on a CPU, unless each would have few slots.

    A program of a few rows leaves cores idle: between matrix products it has stretches of small
    operations that only one core works on. While the program of one loop is in such a stretch, the
    products of the other use the idle core. An accelerator is busy with one loop, and would read
    its weights twice for two. A mesh has one, since programs that exchange arrays must reach all
    devices in one order. Of 256 slots on a CPU it is 2, of 16 slots 1.
    """
    devices = params["embed"]["embedding"].devices()
    one_cpu = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return 2 if one_cpu and slots % 2 == 0 and slots // 2 >= LEAST_SLOTS else 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What every loop of a run reads.

    Attributes:
      prompts: the prompts of all rows.
      decoding: static decoding settings.
      sampling: dynamic sampling settings.
      slots: rows that one loop decodes together.
      cache_slots: length of each row's cache.
      group: neighbouring slots that hold rows of one prefix.
    """

    prompts: Prompts
    decoding: Decoding
    sampling: Sampling
    slots: int
    cache_slots: int
    group: int

    def prefix(self, row: int) -> int:
        """Index of a row's prefix; 0 if there is none."""
        return self.prompts.prefix[row] if self.prompts.prefixes else 0


def run(
    model: ChatModel,
    requests: Sequence[Request],
    interventions: Interventions | None,
    decoding: Decoding,
    *,
    probes: Float[np.ndarray, "layer probe d_model"] | None = None,
    sampling: Sampling | None = None,
    batch: int = 32,
    skip: Collection[int] = (),
) -> Loop:
    """Yield the rows that ended in each chunk of steps; see `Reply.index`.

    Args:
      model: the model to run.
      requests: all rows, also those to skip: they decide sizes and what is shared.
      interventions: stacked conditions, host arrays; None for one that leaves the model alone.
      decoding: static decoding settings.
      probes: unit directions whose projections are recorded; None for none.
      sampling: dynamic sampling settings, unread when greedy.
      batch: most rows that decode together; on a mesh rounded up to a multiple of its data axis.
      skip: indices of requests that are not run.

    Raises:
      UserError: a prompt that does not fit the model's context with its reply, that is empty, or
        that is all prefix; or more memory than there is.
    """
    limit = model.config.max_position - decoding.max_new_tokens
    _check(requests, limit)
    check_memory(model, requests, decoding.max_new_tokens, batch)
    if set(skip) >= set(range(len(requests))):
        return
    prompts = layer_sharing.with_prefixes(
        Prompts(
            model=model,
            requests=requests,
            interventions=interventions or layer_sharing.untouched(model.config),
            probes=prefill.no_probes(model.config) if probes is None else probes,
            packed=pack(requests, limit),
        )
    )
    data = sharding.data_size(model.mesh)
    # An accelerator compiles for longer, and reads a cache in less time.
    few = batch // 4 if count_loops(batch, model.params) > 1 else 0
    for rows in by_length(prompts, decoding.max_new_tokens, few):
        fits = fitted(batch, len(rows), data)
        count = count_loops(fits, model.params)
        asked = [requests[i] for i in rows]
        length, group = _sizes(asked, decoding.max_new_tokens, fits // count // data)
        job = _Job(
            prompts=prompts,
            decoding=decoding,
            sampling=sampling or Sampling(),
            slots=fits // count,
            cache_slots=length,
            group=group,
        )
        left = [i for i in rows if i not in skip]
        # An interrupted run may have few rows left: an empty slot costs as much as a full one.
        shares = _shares(prompts, left, min(count, -(-len(left) // job.slots) or 1))
        with contextlib.closing(interleave([_loop(job, share) for share in shares])) as running:
            yield from filter(None, running)


def by_length(prompts: Prompts, new_tokens: int, few: int) -> list[list[int]]:
    """All rows; or in two parts, if a few with long prompts would slow all others too much.

    A step reads every slot of a cache, so the longest prompt decides how long a step takes. The
    rows of a packed sequence stay together: the longest of its prompts decides their part.

    Args:
      prompts: the prompts of a run.
      new_tokens: most tokens of a reply.
      few: most rows of the part with the longer prompts.
    """
    longest = [np.bincount(ids[ids > 0]).max() for ids in prompts.packed.segment_ids]
    slots = [cache_slots(int(longest[n]), new_tokens) for n in prompts.packed.sequence]
    # Enough for all but a few: for all but one of [48, 224, 48, 48] it is 48.
    bound = sorted(slots)[-1 - min(few, len(slots) - 1)]
    pays = (max(slots) - bound) * new_tokens * len(slots) >= WORTH_COMPILING
    return list(grouped(range(len(slots)), lambda row: pays and slots[row] > bound).values())


def _sizes(requests: Sequence[Request], new_tokens: int, slots: int) -> tuple[int, int]:
    """A job's `cache_slots` and `group`; `slots` are those of one loop and device."""
    longest = max((len(request.own) for request in requests), default=1)
    prefix = max((request.shared for request in requests), default=0)
    of_prefix = len(requests) / max(1, len(_prefixes(requests)))
    group = neighbours(prefix, new_tokens, slots, of_prefix)
    return cache_slots(longest, new_tokens), group


def _prefixes(requests: Sequence[Request]) -> set[tuple[tuple[int, ...], int | None]]:
    """The distinct prefixes, each with its condition unless it is never steered."""
    return {(request.prefix, None if request.plain else request.condition) for request in requests}


def memory(
    model: ChatModel, requests: Sequence[Request], new_tokens: int, batch: int
) -> dict[str, int]:
    """Roughly how many bytes a run takes at most, by what they are for; arguments as for `run`."""
    config, token = model.config, decoder.token_bytes(model.config, model.params)
    longest = max((len(request.tokens) for request in requests), default=1)
    width, data = bucket(longest, config.max_position), sharding.data_size(model.mesh)
    batch = fitted(batch, len(requests), data)
    loops = count_loops(batch, model.params)
    slots, group = _sizes(requests, new_tokens, batch // loops // data)
    entries, rows = layer_sharing.batch_sizes(model.mesh, width, slots)
    # The residual stream and what a layer makes of it, float32.
    read = entries * width * (token + 4 * (8 * config.d_model + 3 * config.d_ff))
    shared = max((request.shared for request in requests), default=0)
    return {
        "weights": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "cache of a batch": (batch * slots + batch // group * shared) * token,
        "shared prefixes": sum(len(prefix) for prefix, _ in _prefixes(requests)) * token,
        "prompts being read": loops * (read + rows * slots * token),
    }


def check_memory(
    model: ChatModel, requests: Sequence[Request], new_tokens: int, batch: int
) -> None:
    """Refuse a run that does not fit the memory; arguments as for `run`.

    Raises:
      UserError: it does not.
    """
    longest = max((len(request.tokens) for request in requests), default=0)
    mend = (
        f"lower the batch of {batch} rows or max_new_tokens, or shorten the longest prompt "
        f"({longest:,} tokens)"
    )
    needed = sum(memory(model, requests, new_tokens, batch).values())
    sharding.check_memory(model.params, needed, mend)


def _check(requests: Sequence[Request], limit: int) -> None:
    for index, request in enumerate(requests):
        bucket(len(request.tokens), limit)
        if not request.tokens:
            raise UserError(f"request {index} has no tokens; a prompt needs at least one")
        if not request.own:
            raise UserError(
                f"row {request.row_id} shares all {len(request.tokens)} of its tokens; leave at "
                "least one out of its prefix"
            )


def _shares(prompts: Prompts, rows: Sequence[int], count: int) -> list[list[int]]:
    """Rows in equal shares: packed sequences in turn, so that at most one is divided.

    In a share, packed sequences of many conditions come before those of few: their rows then differ
    at the same layers, and fill whole batches.
    """
    sequence, requests = prompts.packed.sequence, prompts.requests
    asked = {(sequence[i], request.condition) for i, request in enumerate(requests)}
    conditions = Counter(number for number, _ in asked)
    by_sequence = grouped(rows, sequence.__getitem__)
    # The last packed sequences have the shortest prompts.
    listed = sorted(by_sequence, key=lambda number: (-conditions[number], -number))
    order = [row for first in range(count) for n in listed[first::count] for row in by_sequence[n]]
    return [order[len(order) * n // count : len(order) * (n + 1) // count] for n in range(count)]


def _loop(job: _Job, rows: Sequence[int]) -> Loop:
    """The loop of the module's picture, over some rows.

    Yields after every step, a batch of prompts read or a chunk decoded, the rows that ended in it:
    often none.
    """
    prompts, decoding, sampling = job.prompts, job.decoding, job.sampling
    model, unread = prompts.model, _read(job, rows)
    state: DecodeState | None = None
    # The request in each occupied slot; rows that wait for a slot, by their place in `batch`.
    occupied: dict[int, int] = {}
    batch: DecodeState | None = None
    waiting: list[tuple[int, int]] = []
    # The prefix of each group of slots, and the keys and values of these.
    asked = np.zeros(job.slots // job.group, np.int32)
    prefixes: Past | None = None
    while True:
        heed_stop()
        if len(occupied) < job.slots and batch is None:
            batch, waiting = next(unread, (None, []))
        seats = _seats(job, occupied, waiting)
        if seats and batch is not None:
            if state is None:
                state = decode.empty(batch, model.config, job.slots, model.mesh)
            slots = np.full(len(batch.live), job.slots, np.int32)
            for slot, (place, index) in seats.items():
                slots[place], occupied[slot] = slot, index
            waiting = [one for one in waiting if one not in seats.values()]
            state = decode.insert(state, batch, slots)
            # Dropped before the next is read, so that memory never holds two.
            batch = batch if waiting else None
            yield []
        elif state is not None and occupied:
            wanted = asked.copy()
            for slot, index in occupied.items():
                wanted[slot // job.group] = job.prefix(index)
            if prompts.prefixes and (prefixes is None or (wanted != asked).any()):
                # Dropped before the next are taken, so that memory never holds both.
                asked, prefixes = wanted, None
                prefixes = prompts.placed(take(prompts.prefixes, asked)).cache
            state = decode.advance(
                *(model.definition, decoding, model.params, state, prompts.probes, sampling),
                prefixes,
            )
            yield _emit(job, state, occupied)
        else:
            return


def _seats(
    job: _Job, occupied: Mapping[int, int], waiting: Sequence[tuple[int, int]]
) -> dict[int, tuple[int, int]]:
    """Free slots for rows that wait: beside rows of their prefix, or in an empty group."""
    held = {slot // job.group: job.prefix(index) for slot, index in occupied.items()}
    free, seats = [slot for slot in range(job.slots) if slot not in occupied], {}
    for place, index in waiting:
        prefix = job.prefix(index)
        fit = [slot for slot in free if held.get(slot // job.group, prefix) == prefix]
        if fit:
            slot = min(fit, key=lambda slot: slot // job.group not in held)
            seats[slot], held[slot // job.group] = (place, index), prefix
            free.remove(slot)
    return seats


def _read(job: _Job, rows: Sequence[int]) -> Iterator[tuple[DecodeState, list[tuple[int, int]]]]:
    """Read prompts: rows ready to decode, with their places and requests."""
    prompts, model = job.prompts, job.prompts.model
    by_width = grouped(rows, prompts.packed.width)
    for width in sorted(by_width):
        for some, batch in layer_sharing.read(prompts, by_width[width], slots=job.cache_slots):
            yield (
                prefill.finish(model, job.decoding, batch, job.sampling, job.cache_slots),
                list(enumerate(some)),
            )


def _emit(job: _Job, state: DecodeState, occupied: dict[int, int]) -> list[Reply]:
    """The replies of rows that have ended; their slots become free."""
    prompts, live = job.prompts, np.asarray(state.live)
    ended = [slot for slot in occupied if not live[slot]]
    if not ended:
        return []
    tokens, emitted, prompt, response = jax.device_get(
        (state.tokens, state.emitted, state.prompt, state.response)
    )
    replies = []
    for slot in ended:
        index, chosen = occupied.pop(slot), int(emitted[slot])
        stopped = int(tokens[slot, chosen - 1]) in job.decoding.eos
        ids = np.array(tokens[slot, : chosen - stopped])
        before, after = jax.tree.map(lambda leaf, s=slot: np.array(leaf[s]), (prompt, response))
        logits = np.asarray(state.logits[slot])[:chosen] if job.decoding.keep_logits else None
        replies.append(
            Reply(
                index=index,
                n_prompt=len(prompts.requests[index].tokens),
                tokens=ids,
                text=prompts.model.tokenizer.reply(ids),
                stopped=stopped,
                prompt=before,
                response=after,
                logits=logits,
            )
        )
    return replies


def interleave(loops: Sequence[Loop]) -> Loop:
    """Yield what the loops yield, as it comes; each takes its next step while the caller works.

    An exception of a loop reaches the caller. Then, and when the caller closes this generator, the
    other loops end their current step and are closed.
    """
    try:
        with ThreadPoolExecutor(len(loops)) as pool:
            running: dict[Future[list[Reply] | None], Loop] = {
                pool.submit(next, loop, None): loop for loop in loops
            }
            while running:
                done = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
                loop, step = running.pop(done), done.result()
                if step is not None:
                    running[pool.submit(next, loop, None)] = loop
                    yield step
    finally:
        for loop in loops:
            loop.close()


def check_finite(change: float, what: str) -> None:
    """Refuse a reply whose residual stream was NaN or infinite: its tokens mean nothing.

    Args:
      change: the realised change of the reply, which then is not finite either.
      what: the row, in words, for the message.

    Raises:
      UserError: it was.
    """
    if not np.isfinite(change):
        raise UserError(
            f"{what}: the residual stream contains NaN or infinity; lower the strength, or, if "
            "nothing is steered, convert the model again"
        )


def total_change(reply: Reply) -> float:
    """Norm of the realised change, summed over the reply's tokens, layers and taps."""
    both = [*reply.prompt.values(), *reply.response.values()]
    return float(sum(float(realised.change.sum()) for realised in both))
