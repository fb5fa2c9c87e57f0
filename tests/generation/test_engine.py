from __future__ import annotations

import gc
import os

import jax
import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.generation import engine, stepwise
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.engine import Request
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Project, compile_conditions
from tests import oracle, tiny

PROMPTS = [[3] * 40, [4, 9], [5, 8, 7], [6, 41, 12, 9], [3, 9]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return ChatModel.load(
        convert(tiny.save(tiny.qwen2(), folder / "hf"), folder / "out", "float32")
    )


def run(model, requests, conditions=((),), new_tokens=5, batch=3, eos=63):
    stacked = compile_conditions(
        conditions,
        ["all"] * len(conditions),
        n_layers=model.config.n_layers,
        d_model=model.config.d_model,
    )
    decoding = Decoding(max_new_tokens=new_tokens, eos=(eos,))
    return list(engine.run(model, requests, stacked, decoding, batch=batch))


def test_every_request_comes_back_once(model):
    batches = run(model, [Request(tokens=p) for p in PROMPTS])
    assert [len(batch) for batch in batches] == [3, 2]
    assert sorted(reply.index for batch in batches for reply in batch) == [0, 1, 2, 3, 4]
    for reply in (reply for batch in batches for reply in batch):
        assert reply.n_prompt == len(PROMPTS[reply.index])
        assert reply.text == model.tokenizer.decode(reply.tokens)
        assert len(reply.tokens) == 5 and not reply.stopped


def test_a_row_that_ends_is_handed_over_while_others_go_on(model):
    # More slots than rows, and token 31 comes in the first chunk of some replies only.
    batches = run(model, [Request(tokens=p) for p in PROMPTS], new_tokens=40, batch=8, eos=31)
    assert [{reply.stopped for reply in batch} for batch in batches] == [{True}, {False}]


def test_a_run_that_is_over_holds_no_array(model):
    shared = [Request(tokens=[7, 8, *p], shared=2) for p in PROMPTS]
    run(model, shared)
    gc.collect()
    gc.disable()
    try:
        before = len(jax.live_arrays())
        run(model, shared)
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


def test_a_run_that_is_closed_early_holds_no_array(model):
    # Two loops on a CPU, of which one is closed while the other has just yielded.
    requests = [Request(tokens=[7, 8, 5 + i % 50, 9], shared=2) for i in range(60)]
    stacked = compile_conditions(
        [[]], ["all"], n_layers=model.config.n_layers, d_model=model.config.d_model
    )

    def some():
        running = engine.run(model, requests, stacked, Decoding(max_new_tokens=9, eos=()), batch=32)
        assert next(running)
        running.close()

    some()
    gc.collect()
    gc.disable()
    try:
        before = len(jax.live_arrays())
        some()
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


def test_a_run_that_does_not_fit_the_memory_is_refused(model, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 200)
    with pytest.raises(UserError, match=r"GiB are there; lower the batch of 3 rows or max_new_tok"):
        run(model, [Request(tokens=p) for p in PROMPTS])
    with pytest.raises(UserError, match=r"shorten the prompt \(40 tokens\) or lower"):
        decoding = Decoding(max_new_tokens=5, eos=())
        stepwise.read_each(model, PROMPTS[0], oracle.compiled(model, [[]]), decoding)


def test_no_requests_give_no_batches(model):
    assert run(model, []) == []


@pytest.mark.parametrize(
    "batch", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(32, marks=pytest.mark.slow)]
)
def test_a_row_is_the_same_to_the_bit_beside_other_rows(model, rng, batch):
    v = rng.standard_normal((model.config.n_layers, model.config.d_model)).astype(np.float32)
    conditions = [
        [],
        [Add(direction=v, layers=(1,), scale=2.0)],
        [Project(directions=(v,), layers=(2,))],
    ]
    requests = [Request(tokens=p, condition=c) for c in range(3) for p in PROMPTS]
    stacked = compile_conditions(
        conditions, ["all"] * 3, n_layers=model.config.n_layers, d_model=model.config.d_model
    )
    # Ends at different times: token 22 comes early in some replies and never in others.
    decoding = Decoding(max_new_tokens=12, eos=(22,))
    whole, rest = (
        sorted(
            (r for b in engine.run(model, requests, stacked, decoding, batch=batch, skip=skip)
             for r in b),
            key=lambda r: r.index,
        )
        for skip in ((), (0, 3, 4, 5, 6, 7, 11, 13))
    )  # fmt: skip
    assert [r.index for r in rest] == [1, 2, 8, 9, 10, 12, 14]
    for reply in rest:
        same = whole[reply.index]
        np.testing.assert_array_equal(reply.tokens, same.tokens)
        for ours, theirs in ((reply.prompt, same.prompt), (reply.response, same.response)):
            for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_array_equal(x, y)


