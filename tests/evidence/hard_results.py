"""Results on which a sentence or a chart easily says something false, made without a model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import polars as pl

from jaxsteer.directions import direction
from jaxsteer.directions.direction import Direction
from jaxsteer.study import results
from jaxsteer.study.results import Results
from jaxsteer.study.spec import ConditionSpec, StudySpec
from tests.evidence import windows_made
from tests.receipt import made

N = 40  # harmful prompts, so that 25 of them are exactly 62.5 %
CLAIMS = [*made.CLAIMS, made.claim("suppression again", made.test("persona", "baseline", "lower"))]


def study(seeds: int = 3, more: int = 0, *, claims: bool = True) -> StudySpec:
    """Claims with their controls, and both maps of the layer window."""
    base, windows = made.study(CLAIMS if claims else []), windows_made.study()
    both = {c.name: c for c in [*windows.condition[2:], *base.condition]}
    conditions = [
        msgspec.structs.replace(c, random_seeds=list(range(1, seeds + 1))) if c.random_seeds else c
        for c in both.values()
    ]
    extra = [ConditionSpec(name=f"persona again {i}", ops=[made.ADD]) for i in range(more)]
    return msgspec.structs.replace(base, condition=conditions + extra)


def always(label: str):
    return lambda condition, family, i: label if family != "benign" else "benign-answer"


def ties(condition: str, family: str, i: int) -> str:
    """Every condition refuses 25 of 40."""
    return "refusal" if i < 25 else "complied-unscored"


def _one_condition() -> StudySpec:
    return msgspec.structs.replace(study(claims=False), condition=made.study().condition[:1])


WORLDS = {
    "everything refused": (study, always("refusal")),
    "nothing refused": (study, always("complied-unscored")),
    "all degenerate": (study, always("degenerate")),
    "ties": (study, ties),
    "usual": (study, made.usual),
    "one seed": (lambda: study(seeds=1), made.usual),
    "one condition": (_one_condition, ties),
    "61 conditions": (lambda: study(more=61), made.usual),
    "without claims": (lambda: study(claims=False), made.usual),
}


def world(name: str, folder: Path) -> Results:
    """The results of a world, with projections, and a category of three prompts."""
    asked, label = WORLDS[name]
    spec = asked()
    frame = windows_made.rows(spec, label)
    few = frame["prompt_id"].unique(maintain_order=True).head(3)
    category = pl.when(pl.col("prompt_id").is_in(few.implode())).then(pl.lit("few"))
    frame = frame.with_columns(category=category.otherwise(pl.col("category")))
    return results.load(made.folder(folder, spec, frame=frame))


def directions(folder: Path, names: tuple[str, ...], layers: int = 24, width: int = 896) -> Path:
    """A folder of directions of a model of another size, not measured; returns the folder."""
    rng = np.random.default_rng(1)
    save = [
        Direction(
            name=name,
            vectors=rng.standard_normal((layers, width)).astype(np.float32),
            provenance={"kind": "trait", "tap": "resid_post", "weights_sha256": "0" * 64},
        )
        for name in names
    ]
    folder.mkdir(parents=True)
    direction.save(folder / "directions.safetensors", save)
    return folder
