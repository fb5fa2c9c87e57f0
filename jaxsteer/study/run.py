"""Check, plan and run a study: every (condition, prompt) row in one program, then the table.

Before anything is run or deleted, `checked` says whether the model can run the study to its end,
and `plan` at what cost. Prompts are tokenised for real, and nothing is computed on the model. A
layer that is still to be chosen is taken once as its deepest candidate and once as its shallowest
one: an expression such as `steer+2` that has a layer at both ends has one in between.

A run then makes, in this order:

    prepare    directions, layers and dose               setup.json, directions.safetensors
    record     what is run, with all hashes              run.json
    rows       replies, in shards as they finish         shards/
    table      all rows in order, and their summary      responses.parquet, summary.json
    impact     divergence and right answers              impact.parquet

Rows that are in a shard are not run again, and a row's reply does not depend on which rows run
beside it. So an interrupted run, continued by the same command, gives the table of an uninterrupted
one. A folder that belongs to another run is refused with the parts that differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import polars as pl
from msgspec.structs import replace

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions import samples
from jaxsteer.errors import UserError
from jaxsteer.files import locked, write_json, write_table
from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding, Sampling
from jaxsteer.generation.distributed import ALONE, Hosts
from jaxsteer.generation.requests import Request, check_lengths, fitted, pack
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.config import ModelConfig
from jaxsteer.study import conditions, impact, prepare, results
from jaxsteer.study import spec as specs
from jaxsteer.study.prepare import Setup
from jaxsteer.study.results import Condition, Prepared, RunRecord
from jaxsteer.study.spec import StudySpec
from jaxsteer.words import Progress

PROBES = ("persona", "refusal", "assistant-axis")
# Seconds after which finished rows are written, however few they are.
OFTEN = 10


# -- Checking and planning -------------------------------------------------------------------------


def checked(
    spec: StudySpec, model: ChatModel, families: Mapping[str, Sequence[Prompt]]
) -> tuple[list[Condition], list[Request]]:
    """Check the study; returns its conditions and what each of its rows will ask of the model.

    Layers that are still open are at their deepest candidates.

    Raises:
      UserError: the errors that preparing and running the study would raise, for what is wrong in
        the spec, with what it names, or with its prompts.
    """
    prepare.key(spec, model)  # Reads the policies and the traits.
    still, n_layers = prepare.open_choices(spec), model.config.n_layers
    under = prepare.policies(spec).values()
    spec = max(under, key=lambda each: len(data.policy(each.system).text))
    dose = 1.0 if spec.dose is None else spec.dose
    room, split = model.config.max_position, prepare.split(spec, model)
    if "refusal" in still:
        prepare.openings(spec, model)
    chosen_on = [*split.persona, *split.ordinary]
    check_lengths(map(len, chosen_on), room - spec.selection.max_new_tokens)
    extremes = [_layers(spec, model, pick) for pick in (max, min)]
    found = [conditions.conditions(spec, layers, dose, n_layers) for layers in extremes]
    names = {condition.base for every in found for condition in every}
    for claim in spec.claim:
        where = f"study {spec.name}, claim {claim.name!r}"
        for test in claim.tests:
            if test.expect == "cosine-above":
                for layers in extremes:
                    conditions.resolve_layers(test.at, layers, n_layers, where)
            elif missing := {test.treated, test.control} - names:
                raise UserError(
                    f"{where}: there is no condition {min(missing)!r}; only a condition that "
                    "adds and projects has an unsteered twin, unless the study has an equal one"
                )
    asked = conditions.requests(spec, model, found[0], conditions.cross(found[0], families))
    check_lengths((len(each.tokens) for each in asked), room - spec.decoding.max_new_tokens)
    return found[0], asked


def check(source: str | Path, model: ChatModel) -> list[str]:
    """Everything that is wrong with a study on a model, one line each: FILE:LINE, what, the mend.

    Args:
      source: the study's file or shipped name.
      model: the model, whose weights are not read.

    Raises:
      UserError: no such study, or broken TOML.
    """
    spec, found = specs.examine(source)
    if spec is None:
        return found

    def tried(place: specs.Place, step: Callable[..., Any], *given: Any) -> Any:
        try:
            return step(*given)
        except UserError as error:
            found.append(f"{specs.where(specs.find(source), place)}: {error}")

    for i, prompts in enumerate(spec.prompts):
        tried(("prompts", i), data.read, prompts)
    layers, plain = tried(("layers",), _layers, spec, model, max), replace(spec, modes=[])
    for i, one in enumerate(spec.condition if layers else ()):
        alone = replace(plain, system="generic", condition=[one])
        tried(("condition", i), conditions.conditions, alone, layers, 1.0, model.config.n_layers)
    # Each of these needs all before.
    families = found or tried(("selection",), prepare.prompts, spec)
    if not found:
        tried((), checked, spec, model, families)
    return list(dict.fromkeys(found))


def _layers(
    spec: StudySpec, model: ChatModel, pick: Callable[[Sequence[float]], float]
) -> dict[str, int]:
    """Layers by name: the fixed ones, and of each open choice the candidate that `pick` takes."""
    still, chosen, n_layers = prepare.open_choices(spec), spec.selection, model.config.n_layers
    shares = {
        "steer": chosen.layers,
        "refusal": chosen.refusal_layers,
        "late_refusal": chosen.late.layers,
    }
    layers = {
        name: conditions.depth(pick(found), n_layers)
        for name, found in shares.items()
        if name in still
    }
    layers |= prepare.named_layers(spec, model)
    if "window" in still:
        first = layers["steer"] + int(pick(chosen.windows.starts))
        if first >= n_layers:
            raise UserError(
                f"study {spec.name}: [selection] windows may begin at resid_post.{first}; this "
                f"model has resid_post.0 to resid_post.{n_layers - 1}"
            )
        last = first + int(pick(chosen.windows.widths)) - 1
        layers |= {"window": first, "window_last": min(last, n_layers - 1)}
    return layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a study.

    Attributes:
      conditions: all conditions, twins and repeats included, with the layers that are still open
        at their deepest candidates.
      prompts: number of prompts by set.
      rows: number of (condition, prompt) rows.
      further: replies to questions, and benign replies that are read again, for benign impact.
      prompt_tokens: prompt tokens of all rows.
      own_tokens: of these, the ones after the prefix that rows share.
      new_tokens: most tokens that can be generated.
      memory: bytes at most, roughly, by what they are for (`engine.memory`).
      seconds: rough time of the rows on one device, without preparation and compilation, every
        reply at full length.
      open_choices: what is selected before the rows run, such as `steer` and `dose`.
    """

    conditions: list[Condition]
    prompts: dict[str, int]
    rows: int
    further: int
    prompt_tokens: int
    own_tokens: int
    new_tokens: int
    memory: dict[str, int]
    seconds: float
    open_choices: list[str]


