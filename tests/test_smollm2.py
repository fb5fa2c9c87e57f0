"""The real SmolLM2 against HF transformers on torch: logits, tokens, taps, steering."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxsteer import activations, chat, rows
from jaxsteer.generate import Decoding
from jaxsteer.interventions import Add, Project, compile_conditions
from tests.conftest import chats


def greedy(hf, prompt, new_tokens):
    ids = torch.tensor([prompt])
    out = hf.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def ours(model, prompts, conditions, scope="all", new_tokens=48, batch=32):
    stacked = compile_conditions(
        conditions,
        [scope] * len(conditions),
        n_layers=model.config.n_layers,
        d_model=model.config.d_model,
    )
    requests = [
        rows.Request(tokens=p, condition=c) for c in range(len(conditions)) for p in prompts
    ]
    decoding = Decoding(max_new_tokens=new_tokens, eos=model.eos)
    replies = [r for b in rows.run(model, requests, stacked, decoding, batch=batch) for r in b]
    return sorted(replies, key=lambda r: r.index)


def until_eos(tokens, eos):
    return tokens[: next((i for i, t in enumerate(tokens) if t in eos), len(tokens))]


def test_logits_of_a_padded_batch_of_16_chats_equal_hf(smollm2, oracle):
    prompts = chats(smollm2, 16)
    ids, real = chat.left_pad(prompts, 96)
    _, logits = activations.read(
        smollm2.definition,
        smollm2.params,
        ids,
        real,
        np.zeros((16, 0, 96), np.float32),
        (),
        None,
        False,
    )
    for i, prompt in enumerate(prompts):
        expected = oracle(torch.tensor([prompt])).logits[0].numpy()
        got = np.asarray(logits[i])[real[i]]
        assert np.abs(got - expected).max() <= 2e-3
        np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))


def test_48_greedy_tokens_of_32_prompts_equal_hf(smollm2, oracle):
    prompts = chats(smollm2, 32)
    for prompt, reply in zip(prompts, ours(smollm2, prompts, [[]]), strict=True):
        assert list(reply.tokens) == until_eos(greedy(oracle, prompt, 48), smollm2.eos)


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


class Hooked:
    """The same interventions as torch forward hooks, written apart from jaxsteer's code."""

    def __init__(self, hf, prompt_length, scope, adds, projects):
        self.handles, self.seen = [], {}
        for layer in sorted({layer for layer, _ in adds} | {layer for layer, _ in projects}):
            add = sum((v for at, v in adds if at == layer), torch.zeros(hf.config.hidden_size))
            units = [v / v.norm() for at, v in projects if at == layer]
            q = torch.linalg.qr(torch.stack(units, 1)).Q if units else None

            def hook(module, args, output, layer=layer, add=add, q=q):
                h = output[0] if isinstance(output, tuple) else output
                start = self.seen.get(layer, 0)
                self.seen[layer] = start + h.shape[1]
                index = torch.arange(start, start + h.shape[1])
                on = {
                    "all": index >= 0,
                    "prompt": index < prompt_length,
                    "response": index >= prompt_length,
                }
                new = h + add
                if q is not None:
                    new = new - (new @ q) @ q.T
                new = torch.where(on[scope][None, :, None], new, h)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            self.handles.append(hf.model.layers[layer].register_forward_hook(hook))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
@pytest.mark.parametrize("kind", ["add", "project", "both"])
def test_steering_equals_torch_forward_hooks(smollm2, oracle, rng, scope, kind):
    shape = (smollm2.config.n_layers, smollm2.config.d_model)
    a, b = (rng.standard_normal(shape).astype(np.float32) * 4 for _ in range(2))
    operations, adds, projects = [], [], []
    if kind in ("add", "both"):
        operations.append(Add(direction=a, layers=(5, 20), scale=1.5))
        adds = [(layer, torch.tensor(1.5 * a[layer])) for layer in (5, 20)]
    if kind in ("project", "both"):
        operations.append(Project(directions=(a, a + b), layers=(5, 12, 27)))
        projects = [(at, torch.tensor(v[at])) for at in (5, 12, 27) for v in (a, a + b)]
    prompts = chats(smollm2, 3)
    replies = ours(smollm2, prompts, [operations], scope, new_tokens=32, batch=4)
    for prompt, reply in zip(prompts, replies, strict=True):
        with Hooked(oracle, len(prompt), scope, adds, projects):
            expected = greedy(oracle, prompt, 32)
        assert list(reply.tokens) == until_eos(expected, smollm2.eos)
    if scope == "response":
        return
    stacked = compile_conditions([operations], [scope], n_layers=shape[0], d_model=shape[1])
    ids, real = chat.left_pad(prompts, 64)
    _, logits = activations.read(
        smollm2.definition,
        smollm2.params,
        ids,
        real,
        np.zeros((3, 0, 64), np.float32),
        (),
        stacked.rows(np.zeros(3, int)),
        False,
    )
    for i, prompt in enumerate(prompts):
        with Hooked(oracle, len(prompt), scope, adds, projects):
            expected = oracle(torch.tensor([prompt])).logits[0].numpy()
        assert np.abs(np.asarray(logits[i])[real[i]] - expected).max() <= 2e-3


def test_a_row_is_the_same_alone_reversed_and_among_longer_rows_and_other_conditions(smollm2, rng):
    shape = (smollm2.config.n_layers, smollm2.config.d_model)
    v = rng.standard_normal(shape).astype(np.float32)
    conditions = [
        [],
        [Add(direction=v, layers=(10,), scale=20.0)],
        [Project(directions=(v,), layers=(4, 9))],
    ]
    prompts = chats(smollm2, 10)
    together = ours(smollm2, prompts, conditions, new_tokens=24)
    reversed_ = ours(smollm2, prompts[::-1], conditions[::-1], new_tokens=24)[::-1]
    for one, other in zip(together, reversed_, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    for i in (0, 3, 7):
        alone = ours(smollm2, [prompts[i]], [conditions[1]], new_tokens=24, batch=1)[0]
        np.testing.assert_array_equal(alone.tokens, together[10 + i].tokens)