# 20 slots are a full vector and a rest, in whatever a CPU does with the rows of a product.
@pytest.mark.parametrize("probes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_equal_rows_have_equal_projections_to_the_bit_in_every_slot(model, rng, probes):
    n_layers, d_model = model.config.n_layers, model.config.d_model
    stacked = compile_conditions([[]], ["all"], n_layers=n_layers, d_model=d_model)
    directions = rng.standard_normal((n_layers, probes, d_model)).astype(np.float32)
    directions[:, 1] *= probes > 2
    found = engine.run(
        model,
        [Request(tokens=PROMPTS[0])] * 20,
        stacked,
        Decoding(max_new_tokens=4, eos=()),
        probes=directions,
        batch=20,
    )
    first, *others = [reply for some in found for reply in some]
    for other in others:
        for x, y in zip(
            jax.tree.leaves([other.prompt, other.response]),
            jax.tree.leaves([first.prompt, first.response]),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)


def test_rows_that_are_all_skipped_run_nothing(model):
    stacked = compile_conditions(
        [[]], ["all"], n_layers=model.config.n_layers, d_model=model.config.d_model
    )
    decoding = Decoding(max_new_tokens=5, eos=(63,))
    requests = [Request(tokens=p) for p in PROMPTS]
    assert list(engine.run(model, requests, stacked, decoding, skip=range(5))) == []


def test_each_row_has_its_own_conditions_change(model, rng):
    v = rng.standard_normal((model.config.n_layers, model.config.d_model)).astype(np.float32)
    conditions = [
        [],
        [Add(direction=v, layers=(0,), scale=2.0)],
        [Project(directions=(v,), layers=(2,))],
    ]
    requests = [Request(tokens=p, condition=c) for c in (2, 0, 1) for p in PROMPTS]
    replies = sorted(
        (r for b in run(model, requests, conditions) for r in b), key=lambda r: r.index
    )
    changed = [np.flatnonzero(reply.prompt["resid_post"].change).tolist() for reply in replies]
    assert changed == [[2]] * len(PROMPTS) + [[]] * len(PROMPTS) + [[0]] * len(PROMPTS)


def test_total_change_sums_tokens_layers_and_taps(model, rng):
    v = rng.standard_normal((model.config.n_layers, model.config.d_model)).astype(np.float32)
    both = [Add(direction=v, layers=(0,), scale=1.0), Add(direction=v, layers=(1,), scale=3.0,
            tap="resid_mid")]  # fmt: skip
    found = run(model, [Request(tokens=p) for p in PROMPTS], [both])
    (reply,) = (r for batch in found for r in batch if r.index == 1)
    # Two prompt tokens and four of the five new ones are read by the model.
    expected = 6 * (np.linalg.norm(v[0]) + 3 * np.linalg.norm(v[1]))
    assert engine.total_change(reply) == pytest.approx(expected, rel=1e-4)


def test_a_prompt_without_a_token_of_its_own_is_refused(model):
    with pytest.raises(UserError, match="row 7 shares all 3 of its tokens"):
        run(model, [Request(tokens=[5, 8, 7], row_id=7, shared=3)])


def test_an_empty_prompt_is_refused_and_its_place_said(model):
    with pytest.raises(UserError, match="request 1 has no tokens"):
        run(model, [Request(tokens=[5, 8]), Request(tokens=[])])


def test_a_prompt_that_does_not_fit_is_refused_before_anything_runs(model):
    requests = [Request(tokens=p) for p in ([4, 9], [3] * 509)]
    stacked = compile_conditions(
        [[]], ["all"], n_layers=model.config.n_layers, d_model=model.config.d_model
    )
    batches = engine.run(model, requests, stacked, Decoding(max_new_tokens=5, eos=(63,)), batch=1)
    with pytest.raises(UserError, match="509 tokens and at most 507 fit"):
        next(batches)
