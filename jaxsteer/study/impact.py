"""What conditions cost where nothing should change: divergence on benign replies, right answers.

    divergence   the untouched model's own replies to benign prompts are read under every condition:
                 KL(untouched || condition) of next-token distributions, in nats, the mean over the
                 first tokens of a reply
    answers      our questions with short answers are asked under every condition, and graded

Both run under the conditions that run the benign prompts, in the engine's programs, so another
condition compiles nothing. `impact.parquet` has a line for each condition and prompt; its shards
continue an interrupted run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax import nnx
from jaxtyping import Array, Float

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions import samples
from jaxsteer.files import write_table
from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.requests import Request, grouped
from jaxsteer.judges.verdicts import is_right
from jaxsteer.model import decoder
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.interventions import Interventions
from jaxsteer.study import conditions, results
from jaxsteer.study.results import Condition, Prepared, RunRecord
from jaxsteer.words import Progress

FILE, SHARDS = "impact.parquet", "impact"
# Tokens of a benign reply that are compared, and of an answer.
COMPARED, ANSWER = 32, 24
SCHEMA = {
    "condition": pl.String, "prompt_id": pl.String, "measure": pl.String,
    "value": pl.Float64, "response": pl.String,
}  # fmt: skip
Line = tuple[str, str, str, float, str]


def measure(prepared: Prepared) -> None:
    """Measure what is missing of a finished run, and write its table.

    The study's [impact] says how much is measured.

    Raises:
      UserError: a reply or question that does not fit the model's context, or damaged files.
    """
    run, out = prepared.run, prepared.out
    asked, kept = run.study.impact, results.read_shards(out / SHARDS, run.key)
    done = {line[:3] for shard in kept for line in shard.iter_rows()}
    sets = [prepared.families[name][: asked.compared] for name in run.study.sets("benign")]
    benign = [prompt for some in sets for prompt in some]
    if benign and not any(what == "kl" for _, _, what in done):
        _keep(prepared, divergence(prepared, benign, results.load(out).rows))
    if asked.questions:
        _answer(prepared, {line[:2] for line in done if line[2] == "answer"})
    if kept := results.read_shards(out / SHARDS, run.key):
        lines = pl.concat(kept).unique(["condition", "prompt_id", "measure"])
        write_table(out / FILE, lines.sort("measure", "condition", "prompt_id"))


def _keep(prepared: Prepared, lines: Sequence[Line]) -> None:
    shard = pl.DataFrame(lines, schema=SCHEMA, orient="row")
    results.write_shard(prepared.out / SHARDS, prepared.run.key, shard)


def untouched(run: RunRecord) -> dict[str, Condition]:
    """By mode, the condition that runs the benign prompts and changes nothing."""
    return {c.mode: c for c in run.conditions if c.benign and not c.operations}


def divergence(prepared: Prepared, benign: Sequence[Prompt], table: pl.DataFrame) -> list[Line]:
    """KL(untouched || condition) on the untouched model's benign replies, in the same mode.

    A reply is read behind its prompt, so conditions that steer one of the two alone are left out.
    Errors as for `measure`; `table` has the run's rows, `benign` the prompts.
    """
    run, model = prepared.run, prepared.model
    columns = table.select("condition", "prompt_id", "response")
    said = {(condition, prompt): text for condition, prompt, text in columns.iter_rows()}
    plain = untouched(run)
    changed = [
        c for c in run.conditions
        if c.benign and c.operations and c.scope == "all" and c.mode in plain
    ]  # fmt: skip
    each = [(c, prompt) for c in [*plain.values(), *changed] for prompt in benign]
    requests, counts = [], np.zeros(len(each), int)
    for i, request in enumerate(conditions.requests(run.spec, model, run.conditions, each)):
        text = said[plain[each[i][0].mode].name, each[i][1].id]
        reply = model.tokenizer.encode(text)[:COMPARED]
        requests.append(dataclasses.replace(request, tokens=[*request.tokens, *reply]))
        counts[i] = len(reply)
    streams = _streams(model, requests, prepared.arrays, counts)
    of = grouped(range(len(each)), lambda i: each[i][0].name)
    lines = list[Line]()
    for c in changed:
        both = streams[of[plain[c.mode].name]], streams[of[c.name]]
        nats = np.asarray(_kl(model.definition, model.params, *both))
        for i, found in zip(of[c.name], nats, strict=True):
            if counts[i]:
                mean = float(found[: counts[i]].mean(dtype=np.float64))
                lines.append((c.name, each[i][1].id, "kl", mean, ""))
    return lines


def _streams(
    model: ChatModel, requests: Sequence[Request], arrays: Interventions, counts: np.ndarray
) -> Float[np.ndarray, "row token d_model"]:
    """The stream after all layers where each of the last tokens of a request is predicted."""
    found = np.zeros((len(requests), COMPARED, model.config.d_model), np.float32)
    with Progress("benign replies", len(requests), unit="replies") as progress:
        for some, batch in samples.batches(model, requests, arrays):
            stream, real = np.asarray(batch.outputs[-1].stream), np.asarray(batch.real)
            for slot, row in enumerate(some):
                # Of 3 prompt and 2 reply tokens, those at 2 and 3 predict the reply.
                read = np.flatnonzero(real[slot])[-counts[row] - 1 : -1]
                found[row, : len(read)] = stream[batch.entry[slot, -1], read]
            progress.advance(len(some))
    return found


@functools.partial(jax.jit, static_argnames=("definition",))
def _kl(
    definition: nnx.GraphDef[decoder.Decoder],
    params: decoder.Params,
    plain: Float[Array, "row token d_model"],
    changed: Float[Array, "row token d_model"],
) -> Float[Array, "row token"]:
    """KL(plain || changed) of the next-token distributions after two streams, in nats."""
    model = decoder.bind(definition, params)

    def logs(stream: Array) -> Array:
        stream = stream.astype(params["embed"]["embedding"].dtype)
        return jax.nn.log_softmax(model.logits(model.final_norm(stream)))

    def one(streams: tuple[Array, Array]) -> Array:
        p, q = map(logs, streams)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    # Row by row, since the logits of all rows would take gigabytes.
    return jax.lax.map(one, (plain, changed))


def _answer(prepared: Prepared, done: set[tuple[str, str]]) -> None:
    """Ask the questions, and keep the graded replies as they come."""
    run, model, wanted = prepared.run, prepared.model, prepared.run.study.impact
    answers = {question.id: question.answers for question in data.questions()}
    questions = [
        Prompt(id=q.id, family="questions", category=q.category, text=q.text, kind="benign")
        for q in data.questions()
    ]
    asked = data.sample(questions, wanted.questions, wanted.seed)
    each = [(c, question) for c in run.conditions if c.benign for question in asked]
    requests = conditions.requests(run.spec, model, run.conditions, each)
    skip = {i for i, (c, question) in enumerate(each) if (c.name, question.id) in done}
    decoding = Decoding(max_new_tokens=ANSWER, eos=model.eos)
    batch, lines = run.study.decoding.batch, list[Line]()
    with Progress("questions", len(each), len(skip)) as progress:
        for replies in engine.run(
            model, requests, prepared.arrays, decoding, batch=batch, skip=skip
        ):
            for reply in replies:
                condition, question = each[reply.index]
                right = float(is_right(reply.text, answers[question.id]))
                lines.append((condition.name, question.id, "answer", right, reply.text))
            progress.advance(len(replies), sum(len(reply.tokens) for reply in replies))
            if len(lines) >= batch:
                _keep(prepared, lines)
                lines.clear()
    if lines:
        _keep(prepared, lines)
