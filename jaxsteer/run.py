"""Run a study: directions, selection, rows, labels, summary. Everything lands in one folder.

    responses.parquet       one line per (condition, prompt) row
    summary.json            rates per condition and prompt family
    directions.safetensors  the directions with provenance
    run.json                what was run: hashes, chosen layers and strengths, selection tables
    shards/                 finished batches, from which an interrupted run goes on

Rows that are in a shard are not run again, and a folder that belongs to another run is refused.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from jaxsteer import data, directions, rows, selection, study
from jaxsteer.chatmodel import ChatModel
from jaxsteer.data import Prompt
from jaxsteer.directions import Direction
from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path, canonical_json, sha256_bytes, write_json
from jaxsteer.generate import Decoding, Sampling
from jaxsteer.interventions import compile_conditions
from jaxsteer.judges.label import label
from jaxsteer.model import Realised
from jaxsteer.progress import Progress
from jaxsteer.stats import wilson
from jaxsteer.study import Condition, StudySpec

VERSION = "1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a study needs before its rows run.

    Attributes:
      directions: by name, random ones included.
      layers: layer numbers by name (`steer`, `refusal`, and the spec's own).
      dose: persona strength in natural norms.
      record: the selection tables and choices, JSON-able.
    """

    directions: dict[str, Direction]
    layers: dict[str, int]
    dose: float
    record: dict[str, Any]


def setup_key(spec: StudySpec, model: ChatModel) -> str:
    """Identity of everything the setup depends on."""
    sources = {
        name: data.trait(item.trait).sha256
        for name, item in spec.directions.items()
        if item.kind == "trait"
    }
    value = [
        VERSION,
        model.weights_sha256,
        model.tokenizer_sha256,
        data.policy(spec.system).sha256,
        sources,
        [p.id for p in data.harmless()],
        msgspec.to_builtins([spec.directions, spec.selection, spec.layers, spec.decoding.batch]),
        sorted(seed for item in spec.condition for seed in item.random_seeds),
    ]
    return sha256_bytes(canonical_json(value).encode())


def prepare(spec: StudySpec, model: ChatModel, out: Path) -> Setup:
    """Extract the directions and choose layers and strength, or read them back from `out`.

    HarmBench's standard behaviours are split by hash: the first part trains the refusal
    direction, the second selects its layer, the third selects the persona's layer and strength.
    """
    key = setup_key(spec, model)
    record_path, vectors_path = out / "setup.json", out / "directions.safetensors"
    if record_path.is_file() and vectors_path.is_file():
        record = _json(record_path)
        found = directions.load(vectors_path)
        if record.get("key") == key and record.get("directions") == _hashes(found):
            return Setup(
                directions=found, layers=record["layers"], dose=record["dose"], record=record
            )

    chosen = spec.selection
    system = data.policy(spec.system).text
    harmbench = data.sample(data.harmbench(), 0, spec.data.seed)
    harmless = data.sample(data.harmless(), 0, spec.data.seed)
    n_train, n_validation = chosen.refusal_train, chosen.refusal_validation
    needed = n_train + n_validation + chosen.prompts
    if needed > len(harmbench):
        raise UserError(
            f"study {spec.name}: [selection] asks for {needed} HarmBench prompts "
            f"(refusal_train + refusal_validation + prompts), there are {len(harmbench)}"
        )
    # Train on all harmless prompts but the few that the selection scores.
    harmless_train, harmless_validation = harmless[n_validation:], harmless[:n_validation]

    def ids(prompts: Sequence[Prompt]) -> list[list[int]]:
        return [model.tokenizer.chat(p.text, system) for p in prompts]

    found = {}
    with Progress("directions", len(spec.directions), unit="directions") as progress:
        for name, item in spec.directions.items():
            if item.kind == "trait":
                made = directions.extract_trait(model, data.trait(item.trait), [item.position])
                direction = made[item.position]
            else:
                direction = directions.extract_contrast(
                    model,
                    name,
                    "refusal",
                    [p.text for p in harmbench[:n_train]],
                    [p.text for p in harmless_train[:n_train]],
                    system,
                )
            found[name] = dataclasses.replace(direction, name=name)
            progress.advance(1)

    record = {"key": key}
    n_layers = model.config.n_layers
    layers = {name: study.depth(share, n_layers) for name, share in spec.layers.items()}
    if "refusal" in found:
        candidates = [study.depth(share, n_layers) for share in chosen.refusal_layers]
        opening = [
            model.tokenizer.hf.encode(text, add_special_tokens=False)[0]
            for text in chosen.refusal_openings
        ]
        total = n_validation * (1 + 3 * len(candidates))
        with Progress("refusal layer", total, unit="prompts") as progress:
            scored = selection.refusal_candidates(
                model,
                found["refusal"],
                ids(harmbench[n_train : n_train + n_validation]),
                ids(harmless_validation),
                candidates,
                opening,
                kl_limit=chosen.kl_limit,
                report=progress.advance,
            )
        best = selection.choose_refusal(scored, allow_near_miss=chosen.allow_near_miss)
        layers["refusal"] = best.layer
        record["refusal_candidates"] = [dataclasses.asdict(c) for c in scored]
        record["refusal_near_miss"] = list(best.reasons)
    dose = 1.0
    if "persona" in found:
        grid = [study.depth(share, n_layers) for share in chosen.layers]
        total = chosen.prompts * (1 + len(grid) * len(chosen.scales))
        start = n_train + n_validation
        with Progress("persona layer and strength", total) as progress:
            cells = selection.dose_candidates(
                model,
                found["persona"],
                ids(harmbench[start : start + chosen.prompts]),
                grid,
                chosen.scales,
                max_new_tokens=chosen.max_new_tokens,
                batch=spec.decoding.batch,
                report=progress.advance,
            )
        cell = selection.choose_dose(cells, chosen.max_degenerate)
        layers["steer"], dose = cell.layer, cell.scale
        record["dose_candidates"] = [dataclasses.asdict(c) for c in cells]
        for seed in sorted({s for item in spec.condition for s in item.random_seeds}):
            made_random = directions.random_like(found["persona"], seed)
            found[made_random.name] = made_random
    record |= {"layers": layers, "dose": dose, "directions": _hashes(found)}
    directions.save(vectors_path, list(found.values()))
    write_json(record_path, record)
    return Setup(directions=found, layers=layers, dose=dose, record=record)