def plan(spec: StudySpec, model: ChatModel, *, limit: int | None = None) -> Plan:
    """Plan a study; `limit` is a largest number of prompts of each harmful set.

    Raises:
      UserError: as running it would, for what is wrong in the spec or with its prompts.
    """
    config, new = model.config, spec.decoding.max_new_tokens
    families = prepare.prompts(spec, limit)
    found, asked = checked(spec, model, families)
    batch = fitted(spec.decoding.batch, len(asked))
    leaves = jax.tree.leaves(model.params)
    own = sum(len(request.own) for request in asked)
    compared = sum(len(families[name][: spec.impact.compared]) for name in spec.sets("benign"))
    # A token costs 2 operations per parameter.
    operations = 2 * sum(leaf.size for leaf in leaves) * (own + len(asked) * new)
    return Plan(
        conditions=found,
        prompts={family: len(prompts) for family, prompts in families.items()},
        rows=len(asked),
        further=sum(c.benign for c in found) * (spec.impact.questions + compared),
        prompt_tokens=sum(len(request.tokens) for request in asked),
        own_tokens=own,
        new_tokens=len(asked) * new,
        memory=engine.memory(model, asked, new, spec.decoding.batch),
        seconds=operations / _operations_per_second(config, batch),
        open_choices=prepare.open_choices(spec),
    )


def _operations_per_second(config: ModelConfig, rows: int) -> float:
    """Speed of a float32 product of the MLP's shape, with that many rows."""
    x, w = jnp.ones((rows, config.d_model)), jnp.ones((config.d_model, config.d_ff))
    product = jax.jit(jnp.matmul)
    product(x, w).block_until_ready()
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        product(x, w).block_until_ready()
        runs += 1
    return 2 * rows * config.d_model * config.d_ff * runs / (time.perf_counter() - started)


# -- Running ---------------------------------------------------------------------------------------


