"""The computations of the first notebook: steering in a plane, then on a real model, one prompt.

What the notebook shows is computed here and drawn by `jaxsteer.charts`. Two units are used:

    natural norms   a projection u.h divided by |d|, u = d/|d|: adding alpha d at a layer raises it
                    by exactly alpha there, at every layer and for every direction
    moved           total variation distance of two next-token distributions: the share of
                    probability that is elsewhere, 0 to 1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Float

from jaxsteer.data import prompts
from jaxsteer.directions import activations
from jaxsteer.directions import direction as directions
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.generation import padding, stepwise
from jaxsteer.generation.stepwise import Reading
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import (
    Add,
    Cap,
    Interventions,
    Layers,
    Operation,
    Project,
    apply,
    compile_conditions,
)

Step = Literal["add", "project", "cap"]
ROOM = 24  # tokens of a shown reply
WIDTH = 96  # prompts up to this many tokens share one compiled program

# Harmless, all of them; the first is one that a policy makes SmolLM2 refuse on its wording alone.
EXAMPLES = (
    "How can I steal the show at a party?",
    "Who are you?",
    "What is the best way to shoot a portrait?",
    "How do I get rid of weeds?",
)


def steer_2d(
    h: Sequence[float],
    d: Sequence[float],
    steps: Sequence[Step],
    *,
    strength: float = 1.0,
    high: float = 1.0,
) -> Float[np.ndarray, "state 2"]:
    """Steer one two-dimensional state with the library's own operations.

    Args:
      h: the state.
      d: the direction, natural norm; zero changes nothing.
      steps: applied one after another.
      strength: multiples of d that `add` adds.
      high: `cap` clamps the projection onto d/|d| into [-high, high].

    Returns:
      h, then the state after each step; float32.
    """
    direction = np.asarray([d], np.float32)
    made: dict[Step, Operation] = {
        "add": Add(direction=direction, layers=(0,), scale=strength),
        "project": Project(directions=(direction,), layers=(0,)),
        "cap": Cap(direction=direction, layers=(0,), low=-high, high=high),
    }
    states = [np.asarray([h], np.float32)]
    for step in steps:
        if step == "cap" and not direction.any():
            # A zero vector has no direction to cap; added or removed it changes nothing anyway.
            states.append(states[-1])
            continue
        compiled = compile_conditions([[made[step]]], ["all"], n_layers=1, d_model=2)
        site = stepwise.only(compiled, 0).sites["resid_post"].at(0)
        after, _ = apply(jnp.asarray(states[-1]), site, jnp.array([True]))
        states.append(np.asarray(after))
    return np.concatenate(states)


def length(vector: Sequence[float] | np.ndarray) -> float:
    """The Euclidean norm."""
    return float(np.linalg.norm(np.asarray(vector, np.float64)))


def shadows(d: Sequence[float], states: Sequence[np.ndarray] | np.ndarray) -> list[float]:
    """Projections u.h of each state onto d's unit vector; zero when d is."""
    wide = np.asarray(d, np.float64)
    unit = wide / max(length(wide), 1e-30)
    return [float(unit @ np.asarray(state, np.float64)) for state in states]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """A model and its directions, ready to be steered by hand.

    Attributes:
      model: the loaded model.
      directions: by name.
      watched: names of the directions whose projections are shown, in this order.
    """

    model: ChatModel
    directions: dict[str, Direction]
    watched: tuple[str, ...]

    @property
    def probes(self) -> Float[np.ndarray, "layer probe d_model"]:
        """The watched directions as unit vectors."""
        return np.stack([self.directions[name].unit() for name in self.watched], axis=1)

    @property
    def norms(self) -> Float[np.ndarray, "layer probe"]:
        """Natural norms of the watched directions, float32."""
        vectors = np.stack([self.directions[name].vectors for name in self.watched], axis=1)
        return np.linalg.norm(vectors, axis=-1)

    def interventions(self, operations: Sequence[Operation]) -> Interventions:
        """The operations as one row's arrays, whose shapes do not depend on the operations.

        Raises:
          UserError: an operation this model cannot take.
        """
        # A neighbour with one of each kind: kinds that are not asked for are then arrays of zeros
        # rather than absent, and a change of kind compiles nothing either.
        some: Layers = next(iter(self.directions.values())).vectors
        each: list[Operation] = [
            Add(direction=some, layers=(0,), scale=0.0),
            Project(directions=(some,), layers=(0,)),
            Cap(direction=some, layers=(0,)),
        ]
        compiled = compile_conditions(
            [operations, each],
            ["all", "all"],
            n_layers=self.model.config.n_layers,
            d_model=self.model.config.d_model,
        )
        return stepwise.only(compiled, 0)

    def operation(self, kind: Step, name: str, layer: int, strength: float) -> list[Operation]:
        """One operation as the notebook's controls say it.

        `strength` is in natural norms: what `add` adds, and the bound beyond which `cap` clamps
        the projection, on both sides; `project` has none.
        """
        vectors = self.directions[name].vectors
        if kind == "add":
            return [Add(direction=vectors, layers=(layer,), scale=strength)]
        if kind == "project":
            return [Project(directions=(vectors,), layers=(layer,))]
        bound = abs(strength) * float(np.linalg.norm(vectors[layer]))
        return [Cap(direction=vectors, layers=(layer,), low=-bound, high=bound)]

    def read(self, prompt: Sequence[int], operations: Sequence[Operation]) -> Reading:
        """Read a prompt under the operations: logits, projections, and where the reply starts."""
        return stepwise.read(
            self.model,
            prompt,
            self.interventions(operations),
            self.probes,
            room=ROOM,
            width=WIDTH,
        )

    def replies(self, reading: Reading, operations: Sequence[Operation]) -> Iterator[str]:
        """Yield the reply's text so far, and at last the whole; greedy, at most `ROOM` tokens."""
        tokens: list[int] = []
        interventions = self.interventions(operations)
        for chunk in stepwise.reply(
            self.model, reading, interventions, self.probes, room=ROOM, chunk=4
        ):
            tokens += chunk.tokens
            yield self.model.tokenizer.decode(tokens)


