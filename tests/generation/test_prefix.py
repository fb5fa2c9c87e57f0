"""A shared prefix run once gives what whole prompts give."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxsteer.directions import samples
from jaxsteer.errors import UserError
from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding, Sampling
from jaxsteer.generation.requests import shared_length, shared_lengths
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Project, compile_conditions
from tests import oracle, tiny


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(tiny.llama, id="llama"),
        pytest.param(tiny.qwen2, id="qwen2", marks=pytest.mark.slow),
    ],
)
def hf(request):
    return request.param()


@pytest.fixture(scope="module")
def model(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    return ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


START = [4, 9, 33, 7, 12]
PROMPTS = [[*START, 41], [*START, *range(5, 30)], [*START, 8, 8, 9]]


def conditions(model, rng):
    shape = (model.config.n_layers, model.config.d_model)
    a, b = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    layer = model.config.n_layers // 2
    return [
        [],
        [Add(direction=a, layers=(layer,), scale=3.0)],
        [Add(direction=a, layers=(0,), scale=2.0), Project(directions=(a, b), layers=(layer,))],
    ]


def run(model, prompts, made, shared, scope="all", sampling=None, new_tokens=8):
    stacked = compile_conditions(
        made, [scope] * len(made), n_layers=model.config.n_layers, d_model=model.config.d_model
    )
    requests = [
        engine.Request(tokens=p, condition=c, row_id=17 * c + i, shared=shared)
        for c in range(len(made))
        for i, p in enumerate(prompts)
    ]
    decoding = Decoding(max_new_tokens=new_tokens, eos=model.eos, sample=sampling is not None)
    batches = engine.run(model, requests, stacked, decoding, batch=4, sampling=sampling)
    return sorted((r for batch in batches for r in batch), key=lambda r: r.index)


@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
def test_tokens_and_realised_changes_equal_those_of_whole_prompts(model, rng, scope):
    made = conditions(model, rng)
    whole, split = (run(model, PROMPTS, made, shared, scope) for shared in (0, len(START)))
    for one, other in zip(whole, split, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.n_prompt == other.n_prompt
        for ours, theirs in ((one.prompt, other.prompt), (one.response, other.response)):
            for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-4)


def test_neighbouring_slots_that_read_a_long_prefix_together_change_no_token(model, rng):
    assert engine.neighbours(40, 8, 8, 7) == 4
    start, ends = rng.integers(3, 60, 40).tolist(), rng.integers(3, 60, (7, 3)).tolist()
    made = conditions(model, rng)
    stacked = oracle.compiled(model, made)
    # Replies of many lengths, so that rows enter groups of slots which other rows have not left.
    decoding = Decoding(max_new_tokens=8, eos=tuple(range(0, 64, 7)), sample=True, keep_logits=True)

    def replies(shared, skip=()):
        requests = [
            engine.Request(tokens=[*start, *end], condition=c, shared=shared, row_id=7 * c + i)
            for i, end in enumerate(ends)
            for c in range(len(made))
        ]
        found = engine.run(
            model, requests, stacked, decoding, batch=8, skip=skip, sampling=Sampling(seed=5)
        )
        return {reply.index: reply for some in found for reply in some}

    whole, together = replies(0), replies(len(start))
    assert len({len(reply.tokens) for reply in whole.values()}) > 2
    for index, reply in whole.items():
        np.testing.assert_array_equal(together[index].tokens, reply.tokens)
        for x, y in zip(
            *(jax.tree.leaves((r.prompt, r.response)) for r in (reply, together[index])),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-4)
    for index, reply in replies(len(start), skip={0, 1, 4, 5, 9, 16}).items():
        np.testing.assert_array_equal(reply.logits, together[index].logits)


def test_a_plain_prefix_is_read_as_hf_reads_it_unsteered(rng, tmp_path):
    hf = tiny.llama()
    model = ChatModel.load(convert(tiny.save(hf, tmp_path / "hf"), tmp_path / "out", "float32"))
    made = conditions(model, rng)
    stacked = oracle.compiled(model, made)
    requests = [
        engine.Request(tokens=p, condition=c, shared=len(START), plain=True)
        for c in range(len(made))
        for p in PROMPTS
    ]
    decoding = Decoding(max_new_tokens=6, eos=model.eos, keep_logits=True)
    for replies in engine.run(model, requests, stacked, decoding, batch=4):
        for reply in replies:
            request = requests[reply.index]
            tokens = [*request.tokens, *reply.tokens.tolist()]
            # To HF, all that follows the prefix is a reply.
            theirs = oracle.logits(hf, tokens, made[request.condition], "response", len(START))
            theirs = theirs[len(request.tokens) - 1 :][: len(reply.logits)]
            np.testing.assert_allclose(reply.logits, theirs, atol=2e-4)
            assert (reply.prompt["resid_post"].steered == len(request.own)).all()


@pytest.mark.slow
def test_a_prompt_read_block_by_block_is_continued_as_hf_continues_it(hf, model, rng):
    long, system = rng.integers(3, 60, 420).tolist(), rng.integers(3, 60, 300).tolist()
    prompts, made = [long, [*system, 7, 8], [*system, 9]], conditions(model, rng)[:2]
    for shared in (0, 30):
        same = [[*long[:shared], *prompt[shared:]] for prompt in prompts]
        for reply in run(model, same, made, shared):
            prompt, operations = same[reply.index % 3], made[reply.index // 3]
            after = oracle.logits(hf, [*prompt, *reply.tokens], operations)
            chosen = after.argmax(-1)[len(prompt) - 1 :]
            assert reply.tokens.tolist() == chosen[: len(reply.tokens)].tolist()


# The tests of `decode` sample rows with a shared prefix too.
@pytest.mark.slow
def test_samples_equal_those_of_whole_prompts(model, rng):
    sampling = Sampling(seed=5, temperature=1.0, top_p=0.9)
    made = conditions(model, rng)
    for one, other in zip(
        run(model, PROMPTS, made, 0, sampling=sampling),
        run(model, PROMPTS, made, 3, sampling=sampling),
        strict=True,
    ):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_rows_with_and_without_a_shared_prefix_run_together(model, rng):
    made = conditions(model, rng)
    stacked = compile_conditions(
        made, ["all"] * 3, n_layers=model.config.n_layers, d_model=model.config.d_model
    )
    requests = [
        engine.Request(tokens=p, condition=c, shared=shared)
        for c, shared in ((1, 5), (2, 0), (1, 2))
        for p in PROMPTS
    ]
    decoding = Decoding(max_new_tokens=8, eos=model.eos)
    mixed = sorted(
        (r for b in engine.run(model, requests, stacked, decoding) for r in b),
        key=lambda r: r.index,
    )
    whole = run(model, PROMPTS, made, 0)
    for i, expected in enumerate([*whole[3:6], *whole[6:9], *whole[3:6]]):
        np.testing.assert_array_equal(mixed[i].tokens, expected.tokens)


@pytest.mark.parametrize("shared", [None, [500]])
def test_a_prompt_is_too_long_for_a_capture_by_all_its_tokens(model, shared):
    limit = model.config.max_position
    with pytest.raises(UserError, match=rf"{limit + 1} tokens and at most {limit} fit"):
        next(
            samples.forward(
                model,
                [[5] * limit],
                [[3]],
                ("prompt_end",),
                shared=shared,
            )
        )


def test_captures_equal_those_of_whole_prompts(model):
    responses = [[3, 4], [5], [6, 7, 8]]

    def captured(shared):
        found = samples.forward(model, PROMPTS, responses, samples.POSITIONS, shared=shared)
        return {row: states for row, states, _ in found}

    whole, split = captured(None), captured([5, 2, 0])
    for i in range(3):
        np.testing.assert_allclose(whole[i], split[i], atol=1e-5)


def test_a_prompt_that_does_not_fit_says_its_whole_length(model):
    with pytest.raises(UserError, match="605 tokens"):
        run(model, [[*START, *[3] * 600]], [[]], 5)


def test_shared_length_leaves_each_prompt_a_token_of_its_own():
    assert shared_length([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert shared_length([[1, 2], [1, 2]]) == 0
    assert shared_length([[7]]) == 0
    assert shared_lengths([[1, 2, 3], [9], [1, 2, 4]], ["a", "b", "a"]) == [2, 0, 2]