def run_study(
    spec: StudySpec,
    model: ChatModel,
    out: Path,
    *,
    limit: int | None = None,
    fresh: bool = False,
    hosts: Hosts = ALONE,
) -> list[dict[str, Any]]:
    """Run what is missing of a study in `out` and write its results; returns the summary.

    Processes that share the study run their shares of the rows. The first one does everything
    else, and only it returns a summary; the others return an empty one.

    Args:
      spec: the study.
      model: the model to run it on.
      out: results folder; finished rows in it are kept.
      limit: most prompts of each harmful set instead of the spec's number; 0 is all.
      fresh: delete what `out` holds first.
      hosts: the processes that run this study together, all with the same arguments.

    Raises:
      UserError: the model cannot run the study, `out` belongs to another run or is in use, or a
        condition changed nothing or made the residual stream overflow.
    """
    families = prepare.prompts(spec, limit)
    # With a record, the layers are chosen, and their other candidates no longer matter.
    if fresh or not (out / results.RUN).is_file():
        wanted = spec.decoding
        _, asked = checked(spec, model, families)
        engine.check_memory(model, asked, wanted.max_new_tokens, wanted.batch)
    with _held(out, fresh) if hosts.first else contextlib.nullcontext():
        identity = results.asked(spec, model, families)
        setup = _setup(spec, model, out, identity, hosts)
        spec, made = setup.spec, setup.record
        shape = (model.config.n_layers, model.config.d_model)
        layers, n_layers = made.layers, model.config.n_layers
        found = conditions.conditions(spec, layers, made.dose, n_layers, made.refusal_dose)
        arrays = conditions.stacked(found, setup.directions, shape)
        identity |= {"layers": layers, "dose": made.dose, "refusal_dose": made.refusal_dose}
        identity["policy"] = results.text_of(data.policy(spec.system))
        identity["candidates"] = made.candidates
        identity["directions"] = prepare.hashes(setup.directions)
        identity["conditions"] = conditions.mark_cancelling(found, arrays)
        run = results.make_run(identity)
        if hosts.first:
            _refuse(out, results.differing(out, identity))
            if results.read_run(out) is None:
                data.save(out, itertools.chain(*families.values()))
                results.write_run(out, run)
            hosts.meet("setup")
        planned = conditions.cross(run.conditions, families)
        prepared = Prepared(run, model, arrays, setup.directions, families, out)
        _finish(prepared, planned, hosts)
        hosts.meet("rows")
        if not hosts.first:
            return []
        names = [conditions.row_id(row) for row in planned]
        table = hosts.seen(lambda: results.gathered(out / "shards", run.key, names))
        if table is None:
            raise UserError(
                f"{out} lacks rows that other processes finished; give an --out that all hosts "
                "share, and run the same command again to continue"
            )
        _check_changes(table, run)
        write_table(out / "responses.parquet", table)
        impact.measure(prepared)
        if spec.modes and not (out / "modes.json").is_file():
            write_json(out / "modes.json", msgspec.to_builtins(_mode_shifts(prepared)))
        return results.refresh_summary(out)


# Files that mark a results folder, and all that a run and what follows it leave there.
MARKS = (results.RUN, "setup.json")
OURS = {
    *MARKS, "directions.safetensors", "responses.parquet", "summary.json", "modes.json",
    "geometry.json", data.SAVED, "receipt.json", "receipt.html", "judges", "shards", impact.FILE,
    impact.SHARDS, prepare.SAMPLES,
}  # fmt: skip