def open_bench(model: ChatModel, path: Path, kept: Path) -> Bench:
    """Directions of a results directory, or extracted on the spot where there are none.

    Args:
      model: the loaded model.
      path: a directions file, such as a study leaves in its results directory.
      kept: where directions extracted here are saved, and found the next time.

    Raises:
      UserError: directions of another model.
    """
    if not path.is_file() and not kept.is_file():
        trait = directions.extract_trait(model, prompts.trait("compliant"))["prompt_end"]
        persona = dataclasses.replace(trait, name="persona")
        directions.save(kept, [persona, directions.random_like(persona, 1)])
    source = path if path.is_file() else kept
    found = directions.load(source)
    for direction in found.values():
        directions.check_model(direction, model, str(source))
    if not found:
        raise UserError(f"{source} holds no direction; make one with `jaxsteer extract`")
    watched = [name for name in ("persona", "refusal") if name in found] or list(found)[:2]
    return Bench(model=model, directions=found, watched=tuple(watched))


def probabilities(logits: Float[np.ndarray, "*lead vocab"]) -> Float[np.ndarray, "*lead vocab"]:
    """Softmax in float64."""
    wide = np.asarray(logits, np.float64)
    mass = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return mass / mass.sum(axis=-1, keepdims=True)


def moved(one: Float[np.ndarray, " vocab"], other: Float[np.ndarray, " vocab"]) -> float:
    """Total variation distance of the next-token distributions of two logit vectors, 0 to 1."""
    return float(np.abs(probabilities(one) - probabilities(other)).sum() / 2)


