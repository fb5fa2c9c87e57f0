from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from jaxsteer.errors import UserError
from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding, Sampling, choose, highest
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Cap, Project, compile_conditions, everywhere
from tests import oracle, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


def compiled(model, conditions, scope="all"):
    return compile_conditions(
        conditions,
        [scope] * len(conditions),
        n_layers=model.config.n_layers,
        d_model=model.config.d_model,
    )


PROMPTS = [[3, 9, 33], [5] * 20, list(range(3, 30)), [41, 8, 8, 9]]


def run(model, requests, conditions, *, scope="all", sample=None, batch=4, eos=(2,), new_tokens=8):
    decoding = Decoding(max_new_tokens=new_tokens, eos=eos, sample=sample is not None)
    batches = engine.run(
        model, requests, compiled(model, conditions, scope), decoding, sampling=sample, batch=batch
    )
    return sorted((r for b in batches for r in b), key=lambda r: r.index)


def test_a_row_stops_at_the_end_token_and_does_not_keep_it(model):
    free = run(model, [engine.Request(tokens=PROMPTS[0])], [[]], eos=(63,))[0]
    assert len(free.tokens) == 8 and not free.stopped
    end = int(free.tokens[3])
    cut = run(model, [engine.Request(tokens=PROMPTS[0])], [[]], eos=(63, end))[0]
    first = list(free.tokens).index(end)
    assert cut.stopped and list(cut.tokens) == list(free.tokens[:first])


