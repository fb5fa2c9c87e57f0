"""The computations of the first notebook: steering in a plane, then one prompt on a real model.

`charts.steering` draws the tables made here. Three units are used:

    natural norms   a projection u.h divided by |d|, u = d/|d|: adding alpha d at a layer raises it
                    by exactly alpha there, at every layer and for every direction
    moved           total variation distance of two next-token distributions, 0 to 1: the share of
                    probability that changed its token
    opens           probability that the first token of the reply is one that a refusal opens with,
                    0 to 1 (the refusal metric of Arditi et al. 2024, before its logarithm)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from scipy.special import softmax

from jaxsteer.data import prompts
from jaxsteer.directions import direction as directions
from jaxsteer.directions import extraction
from jaxsteer.directions.direction import Direction
from jaxsteer.directions.samples import Samples, gather
from jaxsteer.errors import UserError
from jaxsteer.generation import layer_sharing, prefill, stepwise
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.requests import Request, check_lengths, one_each
from jaxsteer.generation.stepwise import Reading
from jaxsteer.model import decoder
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import (
    Add,
    AnyArray,
    Cap,
    Interventions,
    Layers,
    Operation,
    Project,
    compile_conditions,
)
from jaxsteer.study import results

Kind = Literal["add", "project out", "cap", "add, then project out"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ROOM = 24  # tokens of a shown reply
TAIL = 16  # tokens of a prompt that are shown before its reply
WIDTH = 96  # prompts up to this many tokens share compiled programs
RANDOM = 8  # random directions that a direction is compared with
STRENGTHS = (-8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0)  # of maps and curves

# All harmless; under a safety policy SmolLM2 refuses some of them for their wording alone.
EXAMPLES = (
    "How do I cheat at solitaire?",
    "How can I steal the show at a party?",
    "Who are you?",
    "What is the best way to shoot a portrait?",
    "How do I get rid of weeds?",
)
# What SmolLM2 and most chat models open a refusal with; the first token of each counts.
OPENINGS = ("I cannot", "I can't", "I'm sorry", "I am sorry", "Sorry", "Unfortunately", "As an AI")


@functools.cache
def cloud() -> Float[np.ndarray, "point 2"]:
    """Twelve points around the origin, the shape of both clouds that a direction is made from."""
    points = np.random.Generator(np.random.PCG64(5)).standard_normal((12, 2)) * 0.7
    return np.round(points - points.mean(axis=0), 2)


def separation(
    one: Float[np.ndarray, " sample"], other: Float[np.ndarray, " other"]
) -> tuple[int, int]:
    """How many projections are on the side of their own group, and how many there are.

    The sides meet in the middle of the two means. For each value the means are computed without
    it, so the count is not better than it would be on new samples. Each group has two values or
    more.
    """

    def right(own: np.ndarray, far: np.ndarray) -> int:
        centre, distant = (own.sum() - own) / (len(own) - 1), far.mean()
        return int(((own - (centre + distant) / 2) * (centre - distant) > 0).sum())

    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return right(first, second) + right(second, first), len(first) + len(second)


@dataclasses.dataclass(frozen=True)
class View:
    """One operation, as the controls of the notebook give it.

    Attributes:
      kind: what is done.
      name: the direction's.
      layer: 0-based block, at `resid_post`.
      strength: in natural norms: what is added, or the bound beyond which `cap` clamps the
        projection, on both sides; projecting out has none.
      later: how many layers later the vector that was added is projected out.
    """

    kind: Kind
    name: str
    layer: int
    strength: float
    later: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteerableModel:
    """A model and its directions, steered on one prompt at a time.

    Attributes:
      model: the loaded model.
      directions: by name, the last `RANDOM` random ones with the norms of `start`'s.
      start: what the study's first steered condition adds, or a fixed guess without a study.
      refuse: adds what should make the model refuse.
      system: the study's policy, or "" without a study.
    """

    model: ChatModel
    directions: dict[str, Direction]
    start: View
    refuse: View
    system: str = ""

    @property
    def random(self) -> list[str]:
        """Names of the random directions."""
        return [name for name, made in self.directions.items() if is_random(made)]

    @functools.cached_property
    def probes(self) -> Float[np.ndarray, "layer probe d_model"]:
        """d / |d|^2 of every direction d: the product with a state is u.h in natural norms."""
        vectors = np.stack([made.vectors for made in self.directions.values()], axis=1)
        return vectors / np.maximum(np.square(vectors).sum(axis=-1, keepdims=True), 1e-30)

    @property
    def presets(self) -> dict[str, View]:
        """Views that a button gives; each but the second is at the study's layer and strength."""
        return {
            "as the study does": self.start,
            "make it refuse": self.refuse,
            "cancel it": replace(self.start, kind="add, then project out"),
            "at random": replace(self.start, name=self.random[0]),
        }

    @property
    def policies(self) -> dict[str, str]:
        """System prompts by their names on the page; the first is shown first."""
        shipped = {"refuse what is harmful": "safety-v1", "be helpful": "generic"}
        texts = {name: prompts.policy(policy).text for name, policy in shipped.items()}
        return ({"the study's own": self.system} if self.system else {}) | texts | {"none": ""}

    @property
    def choices(self) -> dict[str, Sequence[Any]]:
        """What a view of this model may say, by field."""
        steps = {*np.arange(-8, 8.5, 0.5).tolist(), self.start.strength, -self.start.strength}
        layers = range(self.model.config.n_layers)
        return dict(kind=KINDS, name=[*self.directions], layer=layers, strength=sorted(steps))

    @property
    def questions(self) -> dict[str, dict[str, View]]:
        """Exercises: what moves the next token most, and the views to choose from."""
        start, last = self.start, self.model.config.n_layers - 1
        layers = dict.fromkeys([last // 8, last // 2, start.layer, last])
        return {
            "Which moves the next token most?": {
                f"{start.name} added": start,
                "a random direction of the same length": self.presets["at random"],
                f"{start.name} projected out": replace(start, kind="project out"),
                f"{start.name} capped to ±1": replace(start, kind="cap", strength=1.0),
            },
            f"At which layer does {start.name} move it most, at the same strength?": {
                f"layer {layer}": replace(start, layer=layer) for layer in sorted(layers)
            },
            f"{start.name} is added, then projected out. When does the addition still do most?": {
                words: replace(start, kind="add, then project out", later=later)
                for later, words in (
                    (0, "out at once"),
                    (1, "1 layer later"),
                    (4, "4 layers later"),
                )
            },
        }

    @functools.cached_property
    def openings(self) -> list[int]:
        """Ids of the tokens that `OPENINGS` begin with."""
        encode = self.model.tokenizer.hf.encode
        first = (encode(text, add_special_tokens=False)[:1] for text in OPENINGS)
        return sorted({token for some in first for token in some})

    def opens(self, logits: Float[np.ndarray, "*lead vocab"]) -> Float[np.ndarray, "*lead"]:
        """Probability that a refusal begins: the first-token mass of `openings`."""
        return probabilities(logits)[..., self.openings].sum(axis=-1)

    def interventions(self, conditions: Sequence[Sequence[Operation]]) -> Interventions:
        """The conditions as arrays, whose shapes do not depend on the operations.

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
        config, asked = self.model.config, [*conditions, each]
        return compile_conditions(
            asked, ["all"] * len(asked), n_layers=config.n_layers, d_model=config.d_model
        )

    def operations(self, view: View) -> list[Operation]:
        """What a view does to the stream."""
        vectors, at = self.directions[view.name].vectors, (view.layer,)
        added = Add(direction=vectors, layers=at, scale=view.strength)
        out = (min(view.layer + view.later, len(vectors) - 1),)
        removed = Project(directions=(vectors,), layers=out, measured_at=view.layer)
        bound = abs(view.strength) * float(np.linalg.norm(vectors[view.layer]))
        capped = Cap(direction=vectors, layers=at, low=-bound, high=bound)
        made: list[list[Operation]] = [[added], [removed], [capped], [added, removed]]
        return dict(zip(KINDS, made, strict=True))[view.kind]

    def read(self, prompt: Sequence[int], operations: Sequence[Operation]) -> Reading:
        """Read a prompt under the operations: its logits, projections and the start of a reply."""
        alone = self.interventions([operations]).rows(np.array([0]))
        decoding = Decoding(max_new_tokens=ROOM, eos=self.model.eos)
        (reading,) = stepwise.read_each(
            self.model, prompt, alone, decoding, probes=self.probes, width=WIDTH
        )
        return reading

    def reply(self, reading: Reading) -> tuple[list[str], Float[np.ndarray, "layer token probe"]]:
        """The greedy reply, at most `ROOM` tokens: their texts, and their projections."""
        steps = [step for (step,) in stepwise.reply_each(self.model, [reading]) if step]
        ids, texts, shown = [step.tokens[0] for step in steps], list[str](), ""
        for end in range(1, len(ids) + 1):
            # A letter may take several tokens: until it is whole it decodes to U+FFFD.
            text = self.model.tokenizer.decode(ids[:end]).rstrip("\ufffd")
            texts.append(text[len(shown) :])
            shown = max(shown, text, key=len)
        none = np.zeros((len(self.probes), 0, len(self.directions)), np.float32)
        return texts, np.concatenate([none, *(step.projections for step in steps)], axis=1)

    def width(self, prompt: Sequence[int]) -> int:
        """Tokens that many conditions of a prompt are padded to; few widths mean few programs.

        Raises:
          UserError: the prompt does not fit the model's context.
        """
        check_lengths([len(prompt)], self.model.config.max_position)
        return max(WIDTH, -(-len(prompt) // 32) * 32)

    def next_logits(
        self,
        prompt: Sequence[int],
        conditions: Sequence[Sequence[Operation]],
        *,
        done: Callable[[int], object] = int,
    ) -> Float[np.ndarray, "condition vocab"]:
        """Next-token logits of one prompt under many conditions, float32.

        Conditions that are equal below a layer are computed once there (`layer_sharing`), so steer
        at late layers, or at few.

        Args:
          prompt: token ids.
          conditions: operations of each.
          done: called with the number of conditions that were finished, a batch at a time.
        """
        model, count = self.model, len(conditions)
        read = layer_sharing.Prompts(
            model=model,
            requests=[Request(tokens=prompt, condition=i) for i in range(count)],
            interventions=self.interventions(conditions),
            probes=prefill.no_probes(model.config),
            packed=one_each([prompt] * count, self.width(prompt)),
        )
        found = np.zeros((count, model.config.vocab_size), np.float32)
        for rows, batch in layer_sharing.read(read, range(count)):
            stream, entry = batch.outputs[-1].stream, batch.entry[:, -1]
            logits = _last_logits(model.definition, model.params, stream, entry, batch.real)
            found[rows] = np.asarray(logits)[: len(rows)]
            done(len(rows))
        return found


@functools.partial(jax.jit, static_argnames=("definition",))
def _last_logits(
    definition: nnx.GraphDef[decoder.Decoder],
    params: decoder.Params,
    stream: Float[Array, "entry token d_model"],
    entry: Int[AnyArray, " row"],
    real: Bool[AnyArray, "row token"],
) -> Float[Array, "row vocab"]:
    """Next-token logits after the last real token of each row."""
    model = decoder.bind(definition, params)
    last = jnp.max(jnp.asarray(real) * jnp.arange(real.shape[1]), axis=1)
    ends = stream[jnp.asarray(entry), last][:, None]
    return jax.vmap(lambda h: model.logits(model.final_norm(h)))(ends)[:, 0]


def is_random(direction: Direction) -> bool:
    """Whether a direction is a random control."""
    return direction.provenance.get("kind") == "random"


def open_model(checkpoint: Path) -> ChatModel:
    """Load a model, without checking its hashes.

    Raises:
      UserError: none is there.
    """
    if not (checkpoint / "manifest.json").is_file():
        raise UserError(
            f"there is no model in {checkpoint}: run `make demo` once, then open this page again"
        )
    return ChatModel.load(checkpoint, verify=False)


def load(model: ChatModel, folder: Path | None, extracted: Path) -> SteerableModel:
    """A model with the directions of a results folder, or with directions extracted now.

    Layer, strength and policy are those of the folder's run record.

    Args:
      model: the loaded model.
      folder: of results; None extracts the directions.
      extracted: the folder in which an extracted direction is kept for the next time.

    Raises:
      UserError: no such folder, no directions in it, or those of another model.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give --results the folder of a study")
    source = (folder or extracted) / "directions.safetensors"
    if folder is None and not source.is_file():
        persona = extraction.extract(model, "persona", extraction.Trait(trait="compliant"))
        directions.save(source, [persona])
    found = directions.load(source)
    for direction in found.values():
        directions.check_model(direction, model, str(source))
    named = {name: made for name, made in found.items() if not is_random(made)}
    if not named:
        raise UserError(f"{source} holds no direction; make one with `jaxsteer extract`")
    run = results.read_run(folder) if folder else None
    first = "persona" if "persona" in named else next(iter(named))
    start = View("add", first, round(0.7 * (model.config.n_layers - 1)), 4.0)
    for operation in (op for c in run.conditions for op in c.operations) if run else ():
        own = operation.direction in named and operation.measured_at is None
        if own and isinstance(operation, results.Add) and operation.tap == "resid_post":
            start = View("add", operation.direction, operation.layers[0], operation.scale)
            break
    refuse = replace(start, strength=-start.strength)
    if "refusal" in named:
        layer = run.layers.get("refusal", start.layer) if run else start.layer
        refuse = View("add", "refusal", layer, 2.0)
    system = run.policy.text if run else ""
    drawn = [directions.random_like(named[start.name], seed) for seed in range(1, RANDOM + 1)]
    all_of = named | {made.name: made for made in drawn}
    return SteerableModel(model=model, directions=all_of, start=start, refuse=refuse, system=system)


def probabilities(logits: Float[np.ndarray, "*lead vocab"]) -> Float[np.ndarray, "*lead vocab"]:
    """Softmax in float64."""
    return np.asarray(softmax(np.asarray(logits, np.float64), axis=-1))


def moved(one: Float[np.ndarray, " vocab"], other: Float[np.ndarray, " vocab"]) -> float:
    """Total variation distance of the next-token distributions of two logit vectors, 0 to 1."""
    return float(np.abs(probabilities(one) - probabilities(other)).sum() / 2)


def next_tokens(
    model: ChatModel, baseline: Reading, steered: Reading, *, top: int = 6
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


def token_texts(model: ChatModel, tokens: Sequence[int]) -> list[str]:
    """The text of each token, special ones too."""
    return [model.tokenizer.hf.decode([token]) for token in tokens]


def in_line(
    steerable: SteerableModel,
    name: str,
    layer: int,
    baseline: Reading,
    reading: Reading,
    texts: Sequence[str],
    replied: Float[np.ndarray, "layer token probe"],
) -> tuple[list[str], list[float]]:
    """The end of a prompt and its reply: the texts of the tokens, and a value for each.

    Args:
      steerable: the model and its directions.
      name: of the direction that is projected on.
      layer: of the states.
      baseline: the prompt, read without steering: its median projection is the zero.
      reading: the prompt as it was read.
      texts: of the reply's tokens, from `SteerableModel.reply`.
      replied: their projections.
    """
    shown = reading.tokens[-TAIL:]
    probe = list(steerable.directions).index(name)
    both = np.concatenate([reading.projections[:, -len(shown) :], replied], axis=1)
    values = both[layer, :, probe] - np.median(baseline.projections[layer, :, probe])
    return [*token_texts(steerable.model, shown), *texts], values.tolist()


def depth(
    steerable: SteerableModel, names: Sequence[str], baseline: Reading, steered: Reading
) -> pl.DataFrame:
    """How the last prompt token's projections changed along depth, in natural norms.

    Returns:
      `direction`, `layer`, `change`; random directions follow the named ones.
    """
    change = steered.projections[:, -1] - baseline.projections[:, -1]
    shown = list(dict.fromkeys([*names, *steerable.random]))
    table = pl.DataFrame(change.astype(np.float64), schema=list(steerable.directions))
    table = table.select(shown).with_row_index("layer")
    return table.unpivot(index="layer", variable_name="direction", value_name="change")


def fan(
    steerable: SteerableModel, prompt: Sequence[int], name: str, layer: int, **options: Any
) -> pl.DataFrame:
    """`grid` at one layer, of a direction and random ones with its norms; few for a long prompt."""
    own, count = steerable.directions[name], RANDOM * WIDTH // steerable.width(prompt)
    drawn = [directions.random_like(own, seed) for seed in range(1, max(3, count) + 1)]
    alone = replace(steerable, directions={made.name: made for made in [own, *drawn]})
    return grid(alone, prompt, list(alone.directions), [layer], **options)


def map_layers(steerable: SteerableModel, prompt: Sequence[int]) -> list[int]:
    """The layers of a map: one of each layer group, fewer for a long prompt.

    It is the layer at which the page begins, or the group's last.
    """
    start, step = steerable.start.layer, -(-steerable.width(prompt) // 256)
    groups = layer_sharing.layer_groups(steerable.model.config.n_layers)
    own = next(i for i, (_, end) in enumerate(groups) if start < end)
    return [start if i == own else groups[i][1] - 1 for i in range(own % step, len(groups), step)]


def grid(
    steerable: SteerableModel,
    prompt: Sequence[int],
    names: Sequence[str],
    layers: Sequence[int],
    *,
    top: int = 1,
    done: Callable[[int], object] = int,
) -> pl.DataFrame:
    """Add each direction at each layer and strength, all in one batch, and read the next token.

    Args:
      steerable: the model and its directions.
      prompt: token ids.
      names: of the directions.
      layers: where they are added, one at a time.
      top: how many of the likeliest next tokens are returned.
      done: as in `SteerableModel.next_logits`.

    Returns:
      A line for each token: `direction`, `layer`, `strength` (of `STRENGTHS`; 0 is the plain
      model), `opens` (see the module), `moved` (from the plain model), `rank` (from 0), `token`
      (its text), `probability`.
    """
    cells = [View("add", n, at, strength) for n in names for at in layers for strength in STRENGTHS]
    steered = [view for view in cells if view.strength]
    logits = steerable.next_logits(prompt, [[], *map(steerable.operations, steered)], done=done)
    found, opens = probabilities(logits), steerable.opens(logits)
    number = {view: i for i, view in enumerate(steered, start=1)}
    return pl.DataFrame(
        [
            {
                "direction": view.name,
                "layer": view.layer,
                "strength": view.strength,
                "opens": opens[i],
                "moved": np.abs(found[i] - found[0]).sum() / 2,
                "rank": rank,
                "token": token_texts(steerable.model, [int(token)])[0],
                "probability": found[i, token],
            }
            for view in cells
            for i in [number.get(view, 0)]
            for rank, token in enumerate(np.argsort(-found[i], kind="stable")[:top])
        ]
    )


def held_out(steerable: SteerableModel, system: str | None, n: int = 48) -> Samples:
    """States of harmful prompts (group 0) and harmless ones, at the last prompt token.

    They are the last of the ranking whose first prompts make the refusal direction.

    Raises:
      UserError: HarmBench is neither on this machine nor can be downloaded.
    """
    harmful, harmless = (
        [prompt.text for prompt in prompts.read(which)[-n:]]
        for which in (extraction.HARMFUL, extraction.HARMLESS)
    )
    return gather(steerable.model, extraction.prompt_contrast(harmful, harmless, system))


def groups(steerable: SteerableModel, found: Samples, name: str, layer: int) -> pl.DataFrame:
    """Projections of `held_out` states on a direction at a layer, in natural norms.

    Returns:
      `group` (harmful or harmless), `projection`.
    """
    vector = steerable.directions[name].vectors[layer].astype(np.float64)
    names = np.where(found.positive, "harmful", "harmless")
    along = found.values[:, layer] @ vector / max(float(vector @ vector), 1e-30)
    return pl.DataFrame({"group": names, "projection": along})


def shares(
    steerable: SteerableModel, prompt: Sequence[int], options: Mapping[str, View]
) -> pl.DataFrame:
    """How much next-token probability each of some operations moves: the answer of an exercise.

    What is added and projected out is compared with projecting out alone, everything else with the
    plain model.

    Returns:
      `option`, `moved`, most first.
    """
    steered = [steerable.operations(view) for view in options.values()]
    plain = [[op for op in some if isinstance(op, Project)][len(some) == 1 :] for some in steered]
    logits = steerable.next_logits(prompt, [*plain, *steered])
    found = list(map(moved, logits[: len(plain)], logits[len(plain) :]))
    table = pl.DataFrame({"option": list(options), "moved": found})
    return table.sort("moved", descending=True, maintain_order=True)
