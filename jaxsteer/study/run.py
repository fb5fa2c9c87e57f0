"""Run a study: setup, then every (condition, prompt) row through one program, then the table.

Rows that are in a shard are not run again, and batches are cut from the plan the same way every
time, so an interrupted run that goes on ends in the table an uninterrupted one gives. A folder
that belongs to another run is refused, naming what differs. `results` says what lies where.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from jaxsteer import tables
from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions import persona_shift
from jaxsteer.errors import UserError
from jaxsteer.files import write_json
from jaxsteer.generation import engine
from jaxsteer.generation.distributed import ALONE, Hosts
from jaxsteer.generation.generate import Decoding, Sampling
from jaxsteer.judges.labels import label
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.decoder import Realised
from jaxsteer.progress import Progress
from jaxsteer.study import prepare, record, results, store, validate
from jaxsteer.study.conditions import conditions, mark_cancelling
from jaxsteer.study.planned import Planned, cross, prompts, requests, row_name, stacked
from jaxsteer.study.prepare import Setup
from jaxsteer.study.record import Condition, RunRecord
from jaxsteer.study.spec import StudySpec

PROBES = ("persona", "refusal", "assistant-axis")
# What a run leaves in its folder; one that holds nothing else is a run's even without setup.json.
OURS = {
    "run.json", "setup.json", "directions.safetensors", "responses.parquet", "summary.json",
    "modes.json", "receipt.json", "receipt.html", "judges", "shards",
}  # fmt: skip
# Seconds after which rows that have ended are written, however few they are.
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

    Processes that share the study run their shares of the rows; the first one does all the rest,
    and only it returns a summary, the others an empty one.

    Args:
      spec: the study.
      model: the model to run it on.
      out: results folder; finished rows in it are kept.
      limit: number of StrongREJECT prompts instead of the spec's; 0 is all.
      fresh: forget what `out` holds.
      hosts: the processes that run this study together, all with the same arguments.

    Raises:
      UserError: this model cannot run the study, `out` belongs to another run or is in use, or an
        intervention changed nothing, or too much for numbers to hold.
    """
    families = prompts(spec, limit)
    # A run that has begun has passed, with the layers it chose and not only their candidates.
    if fresh or not (out / "run.json").is_file():
        validate.study(spec, model, families)
    with _held(out, fresh) if hosts.first else contextlib.nullcontext():
        if hosts.first:
            _check_asked(out, spec, model, families)
            prepared = prepare.prepare(spec, model, out)
        else:
            hosts.meet("setup")
            prepared = _setup_of_first(spec, model, out, hosts)
        made = _record(spec, model, prepared, families)
        compiled = made.conditions
        if hosts.first:
            store.claim(out, made)
            hosts.meet("setup")
        else:
            store.check_same(out, made, hosts)
        planned = cross(compiled, families)
        folder, key = out / "shards", made.key
        _finish_rows(spec, model, folder, key, prepared, compiled, planned, hosts)
        if not hosts.first:
            return []
        names = [row_name(condition.name, prompt.id) for condition, prompt in planned]
        table = hosts.seen(lambda: store.table(folder, key, names))
        if table is None:
            raise UserError(
                f"{folder} lacks rows that other processes finished; is it one folder that all "
                "hosts share? Run the same command again to go on"
            )
        _check_changes(table, compiled)
        tables.write(out / "responses.parquet", table)
        if spec.modes and not (out / "modes.json").is_file():
            write_json(out / "modes.json", _mode_shifts(spec, model, prepared, families))
        return results.refresh_summary(out)


def _check_asked(
    out: Path, spec: StudySpec, model: ChatModel, families: Mapping[str, Sequence[Prompt]]
) -> None:
    """Refuse another run's folder before the setup in it is touched."""
    held = record.read(out)
    if held is None:
        return
    parts = store.differing(held, record.asked(spec, model, families))
    if parts:
        store.refuse(out, parts, spec)
    # Also made from what the study only names: the texts of traits and roles, and which prompts.
    setup = prepare.read_record(out)
    if setup is not None and setup.key != prepare.key(spec, model):
        store.refuse(out, ["directions"], spec)


