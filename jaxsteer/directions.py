"""Directions in the residual stream: difference of means, saved with where they came from.

A direction is float32 [n_layers, d_model], one vector per block at `resid_post`, natural norm
kept. For a trait it is mean(positive) - mean(negative) over the same questions (persona vectors,
Chen et al. 2025, section 2.2); for refusal mean(harmful) - mean(harmless) (Arditi et al. 2024,
section 2.3). Sums run in float64.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxsteer import activations, rows
from jaxsteer.activations import Position
from jaxsteer.chatmodel import ChatModel
from jaxsteer.data import Trait
from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path, canonical_json, sha256_bytes
from jaxsteer.generate import Decoding, Sampling
from jaxsteer.interventions import Layers, compile_conditions
from jaxsteer.prefix import shared_length, shared_lengths

FORMAT = "jaxsteer-directions-1"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """One direction and its provenance.

    Attributes:
      name: how studies and the command line call it.
      vectors: float32, one vector per block, natural norm.
      provenance: JSON-able record: kind, tap, position, model hash, prompt hashes, counts.
    """

    name: str
    vectors: Layers
    provenance: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Identity of the vectors (shape and little-endian float32 bytes)."""
        return sha256_bytes(str(self.vectors.shape).encode() + self.vectors.astype("<f4").tobytes())

    def unit(self) -> Layers:
        """Unit vectors per layer, float32; a zero vector stays zero."""
        norms = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        return np.divide(self.vectors, norms, out=np.zeros_like(self.vectors), where=norms > 0)


class Mean:
    """A streamed mean in float64: add rows in any order, memory of one row."""

    def __init__(self) -> None:
        self.total: np.ndarray | None = None
        self.count = 0

    def add(self, value: np.ndarray) -> None:
        """Take one sample in."""
        wide = np.asarray(value, np.float64)
        self.total = wide.copy() if self.total is None else self.total + wide
        self.count += 1

    def value(self) -> np.ndarray:
        """The mean of what was added; at least one sample must have been."""
        assert self.total is not None
        return self.total / self.count


def mean_activations(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    asked: Sequence[Position],
    shared: Sequence[int] | None = None,
) -> tuple[Float[np.ndarray, "position n_layers d_model"], Float[np.ndarray, "position n_layers"]]:
    """Mean `resid_post` over rows at each asked position, and the mean of its norm; float64.

    `shared` is how many leading tokens of each prompt to run once (see `prefix`).
    """
    mean, norm = Mean(), Mean()
    for _, captured in activations.capture(
        model.definition, model.config, model.params, prompts, responses, asked, shared=shared
    ):
        mean.add(captured)
        norm.add(np.linalg.norm(captured.astype(np.float64), axis=-1))
    return np.swapaxes(mean.value(), 0, 1), np.swapaxes(norm.value(), 0, 1)


def sample_replies(
    model: ChatModel,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    max_new_tokens: int,
    shared: Sequence[int] | None = None,
) -> list[list[int]]:
    """Unsteered replies at temperature 1 and top_p 0.95 (PROTOCOL: the recipe of the study)."""
    plain = compile_conditions(
        [[]], ["all"], n_layers=model.config.n_layers, d_model=model.config.d_model
    )
    shared = [0] * len(prompts) if shared is None else shared
    requests = [
        rows.Request(tokens=p, row_id=i, shared=n)
        for i, (p, n) in enumerate(zip(prompts, shared, strict=True))
    ]
    decoding = Decoding(max_new_tokens=max_new_tokens, eos=model.eos, sample=True)
    replies: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(seed=seed, temperature=1.0, top_p=0.95)
    for batch in rows.run(model, requests, plain, decoding, sampling=sampling):
        for reply in batch:
            replies[reply.index] = [int(t) for t in reply.tokens]
    return replies


