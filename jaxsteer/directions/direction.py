"""Directions in the residual stream: difference of means, saved with where they came from.

A direction is float32 [n_layers, d_model], one vector per block at `resid_post`, natural norm
kept. For a trait it is mean(positive) - mean(negative) over the same questions (persona vectors,
Chen et al. 2025, section 2.2); for refusal mean(harmful) - mean(harmless) (Arditi et al. 2024,
section 2.3). Sums run in float64.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxsteer.data.prompts import Trait
from jaxsteer.directions.activations import Position
from jaxsteer.directions.means import SAMPLED, chat_means, group_means, sample_replies
from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path, canonical_json, sha256_bytes
from jaxsteer.generation.prefix import shared_length
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Layers

FORMAT = "jaxsteer-directions-1"
# Names that `--steer NAME@LAYERxSCALE` can hold.
NAME = r"[\w.-]+"


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
    positive, negative = chat_means(
        model,
        [
            [(system, question) for system in side for question in trait.questions]
            for side in (trait.positive, trait.negative)
        ],
        asked,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    return {
        position: _direction(
            model,
            trait.name,
            positive.stream[i] - negative.stream[i],
            kind="trait",
            position=position,
            n_positive=positive.count,
            n_negative=negative.count,
            source_sha256=trait.sha256,
            residual_norm=_rounded(positive.norm[i]),
            **_sampled(position, seed, max_new_tokens),
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
    prompts = [model.tokenizer.chat(text, system) for text in (*positive, *negative)]
    groups = [0] * len(positive) + [1] * len(negative)
    shared = [shared_length(prompts)] * len(prompts)
    one, two = group_means(model, prompts, [[]] * len(prompts), groups, ["prompt_end"], shared)
    return _direction(
        model,
        name,
        one.stream[0] - two.stream[0],
        kind=kind,
        position="prompt_end",
        n_positive=len(positive),
        n_negative=len(negative),
        source_sha256=sha256_bytes(
            canonical_json([list(positive), list(negative), system]).encode()
        ),
        residual_norm=_rounded(one.norm[0]),
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
    assistant, *others = chat_means(
        model,
        [
            [(system, question) for system in systems for question in questions]
            for systems in (default, *([instruction] for _, instruction in roles))
        ],
        [position],
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    return _direction(
        model,
        "assistant-axis",
        assistant.stream[0] - np.mean([role.stream[0] for role in others], axis=0),
        kind="assistant-axis",
        position=position,
        n_positive=assistant.count,
        n_negative=sum(role.count for role in others),
        source_sha256=sha256_bytes(
            canonical_json([list(default), [list(r) for r in roles], list(questions)]).encode()
        ),
        residual_norm=_rounded(assistant.norm[0]),
        **_sampled(position, seed, max_new_tokens),
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

    def said(instructions: Sequence[str]) -> list[tuple[str, str]]:
        prompts = [model.tokenizer.chat(q, i) for i in instructions for q in trait.questions]
        replies = sample_replies(model, prompts, seed=seed, max_new_tokens=max_new_tokens)
        texts = [text for text in map(model.tokenizer.decode, replies) if text.strip()]
        if not texts:
            raise UserError(f"every sampled reply of trait {trait.name} was empty")
        return [(system, text) for text in texts]

    positive, negative = chat_means(
        model,
        [said(trait.positive), said(trait.negative)],
        [asked],
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    return _direction(
        model,
        name,
        positive.stream[0] - negative.stream[0],
        kind="user-persona",
        position=asked,
        n_positive=positive.count,
        n_negative=negative.count,
        source_sha256=sha256_bytes(canonical_json([trait.sha256, system]).encode()),
        seed=seed,
        sampled={**SAMPLED, "max_new_tokens": max_new_tokens},
        residual_norm=_rounded(positive.norm[0]),
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


def _sampled(position: Position, seed: int, max_new_tokens: int) -> dict[str, Any]:
    """What the provenance says of the replies behind a direction."""
    if position == "prompt_end":
        return {}
    return {"seed": seed, "sampled": {**SAMPLED, "max_new_tokens": max_new_tokens}}


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
        try:
            save_file({d.name: d.vectors for d in directions}, temporary, metadata=metadata)
        except SafetensorError as error:
            # Its own errors for the file system's: a full disk, for one.
            raise OSError(0, str(error).rsplit(": ", 1)[-1]) from None


def load(path: Path) -> dict[str, Direction]:
    """Read a directions file.

    Raises:
      UserError: missing, not safetensors, without jaxsteer's provenance, or with a tensor that is
        no float32 [layer, width].
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a {FORMAT} file; make one with `jaxsteer extract`")
            provenance = json.loads(metadata["provenance"])
            # keys() is a method of the safetensors handle, which is no mapping.
            found = {name: file.get_tensor(name) for name in list(file.keys())}
            for name, vectors in found.items():
                if vectors.ndim != 2 or vectors.dtype != np.float32:
                    raise UserError(
                        f"{path}: {name!r} is {vectors.dtype.name} {vectors.shape}, a direction is "
                        "float32 (layers, width); extract it again"
                    )
            return {
                name: Direction(name=name, vectors=vectors, provenance=provenance[name])
                for name, vectors in found.items()
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