def _record(
    spec: StudySpec,
    model: ChatModel,
    prepared: Setup,
    families: Mapping[str, Sequence[Prompt]],
) -> RunRecord:
    found = conditions(spec, prepared.layers, prepared.dose, model.config.n_layers)
    identity = {
        **record.asked(spec, model, families),
        "layers": prepared.layers,
        "dose": prepared.dose,
        "directions": prepare.hashes(prepared.directions),
        "conditions": mark_cancelling(found, prepared.directions),
    }
    return record.make(identity)


@contextlib.contextmanager
def _held(out: Path, fresh: bool) -> Iterator[None]:
    """Hold the results folder, emptied if `fresh`."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    # A dot is in front of the lock, and of what a killed process was writing.
    foreign = {name for name in names - OURS if not name.startswith(".") or (out / name).is_dir()}
    if foreign and "setup.json" not in names:
        raise UserError(f"{out} holds something else than results; choose another --out")
    if not names & {"setup.json", "run.json"} and "directions.safetensors" in names and not fresh:
        # `jaxsteer extract` writes such a file too.
        raise UserError(
            f"{out} holds directions.safetensors without the setup.json that says whose they are; "
            "choose another --out, or give --fresh to replace them"
        )
    with store.locked(out):
        if fresh:
            for path in out.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def _setup_of_first(spec: StudySpec, model: ChatModel, out: Path, hosts: Hosts) -> Setup:
    """What process 0 prepared."""
    prepared = hosts.seen(lambda: prepare.read(spec, model, out))
    if prepared is None:
        raise UserError(
            f"process {hosts.process} does not find in {out} what process 0 prepared; give all "
            "processes the same command, and an --out that all hosts share"
        )
    return prepared


def _finish_rows(
    spec: StudySpec,
    model: ChatModel,
    folder: Path,
    key: str,
    prepared: Setup,
    compiled: Sequence[Condition],
    planned: Sequence[Planned],
    hosts: Hosts,
) -> None:
    """Run what no shard holds of this process's share, and wait for the others."""
    finished = {row_id for shard in store.read(folder, key) for row_id in shard["row_id"]}
    done = {i for i, row in enumerate(planned) if row_name(row[0].name, row[1].id) in finished}
    asked = requests(spec, model, compiled, planned)
    # The rows of a lane stay together: they share work.
    limit = model.config.max_position - spec.decoding.max_new_tokens
    share = hosts.share([f"lane {lane}" for lane in engine.pack(asked, limit).lane])
    probed = [name for name in PROBES if name in prepared.directions]
    # Never a single one: a matrix times a vector, whose sums a CPU orders by the row's slot.
    columns = 2 if len(probed) == 1 else len(probed)
    probes = np.zeros((model.config.n_layers, columns, model.config.d_model), np.float32)
    for p, name in enumerate(probed):
        probes[:, p] = prepared.directions[name].unit()
    decoding = Decoding(
        max_new_tokens=spec.decoding.max_new_tokens,
        eos=model.eos,
        sample=spec.decoding.temperature > 0,
    )
    sampling = Sampling(
        seed=spec.decoding.seed,
        temperature=spec.decoding.temperature or 1.0,
        top_p=spec.decoding.top_p,
    )
    if not hosts.first:
        todo = len(share - done)
        said = f"process {hosts.process} of {hosts.count}: {todo} of its {len(share)} rows to run"
        print(said, file=sys.stderr, flush=True)
    # Of several processes, the first reports the rows of all.
    whole, counted = hosts.first and hosts.count > 1, dict[str, int]()
    held: list[engine.Reply] = []
    with Progress("study", len(planned), done=len(done), quiet=not hosts.first) as progress:

        def count(fresh: int = 0, tokens: int = 0) -> None:
            if whole:
                fresh = store.count(folder, key, counted) - progress.done
            progress.advance(fresh, tokens)

        def keep() -> None:
            lines = [_line(*planned[reply.index], reply, probed) for reply in held]
            store.write(folder, key, pl.DataFrame(lines, schema_overrides=_SCHEMA))
            tokens, fresh = sum(len(reply.tokens) for reply in held), len(held)
            held.clear()
            count(fresh, tokens)

        written = time.monotonic()
        try:
            # Closed here, not when it is forgotten: what a signal raises then would be lost.
            with contextlib.closing(
                engine.run(
                    model,
                    asked,
                    stacked(compiled, prepared.directions, model.config),
                    decoding,
                    probes=probes,
                    sampling=sampling,
                    batch=spec.decoding.batch,
                    skip=done | (set(range(len(planned))) - share),
                )
            ) as running:
                for ended in running:
                    for reply in ended:
                        condition, _ = planned[reply.index]
                        engine.check_finite(reply, f"condition {condition.name!r}")
                    held += ended
                    if len(held) >= spec.decoding.batch or time.monotonic() - written > OFTEN:
                        keep()
                        written = time.monotonic()
        finally:
            # Also when it is stopped: a row that has ended is not run again.
            if held:
                keep()
        hosts.meet("rows", meanwhile=count)
        if whole and progress.done < len(planned):
            count()


