"""The computations of the first notebook: steering in a plane, then one prompt on a real model.

`charts.steering` draws the tables made here. Two units are used:

    natural norms   a projection u.h divided by |d|, u = d/|d|: adding alpha d at a layer raises it
                    by exactly alpha there, at every layer and for every direction
    moved           total variation distance of two next-token distributions, 0 to 1: the share of
                    probability that changed its token
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
from scipy.special import softmax

from jaxsteer.directions import direction as directions
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.extraction import Trait, extract
from jaxsteer.errors import UserError
from jaxsteer.generation import stepwise
from jaxsteer.generation.decode import Decoding
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

# All harmless; under a safety policy SmolLM2 refuses the first for its wording alone.
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
        compiled = compile_conditions([[made[step]]], ["all"], n_layers=1, d_model=2)
        site = stepwise.only(compiled, 0).sites["resid_post"].at(0)
        after, _ = apply(jnp.asarray(states[-1]), site, jnp.array([True]))
        states.append(np.asarray(after))
    return np.concatenate(states)


def norm(vector: Sequence[float] | np.ndarray) -> float:
    """The Euclidean norm."""
    return float(np.linalg.norm(np.asarray(vector, np.float64)))


def projections_2d(d: Sequence[float], states: Sequence[np.ndarray] | np.ndarray) -> list[float]:
    """Projections u.h of each state onto d's unit vector; zero when d is."""
    unit = np.asarray(d, np.float64) / max(norm(d), 1e-30)
    return [float(unit @ np.asarray(state, np.float64)) for state in states]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteerableModel:
    """A model and its directions, steered on one prompt at a time.

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
          UserError: an operation that does not fit this model.
        """
        # Compiled beside a condition with one operation of each kind: a kind that is not asked for
        # is then an array of zeros and not absent, so another kind compiles no new program.
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
        """One operation from the values of the notebook's controls.

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
        """Read a prompt under the operations: its logits, projections and the start of a reply."""
        return stepwise.read(
            self.model,
            prompt,
            self.interventions(operations),
            Decoding(max_new_tokens=ROOM, eos=self.model.eos),
            probes=self.probes,
            width=WIDTH,
        )

    def replies(self, reading: Reading) -> Iterator[str]:
        """Yield the reply's text, empty and after each token: greedy, at most `ROOM` tokens."""
        tokens: list[int] = []
        yield ""
        for token in stepwise.reply(self.model, reading):
            tokens += token.tokens
            yield self.model.tokenizer.decode(tokens)


def load(model: ChatModel, path: Path, extracted: Path) -> SteerableModel:
    """A model with the directions of a results folder, or with directions extracted now.

    Args:
      model: the loaded model.
      path: a directions file, such as a study leaves in its results folder.
      extracted: where directions are saved that are extracted because `path` does not exist; read
        the next time.

    Raises:
      UserError: directions of another model.
    """
    if not path.is_file() and not extracted.is_file():
        persona = extract(model, "persona", Trait(trait="compliant"))
        directions.save(extracted, [persona, directions.random_like(persona, 1)])
    source = path if path.is_file() else extracted
    found = directions.load(source)
    for direction in found.values():
        directions.check_model(direction, model, str(source))
    if not found:
        raise UserError(f"{source} holds no direction; make one with `jaxsteer extract`")
    watched = [name for name in ("persona", "refusal") if name in found] or list(found)[:2]
    return SteerableModel(model=model, directions=found, watched=tuple(watched))


def probabilities(logits: Float[np.ndarray, " vocab"]) -> Float[np.ndarray, " vocab"]:
    """Softmax in float64."""
    return np.asarray(softmax(np.asarray(logits, np.float64)))


def moved(one: Float[np.ndarray, " vocab"], other: Float[np.ndarray, " vocab"]) -> float:
    """Total variation distance of the next-token distributions of two logit vectors, 0 to 1."""
    return float(np.abs(probabilities(one) - probabilities(other)).sum() / 2)


def next_tokens(
    model: ChatModel, baseline: Reading, steered: Reading, *, top: int = 8
) -> pl.DataFrame:
    """The most likely next tokens of two readings.

    Returns:
      `token` (id), `text`, `baseline` and `steered` (probabilities), sorted by the larger of both.
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
    steerable: SteerableModel, prompt: Sequence[int], baseline: Reading, steered: Reading
) -> pl.DataFrame:
    """Projections of every prompt token at every layer, before and after, in natural norms.

    Returns:
      `direction`, `layer`, `position` (0 is the first token), `text` (of the token), `baseline`,
      `steered`, `change`.
    """
    norms = steerable.norms[:, None, :]
    scale = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    before, after = baseline.projections * scale, steered.projections * scale
    layer, position, probe = (i.ravel() for i in np.indices(before.shape))
    texts = [steerable.model.tokenizer.hf.decode([int(t)]) for t in prompt]
    return pl.DataFrame(
        {
            "direction": [steerable.watched[i] for i in probe],
            "layer": layer,
            "position": position,
            "text": [texts[i] for i in position],
            "baseline": before.ravel().astype(np.float64),
            "steered": after.ravel().astype(np.float64),
            "change": (after - before).ravel().astype(np.float64),
        }
    )


def survival(
    steerable: SteerableModel, prompt: Sequence[int], name: str, layer: int, strength: float
) -> pl.DataFrame:
    """How much of an addition remains when its direction is projected out some layers later.

    At each distance k from 0 to 4, and then to the last layer in steps of 4, the direction of
    `layer` is projected out at layer + k, with and without having been added at `layer`. What moves
    between the two is the effect of the addition. At k = 0 it is nothing, by algebra:
    (I - uu')(h + a u) = (I - uu') h.

    Returns:
      `later` (k), `layer` (where it is projected out), `moved` (next-token probability moved by the
      addition despite the projection), `alone` (moved by the addition without any projection).
    """
    vectors = steerable.directions[name].vectors
    added = Add(direction=vectors, layers=(layer,), scale=strength)

    def effect(*others: Operation) -> float:
        without, with_it = (
            steerable.read(prompt, operations).logits for operations in (others, (added, *others))
        )
        return moved(without, with_it)

    reach = steerable.model.config.n_layers - layer
    distances = [k for k in range(reach) if k <= 4 or k % 4 == 0]
    return pl.DataFrame(
        {
            "later": distances,
            "layer": [layer + k for k in distances],
            "moved": [
                effect(Project(directions=(vectors,), layers=(layer + k,), measured_at=layer))
                for k in distances
            ],
            "alone": [effect()] * len(distances),
        }
    )