def _hashes(found: Mapping[str, Direction]) -> dict[str, str]:
    return {name: direction.sha256 for name, direction in sorted(found.items())}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run again") from None
    return value if isinstance(value, dict) else {}


def run_study(
    spec: StudySpec,
    model: ChatModel,
    out: Path,
    *,
    limit: int | None = None,
    fresh: bool = False,
) -> list[dict[str, Any]]:
    """Run what is missing of a study in `out` and write its results; returns the summary.

    Args:
      spec: the study.
      model: the model to run it on.
      out: results folder; finished rows in it are kept.
      limit: number of StrongREJECT prompts instead of the spec's; 0 is all.
      fresh: forget what `out` holds.

    Raises:
      UserError: `out` belongs to another run, or an intervention changed nothing.
    """
    if fresh and (out / "run.json").is_file():
        shutil.rmtree(out)
    setup = prepare(spec, model, out)
    if setup.record.get("refusal_near_miss"):
        reasons = ", ".join(setup.record["refusal_near_miss"])
        layer = setup.layers["refusal"]
        print(f"note: no refusal candidate passed; took resid_post.{layer} ({reasons})", flush=True)
    compiled = study.conditions(spec, setup.directions, setup.layers, setup.dose)
    harmful = data.sample(
        data.strongreject(), spec.data.harmful if limit is None else limit, spec.data.seed
    )
    benign = data.sample(data.benign(), spec.data.benign, spec.data.seed)
    planned = [
        (c, prompt)
        for c, condition in enumerate(compiled)
        for prompt in [*harmful, *(benign if condition.benign else [])]
    ]
    key = sha256_bytes(
        canonical_json(
            [
                setup.record["key"],
                setup.record["directions"],
                msgspec.to_builtins(spec),
                [(compiled[c].name, prompt.id) for c, prompt in planned],
            ]
        ).encode()
    )
    _claim(out, key, spec, model, setup, compiled)
    table = _finish_rows(spec, model, out, key, setup, compiled, planned)
    _check_changes(table, compiled)
    with atomic_path(out / "responses.parquet") as temporary:
        table.write_parquet(temporary)
    summary = summarise(table)
    write_json(out / "summary.json", summary)
    return summary


def _claim(
    out: Path,
    key: str,
    spec: StudySpec,
    model: ChatModel,
    setup: Setup,
    compiled: Sequence[Condition],
) -> None:
    path = out / "run.json"
    if path.is_file():
        if _json(path).get("key") != key:
            raise UserError(
                f"{out} holds another run (its study, model, directions or prompts differ); "
                "choose another --out, or give --fresh to replace it"
            )
        return
    policy = data.policy(spec.system)
    write_json(
        path,
        {
            "key": key,
            "study": msgspec.to_builtins(spec),
            "model": model.name,
            "weights_sha256": model.weights_sha256,
            "tokenizer_sha256": model.tokenizer_sha256,
            "policy": {"name": policy.name, "version": policy.version, "sha256": policy.sha256},
            "layers": setup.layers,
            "dose": setup.dose,
            "directions": setup.record["directions"],
            "conditions": [
                {
                    "name": c.name,
                    "sites": list(c.sites),
                    "scope": c.scope,
                    "cancels_steering": c.cancels_steering,
                    "unsteered_twin_of": c.unsteered_twin_of,
                }
                for c in compiled
            ],
        },
    )


