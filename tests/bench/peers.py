"""The other libraries, each behind one method: rows in, token ids out.

None of them mixes conditions in a batch: hooks and traces belong to a whole forward pass, so each
batch holds one condition's rows. That is their cost model, and not a choice made here.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.bench import hooks
from tests.bench.job import Job


class Hf:
    """HF transformers: `generate` with forward hooks, cache on, greedy."""

    packages = ("torch", "transformers")

    def __init__(self, job: Job, folder: Path):
        self.job = job
        self.model = _load(folder)

    def run(
        self, rows: Sequence[int], batch: int, new_tokens: int | None = None
    ) -> list[list[int]]:
        """Reply tokens of each row, in the order given; no more than `new_tokens`, if given."""
        count = new_tokens or self.job.max_new_tokens
        replies: dict[int, list[int]] = {}
        for members in self.job.batches(rows, batch):
            out = self._generate(self.job.condition[members[0]], members, count)
            replies |= zip(members, _replies(out, self.job.eos), strict=True)
        return [replies[row] for row in rows]

    def _generate(self, condition: int, members: Sequence[int], count: int) -> torch.Tensor:
        ids, mask = _padded([self.job.tokens[row] for row in members])
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        with hooks.Hooked(self.model, self.job.conditions[condition]):
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=self.job.eos,
                pad_token_id=self.job.eos[0],
            )
        return out[:, ids.shape[1] :]

    def long(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The reply to one long prompt that nothing steers."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        settings = {"min_new_tokens": new_tokens, "pad_token_id": self.job.eos[0]}
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            **settings,
        )
        return out[0, ids.shape[1] :].tolist()


class Lens(Hf):
    """TransformerLens: its bridge over the same HF model, hooks by name."""

    packages = ("torch", "transformers", "transformer-lens")

    def __init__(self, job: Job, folder: Path):
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoTokenizer

        self.job = job
        # It forces eager attention on what it loads, so that its hooks can see the scores.
        hf = _load(folder, attn_implementation="eager")
        self.bridge = TransformerBridge.boot_transformers(
            str(folder),
            hf_model=hf,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            device="cpu",
            dtype=torch.float32,
        )
        # The names that HookedTransformer had, `resid_mid` among them; weights stay as they are.
        self.bridge.enable_compatibility_mode(no_processing=True)

    def _generate(self, condition: int, members: Sequence[int], count: int) -> torch.Tensor:
        ids, mask = _padded([self.job.tokens[row] for row in members])
        named = [(_lens_name(s), _lens_hook(s)) for s in self.job.conditions[condition]]
        with self.bridge.hooks(fwd_hooks=named):
            out = self.bridge.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=self.job.eos[0],
                return_type="tokens",
                verbose=False,
            )
        return out[:, ids.shape[1] :]


def _lens_name(site: Any) -> str:
    return "hook_embed" if site.tap == "embed" else f"blocks.{site.layer}.hook_{site.tap}"


def _lens_hook(site: Any) -> Any:
    changed = hooks.change(site)
    return lambda h, hook: changed(h)


class Nnsight(Hf):
    """nnsight: a generation trace that sets the sites' values at every step."""

    packages = ("torch", "transformers", "nnsight")

    def __init__(self, job: Job, folder: Path):
        from nnsight import TransformersModel
        from transformers import AutoTokenizer

        self.job = job
        self.model = TransformersModel(
            _load(folder), tokenizer=AutoTokenizer.from_pretrained(folder), task="text-generation"
        )

    def _generate(self, condition: int, members: Sequence[int], count: int) -> torch.Tensor:
        ids, mask = _padded([self.job.tokens[row] for row in members])
        steps = [(site, hooks.change(site)) for site in self.job.conditions[condition]]
        model = self.model
        settings = {
            "max_new_tokens": count,
            "do_sample": False,
            "eos_token_id": self.job.eos,
            "pad_token_id": self.job.eos[0],
        }
        with model.generate(**settings) as tracer:
            with tracer.invoke({"input_ids": ids, "attention_mask": mask}):
                # Open-ended, the loop ends where its body waits for a step that never comes: a
                # body that waits for nothing would never end.
                for _step in tracer.iter[:] if steps else ():
                    for site, changed in steps:
                        if site.tap == "embed":
                            model.model.embed_tokens.output = changed(
                                model.model.embed_tokens.output
                            )
                        elif site.tap == "resid_post":
                            block = model.model.layers[site.layer]
                            block.output = changed(block.output)
                        else:
                            block = model.model.layers[site.layer]
                            base = block.input
                            mixed = block.self_attn.output
                            new = changed(mixed[0] + base) - base
                            block.self_attn.output = (new, *mixed[1:])
            with tracer.invoke():
                out = tracer.result.save()
        return out[:, ids.shape[1] :]


PEERS: dict[str, type[Hf]] = {"hf": Hf, "lens": Lens, "nnsight": Nnsight}


def versions(name: str) -> dict[str, str]:
    """The packages a peer stands on."""
    return {package: importlib.metadata.version(package) for package in PEERS[name].packages}


def _load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    # On a GPU in bfloat16, as jaxsteer runs there. The CPU's parts hide a GPU from this process.
    gpu = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return hf.to(device).eval()


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = [[0] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _replies(out: torch.Tensor, eos: Sequence[int]) -> list[list[int]]:
    return [r[: next((i for i, t in enumerate(r) if t in eos), len(r))] for r in out.tolist()]
