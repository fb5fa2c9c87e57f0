"""Results of shipped studies without a model: a world says what each condition did."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import polars as pl

from jaxsteer.data.prompts import PromptSet
from jaxsteer.directions import direction
from jaxsteer.study.results import Condition, Prompts, Results, RunRecord
from jaxsteer.study.spec import StudySpec
from tests.receipt import made
from tests.study.stand_ins import compiled

HARMFUL, BENIGN = 120, 60
# From a condition, a prompt family and the number of a prompt to the label of the reply.
World = Callable[[Condition, str, int], str]


def results(study: StudySpec, world: World, folder: Path) -> Results:
    """A study's whole table of rows under a world, with 120 harmful and 60 benign prompts."""
    sizes = {"strongreject": HARMFUL, "benign": BENIGN}
    sets = [PromptSet(set=name, n=n) for name, n in sizes.items()]
    study = msgspec.structs.replace(study, prompts=sets)
    run = msgspec.structs.replace(
        msgspec.convert(made.run_record(made.study()), RunRecord),
        study=study,
        conditions=compiled(study),
        layers={"steer": 3, "refusal": 2},
        prompts={
            each.name: Prompts(
                kind=each.kind, n=each.n, sha256="0" * 64, source=each.source, own=False
            )
            for each in sets
        },
    )
    columns = ("condition", "base", "seed", "scale", "family", "prompt_id", "category", "label")
    rows = pl.DataFrame(
        [
            (c.name, c.base, c.seed, c.scale, family, f"{family}-{i}", "any", world(c, family, i))
            for c in run.conditions
            for family, n in sizes.items()
            if family != "benign" or c.benign
            for i in range(n if family == "benign" else min(n, c.prompts or n))
        ],
        schema=columns,
        schema_overrides={"seed": pl.Int64, "scale": pl.Float64},
        orient="row",
    ).with_columns(
        row_id=pl.concat_str("condition", "prompt_id", separator="/"),
        response=pl.lit(""),
        kind=pl.col("family").replace("strongreject", "harmful"),
    )
    direction.save(folder / "directions.safetensors", made.made_directions())
    return Results(folder=folder, run=run, rows=rows, verdicts={})


@functools.cache
def _order(key: str, n: int) -> dict[int, int]:
    hashed = sorted(range(n), key=lambda j: hashlib.sha256(f"{key}:{j}".encode()).digest())
    return {item: place for place, item in enumerate(hashed)}


def spread(key: str, i: int, n: int) -> int:
    """The place of item i of n in an order that depends on the key alone."""
    return _order(key, n)[i]