def _side(
    model: ChatModel,
    chats: Sequence[tuple[str, str]],
    asked: Sequence[Position],
    *,
    seed: int,
    max_new_tokens: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    prompts = [model.tokenizer.chat(user, system) for system, user in chats]
    shared = shared_lengths(prompts, [system for system, _ in chats])
    responses: list[list[int]] = [[] for _ in prompts]
    if any(position != "prompt_end" for position in asked):
        responses = sample_replies(
            model, prompts, seed=seed, max_new_tokens=max_new_tokens, shared=shared
        )
        kept = [i for i, response in enumerate(responses) if response]
        prompts, responses = [prompts[i] for i in kept], [responses[i] for i in kept]
        shared = [shared[i] for i in kept]
        if not prompts:
            raise UserError("every sampled reply was empty, so response positions have no tokens")
    return *mean_activations(model, prompts, responses, asked, shared), len(prompts)


def extract_trait(
    model: ChatModel,
    trait: Trait,
    asked: Sequence[Position] = ("prompt_end",),
    *,
    seed: int = 0,
    max_new_tokens: int = 64,
) -> dict[Position, Direction]:
    """Model-persona direction of a trait at each asked position.

    Every instruction meets every question once, so both sides see the same questions. At
    `prompt_end` nothing is sampled: the state does not depend on the reply.
    """
    positive, norm, n_positive = _side(
        model,
        [(system, question) for system in trait.positive for question in trait.questions],
        asked,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    negative, _, n_negative = _side(
        model,
        [(system, question) for system in trait.negative for question in trait.questions],
        asked,
        seed=seed + 1,
        max_new_tokens=max_new_tokens,
    )
    return {
        position: _direction(
            model,
            trait.name,
            positive[i] - negative[i],
            kind="trait",
            position=position,
            n_positive=n_positive,
            n_negative=n_negative,
            source_sha256=trait.sha256,
            seed=seed,
            residual_norm=_rounded(norm[i]),
        )
        for i, position in enumerate(asked)
    }


def extract_contrast(
    model: ChatModel,
    name: str,
    kind: str,
    positive: Sequence[str],
    negative: Sequence[str],
    system: str | None,
) -> Direction:
    """mean(positive prompts) - mean(negative prompts) at the last prompt token."""
    chats = [[model.tokenizer.chat(text, system) for text in side] for side in (positive, negative)]
    shared = shared_length(chats[0] + chats[1])
    (one, norm), (two, _) = (
        mean_activations(model, side, [[]] * len(side), ["prompt_end"], [shared] * len(side))
        for side in chats
    )
    return _direction(
        model,
        name,
        one[0] - two[0],
        kind=kind,
        position="prompt_end",
        n_positive=len(positive),
        n_negative=len(negative),
        source_sha256=sha256_bytes(
            canonical_json([list(positive), list(negative), system]).encode()
        ),
        residual_norm=_rounded(norm[0]),
    )


def extract_assistant_axis(
    model: ChatModel,
    default: Sequence[str],
    roles: Sequence[tuple[str, str]],
    questions: Sequence[str],
    position: Position = "response_avg",
    *,
    seed: int = 0,
    max_new_tokens: int = 48,
) -> Direction:
    """Default-assistant axis: mean(default) - mean over roles of each role's mean.

    Roles count equally however many replies each has (assistant axis, Lu et al. 2026). It points
    toward the assistant.
    """

    def mean(systems: Iterable[str], offset: int) -> tuple[np.ndarray, np.ndarray]:
        chats = [(system, question) for system in systems for question in questions]
        value, norm, _ = _side(
            model, chats, [position], seed=seed + offset, max_new_tokens=max_new_tokens
        )
        return value[0], norm[0]

    assistant, norm = mean(default, 0)
    role_means = [mean([instruction], 1 + i)[0] for i, (_, instruction) in enumerate(roles)]
    return _direction(
        model,
        "assistant-axis",
        assistant - np.mean(role_means, axis=0),
        kind="assistant-axis",
        position=position,
        n_positive=len(default) * len(questions),
        n_negative=len(roles) * len(questions),
        source_sha256=sha256_bytes(
            canonical_json([list(default), [list(r) for r in roles], list(questions)]).encode()
        ),
        seed=seed,
        residual_norm=_rounded(norm),
    )


def extract_user_persona(
    model: ChatModel,
    name: str,
    trait: Trait,
    asked: Position = "prompt_end",
    *,
    system: str = "You are a helpful assistant.",
    seed: int = 0,
    max_new_tokens: int = 64,
) -> Direction:
    """How the model reads a *user* who shows the trait (the study's UP, PROTOCOL 1.3).

    The model first speaks under the trait's instructions; what it said then becomes a user's
    message under a generic system prompt, and the states there are contrasted. Empty replies are
    left out, so the two sides may differ in size.
    """

    def side(instructions: Sequence[str], offset: int) -> tuple[np.ndarray, np.ndarray, int]:
        chats = [(i, question) for i in instructions for question in trait.questions]
        prompts = [model.tokenizer.chat(question, i) for i, question in chats]
        replies = sample_replies(model, prompts, seed=seed + offset, max_new_tokens=max_new_tokens)
        said = [text for text in map(model.tokenizer.decode, replies) if text.strip()]
        if not said:
            raise UserError(f"every sampled reply of trait {trait.name} was empty")
        return _side(
            model,
            [(system, text) for text in said],
            [asked],
            seed=seed + 2 + offset,
            max_new_tokens=max_new_tokens,
        )

    positive, norm, n_positive = side(trait.positive, 0)
    negative, _, n_negative = side(trait.negative, 1)
    return _direction(
        model,
        name,
        positive[0] - negative[0],
        kind="user-persona",
        position=asked,
        n_positive=n_positive,
        n_negative=n_negative,
        source_sha256=sha256_bytes(canonical_json([trait.sha256, system]).encode()),
        seed=seed,
        residual_norm=_rounded(norm[0]),
    )


def minus(name: str, first: Direction, second: Direction) -> Direction:
    """first - second, layer by layer; both from the same model."""
    return _derived(name, "minus", first, second, first.vectors - second.vectors)


def without(name: str, first: Direction, second: Direction) -> Direction:
    """`first` with its component along `second` removed at each layer, natural norm kept."""
    unit = second.unit().astype(np.float64)
    along = np.einsum("ld,ld->l", first.vectors.astype(np.float64), unit)
    return _derived(name, "without", first, second, first.vectors - along[:, None] * unit)


def _derived(
    name: str, kind: str, first: Direction, second: Direction, vectors: np.ndarray
) -> Direction:
    kept = ("tap", "model", "weights_sha256", "tokenizer_sha256", "residual_norm")
    provenance = {key: first.provenance[key] for key in kept if key in first.provenance}
    of = {direction.name: direction.sha256 for direction in (first, second)}
    return Direction(
        name=name,
        vectors=vectors.astype(np.float32),
        provenance=provenance | {"kind": kind, "of": of},
    )


def random_like(direction: Direction, seed: int) -> Direction:
    """An isotropic random direction with the same norm as `direction` at every layer."""
    generator = np.random.Generator(np.random.PCG64(seed))
    raw = generator.standard_normal(direction.vectors.shape)
    norms = np.linalg.norm(direction.vectors.astype(np.float64), axis=1, keepdims=True)
    vectors = raw / np.linalg.norm(raw, axis=1, keepdims=True) * norms
    provenance = {
        "kind": "random",
        "tap": "resid_post",
        "seed": seed,
        "norm_of": direction.name,
        "norm_of_sha256": direction.sha256,
        "weights_sha256": direction.provenance["weights_sha256"],
        "residual_norm": direction.provenance.get("residual_norm"),
    }
    return Direction(
        name=f"random-{seed}", vectors=vectors.astype(np.float32), provenance=provenance
    )


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


def _direction(model: ChatModel, name: str, vectors: np.ndarray, **provenance: Any) -> Direction:
    return Direction(
        name=name,
        vectors=vectors.astype(np.float32),
        provenance={
            "tap": "resid_post",
            **provenance,
            "model": model.name,
            "weights_sha256": model.weights_sha256,
            "tokenizer_sha256": model.tokenizer_sha256,
        },
    )


def save(path: Path, directions: Sequence[Direction]) -> None:
    """Write directions to one safetensors file, provenance in its header, atomically."""
    metadata = {
        "format": FORMAT,
        "layers": "tensor row l is resid_post[l], the output of block l counted from 0",
        "provenance": canonical_json({d.name: d.provenance for d in directions}),
    }
    with atomic_path(path) as temporary:
        save_file({d.name: d.vectors for d in directions}, temporary, metadata=metadata)


def load(path: Path) -> dict[str, Direction]:
    """Read a directions file.

    Raises:
      UserError: missing, not safetensors, or without jaxsteer's provenance.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a {FORMAT} file; make one with `jaxsteer extract`")
            provenance = json.loads(metadata["provenance"])
            # keys() is a method of the safetensors handle, which is no mapping.
            names = list(file.keys())
            return {
                name: Direction(
                    name=name, vectors=file.get_tensor(name), provenance=provenance[name]
                )
                for name in names
            }
    except FileNotFoundError:
        raise UserError(f"no directions file {path}; make one with `jaxsteer extract`") from None
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"cannot read directions from {path}: {error}") from error


def check_model(direction: Direction, model: ChatModel, where: str) -> None:
    """Refuse a direction that was extracted from other weights or has another width.

    Raises:
      UserError: naming the direction and both shapes or hashes.
    """
    expected = (model.config.n_layers, model.config.d_model)
    if direction.vectors.shape != expected:
        raise UserError(
            f"{where}: direction {direction.name!r} has shape {direction.vectors.shape}, "
            f"model {model.name} needs {expected}; extract it on this model"
        )
    made_on = direction.provenance.get("weights_sha256")
    if made_on != model.weights_sha256:
        raise UserError(
            f"{where}: direction {direction.name!r} was extracted from other weights "
            f"({str(made_on)[:12]}, this model is {model.weights_sha256[:12]}); extract it again"
        )


def stable_id(*parts: str) -> int:
    """A 32-bit number from text, the same in every run and process."""
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:4], "big")
