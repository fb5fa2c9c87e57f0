"""Decks of slots: rows wait for a slot, decode in a deck beside others, and leave when they end.

A program of a few rows leaves cores idle: between products it has stretches of small operations
that only one core works on. So on a CPU the slots are in two decks of one size, each with a thread:
while one's program is in such a stretch, or reads prompts, the other's products use the rest. An
accelerator is full with one deck, and would read its weights twice for two; a mesh has one, since
programs that exchange arrays must reach all devices in one order.

Which deck a row comes to depends on who ended first. Its bits do not: all decks run one program, in
which nothing of a row depends on those beside it (`slots`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import jax
import numpy as np
from jaxtyping import Float

from jaxsteer import parallel, slots
from jaxsteer.chatmodel import ChatModel
from jaxsteer.generate import Decoding, Sampling
from jaxsteer.model import Params, Realised
from jaxsteer.prefill import Prefilled

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
      logits: what each token, and the ending one, was chosen from; no column unless kept.
    """

    seat: Seat
    tokens: np.ndarray
    stopped: bool
    response: dict[str, Realised]
    logits: Float[np.ndarray, "chosen kept"]


class Waiting:
    """Rows that have no slot yet; one deck at a time takes from them, and holds `lock` for it.

    Attributes:
      lock: held by the deck that takes.
      stopped: set when nobody wants the rows any more.
    """

    def __init__(self, read: Iterator[tuple[Prefilled, list[Seat]]]):
        """`read` reads prompts as it is asked for the next rows."""
        self.lock = threading.Lock()
        self.stopped = False
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
    """Slots that decode together, and who sits in each."""

    def __init__(
        self,
        model: ChatModel,
        decoding: Decoding,
        probes: Float[np.ndarray, "layer probe d_model"],
        sampling: Sampling,
        waiting: Waiting,
        size: int,
    ):
        self.model, self.decoding, self.probes, self.sampling = model, decoding, probes, sampling
        self.waiting, self.size = waiting, size
        self.state: slots.Slots | None = None
        self.seated: dict[int, Seat] = {}

    def turn(self) -> list[Ended] | None:
        """Fill free slots and decode a chunk: the rows that ended, or None if nobody is left."""
        with self.waiting.lock:
            while not self.waiting.stopped and len(self.seated) < self.size and self._enter():
                pass
        if self.waiting.stopped or self.state is None or not self.seated:
            return None
        model = self.model
        self.state = s = slots.advance(
            model.definition, self.decoding, model.params, self.state, self.probes, self.sampling
        )
        live = np.asarray(s.live)
        left = [slot for slot in self.seated if not live[slot]]
        if not left:
            return []
        tokens, length, stopped, emitted, response = jax.device_get(
            (s.tokens, s.length, s.stopped, s.emitted, s.response)
        )
        return [
            Ended(
                seat=self.seated.pop(slot),
                tokens=np.array(tokens[slot, : length[slot]]),
                stopped=bool(stopped[slot]),
                response=jax.tree.map(lambda leaf, slot=slot: np.array(leaf[slot]), response),
                logits=np.asarray(s.logits[slot, : emitted[slot]]),
            )
            for slot in left
        ]

    def _enter(self) -> bool:
        """Let rows into free slots; whether there were any."""
        taken = self.waiting.take(self.size - len(self.seated))
        if taken is None:
            return False
        prefilled, entering = taken
        if self.state is None:
            mesh = parallel.mesh_of(self.model.params)
            config = self.model.config
            self.state = slots.empty(config, self.decoding, self.size, prefilled, mesh)
        free = [slot for slot in range(self.size) if slot not in self.seated]
        put = np.full(len(prefilled.token), self.size, np.int32)
        for slot, seat in zip(free, entering, strict=False):
            put[seat.row], self.seated[slot] = slot, seat
        self.state = slots.insert(self.decoding, self.state, prefilled, put)
        return True


def sizes(batch: int, params: Params) -> list[int]:
    """Of the decks that so many slots are in.

    Of 256 slots on a CPU [128, 128], of 16 [16]; on an accelerator [256].
    """
    devices = params["embed"]["embedding"].devices()
    alone = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return [batch // 2] * 2 if alone and batch % 2 == 0 and batch // 2 >= LEAST else [batch]


def run(
    model: ChatModel,
    read: Iterator[tuple[Prefilled, list[Seat]]],
    decoding: Decoding,
    probes: Float[np.ndarray, "layer probe d_model"],
    sampling: Sampling,
    batch: int,
) -> Iterator[list[Ended]]:
    """Yield rows as they end. Who stops earlier waits for a chunk of steps.

    Args:
      model: the model to run.
      read: reads prompts as it is asked for the next rows: those prefilled together, and who they
        are.
      decoding: static decoding settings.
      probes: unit directions whose projections are recorded.
      sampling: dynamic sampling settings, unread when greedy.
      batch: slots of all decks.
    """
    waiting = Waiting(read)
    decks = [
        Deck(model, decoding, probes, sampling, waiting, size)
        for size in sizes(batch, model.params)
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
            waiting.stopped = True