def _finish_rows(
    spec: StudySpec,
    model: ChatModel,
    out: Path,
    key: str,
    setup: Setup,
    compiled: Sequence[Condition],
    planned: Sequence[tuple[int, Prompt]],
) -> pl.DataFrame:
    shards = out / "shards"
    done = _read_shards(shards, key)
    finished = {row_id for shard in done for row_id in shard["row_id"]}
    names = [(compiled[c].name, prompt.id) for c, prompt in planned]
    todo = [i for i, (name, prompt) in enumerate(names) if f"{name}/{prompt}" not in finished]
    system = data.policy(spec.system).text
    requests = [
        rows.Request(
            tokens=model.tokenizer.chat(planned[i][1].text, system),
            condition=planned[i][0],
            row_id=directions.stable_id(*names[i]),
        )
        for i in todo
    ]
    config = model.config
    stacked = compile_conditions(
        [condition.operations for condition in compiled],
        [condition.scope for condition in compiled],
        n_layers=config.n_layers,
        d_model=config.d_model,
    )
    probed = [name for name in ("persona", "refusal") if name in setup.directions]
    probes = np.stack([setup.directions[name].unit() for name in probed], axis=1)
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
    with Progress("study", len(planned), done=len(planned) - len(todo)) as progress:
        for batch in rows.run(
            model,
            requests,
            stacked,
            decoding,
            probes=probes,
            sampling=sampling,
            batch=spec.decoding.batch,
        ):
            lines = []
            for reply in batch:
                c, prompt = planned[todo[reply.index]]
                lines.append(_line(compiled[c], prompt, reply, probed))
            shard = pl.DataFrame(lines, schema_overrides={"touched": pl.Int64})
            _write_shard(shards, key, shard)
            done.append(shard)
            progress.advance(len(batch), tokens=sum(len(reply.tokens) for reply in batch))
    order = pl.DataFrame({"row_id": [f"{name}/{prompt}" for name, prompt in names]})
    return order.join(pl.concat(done), on="row_id", how="left", maintain_order="left")


def _line(
    condition: Condition, prompt: Prompt, reply: rows.Reply, probed: Sequence[str]
) -> dict[str, Any]:
    given, judge = label(reply.text)
    both = [*reply.prompt.values(), *reply.response.values()]
    line: dict[str, Any] = {
        "row_id": f"{condition.name}/{prompt.id}",
        "condition": condition.name,
        "prompt_id": prompt.id,
        "family": prompt.family,
        "category": prompt.category,
        "response": reply.text,
        "n_tokens": len(reply.tokens),
        "stopped": reply.stopped,
        "label": given,
        "judge": judge,
        "cancels_steering": condition.cancels_steering,
        # Tokens times sites that were touched, and the summed norm of what changed there.
        "touched": int(sum(int(r.touched.sum()) for r in both)),
        "change": rows.total_change(reply),
    }
    for phase, realised in (("prompt", reply.prompt), ("response", reply.response)):
        stream: Realised = realised["resid_post"]
        count = max(_tokens(phase, reply), 1)
        for i, name in enumerate(probed):
            line[f"{name}_before_{phase}"] = (stream.before[:, i] / count).tolist()
            line[f"{name}_after_{phase}"] = (stream.after[:, i] / count).tolist()
    return line


def _tokens(phase: str, reply: rows.Reply) -> int:
    # The last generated token is emitted but never read, unless the row went on to an end token.
    if phase == "prompt":
        return reply.n_prompt
    return len(reply.tokens) - (0 if reply.stopped else 1)


def _write_shard(shards: Path, key: str, shard: pl.DataFrame) -> None:
    buffer = io.BytesIO()
    shard.write_parquet(buffer)
    name = f"{key[:16]}-{sha256_bytes(buffer.getvalue())[:16]}.parquet"
    with atomic_path(shards / name) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _read_shards(shards: Path, key: str) -> list[pl.DataFrame]:
    found = []
    for path in sorted(shards.glob(f"{key[:16]}-*.parquet")):
        try:
            found.append(pl.read_parquet(path))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it, its rows run again") from None
    return found


def _check_changes(table: pl.DataFrame, compiled: Sequence[Condition]) -> None:
    """Refuse a run in which something was asked for and nothing changed: a silent no-op."""
    changed = dict(table.group_by("condition").agg(pl.col("change").sum()).iter_rows())
    for condition in compiled:
        if condition.operations and not changed.get(condition.name, 0.0) > 0:
            raise UserError(
                f"condition {condition.name!r} ({'; '.join(condition.sites)}) changed nothing in "
                "the residual stream: its strength, direction or scope is empty"
            )


def summarise(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Rates per condition and prompt family, with Wilson 95 % intervals for refusal.

    `complied` is the share neither refused nor degenerate; nobody has scored it for harm.
    `mean_change` is the mean norm of the realised change per touched token and site.
    """
    summary = []
    for (condition, family), group in table.group_by("condition", "family", maintain_order=True):
        n = group.height
        counts = dict(group["label"].value_counts().iter_rows())
        low, high = wilson(counts.get("refusal", 0), n)
        touched = int(group["touched"].sum())
        summary.append(
            {
                "condition": condition,
                "family": family,
                "n": n,
                "refusal": counts.get("refusal", 0) / n,
                "refusal_low": low,
                "refusal_high": high,
                "degenerate": counts.get("degenerate", 0) / n,
                "complied": counts.get("complied-unscored", 0) / n,
                "cancels_steering": bool(group["cancels_steering"][0]),
                "mean_change": float(group["change"].sum()) / max(touched, 1),
            }
        )
    return summary