def test_samples_depend_on_seed_and_row_id_only(model):
    requests = [engine.Request(tokens=p, row_id=100 + i) for i, p in enumerate(PROMPTS)]
    sampling = Sampling(seed=3, temperature=1.0, top_p=0.9)
    together = run(model, requests, [[]], sample=sampling)
    backwards = run(model, requests[::-1], [[]], sample=sampling, batch=1)[::-1]
    for one, other in zip(together, backwards, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    other_seed = run(model, requests, [[]], sample=Sampling(seed=4, temperature=1.0, top_p=0.9))
    assert any(list(a.tokens) != list(b.tokens) for a, b in zip(together, other_seed, strict=True))


@pytest.mark.parametrize(
    "logits", [[1, 3, 3, 2], [-0.0, 0.0], [-np.inf, -np.inf], [1, np.nan, np.inf, np.nan], [np.inf]]
)
def test_the_highest_logit_is_the_one_that_argmax_finds(logits):
    logits = np.array(logits, np.float32)
    assert highest(jnp.asarray(logits)) == np.argmax(logits)


def draws(logits, ids, index=0, **settings):
    """Token `index` of many rows that have the same logits."""
    one = functools.partial(choose, sampling=Sampling(**settings), sample=True)
    each = jax.vmap(one, in_axes=(None, 0, None))
    return np.asarray(each(jnp.asarray(logits), ids, jnp.int32(index)))


@pytest.mark.parametrize(
    ("temperature", "top_p", "weights"),
    [
        (1.0, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (0.5, 1.0, [0.01, 0.16, 0.04, 0.09]),
        # 0.4 falls short of 0.6, and with 0.3 it reaches that.
        (1.0, 0.6, [0, 0.4, 0, 0.3]),
    ],
)
def test_draws_are_as_frequent_as_their_tempered_probability_says(temperature, top_p, weights):
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    ids = jnp.arange(4000, dtype=jnp.uint32)
    drawn = draws(logits, ids, seed=5, temperature=temperature, top_p=top_p)
    counts, expected = np.bincount(drawn, minlength=4), np.array(weights) / sum(weights)
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert scipy.stats.chisquare(counts[kept], 4000 * expected[kept]).pvalue > 1e-3


def test_each_seed_row_and_token_is_drawn_on_its_own():
    logits, ids = np.zeros(2**16, np.float32), jnp.arange(3, dtype=jnp.uint32)
    drawn = [draws(logits, ids, index, seed=seed) for index in range(3) for seed in range(3)]
    assert len(set(np.concatenate(drawn).tolist())) == 27


def test_a_tiny_top_p_is_greedy(model):
    requests = [engine.Request(tokens=p, row_id=i) for i, p in enumerate(PROMPTS)]
    nucleus = run(model, requests, [[]], sample=Sampling(seed=1, temperature=1.0, top_p=1e-6))
    for one, other in zip(nucleus, run(model, requests, [[]]), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_realised_change_counts_real_tokens_in_scope(model, rng):
    vectors = rng.standard_normal((model.config.n_layers, model.config.d_model))
    norm = np.linalg.norm(vectors[1])
    operations = [Add(direction=vectors, layers=(1,), scale=1.0)]
    for scope, prompt_tokens, response_tokens in (
        ("all", 3, 7),
        ("prompt", 3, 0),
        ("response", 0, 7),
    ):
        requests = [engine.Request(tokens=PROMPTS[0])]
        reply = run(model, requests, [operations], scope=scope, eos=(63,))[0]
        for realised, expected in (
            (reply.prompt, prompt_tokens),
            (reply.response, response_tokens),
        ):
            np.testing.assert_allclose(
                realised["resid_post"].change, [0, expected * norm, 0], rtol=1e-4
            )
            assert (realised["resid_post"].steered == expected).all()


def test_a_projection_leaves_its_probe_at_zero(model, rng):
    vectors = rng.standard_normal((model.config.n_layers, model.config.d_model)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    stacked = compiled(model, [[Project(directions=(vectors,), layers=(1,))]])
    decoding = Decoding(max_new_tokens=4, eos=(63,))
    replies = next(
        engine.run(
            model,
            [engine.Request(tokens=PROMPTS[0])],
            stacked,
            decoding,
            probes=unit[:, None],
            batch=1,
        )
    )
    realised = replies[0].prompt["resid_post"]
    assert abs(realised.before[1, 0]) > 0.1 and abs(realised.after[1, 0]) < 1e-4


def test_a_prompt_beyond_the_context_is_refused(model):
    with pytest.raises(UserError, match="tokens"):
        run(model, [engine.Request(tokens=[3] * 600)], [[]])


def test_logits_are_kept_when_asked_for_and_explain_every_token(model):
    requests = [engine.Request(tokens=p) for p in PROMPTS]
    plain = compiled(model, [[]])
    decoding = Decoding(max_new_tokens=8, eos=(2,), keep_logits=True)
    for reply in next(engine.run(model, requests[:1], plain, decoding, batch=1)):
        assert reply.logits.shape == (len(reply.tokens) + reply.stopped, model.config.vocab_size)
        np.testing.assert_array_equal(reply.logits.argmax(-1)[: len(reply.tokens)], reply.tokens)
    assert run(model, requests, [[]])[0].logits is None


@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
def test_every_tap_and_operation_equals_torch_hooks_at_every_step(model, rng, scope):
    shape = (model.config.n_layers, model.config.d_model)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    conditions = [
        [Add(direction=a, layers=(0,), scale=2.0, tap="embed")],
        [Project(directions=(a, a + b), layers=(0, 2), tap="resid_mid")],
        [Cap(direction=a, layers=(1,), low=-0.1, high=0.3, tap="resid_mid")],
        [Add(direction=a, layers=(0, 1), scale=-1.5, measured_at=2)],
        [Add(direction=a, layers=(1,), scale=2.0), Cap(direction=b, layers=(1,), high=-0.2)],
        [
            Add(direction=a, layers=(1,), scale=2.0),
            Project(directions=(b, c), layers=(1,), measured_at=0),
            Cap(direction=a - b, layers=(1, 2), low=0.5),
            Add(direction=c, layers=(2,), scale=1.0, tap="resid_mid"),
        ],
    ]
    hf, prompts = tiny.llama(), [[3, 9, 33], [41, 8, 8, 9], list(range(3, 30))]
    replies = oracle.ours(
        model, prompts, conditions, [scope] * len(conditions), new_tokens=6, batch=18
    )
    for i, reply in enumerate(replies):
        operations, prompt = conditions[i // 3], prompts[i % 3]
        expected = oracle.steps(hf, prompt, reply, operations, scope)
        np.testing.assert_allclose(reply.logits, expected, atol=1e-4)
        plain = oracle.steps(hf, prompt, reply)
        assert np.abs(plain - expected).max() > 1e-2 or len(expected) == 1


def test_projecting_everywhere_equals_ablating_every_write(model, rng):
    # As its authors ablate a refusal direction: each block's input, and what attention and MLP add.
    vectors = rng.standard_normal((model.config.n_layers, model.config.d_model)).astype(np.float32)
    hf, prompts = tiny.llama(), [[3, 9, 33], list(range(3, 30))]
    replies = oracle.ours(model, prompts, [everywhere(vectors, 1)], new_tokens=6, batch=2)
    unit = torch.tensor(vectors[1] / np.linalg.norm(vectors[1]))

    def ablated(h):
        return h - (h @ unit)[..., None] * unit

    def output(_module, _args, out):
        return (ablated(out[0]), *out[1:]) if isinstance(out, tuple) else ablated(out)

    for block in hf.model.layers:
        block.register_forward_pre_hook(lambda _module, args: (ablated(args[0]), *args[1:]))
        block.self_attn.register_forward_hook(output)
        block.mlp.register_forward_hook(output)
    for prompt, reply in zip(prompts, replies, strict=True):
        np.testing.assert_allclose(reply.logits, oracle.steps(hf, prompt, reply), atol=1e-4)
