"""The independent side of parity: HF transformers on torch, steered by forward hooks.

Nothing here calls jaxsteer's arithmetic. An `Add`, a `Project` or a `Cap` is computed again, in
torch, at the place of its tap in HF's modules.

One trick saves most of the time. HF's greedy choice at step j, given our first j tokens, is the
argmax of one uncached pass over prompt + reply; when it is our token j at every j, then by
induction HF's own greedy reply is ours. That pass gives every decode step's logits too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import (
    Add,
    Cap,
    Interventions,
    Operation,
    Project,
    Scope,
    compile_conditions,
)


class Hooked:
    """HF's model under interventions, as forward hooks; a context manager.

    `n_prompt` tells the prompt's tokens from the reply's; tokens are counted over the calls made
    inside one `with`, so a cached decode is hooked right too. One row, or rows with no padding.
    With `record`, every tap is hooked, and `states` has what is there after the interventions.
    """

    def __init__(
        self,
        hf: Any,
        operations: Sequence[Operation],
        scope: Scope = "all",
        n_prompt: int = 0,
        *,
        record: bool = False,
    ):
        self.scope, self.n_prompt = scope, n_prompt
        self.seen: dict[tuple[str, int], int] = {}
        self.handles = []
        self.entered: dict[int, torch.Tensor] = {}
        self.states: dict[tuple[str, int], torch.Tensor] = {}
        self.text = getattr(hf.model, "language_model", hf.model)
        self.scale = getattr(hf.config.get_text_config(), "residual_multiplier", 1.0)
        hooked = {(o.tap, layer) for o in operations for layer in o.layers}
        if record:
            layers = range(len(self.text.layers))
            hooked = {("embed", 0)} | {(t, n) for t in ("resid_mid", "resid_post") for n in layers}
        for tap, layer in sorted(hooked):
            here = [o for o in operations if o.tap == tap and layer in o.layers]
            self._hook(tap, layer, here)

    def _hook(self, tap: str, layer: int, here: list[Operation]) -> None:
        block = self.text.layers[layer]

        def enter(_module: Any, args: Any) -> Any:
            # Not the output of the token table: some families multiply it afterwards.
            return (self._changed(args[0], tap, layer, here), *args[1:])

        def leave(_module: Any, _args: Any, out: Any) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            new = self._changed(h, tap, layer, here)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        def add(_module: Any, _args: Any, out: Any) -> Any:
            # The middle of a block is no module's output: what came in plus what attention adds.
            h, base = out[0] if isinstance(out, tuple) else out, self.entered[layer]
            new = (self._changed(h * self.scale + base, tap, layer, here) - base) / self.scale
            return (new, *out[1:]) if isinstance(out, tuple) else new

        if tap == "embed":
            self.handles.append(block.register_forward_pre_hook(enter))
        elif tap == "resid_post":
            self.handles.append(block.register_forward_hook(leave))
        else:
            self.handles.append(
                block.register_forward_pre_hook(
                    lambda _module, args: self.entered.__setitem__(layer, args[0])
                )
            )
            # Where a family normalises what attention gives, that is what is added.
            normed = hasattr(block, "post_feedforward_layernorm")
            module = block.post_attention_layernorm if normed else block.self_attn
            self.handles.append(module.register_forward_hook(add))

    def _changed(self, h: torch.Tensor, tap: str, layer: int, here: list[Operation]) -> Any:
        start = self.seen.get((tap, layer), 0)
        self.seen[tap, layer] = start + h.shape[1]
        index = torch.arange(start, start + h.shape[1])
        steered = {
            "all": index >= 0,
            "prompt": index < self.n_prompt,
            "response": index >= self.n_prompt,
        }[self.scope]
        new = h.float()
        for operation in (o for o in here if isinstance(o, Add)):
            new = new + operation.scale * _vector(operation, operation.direction, layer)
        removed = [
            _vector(o, direction, layer)
            for o in here
            if isinstance(o, Project)
            for direction in o.directions
        ]
        if removed:
            q = torch.linalg.qr(torch.stack(removed, 1)).Q
            new = new - (new @ q) @ q.T
        for operation in (o for o in here if isinstance(o, Cap)):
            vector = _vector(operation, operation.direction, layer)
            unit = vector / vector.norm()
            at = new @ unit
            new = new + (at.clamp(operation.low, operation.high) - at)[..., None] * unit
        changed = torch.where(steered[None, :, None], new.to(h.dtype), h)
        self.states[tap, layer] = changed
        return changed

    def __enter__(self) -> Hooked:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _vector(operation: Any, direction: np.ndarray, layer: int) -> torch.Tensor:
    measured = layer if operation.measured_at is None else operation.measured_at
    return torch.tensor(np.asarray(direction[measured], np.float32))


def logits(
    hf: Any,
    tokens: Sequence[int],
    operations: Sequence[Operation] = (),
    scope: Scope = "all",
    n_prompt: int = 0,
) -> np.ndarray:
    """HF's logits after every token of one row, float32 [token, vocab]."""
    with Hooked(hf, operations, scope, n_prompt):
        return hf(torch.tensor([list(tokens)])).logits[0].float().numpy()


