from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.generation import engine, stepwise
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.requests import left_pad
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Project, compile_conditions
from tests import compiles, reference, tiny

ROOM = 8
PROMPTS = [[3, 9, 33], [5] * 20, list(range(3, 43))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stepwise")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


@pytest.fixture(scope="module")
def vectors(model):
    shape = (model.config.n_layers, model.config.d_model)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def compiled(model, conditions, scope="all"):
    return compile_conditions(
        conditions,
        [scope] * len(conditions),
        n_layers=model.config.n_layers,
        d_model=model.config.d_model,
    )


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True))[:, None]


def run(model, prompt, interventions, probes, *, room=ROOM, width=0):
    decoding = Decoding(max_new_tokens=room, eos=model.eos)
    prompt = reference.read_one(model, prompt, interventions, decoding, probes=probes, width=width)
    return prompt, list(reference.reply(model, prompt))


def tokens_of(steps):
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
def test_tokens_are_those_of_the_engine_steered_and_not(model, vectors, scope):
    conditions = [[], [Add(direction=vectors, layers=(1,), scale=3.0)]]
    stacked = compiled(model, conditions, scope)
    requests = [engine.Request(tokens=p, condition=c) for p in PROMPTS for c in range(2)]
    decoding = Decoding(max_new_tokens=ROOM, eos=model.eos)
    expected = {
        reply.index: list(reply.tokens)
        for batch in engine.run(model, requests, stacked, decoding, batch=6)
        for reply in batch
    }
    for index, request in enumerate(requests):
        row = reference.only(stacked, request.condition)
        _, steps = run(model, request.tokens, row, unit(vectors))
        assert tokens_of(steps) == expected[index]
    assert any(expected[2 * i] != expected[2 * i + 1] for i in range(len(PROMPTS)))


@pytest.mark.slow
def test_tokens_of_the_real_model_are_those_of_the_engine(smollm2):
    shape = (smollm2.config.n_layers, smollm2.config.d_model)
    vectors = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    stacked = compiled(smollm2, [[], [Add(direction=vectors, layers=(14,), scale=1.5)]])
    prompt = smollm2.tokenizer.chat("Name three primary colours.", "Be brief.")
    requests = [engine.Request(tokens=prompt, condition=c) for c in range(2)]
    decoding = Decoding(max_new_tokens=ROOM, eos=smollm2.eos)
    replies = [r for b in engine.run(smollm2, requests, stacked, decoding, batch=2) for r in b]
    assert list(replies[0].tokens) != list(replies[1].tokens)
    for reply in replies:
        row = reference.only(stacked, reply.index)
        _, steps = run(smollm2, prompt, row, unit(vectors))
        assert tokens_of(steps) == list(reply.tokens)


def test_a_wider_padding_does_not_change_what_is_read(model, vectors):
    row = reference.only(compiled(model, [[Add(direction=vectors, layers=(0,), scale=1.0)]]), 0)
    narrow, a = run(model, PROMPTS[0], row, unit(vectors))
    wide, b = run(model, PROMPTS[0], row, unit(vectors), width=96)
    np.testing.assert_allclose(narrow.logits, wide.logits, atol=1e-4)
    np.testing.assert_allclose(narrow.projections, wide.projections, atol=1e-4)
    assert tokens_of(a) == tokens_of(b)


