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

# Most tests decode alike, so that they run the same few programs: compiling takes all the time.
# Some replies end at these tokens early, so that slots are refilled in the middle of others.
EOS = (3, 11, 22, 40)
DECODING = Decoding(max_new_tokens=12, eos=EOS, keep_logits=True)
SLOTS = 3
START = [4, 9, 33, 7, 12]
PROMPTS = [[*START, *tail] for tail in ([41], [*range(5, 40)], [8, 8, 9], [50], [6, 7, 60, 2])]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(tiny.llama, id="llama"),
        pytest.param(tiny.qwen2, id="qwen2", marks=pytest.mark.slow),
    ],
)
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


def probes(model):
    """Two unread directions, so that all tests have as many."""
    shape = (model.config.n_layers, 2, model.config.d_model)
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def run(model, requests, stacked, decoding=DECODING, *, batch=SLOTS, **options):
    """Replies in the order in which they end."""
    found = engine.run(
        model, requests, stacked, decoding, probes=probes(model), batch=batch, **options
    )
    return [reply for some in found for reply in some]


def rows(prompts, made, shared=0):
    return [
        Request(tokens=p, condition=c, row_id=100 * c + i, shared=shared)
        for c in range(len(made))
        for i, p in enumerate(prompts)
    ]


def compare(
    model, prompts, made, *, scope="all", shared=0, batch=SLOTS, decoding=DECODING, logits=2e-4
):
    """Run both ways and compare everything; returns the replies' lengths."""
    stacked, requests = stack(model, made, scope), rows(prompts, made, shared)
    sampling = Sampling(seed=3, temperature=0.8, top_p=0.9)
    expected = reference.replies(
        model, requests, stacked, decoding, probes=probes(model), sampling=sampling
    )
    found = run(model, requests, stacked, decoding, sampling=sampling, batch=batch)
    replies = sorted(found, key=lambda reply: reply.index)
    assert [reply.index for reply in replies] == list(range(len(requests)))
    for reply, same in zip(replies, expected, strict=True):
        assert reply.tokens.tolist() == same.tokens
        assert reply.stopped == same.stopped
        np.testing.assert_allclose(reply.logits, same.logits, atol=logits)
        for ours, theirs in ((reply.prompt, same.prompt), (reply.response, same.response)):
            assert ours.keys() == theirs.keys()
            for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(x, y, rtol=5e-4, atol=5e-4)
    return [len(reply.tokens) for reply in replies]


@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
def test_greedy_rows_are_those_of_the_stepwise_path_at_every_tap(model, rng, scope):
    lengths = compare(model, PROMPTS, conditions(model, rng), scope=scope)
    assert len(set(lengths)) > 3


@pytest.mark.parametrize(
    ("shared", "batch"),
    [
        (5, SLOTS),
        pytest.param(0, 1, marks=pytest.mark.slow),
        pytest.param(3, 64, marks=pytest.mark.slow),
    ],
)
def test_what_is_shared_and_the_number_of_slots_change_no_token(model, rng, shared, batch):
    compare(model, PROMPTS, conditions(model, rng), shared=shared, batch=batch)


def test_sampled_rows_are_those_of_the_stepwise_path(model, rng):
    decoding = dataclasses.replace(DECODING, sample=True)
    lengths = compare(model, PROMPTS, conditions(model, rng), shared=5, decoding=decoding)
    assert len(set(lengths)) > 3


@pytest.mark.slow
def test_replies_of_one_token_end_at_once(model, rng):
    decoding = Decoding(max_new_tokens=1, eos=model.eos, keep_logits=True)
    assert set(compare(model, PROMPTS, conditions(model, rng), decoding=decoding)) <= {0, 1}


def test_nothing_of_an_earlier_row_is_left_in_its_slot(model):
    huge = np.full((model.config.n_layers, model.config.d_model), 3e38, np.float32)
    made = [[Add(direction=huge, layers=(0,), scale=1.0)], []]
    stacked, requests = stack(model, made, "all"), rows([PROMPTS[1]] * SLOTS, made)
    both = run(model, requests, stacked)
    # The rows that overflow have left all slots before the others enter.
    assert {reply.index for reply in both[:SLOTS]} == set(range(SLOTS))
    assert not any(np.isfinite(r.prompt["resid_post"].norm).all() for r in both[:SLOTS])
    alone = {r.index: r for r in run(model, requests, stacked, skip=range(SLOTS))}
    for reply in both[SLOTS:]:
        np.testing.assert_array_equal(reply.logits, alone[reply.index].logits)


def test_a_prompt_that_overflows_changes_no_other_of_its_packed_sequence(model):
    table = np.array(model.params["embed"]["embedding"])
    table[60] = np.inf
    broken = dataclasses.replace(
        model, params=model.params | {"embed": {"embedding": jnp.asarray(table)}}
    )
    requests = [Request(tokens=p) for p in ([5, 6, 7], [8, 60, 9], [10, 11])]
    assert len(pack(requests, 64).tokens) == 1
    found = [{r.index: r for r in run(m, requests, stack(m, [[]], "all"))} for m in (model, broken)]
    assert not np.isfinite(found[1][1].prompt["resid_post"].norm).all()
    for row in (0, 2):
        # The changed line of the table is also a line of a tied head: look at the others.
        fine, beside = (np.delete(some[row].logits, 60, axis=1)[:1] for some in found)
        np.testing.assert_array_equal(fine, beside)
        for x, y in zip(*(jax.tree.leaves(some[row].prompt) for some in found), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_row_has_the_same_bits_beside_other_rows(model, rng):
    made = conditions(model, rng)
    stacked, requests = stack(model, made, "all"), rows(PROMPTS, made, shared=5)

    def logits(skip):
        return {r.index: r.logits for r in run(model, requests, stacked, skip=skip)}

    everyone = logits(())
    # Replies of many lengths: rows enter slots at other times, beside others.
    assert len({len(kept) for kept in everyone.values()}) > 3
    for index, alone in logits(set(range(0, len(requests), 2)) | {1, 7, 9}).items():
        np.testing.assert_array_equal(alone, everyone[index])


def test_fewer_slots_than_a_prefill_batch_take_its_rows_a_few_at_a_time(model):
    requests = [Request(tokens=[5 + i, 9]) for i in range(layer_sharing.BATCH + 2)]
    found = run(model, requests, stack(model, [[]], "all"), batch=2)
    assert sorted(reply.index for reply in found) == list(range(len(requests)))


# The last of the tiny models, since it drops all programs.
def test_neither_more_conditions_nor_other_operations_compile_anything(model, rng):
    vectors = rng.standard_normal((model.config.n_layers, model.config.d_model))

    def compiled(n, layer, *more):
        made = [[Add(direction=vectors, layers=(layer,), scale=float(c)), *more] for c in range(n)]
        with compiles.counted() as found:
            run(model, rows(PROMPTS[2:], made, shared=5), stack(model, made, "all"))
        return {name: found[name] for name in compiles.ENGINE if found[name]}

    jax.clear_caches()
    assert compiled(3, 1).keys() == set(compiles.ENGINE)
    removed = Project(directions=(vectors,), layers=(2,))
    for n, layer, *more in ((30, 1), (5, 0), (5, 2), (5, 1, removed)):
        assert compiled(n, layer, *more) == {}


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
    decoding = Decoding(max_new_tokens=24, eos=smollm2.eos, keep_logits=True)
    compare(smollm2, prompts, made, shared=shared, batch=8, decoding=decoding, logits=1e-2)