def taps(
    hf: Any,
    tokens: Sequence[int],
    operations: Sequence[Operation] = (),
    scope: Scope = "all",
    n_prompt: int = 0,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """HF's stream of one row at every tap [layer, token, d_model], and its logits; float32."""
    with Hooked(hf, operations, scope, n_prompt, record=True) as hooked:
        after = hf(torch.tensor([list(tokens)])).logits[0].float().numpy()
    found: dict[str, list[np.ndarray]] = {}
    for (tap, _), state in sorted(hooked.states.items()):
        found.setdefault(tap, []).append(state[0].float().numpy())
    return {tap: np.stack(states) for tap, states in found.items()}, after


def greedy(hf: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """HF's own cached greedy replies, left-padded in one batch, unsteered; the end token is cut."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ends = hf.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    out = hf.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=ends[0]
    )
    replies = [row[width:].tolist() for row in out]
    return [r[: next((i for i, t in enumerate(r) if t in ends), len(r))] for r in replies]


def compiled(
    model: ChatModel,
    conditions: Sequence[Sequence[Operation]],
    scopes: Sequence[Scope] | None = None,
) -> Interventions:
    """Conditions stacked for this model, in the scopes given or on all tokens."""
    return compile_conditions(
        conditions,
        scopes or ["all"] * len(conditions),
        n_layers=model.config.n_layers,
        d_model=model.config.d_model,
    )


def ours(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    conditions: Sequence[Sequence[Operation]],
    scopes: Sequence[Scope] | None = None,
    *,
    new_tokens: int = 48,
    batch: int = 32,
    keep_logits: bool = True,
) -> list[engine.Reply]:
    """jaxsteer's greedy replies, conditions in the outer order and prompts in the inner."""
    stacked = compiled(model, conditions, scopes)
    requests = [
        engine.Request(tokens=p, condition=c) for c in range(len(conditions)) for p in prompts
    ]
    decoding = Decoding(max_new_tokens=new_tokens, eos=model.eos, keep_logits=keep_logits)
    replies = [r for b in engine.run(model, requests, stacked, decoding, batch=batch) for r in b]
    return sorted(replies, key=lambda r: r.index)


def steps(
    hf: Any,
    prompt: Sequence[int],
    reply: engine.Reply,
    operations: Sequence[Operation] = (),
    scope: Scope = "all",
) -> np.ndarray:
    """HF's logits where `reply.logits` has ours: after the prompt and after each token read."""
    tokens = [*prompt, *reply.tokens.tolist()]
    assert reply.logits is not None
    after = logits(hf, tokens, operations, scope, len(prompt))[len(prompt) - 1 :]
    return after[: len(reply.logits)]


def chosen(reply: engine.Reply) -> np.ndarray:
    """Our greedy choices, the ending token included; equal to HF's argmax when the replies are."""
    assert reply.logits is not None
    choices = reply.logits.argmax(-1)
    np.testing.assert_array_equal(choices[: len(reply.tokens)], reply.tokens)
    return choices
