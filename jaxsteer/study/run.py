"""Run a study: prepare it, then every (condition, prompt) row in one program, then the table.

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
import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from jaxsteer.data import prompts as data
from jaxsteer.directions import samples
from jaxsteer.errors import UserError
from jaxsteer.files import locked, write_json, write_table
from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding, Sampling
from jaxsteer.generation.distributed import ALONE, Hosts
from jaxsteer.generation.requests import pack
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.study import conditions, impact, prepare, record, results, validate
from jaxsteer.study.prepare import Setup
from jaxsteer.study.record import Prepared, RunRecord
from jaxsteer.study.spec import StudySpec
from jaxsteer.words import Progress

PROBES = ("persona", "refusal", "assistant-axis")
# Seconds after which finished rows are written, however few they are.
OFTEN = 10


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
    if fresh or not (out / record.FILE).is_file():
        wanted = spec.decoding
        _, asked = validate.study(spec, model, families)
        engine.check_memory(model, asked, wanted.max_new_tokens, wanted.batch)
    with _held(out, fresh) if hosts.first else contextlib.nullcontext():
        identity = record.asked(spec, model, families)
        setup = _setup(spec, model, out, identity, hosts)
        spec, made = setup.spec, setup.record
        shape = (model.config.n_layers, model.config.d_model)
        layers, n_layers = made.layers, model.config.n_layers
        found = conditions.conditions(spec, layers, made.dose, n_layers, made.refusal_dose)
        arrays = conditions.stacked(found, setup.directions, shape)
        identity |= {"layers": layers, "dose": made.dose, "refusal_dose": made.refusal_dose}
        identity["policy"] = record.text_of(data.policy(spec.system))
        identity["candidates"] = made.candidates
        identity["directions"] = prepare.hashes(setup.directions)
        identity["conditions"] = conditions.mark_cancelling(found, arrays)
        run = record.make(identity)
        if hosts.first:
            _refuse(out, record.differing(out, identity))
            if record.read(out) is None:
                data.save(out, itertools.chain(*families.values()))
                record.write(out, run)
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
MARKS = (record.FILE, "setup.json")
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
        _refuse(out, record.differing(out, identity))
        # The setup also depends on what the study only names, such as the texts of traits.
        made = prepare.read_record(out)
        if made and made.key != prepare.key(spec, model) and record.read(out):
            _refuse(out, ["directions"])
        return prepare.prepare(spec, model, out)

    def read() -> Setup | None:
        same = record.differing(out, identity) == []
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
            done = "; ".join(map(record.describe, condition.operations))
            raise UserError(
                f"condition {condition.name!r} ({done}) changed nothing in the residual stream: "
                "its strength, direction or scope is empty"
            )