def test_projections_are_those_of_a_plain_forward_pass_over_the_whole_text(model, vectors):
    row = compiled(model, [[]])
    probes = unit(vectors)
    reading, steps = run(model, PROMPTS[1], reference.only(row, 0), probes)
    reply = tokens_of(steps)
    assert len(reply) == ROOM
    whole = PROMPTS[1] + reply
    tokens, real = left_pad([whole], len(whole))
    captured, logits = reference.read(model.definition, model.params, tokens, real, ("resid_post",))
    expected = np.einsum("ltd,lpd->ltp", captured["resid_post"][0], probes)
    found = np.concatenate([reading.projections, *(c.projections for c in steps)], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_allclose(reading.logits, logits[0, len(PROMPTS[1]) - 1], atol=1e-3)


def test_layers_of_two_kinds_are_read_each_by_its_number(tmp_path):
    # A window of 8 tokens in every second of four layers.
    made = tiny.save(tiny.family("gemma3_text"), tmp_path / "hf")
    mixed = ChatModel.load(convert(made, tmp_path / "out", "float32"))
    prompt = list(range(3, 33))
    reading, steps = run(mixed, prompt, reference.only(compiled(mixed, [[]]), 0), None)
    whole = prompt + tokens_of(steps)
    tokens, real = left_pad([whole], len(whole))
    _, logits = reference.read(mixed.definition, mixed.params, tokens, real)
    found = np.stack([reading.logits, *(step.logits for step in steps)])
    np.testing.assert_allclose(found, logits[0, len(prompt) - 1 :], atol=1e-3)


def test_an_added_direction_raises_its_own_projection_by_its_strength_at_its_layer(model, vectors):
    norms = np.linalg.norm(vectors, axis=1)
    stacked = compiled(model, [[], [Add(direction=vectors, layers=(1,), scale=2.0)]])
    plain, steered = (
        run(model, PROMPTS[0], reference.only(stacked, c), unit(vectors))[0] for c in range(2)
    )
    change = (steered.projections - plain.projections)[..., 0]
    np.testing.assert_allclose(change[0], 0, atol=1e-5)
    np.testing.assert_allclose(change[1], 2 * norms[1], rtol=1e-4)
    assert np.abs(change[2]).min() > 0


def test_the_reply_stops_before_the_end_token(model, vectors):
    row = reference.only(compiled(model, [[]]), 0)
    _, steps = run(model, PROMPTS[0], row, unit(vectors))
    free = tokens_of(steps)
    ending = ChatModel(**{**vars(model), "eos": (free[5],)})
    _, cut = run(ending, PROMPTS[0], row, unit(vectors))
    assert tokens_of(cut) == free[: free.index(free[5])]
    assert cut[-1].next == free[5]


def test_another_strength_layer_or_direction_compiles_nothing(model, vectors):
    jax.clear_caches()
    counts = []
    for scale, layer, direction in ((0.0, 0, vectors), (2.0, 1, vectors), (5.0, 2, -vectors)):
        stacked = compiled(model, [[Add(direction=direction, layers=(layer,), scale=scale)]])
        with compiles.counted() as found:
            run(model, PROMPTS[0], reference.only(stacked, 0), unit(vectors))
        counts.append(found["read_layers"])
    # One program reads the prompt, layer by layer, another each token of the reply.
    assert counts == [2, 0, 0]


def test_a_projection_reads_as_zero_where_it_was_removed(model, vectors):
    stacked = compiled(model, [[Project(directions=(vectors,), layers=(1,))]])
    reading, steps = run(model, PROMPTS[1], reference.only(stacked, 0), unit(vectors))
    assert np.abs(reading.projections[1]).max() < 1e-4
    assert max(np.abs(c.projections[1]).max() for c in steps) < 1e-4
    assert np.abs(reading.projections[0]).min() > 0


def test_conditions_that_are_read_in_step_have_the_replies_that_each_has_alone(model, vectors):
    stacked = compiled(model, [[], [Add(direction=vectors, layers=(1,), scale=3.0)]])
    alone = [
        run(model, PROMPTS[1], reference.only(stacked, c), unit(vectors), room=20) for c in range(2)
    ]
    # The first reply ends early: its row then has nothing to say.
    ending = ChatModel(**{**vars(model), "eos": (*model.eos, tokens_of(alone[0][1])[4])})
    decoding = Decoding(max_new_tokens=20, eos=ending.eos)
    readings = stepwise.read_each(ending, PROMPTS[1], stacked, decoding, probes=unit(vectors))
    steps = list(stepwise.reply_each(ending, readings))
    for c, (prompt, reply) in enumerate(alone):
        np.testing.assert_allclose(readings[c].logits, prompt.logits, atol=1e-4)
        mine = [step[c] for step in steps if step[c] is not None]
        free = tokens_of(reply)
        ends = [i for i, token in enumerate(free) if token in ending.eos]
        assert tokens_of(mine) == free[: min(ends, default=len(free))]
        for one, other in zip(mine, reply, strict=False):
            np.testing.assert_allclose(one.projections, other.projections, atol=1e-4)
    assert steps[-1][0] is None and steps[-1][1] is not None


def test_a_prompt_without_room_for_its_reply_is_refused(model, vectors):
    row = reference.only(compiled(model, [[]]), 0)
    with pytest.raises(UserError, match="tokens"):
        run(model, [3] * 505, row, unit(vectors))


def test_the_realised_change_is_counted_in_every_pass(model, vectors):
    stacked = compiled(model, [[Add(direction=vectors, layers=(1,), scale=1.0)]], "response")
    prompt, steps = run(model, PROMPTS[0], reference.only(stacked, 0), unit(vectors))
    assert prompt.realised["resid_post"].change.tolist() == [0, 0, 0]
    for step in steps:
        expected = [0, np.linalg.norm(vectors[1]), 0]
        np.testing.assert_allclose(step.realised["resid_post"].change, expected, rtol=1e-4)
