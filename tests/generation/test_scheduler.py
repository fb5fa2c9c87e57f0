from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxsteer.generation import decode, engine, scheduler
from jaxsteer.generation.engine import Request
from jaxsteer.generation.generate import Decoding, Sampling, no_probes
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Project, compile_conditions
from tests import tiny

# Two decks of 16 on a CPU.
BATCH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decks")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


@pytest.fixture
def turns(monkeypatch):
    """How many turns each deck has had, by object."""
    counted: dict[scheduler.Deck, int] = {}
    turn = scheduler.Deck.turn

    def counting(deck):
        counted[deck] = counted.get(deck, 0) + 1
        return turn(deck)

    monkeypatch.setattr(scheduler.Deck, "turn", counting)
    return counted


def run(model, rng, *, new=20, eos=(3, 11, 22, 40), skip=(), batch=BATCH, distinct=30, **more):
    v = rng.standard_normal((model.config.n_layers, model.config.d_model)).astype(np.float32)
    made = [
        [],
        [Add(direction=v, layers=(0,), scale=2.0)],
        [Project(directions=(v,), layers=(1,))],
    ]
    stacked = compile_conditions(
        made, ["all"] * 3, n_layers=model.config.n_layers, d_model=model.config.d_model
    )
    requests = [
        Request(tokens=[5 + i, 9, 7 + i % 11, *[8] * (i % 5)], condition=n % 3, row_id=n)
        for n in range(90)
        for i in [n % distinct]
    ]
    decoding = Decoding(max_new_tokens=new, eos=eos, **more)
    return engine.run(model, requests, stacked, decoding, batch=batch, skip=skip)


def by_index(found):
    return {reply.index: reply for some in found for reply in some}


@pytest.mark.parametrize(
    ("platforms", "batch", "expected"),
    [
        (["cpu"], 256, 2),
        (["cpu"], 32, 2),
        (["cpu"], 16, 1),
        (["cpu"], 33, 1),
        (["tpu"], 256, 1),
        (["gpu"], 256, 1),
        (["cpu", "cpu"], 256, 1),
    ],
)
def test_only_one_cpu_device_has_two_decks(platforms, batch, expected):
    table = SimpleNamespace(devices=lambda: [SimpleNamespace(platform=p) for p in platforms])
    assert scheduler.count(batch, {"embed": {"embedding": table}}) == expected


def test_two_decks_share_the_rows_and_return_each_once(model, rng, turns):
    found = [reply.index for some in run(model, rng) for reply in some]
    assert sorted(found) == list(range(90))
    assert len(turns) == 2 and min(turns.values()) > 2


def test_rows_that_fit_one_deck_are_in_one(model, rng, turns):
    for left, decked in ((16, 1), (17, 2)):
        turns.clear()
        assert len(by_index(run(model, rng, skip=set(range(left, 90))))) == left
        assert len(turns) == decked


def test_a_deck_takes_what_the_other_left(model, rng, turns):
    # One prompt is one lane, and a lane's rows are read by one deck.
    assert len(by_index(run(model, rng, distinct=1))) == 90
    assert len(turns) == 2 and min(turns.values()) > 2


def test_a_row_has_the_same_bits_in_either_deck(model, rng):
    state = rng.bit_generator.state
    whole = by_index(run(model, rng, keep_logits=True))
    assert len({len(reply.tokens) for reply in whole.values()}) > 3
    for skip in ((), set(range(0, 90, 4)), set(range(40))):
        rng.bit_generator.state = state
        for index, reply in by_index(run(model, rng, keep_logits=True, skip=skip)).items():
            same = whole[index]
            np.testing.assert_array_equal(reply.logits, same.logits)
            pairs = zip(
                jax.tree.leaves(reply.response), jax.tree.leaves(same.response), strict=True
            )
            for x, y in pairs:
                np.testing.assert_array_equal(x, y)


def test_a_deck_whose_rows_all_end_at_once_takes_the_next(model, rng, turns):
    assert len(by_index(run(model, rng, new=2, eos=(63,)))) == 90
    assert min(turns.values()) > 1


def test_what_one_deck_compiles_the_other_finds(model, rng, caplog):
    jax.clear_caches()
    with caplog.at_level(logging.DEBUG, logger="jax._src.dispatch"):
        assert len(by_index(run(model, rng))) == 90
    said = [r.getMessage() for r in caplog.records]
    for name in ("segment", "gather", "first_token", "_put", "_put_opening", "advance"):
        found = [text for text in said if f"Finished XLA compilation of jit({name})" in text]
        # The level of `embed`, and a segment's, have a shape of their own.
        assert len(found) == (2 if name == "gather" else 1)


def test_a_full_deck_decodes_while_another_reads_from_its_rows(model, monkeypatch):
    asked = []

    class Taken:
        """The lock of rows that another deck reads from."""

        def acquire(self, blocking):
            asked.append(blocking)

    def advance(*_):
        raise StopIteration

    monkeypatch.setattr(decode, "advance", advance)
    left = scheduler.Waiting(iter(()))
    left.lock = Taken()
    probes = no_probes(model.config.n_layers, model.config.d_model)
    decoding = Decoding(max_new_tokens=5, eos=(63,))
    deck = scheduler.Deck(model, decoding, probes, Sampling(), [left], 2, threading.Event())
    deck.state, deck.seated = object(), {0: None, 1: None}
    with pytest.raises(StopIteration):
        deck.turn()
    assert asked == []
    # One that has a free slot waits for its own rows.
    del deck.seated[1]
    with pytest.raises(StopIteration):
        deck.turn()
    assert asked == [True]


def test_a_deck_that_is_done_holds_no_slots_while_the_other_goes_on(model, rng, monkeypatch):
    turn, held = scheduler.Deck.turn, []

    def watching(deck):
        ended = turn(deck)
        if ended is None:
            held.append(deck.state)
        return ended

    monkeypatch.setattr(scheduler.Deck, "turn", watching)
    assert len(by_index(run(model, rng))) == 90
    assert held == [None, None]


def test_what_goes_wrong_in_a_deck_reaches_the_caller(model, rng, monkeypatch):
    advance, calls = decode.advance, []

    def failing(*given):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return advance(*given)

    monkeypatch.setattr(decode, "advance", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        by_index(run(model, rng))
    assert not workers()


def test_who_stops_early_leaves_no_thread_behind(model, rng):
    found = run(model, rng)
    assert next(found)
    found.close()
    assert not workers()


def test_a_deck_that_fills_when_all_is_stopped_reads_no_further(model, rng, monkeypatch):
    enter, entered = scheduler.Deck._enter, []

    def stopping(deck, waiting):
        entered.append(enter(deck, waiting))
        deck.stopped.set()
        return entered[-1]

    monkeypatch.setattr(scheduler.Deck, "_enter", stopping)
    # Decks of 32, and prompts are read 16 at a time: each would let rows in twice.
    assert by_index(run(model, rng, batch=64)) == {}
    assert 1 <= sum(entered) <= 2


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