@contextlib.contextmanager
def _held(out: Path, fresh: bool) -> Iterator[None]:
    """Hold the results folder, emptied if `fresh`."""
    names = {path.name for path in out.glob("[!.]*")}
    if names and not names & set(MARKS) and not (fresh and names <= OURS):
        raise UserError(
            f"{out} is not a results folder; choose another --out, or give --fresh to replace what "
            "is left of one"
        )
    with locked(out):
        if fresh:
            # The marks last: a deletion that was stopped can then be continued.
            for path in sorted(out.glob("[!.]*"), key=lambda path: path.name in MARKS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def _setup(
    spec: StudySpec, model: ChatModel, out: Path, identity: Mapping[str, Any], hosts: Hosts
) -> Setup:
    """The study's setup, made or read by the first process and read by the others."""
    if hosts.first:
        _refuse(out, results.differing(out, identity))
        # The setup also depends on what the study only names, such as the texts of traits.
        made = prepare.read_record(out)
        if made and made.key != prepare.key(spec, model) and results.read_run(out):
            _refuse(out, ["directions"])
        return prepare.prepare(spec, model, out)

    def read() -> Setup | None:
        same = results.differing(out, identity) == []
        return prepare.read(spec, model, out) if same else None

    hosts.meet("setup")
    if (setup := hosts.seen(read)) is None:
        raise UserError(
            f"process {hosts.process} does not find in {out} what process 0 prepared; give all "
            "processes the same command, and an --out that all hosts share"
        )
    return setup


def _refuse(out: Path, differ: Sequence[str] | None) -> None:
    """Refuse a folder whose run differs in some fields of its record; pass one without any."""
    if differ:
        raise UserError(
            f"{out} holds another run ({', '.join(differ)} differ); choose another --out, or give "
            "--fresh to replace it"
        )


def _finish(prepared: Prepared, planned: Sequence[conditions.Row], hosts: Hosts) -> None:
    """Run the rows of this process's share that no shard holds."""
    run, model, folder = prepared.run, prepared.model, prepared.out / "shards"
    shards = results.read_shards(folder, run.key)
    finished = {row_id for shard in shards for row_id in shard["row_id"]}
    done = {i for i, row in enumerate(planned) if conditions.row_id(row) in finished}
    wanted = run.study.decoding
    asked = conditions.requests(run.spec, model, run.conditions, planned)
    # Rows of one packed sequence run in one process, because they share work.
    packed = pack(asked, model.config.max_position - wanted.max_new_tokens)
    share = hosts.share([f"sequence {n}" for n in packed.sequence])
    probed = [name for name in PROBES if name in prepared.directions]
    # At least two: a CPU sums a product with a single vector in an order that depends on the slot.
    columns = 2 if len(probed) == 1 else len(probed)
    probes = np.zeros((model.config.n_layers, columns, model.config.d_model), np.float32)
    for p, name in enumerate(probed):
        probes[:, p] = prepared.directions[name].unit()
    sample, heat = wanted.temperature > 0, wanted.temperature or 1.0
    replies = engine.run(
        model,
        asked,
        prepared.arrays,
        Decoding(max_new_tokens=wanted.max_new_tokens, eos=model.eos, sample=sample),
        probes=probes,
        sampling=Sampling(seed=wanted.seed, temperature=heat, top_p=wanted.top_p),
        batch=wanted.batch,
        skip=done | (set(range(len(planned))) - share),
    )
    title = f"study, share {hosts.process + 1} of {hosts.count}" if hosts.count > 1 else "study"
    ended, written = list[engine.Reply](), time.monotonic()
    with Progress(title, len(share), len(share & done)) as progress:

        def keep() -> None:
            lines = [conditions.line(planned[reply.index], reply, probed) for reply in ended]
            # A column may be null in every line of a shard.
            shard = pl.DataFrame(lines, schema_overrides=results.SCHEMA)
            results.write_shard(folder, run.key, shard)
            count, tokens = len(ended), sum(len(reply.tokens) for reply in ended)
            # Before the report, which raises after a stop signal: no row is written twice.
            ended.clear()
            progress.advance(count, tokens)

        try:
            # Closed here, because an error raised in a generator's deletion would be lost.
            with contextlib.closing(replies):
                for batch in replies:
                    for reply in batch:
                        where = f"condition {planned[reply.index][0].name!r}"
                        engine.check_finite(engine.total_change(reply), where)
                    ended += batch
                    if len(ended) >= wanted.batch or time.monotonic() - written > OFTEN:
                        keep()
                        written = time.monotonic()
        finally:
            # After an error or a stop signal too: a finished row is not run again.
            if ended:
                keep()


def _mode_shifts(prepared: Prepared) -> list[samples.Shift]:
    run, model = prepared.run, prepared.model
    probed = {name: prepared.directions[name] for name in PROBES if name in prepared.directions}
    modes, asked = list(map(data.mode, run.study.modes)), prepared.families.values()
    layer = run.layers.get("steer", model.config.n_layers // 2)
    every = [prompt for some in asked for prompt in some]
    return samples.shifts(model, modes, run.policy.text, every, probed, layer)


def _check_changes(table: pl.DataFrame, run: RunRecord) -> None:
    """Refuse a run with a condition that has operations and changed nothing."""
    changed = dict(table.group_by("condition").agg(pl.col("change").sum()).iter_rows())
    for condition in run.conditions:
        if condition.operations and not changed.get(condition.name, 0.0) > 0:
            done = "; ".join(map(results.describe, condition.operations))
            raise UserError(
                f"condition {condition.name!r} ({done}) changed nothing in the residual stream: "
                "its strength, direction or scope is empty"
            )
