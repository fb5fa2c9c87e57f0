"""Decks of slots: rows wait for a slot, decode in a deck beside others, and leave when they end.

A program of a few rows leaves cores idle: between products it has stretches of small operations
that only one core works on. So on a CPU the slots are in two decks of one size, each with a thread
where it reads prompts and decodes: while one's program is in such a stretch, the other's products
use the rest. An accelerator is full with one deck, and would read its weights twice for two; a mesh
has one, since programs that exchange arrays must reach all devices in one order.

Which deck a row comes to depends on who ended first. Its bits do not: all decks run one program, in
which nothing of a row depends on those beside it (`slots`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import jax
import numpy as np
from jaxtyping import Float

from jaxsteer.generation import decode
from jaxsteer.generation.generate import Decoding, Sampling
from jaxsteer.generation.prefill import Prefilled
from jaxsteer.model import sharding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.decoder import Params, Realised

# Fewest slots of one of two decks.
LEAST = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seat:
    """A row on its way.

    Attributes:
      index: of its request.
      row: its place among those prefilled with it.
      prompt: realised change over its prompt per tap, leaves [layer, ...].
    """

    index: int
    row: int
    prompt: dict[str, Realised]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """A row that has left its slot, on the host.

    Attributes:
      seat: who it is.
      tokens: generated ids, the ending token left out.
      stopped: whether an end-of-sequence token ended it.
      response: realised change over the generated tokens per tap, leaves [layer, ...].
      logits: what each token, and the ending one, was chosen from; None unless kept.
    """

    seat: Seat
    tokens: np.ndarray
    stopped: bool
    response: dict[str, Realised]
    logits: Float[np.ndarray, "chosen vocab"] | None


# Reads prompts as it is asked for the next rows: those prefilled together, and who they are.
Reader = Iterator[tuple[Prefilled, list[Seat]]]


class Waiting:
    """Rows that have no slot yet; one deck at a time takes from them, and holds `lock` for it."""

    def __init__(self, read: Reader):
        self.lock = threading.Lock()
        self._read = read
        self._prefilled: Prefilled | None = None
        self._seats: list[Seat] = []

    def take(self, most: int) -> tuple[Prefilled, list[Seat]] | None:
        """Rows that were prefilled together, and which of them to seat; None when all are."""
        if not self._seats:
            # Let go first: the next are made beside it otherwise.
            self._prefilled = None
            self._prefilled, self._seats = next(self._read, (None, []))
        if self._prefilled is None:
            return None
        entering, self._seats = self._seats[:most], self._seats[most:]
        return self._prefilled, entering


class Deck:
    """Slots that decode together, and who sits in each.

    Of the rows that wait, a deck takes the first ones, and what others left when it has no more.
    """

    def __init__(
        self,
        model: ChatModel,
        decoding: Decoding,
        probes: Float[np.ndarray, "layer probe d_model"],
        sampling: Sampling,
        waiting: Sequence[Waiting],
        size: int,
        stopped: threading.Event,
    ):
        self.model, self.decoding, self.probes, self.sampling = model, decoding, probes, sampling
        self.waiting, self.size, self.stopped = waiting, size, stopped
        self.state: decode.Slots | None = None
        self.seated: dict[int, Seat] = {}

    def turn(self) -> list[Ended] | None:
        """Fill free slots and decode a chunk: the rows that ended, or None if nobody is left."""
        for some in self.waiting:
            if len(self.seated) == self.size:
                break
            # Who has rows to decode does not wait for another deck to read its own.
            if some.lock.acquire(blocking=some is self.waiting[0] or not self.seated):
                try:
                    while len(self.seated) < self.size and self._enter(some):
                        pass
                finally:
                    some.lock.release()
        if self.stopped.is_set() or self.state is None or not self.seated:
            # The other decks may go on for long, and the slots hold a gigabyte.
            self.state = None
            return None
        model = self.model
        self.state = s = decode.advance(
            model.definition, self.decoding, model.params, self.state, self.probes, self.sampling
        )
        live = np.asarray(s.live)
        left = [slot for slot in self.seated if not live[slot]]
        if not left:
            return []
        kept = self.decoding.keep_logits
        tokens, length, stopped, emitted, response = jax.device_get(
            (s.tokens, s.length, s.stopped, s.emitted, s.response)
        )
        return [
            Ended(
                seat=self.seated.pop(slot),
                tokens=np.array(tokens[slot, : length[slot]]),
                stopped=bool(stopped[slot]),
                response=jax.tree.map(lambda leaf, slot=slot: np.array(leaf[slot]), response),
                logits=np.asarray(s.logits[slot])[: emitted[slot]] if kept else None,
            )
            for slot in left
        ]

    def _enter(self, waiting: Waiting) -> bool:
        """Let rows into free slots; whether there were any, and somebody wants them still."""
        taken = None if self.stopped.is_set() else waiting.take(self.size - len(self.seated))
        if taken is None:
            return False
        prefilled, entering = taken
        if self.state is None:
            mesh = sharding.mesh_of(self.model.params)
            config = self.model.config
            self.state = decode.empty(config, self.decoding, self.size, prefilled, mesh)
        free = [slot for slot in range(self.size) if slot not in self.seated]
        put = np.full(len(prefilled.token), self.size, np.int32)
        for slot, seat in zip(free, entering, strict=False):
            put[seat.row], self.seated[slot] = slot, seat
        self.state = decode.insert(self.decoding, self.state, prefilled, put)
        return True


def count(batch: int, params: Params) -> int:
    """How many decks so many slots are in: two on a CPU, if neither is too small to be worth it.

    For 256 slots on a CPU 2, for 16 it is 1; on an accelerator always 1.
    """
    devices = params["embed"]["embedding"].devices()
    alone = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return 2 if alone and batch % 2 == 0 and batch // 2 >= LEAST else 1


def run(
    model: ChatModel,
    readers: Sequence[Reader],
    decoding: Decoding,
    probes: Float[np.ndarray, "layer probe d_model"],
    sampling: Sampling,
    size: int,
) -> Generator[list[Ended], None, None]:
    """Yield rows as they end. Who stops earlier waits for a chunk of steps.

    Args:
      model: the model to run.
      readers: one for each deck; each row is read by one of them.
      decoding: static decoding settings.
      probes: unit directions whose projections are recorded.
      sampling: dynamic sampling settings, unread when greedy.
      size: slots of each deck.
    """
    waiting = [Waiting(read) for read in readers]
    stopped = threading.Event()
    decks = [
        Deck(model, decoding, probes, sampling, waiting[first:] + waiting[:first], size, stopped)
        for first in range(len(waiting))
    ]
    with ThreadPoolExecutor(len(decks)) as pool:
        running: dict[Future[list[Ended] | None], Deck] = {
            pool.submit(deck.turn): deck for deck in decks
        }
        try:
            while running:
                done = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
                deck, ended = running.pop(done), done.result()
                if ended is not None:
                    running[pool.submit(deck.turn)] = deck
                if ended:
                    yield ended
        finally:
            stopped.set()
