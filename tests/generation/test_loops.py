from __future__ import annotations

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxsteer.generation import decode, engine
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.engine import Request
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Project, compile_conditions
from tests import compiles, tiny

# Two loops of 16 slots on a CPU.
BATCH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


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


@pytest.fixture
def threads(monkeypatch):
    """How many chunks each thread has decoded."""
    counted: dict[str, int] = {}
    advance = decode.advance

    def counting(*given):
        name = threading.current_thread().name
        counted[name] = counted.get(name, 0) + 1
        return advance(*given)

    monkeypatch.setattr(decode, "advance", counting)
    return counted


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
def test_only_one_cpu_device_has_two_loops(platforms, batch, expected):
    table = SimpleNamespace(devices=lambda: [SimpleNamespace(platform=p) for p in platforms])
    assert engine.count_loops(batch, {"embed": {"embedding": table}}) == expected


def test_two_loops_share_the_rows_and_return_each_once(model, rng, threads):
    found = [reply.index for some in run(model, rng) for reply in some]
    assert sorted(found) == list(range(90))
    assert len(threads) == 2 and min(threads.values()) > 2


def test_rows_that_fit_the_slots_of_one_loop_run_in_one(model, rng, threads):
    for left, loops in ((16, 1), (17, 2)):
        threads.clear()
        assert len(by_index(run(model, rng, skip=set(range(left, 90))))) == left
        assert len(threads) == loops


def test_the_rows_of_one_packed_sequence_are_divided(model, rng, threads):
    assert len(by_index(run(model, rng, distinct=1))) == 90
    assert len(threads) == 2 and min(threads.values()) > 2


def test_a_row_has_the_same_bits_in_either_loop(model, rng):
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


def of_lengths(model, lengths, *, skip=()):
    requests = [
        Request(tokens=[5 + n % 30, 9, *[8] * (length - 2)], row_id=n)
        for n, length in enumerate(lengths)
    ]
    decoding = Decoding(max_new_tokens=20, eos=(3, 11, 22, 40), keep_logits=True)
    return by_index(engine.run(model, requests, None, decoding, batch=BATCH, skip=skip))


@pytest.fixture
def caches(monkeypatch):
    """Rows and length of the caches that were decoded with."""
    seen: set[tuple[int, int]] = set()
    advance = decode.advance

    def seeing(*given):
        keys = given[3].cache[0][0]
        seen.add((keys.shape[0], keys.shape[2]))
        return advance(*given)

    monkeypatch.setattr(decode, "advance", seeing)
    return seen


def test_a_few_long_prompts_decode_apart_in_longer_caches(model, monkeypatch, caches):
    monkeypatch.setattr(engine, "WORTH_COMPILING", 1)
    lengths = [8] * 60 + [122] * 8
    apart = of_lengths(model, lengths)
    assert caches == {(16, 32), (8, 160)}
    caches.clear()
    # A quarter of the slots is a few; nine rows are more.
    of_lengths(model, [8] * 60 + [122] * 9)
    assert caches == {(16, 160)}
    # Which rows are left decides nothing: not in which part a row is, and not one bit of it.
    for skip in (set(range(60)), set(range(30, 68)), set(range(0, 68, 2))):
        left = of_lengths(model, lengths, skip=skip)
        assert left.keys() == set(range(68)) - skip
        for index, reply in left.items():
            np.testing.assert_array_equal(reply.logits, apart[index].logits)


def test_rows_stay_together_where_apart_saves_less_than_it_compiles(model, caches):
    assert len(of_lengths(model, [8] * 60 + [122] * 8)) == 68
    assert caches == {(16, 160)}


def test_rows_that_all_end_at_once_are_followed_by_the_next(model, rng, threads):
    assert len(by_index(run(model, rng, new=2, eos=(63,)))) == 90
    # 32 slots hold 90 rows in three turns. How the two loops share them depends on their speed.
    assert sum(threads.values()) > 2


def test_what_one_loop_compiles_the_other_finds(model, rng):
    jax.clear_caches()
    with compiles.counted() as found:
        assert len(by_index(run(model, rng))) == 90
    # The output of `embed` and that of a layer group have different shapes, and so have one layer's
    # cache and the rest of a row.
    twice = {"gather": 2, "_put": 2}
    assert {name: found[name] for name in compiles.ENGINE} == {
        name: twice.get(name, 1) for name in compiles.ENGINE
    }


def test_what_goes_wrong_in_a_loop_reaches_the_caller(model, rng, monkeypatch):
    advance, calls = decode.advance, []

    def failing(*given):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return advance(*given)

    monkeypatch.setattr(decode, "advance", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        by_index(run(model, rng))
    assert not pool()


def test_a_run_that_is_closed_early_leaves_no_thread_behind(model, rng):
    found = run(model, rng)
    assert next(found)
    found.close()
    assert not pool()


def pool():
    return [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def counting_up(stop, closed):
    try:
        yield from range(stop)
    finally:
        closed.append(stop)


def test_loops_take_a_step_while_the_caller_works_and_no_more():
    taken = []

    def steps():
        for step in range(9):
            taken.append(step)
            yield step

    running = engine.interleave([steps()])
    assert next(running) == 0
    running.close()
    assert taken == [0, 1]


def test_every_step_of_every_loop_is_yielded_and_the_loops_are_closed():
    closed = []
    found = list(engine.interleave([counting_up(n, closed) for n in (5, 0, 3)]))
    assert sorted(found) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert sorted(closed) == [0, 3, 5]


def test_all_loops_are_closed_when_one_of_them_fails():
    closed = []

    def failing():
        yield 0
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        list(engine.interleave([counting_up(10**6, closed), failing()]))
    assert closed == [10**6]
