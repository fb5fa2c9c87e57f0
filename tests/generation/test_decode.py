"""Rows that decode in slots give what the stepwise path gives, token for token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.generation import engine, layer_sharing
from jaxsteer.generation.decode import Decoding, Sampling
from jaxsteer.generation.engine import Request
from jaxsteer.generation.requests import pack
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Cap, Project, compile_conditions
from tests import compiles, reference, tiny
from tests.conftest import chats

START = [4, 9, 33, 7, 12]
PROMPTS = [[*START, *tail] for tail in ([41], [*range(5, 40)], [8, 8, 9], [50], [6, 7, 60, 2])]


@pytest.fixture(scope="module", params=[tiny.llama, tiny.qwen2], ids=["llama", "qwen2"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    return ChatModel.load(
        convert(tiny.save(request.param(), folder / "hf"), folder / "out", "float32")
    )


def conditions(model, rng):
    """Nothing, and operations that begin at every depth and tap."""
    shape = (model.config.n_layers, model.config.d_model)
    a, b = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    last, middle = shape[0] - 1, shape[0] // 2
    return [
        [],
        [Add(direction=a, layers=(last,), scale=3.0)],
        [Add(direction=a, layers=(middle,), scale=3.0)],
        [
            Add(direction=a, layers=(middle,), scale=3.0),
            Project(directions=(a, b), layers=(last,)),
        ],
        [Add(direction=b, layers=(0,), scale=2.0, tap="embed")],
        [Cap(direction=b, layers=(0, last), low=-0.1, high=0.2, tap="resid_mid")],
    ]


def stack(model, made, scope):
    return compile_conditions(
        made, [scope] * len(made), n_layers=model.config.n_layers, d_model=model.config.d_model
    )


def compare(
    model, prompts, made, *, scope="all", sample=False, shared=0, batch=3, new=12, eos=None
):
    """Run both ways and compare everything; returns the replies' lengths."""
    stacked = stack(model, made, scope)
    requests = [
        Request(tokens=p, condition=c, row_id=100 * c + i, shared=shared)
        for c in range(len(made))
        for i, p in enumerate(prompts)
    ]
    probes = np.random.default_rng(2).standard_normal(
        (model.config.n_layers, 2, model.config.d_model)
    )
    probes = probes.astype(np.float32)
    decoding = Decoding(max_new_tokens=new, eos=eos or model.eos, sample=sample)
    sampling = Sampling(seed=3, temperature=0.8, top_p=0.9)
    expected = reference.replies(
        model, requests, stacked, decoding, probes=probes, sampling=sampling
    )
    found = engine.run(
        model, requests, stacked, decoding, probes=probes, sampling=sampling, batch=batch
    )
    replies = sorted((reply for some in found for reply in some), key=lambda r: r.index)
    assert [reply.index for reply in replies] == list(range(len(requests)))
    for reply, same in zip(replies, expected, strict=True):
        assert reply.tokens.tolist() == same.tokens
        assert reply.stopped == same.stopped
        for ours, theirs in ((reply.prompt, same.prompt), (reply.response, same.response)):
            assert ours.keys() == theirs.keys()
            for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(x, y, rtol=5e-4, atol=5e-4)
    return [len(reply.tokens) for reply in replies]


@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
def test_greedy_rows_are_those_of_the_stepwise_path_at_every_tap(model, rng, scope):
    # Some replies end early: slots are refilled in the middle of others' replies.
    lengths = compare(model, PROMPTS, conditions(model, rng), scope=scope, eos=(3, 11, 22, 40))
    assert len(set(lengths)) > 3


@pytest.mark.parametrize(("shared", "batch"), [(0, 1), (5, 3), (3, 64)])
def test_what_is_shared_and_the_number_of_slots_change_no_token(model, rng, shared, batch):
    made = conditions(model, rng)
    compare(model, PROMPTS, made, shared=shared, batch=batch, eos=(3, 11, 22, 40))


def test_sampled_rows_are_those_of_the_stepwise_path(model, rng):
    eos = (3, 11, 22, 40)
    lengths = compare(model, PROMPTS, conditions(model, rng), sample=True, shared=5, eos=eos)
    assert len(set(lengths)) > 3


def test_replies_of_one_token_end_at_once(model, rng):
    assert set(compare(model, PROMPTS, conditions(model, rng), new=1)) <= {0, 1}


def test_nothing_of_an_earlier_row_is_left_in_its_slot(model):
    huge = np.full((model.config.n_layers, model.config.d_model), 3e38, np.float32)
    stacked = stack(model, [[Add(direction=huge, layers=(0,), scale=1.0)], []], "all")
    decoding = Decoding(max_new_tokens=6, eos=(63,))
    requests = [Request(tokens=PROMPTS[0], condition=c) for c in (0, 1)]
    both = [r for b in engine.run(model, requests, stacked, decoding, batch=1) for r in b]
    (alone,) = next(engine.run(model, requests[1:], stacked, decoding, batch=1))
    assert not np.isfinite(both[0].prompt["resid_post"].norm).all()
    np.testing.assert_array_equal(both[1].tokens, alone.tokens)


