"""Steering in torch, one function per site, for whichever library calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.bench.job import Site

Change = Callable[[torch.Tensor], torch.Tensor]


def change(site: Site, like: torch.Tensor | None = None) -> Change:
    """The site's effect on the stream [row, token, d_model]: add, then remove a span.

    Its vectors have the device and dtype of `like`; None for float32 on the CPU.
    """
    like = torch.zeros(()) if like is None else like
    added = sum((torch.from_numpy(v) for v in site.added), torch.zeros(())).to(like)
    basis = torch.linalg.qr(torch.from_numpy(_columns(site)))[0].to(like) if site.removed else None

    def changed(h: torch.Tensor) -> torch.Tensor:
        if site.added:
            h = h + added
        return h if basis is None else h - (h @ basis) @ basis.T

    return changed


def _columns(site: Site) -> Any:
    import numpy as np

    return np.stack(site.removed, axis=1)


class Hooked:
    """An HF Llama under a condition, as forward hooks; a context manager."""

    def __init__(self, hf: Any, sites: Sequence[Site]):
        self.handles: list[Any] = []
        self.entered: dict[int, torch.Tensor] = {}
        for site in sites:
            self._hook(hf, site)

    def _hook(self, hf: Any, site: Site) -> None:
        changed = change(site, hf.model.embed_tokens.weight)
        if site.tap == "embed":
            module = hf.model.embed_tokens
            self.handles.append(module.register_forward_hook(lambda m, a, out: changed(out)))
            return
        block = hf.model.layers[site.layer]
        if site.tap == "resid_post":
            self.handles.append(block.register_forward_hook(_output(changed)))
            return
        # The middle of a block is no module's output: what came in plus what attention adds.
        self.handles.append(
            block.register_forward_pre_hook(
                lambda m, args: self.entered.__setitem__(site.layer, args[0])
            )
        )

        def middle(h: torch.Tensor) -> torch.Tensor:
            base = self.entered[site.layer]
            return changed(h + base) - base

        self.handles.append(block.self_attn.register_forward_hook(_output(middle)))

    def __enter__(self) -> Hooked:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _output(changed: Change) -> Callable[..., Any]:
    def hook(_module: Any, _args: Any, out: Any) -> Any:
        return (changed(out[0]), *out[1:]) if isinstance(out, tuple) else changed(out)

    return hook