def next_tokens(
    model: ChatModel, baseline: Reading, steered: Reading, *, top: int = 8
) -> pl.DataFrame:
    """Tokens that either reading finds likeliest.

    Returns:
      `token` (id), `text`, `baseline`, `steered` (probabilities), the largest of the two first.
    """
    before, after = probabilities(baseline.logits), probabilities(steered.logits)
    order = np.argsort(-np.maximum(before, after), kind="stable")[:top]
    return pl.DataFrame(
        {
            "token": [int(t) for t in order],
            "text": [model.tokenizer.decode([int(t)]) for t in order],
            "baseline": before[order],
            "steered": after[order],
        }
    )


def projections(
    bench: Bench, prompt: Sequence[int], baseline: Reading, steered: Reading
) -> pl.DataFrame:
    """Projections of every prompt token at every layer, before and after, in natural norms.

    Returns:
      `direction`, `layer`, `position` (0 is the first token), `text` (of the token), `baseline`,
      `steered`, `change`.
    """
    norms = bench.norms[:, None, :]
    scale = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    before, after = baseline.projections * scale, steered.projections * scale
    layers, tokens, probes = before.shape
    layer, position, probe = (i.ravel() for i in np.indices(before.shape))
    texts = np.array([bench.model.tokenizer.hf.decode([int(t)]) for t in prompt], dtype=object)
    assert (layers, tokens, probes) == (len(norms), len(prompt), len(bench.watched))
    return pl.DataFrame(
        {
            "direction": [bench.watched[i] for i in probe],
            "layer": layer,
            "position": position,
            "text": [str(texts[i]) for i in position],
            "baseline": before.ravel().astype(np.float64),
            "steered": after.ravel().astype(np.float64),
            "change": (after - before).ravel().astype(np.float64),
        }
    )


def survival(
    bench: Bench, prompt: Sequence[int], name: str, layer: int, strength: float
) -> pl.DataFrame:
    """How much of an addition a projection some layers later leaves.

    At each distance k from 0 to 4, and then to the last layer in steps of 4, two conditions are
    read: the direction of `layer` projected out at layer + k, with and without having been added
    at `layer`. What moves between them is the addition's doing. At k = 0 it is nothing, by algebra:
    (I - uu')(h + a u) = (I - uu') h. One compiled program reads all conditions.

    Returns:
      `later` (k), `layer` (where it is projected out), `moved` (next-token probability moved by the
      addition despite the projection), `alone` (moved by the addition without any projection).
    """
    config, vectors = bench.model.config, bench.directions[name].vectors
    reach = config.n_layers - layer
    distances = [k for k in range(reach) if k <= 4 or k % 4 == 0]
    added = Add(direction=vectors, layers=(layer,), scale=strength)
    conditions: list[list[Operation]] = [[], [added]]
    for k in distances:
        out = Project(directions=(vectors,), layers=(layer + k,), measured_at=layer)
        conditions += [[out], [added, out]]
    logits = _last_logits(bench.model, prompt, conditions)
    return pl.DataFrame(
        {
            "later": distances,
            "layer": [layer + k for k in distances],
            "moved": [moved(logits[2 + 2 * i], logits[3 + 2 * i]) for i in range(len(distances))],
            "alone": [moved(logits[0], logits[1])] * len(distances),
        }
    )


def _last_logits(
    model: ChatModel, prompt: Sequence[int], conditions: Sequence[Sequence[Operation]]
) -> np.ndarray:
    """Next-token logits of one prompt under each condition, in batches of one fixed size."""
    size = 8
    compiled = compile_conditions(
        conditions,
        ["all"] * len(conditions),
        n_layers=model.config.n_layers,
        d_model=model.config.d_model,
    )
    width = padding.bucket(max(len(prompt), WIDTH), model.config.max_position)
    tokens, real = padding.left_pad([list(prompt)] * size, width)
    nothing = np.zeros((size, 0, width), np.float32)
    found = []
    for start in range(0, len(conditions), size):
        members = np.minimum(np.arange(start, start + size), len(conditions) - 1)
        rows = compiled.rows(members)
        _, logits = activations.read(
            model.definition, model.params, tokens, real, nothing, (), rows
        )
        found.append(np.asarray(logits[:, 0]))
    return np.concatenate(found)[: len(conditions)]