def test_a_prompt_that_overflows_changes_no_other_of_its_packed_sequence(model):
    table = np.array(model.params["embed"]["embedding"])
    table[60] = np.inf
    broken = dataclasses.replace(
        model, params=model.params | {"embed": {"embedding": jnp.asarray(table)}}
    )
    prompts = [[5, 6, 7], [8, 60, 9], [10, 11]]
    requests = [Request(tokens=p) for p in prompts]
    assert len(pack(requests, 64).tokens) == 1
    decoding = Decoding(max_new_tokens=4, eos=(63,), keep_logits=True)
    found = [
        {r.index: r for b in engine.run(m, requests, stack(m, [[]], "all"), decoding) for r in b}
        for m in (model, broken)
    ]
    assert not np.isfinite(found[1][1].prompt["resid_post"].norm).all()
    for row in (0, 2):
        # The changed line of the table is also a line of a tied head: look at the others.
        fine, beside = (np.delete(some[row].logits, 60, axis=1)[:1] for some in found)
        np.testing.assert_array_equal(fine, beside)
        for x, y in zip(*(jax.tree.leaves(some[row].prompt) for some in found), strict=True):
            np.testing.assert_array_equal(x, y)


def test_logits_of_a_slot_are_those_of_the_stepwise_path(model, rng):
    stacked = stack(model, conditions(model, rng), "all")
    decoding = Decoding(max_new_tokens=6, eos=model.eos, keep_logits=True)
    requests = [Request(tokens=p, condition=c) for c in range(6) for p in PROMPTS]
    expected = reference.replies(model, requests, stacked, decoding)
    for reply in (r for b in engine.run(model, requests, stacked, decoding, batch=4) for r in b):
        np.testing.assert_allclose(reply.logits, expected[reply.index].logits, atol=2e-4)


def test_a_row_has_the_same_bits_beside_other_rows(model, rng):
    stacked = stack(model, conditions(model, rng), "all")
    decoding = Decoding(max_new_tokens=20, eos=(3, 11, 22, 40), keep_logits=True)
    requests = [Request(tokens=p, condition=c, shared=3) for c in range(6) for p in PROMPTS]

    def logits(skip):
        found = engine.run(model, requests, stacked, decoding, batch=4, skip=skip)
        return {reply.index: reply.logits for some in found for reply in some}

    everyone = logits(())
    # Replies of many lengths: rows enter slots at other times, beside others.
    assert len({len(kept) for kept in everyone.values()}) > 3
    for index, alone in logits(set(range(0, len(requests), 2)) | {1, 7, 9}).items():
        np.testing.assert_array_equal(alone, everyone[index])


def test_neither_more_conditions_nor_other_layers_compile_anything(model, rng):
    vectors = rng.standard_normal((model.config.n_layers, model.config.d_model))
    decoding = Decoding(max_new_tokens=4, eos=model.eos)

    def compiled(n, layer):
        made = [[Add(direction=vectors, layers=(layer,), scale=float(c))] for c in range(n)]
        requests = [Request(tokens=p, condition=c, shared=5) for c in range(n) for p in PROMPTS[2:]]
        with compiles.counted() as found:
            list(engine.run(model, requests, stack(model, made, "all"), decoding, batch=4))
        return {name: found[name] for name in compiles.ENGINE if found[name]}

    jax.clear_caches()
    assert compiled(3, 1).keys() == set(compiles.ENGINE)
    for n, layer in ((30, 1), (5, 0), (5, 2)):
        assert compiled(n, layer) == {}


def test_fewer_slots_than_a_prefill_batch_take_its_rows_a_few_at_a_time(model):
    requests = [Request(tokens=[5 + i, 9]) for i in range(layer_sharing.BATCH + 2)]
    decoding = Decoding(max_new_tokens=3, eos=(63,))
    found = list(engine.run(model, requests, stack(model, [[]], "all"), decoding, batch=2))
    assert sorted(r.index for b in found for r in b) == list(range(len(requests)))


@pytest.mark.slow
def test_the_real_models_rows_are_those_of_the_stepwise_path(smollm2, rng):
    shape = (smollm2.config.n_layers, smollm2.config.d_model)
    a = rng.standard_normal(shape).astype(np.float32)
    made = [
        [],
        [Add(direction=a, layers=(17,), scale=2.0)],
        [
            Add(direction=a, layers=(17,), scale=2.0),
            Project(directions=(a,), layers=(21,), measured_at=17),
        ],
    ]
    prompts = chats(smollm2, 16)[1::2][:6]
    shared = min(map(len, prompts)) // 4
    assert all(p[:shared] == prompts[0][:shared] for p in prompts)
    compare(smollm2, prompts, made, shared=shared, batch=8, new=24)
