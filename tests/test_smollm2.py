"""The real SmolLM2 against HF transformers on torch: logits, tokens, taps, steering."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxsteer.generation.requests import left_pad
from jaxsteer.model.interventions import Add, Cap, Project
from tests import oracle as torch_side
from tests import reference
from tests.conftest import chats

# The short tests compare tiny models with torch; reading the real one there takes a minute.
pytestmark = pytest.mark.slow


def test_logits_of_a_padded_batch_of_16_chats_equal_hf(smollm2, oracle):
    prompts = chats(smollm2, 16)
    ids, real = left_pad(prompts, 64)
    _, logits = reference.read(smollm2.definition, smollm2.params, ids, real)
    for i, prompt in enumerate(prompts):
        expected = torch_side.logits(oracle, prompt)
        got = np.asarray(logits[i])[real[i]]
        assert np.abs(got - expected).max() <= 2e-3
        np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))


def test_captured_taps_equal_hidden_states_but_for_the_last_which_is_normed(smollm2, oracle):
    prompts = chats(smollm2, 3)
    ids, real = left_pad(prompts, 64)
    captured, _ = reference.read(
        smollm2.definition, smollm2.params, ids, real, ("embed", "resid_post"), last_only=True
    )
    # The last five tokens show as much as all would.
    captured = {tap: states[:, :, -5:] for tap, states in captured.items()}
    for i, prompt in enumerate(prompts):
        states = oracle(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        states = [state[0, -5:].numpy() for state in states]
        np.testing.assert_allclose(captured["embed"][i, 0], states[0], atol=1e-6)
        for layer in range(smollm2.config.n_layers - 1):
            ours = np.asarray(captured["resid_post"][i, layer])
            assert np.abs(ours - states[layer + 1]).max() <= 1e-3 + 1e-5 * np.abs(ours).max()
        last = torch.tensor(np.asarray(captured["resid_post"][i, -1]))
        np.testing.assert_allclose(oracle.model.norm(last), states[-1], atol=1e-3)


def test_48_greedy_tokens_of_32_prompts_equal_hf(smollm2, oracle):
    prompts = chats(smollm2, 32)
    replies = torch_side.ours(smollm2, prompts, [[]], batch=16, keep_logits=False)
    expected = torch_side.greedy(oracle, prompts, 48)
    assert [reply.tokens.tolist() for reply in replies] == expected
    assert sum(map(len, expected)) > 1000


def test_token_ids_equal_the_torch_path(smollm2):
    from transformers import AutoTokenizer

    from tests.conftest import gguf_path

    path = gguf_path()
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in (
        "Hello, world!",
        "  two  spaces\n\ttab",
        "naïve café 東京 🙂",
        "x = 12345 + 67.8e-9",
    ):
        assert smollm2.tokenizer.hf(text)["input_ids"] == theirs(text)["input_ids"]


SCOPES = ("all", "prompt", "response")
KINDS = ("add", "project", "both", "cap")


@pytest.fixture(scope="module")
def steered(smollm2):
    """Every kind of operation in every scope, and none, on two prompts: one batch, one program."""
    rng = np.random.default_rng(0)
    shape = (smollm2.config.n_layers, smollm2.config.d_model)
    a, b = (rng.standard_normal(shape).astype(np.float32) * 4 for _ in range(2))
    add = Add(direction=a, layers=(5, 20), scale=1.5)
    project = Project(directions=(a, a + b), layers=(5, 12, 27))
    cap = Cap(direction=b, layers=(8, 21), low=-0.5, high=0.25)
    operations = {"add": [add], "project": [project], "both": [add, project], "cap": [cap]}
    cells = [("none", "all"), *((kind, scope) for kind in KINDS for scope in SCOPES)]
    prompts = chats(smollm2, 3)[::2]
    replies = torch_side.ours(
        smollm2,
        prompts,
        [operations.get(kind, []) for kind, _ in cells],
        [scope for _, scope in cells],
        new_tokens=32,
        batch=2 * len(cells),
    )
    by_cell = {cell: replies[2 * i : 2 * i + 2] for i, cell in enumerate(cells)}
    return operations, prompts, by_cell


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_steering_equals_torch_forward_hooks_at_every_step(steered, oracle, scope, kind):
    operations, prompts, by_cell = steered
    for prompt, reply in zip(prompts, by_cell[kind, scope], strict=True):
        expected = torch_side.steps(oracle, prompt, reply, operations[kind], scope)
        assert np.abs(reply.logits - expected).max() <= 2e-3
        np.testing.assert_array_equal(torch_side.chosen(reply), expected.argmax(-1))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_of_those_interventions_moves_the_logits(steered, scope, kind):
    _, _, by_cell = steered
    for plain, reply in zip(by_cell["none", "all"], by_cell[kind, scope], strict=True):
        # The first token is chosen before any reply token is read, so a reply scope spares it.
        step = 1 if scope == "response" else 0
        assert np.abs(plain.logits[step] - reply.logits[step]).max() > 0.01
        if scope == "response":
            np.testing.assert_array_equal(plain.logits[0], reply.logits[0])


def test_a_row_is_the_same_alone_reversed_and_among_longer_rows_and_other_conditions(smollm2, rng):
    shape = (smollm2.config.n_layers, smollm2.config.d_model)
    v = rng.standard_normal(shape).astype(np.float32)
    conditions = [
        [],
        [Add(direction=v, layers=(10,), scale=20.0)],
        [Project(directions=(v,), layers=(4, 9))],
        [Cap(direction=v, layers=(15,), high=0.0)],
    ]
    # 21 to 30 tokens: eight prompts of one bucket, so the 32 rows run as one batch.
    prompts = chats(smollm2, 16)[::2]
    together = tokens(smollm2, prompts, conditions)
    assert together == tokens(smollm2, prompts[::-1], conditions[::-1])[::-1]
    for i in (0, 3):
        alone = tokens(smollm2, [prompts[i]], [conditions[1]], batch=1)
        assert alone == [together[8 + i]]


def tokens(model, prompts, conditions, batch=32):
    replies = torch_side.ours(
        model, prompts, conditions, new_tokens=16, batch=batch, keep_logits=False
    )
    return [reply.tokens.tolist() for reply in replies]