# Columns whose type a shard's own values may not show.
_SCHEMA = {"touched": pl.Int64, "seed": pl.Int64, "scale": pl.Float64}


def _line(
    condition: Condition, prompt: Prompt, reply: engine.Reply, probed: Sequence[str]
) -> dict[str, Any]:
    given, judge = label(reply.text, prompt.family)
    both = [*reply.prompt.values(), *reply.response.values()]
    line: dict[str, Any] = {
        "row_id": row_name(condition.name, prompt.id),
        "condition": condition.name,
        "base": condition.base,
        "seed": condition.seed,
        "scale": condition.scale,
        "mode": condition.mode,
        "prompt_id": prompt.id,
        "family": prompt.family,
        "category": prompt.category,
        "response": reply.text,
        "n_tokens": len(reply.tokens),
        "stopped": reply.stopped,
        "label": given,
        "judge": judge,
        "cancels_steering": condition.cancels_steering,
        # Tokens times sites where something changed, and the summed norm of the change there.
        "touched": sum(int(realised.steered[realised.change > 0].sum()) for realised in both),
        "change": engine.total_change(reply),
    }
    for phase, realised in (("prompt", reply.prompt), ("response", reply.response)):
        stream: Realised = realised["resid_post"]
        count = max(_tokens(phase, reply), 1)
        for p, name in enumerate(probed):
            line[f"{name}_before_{phase}"] = (stream.before[:, p] / count).tolist()
            line[f"{name}_after_{phase}"] = (stream.after[:, p] / count).tolist()
    return line


def _tokens(phase: str, reply: engine.Reply) -> int:
    # The last generated token is emitted but never read, unless the row went on to an end token.
    if phase == "prompt":
        return reply.n_prompt
    return len(reply.tokens) - (0 if reply.stopped else 1)


def _mode_shifts(
    spec: StudySpec,
    model: ChatModel,
    prepared: Setup,
    families: Mapping[str, Sequence[Prompt]],
) -> list[dict[str, Any]]:
    probed = {name: prepared.directions[name] for name in PROBES if name in prepared.directions}
    found = persona_shift.shifts(
        model,
        {name: data.mode(name) for name in spec.modes},
        data.policy(spec.system).text,
        [prompt for asked in families.values() for prompt in asked],
        probed,
    )
    return persona_shift.record(found, prepared.layers.get("steer", model.config.n_layers // 2))


def _check_changes(table: pl.DataFrame, compiled: Sequence[Condition]) -> None:
    """Refuse a run in which something was asked for and nothing changed: a silent no-op."""
    changed = dict(table.group_by("condition").agg(pl.col("change").sum()).iter_rows())
    for condition in compiled:
        if condition.operations and not changed.get(condition.name, 0.0) > 0:
            done = "; ".join(map(record.describe, condition.operations))
            raise UserError(
                f"condition {condition.name!r} ({done}) changed nothing in the "
                "residual stream: its strength, direction or scope is empty"
            )
