"""A made results folder with both maps: knockouts and added refusal over layers and strengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from jaxsteer.data.prompts import PromptSet
from jaxsteer.study.spec import AddSpec, ConditionSpec, ProjectSpec, StudySpec
from tests.receipt import made

SCALES = [1.0, 2.0, 4.0]
ADD = AddSpec(direction="persona", at="steer", unit="each")
DOSE = AddSpec(direction="persona", at="steer", unit="dose")
N = 24


def study(*, refusal: bool = True) -> StudySpec:
    """Steer at layer 3 of 6; knockouts at 3, 4, 5 and 4 to 5; refusal added at 1 and 5."""
    knockouts = [
        ConditionSpec(name=name, scales=SCALES, ops=[ADD, ProjectSpec(direction="persona", at=at)])
        for name, at in (
            ("persona, out at steer", "steer"),
            ("persona, out at 4", "4"),
            ("persona, out at 5", "5"),
            ("persona, out late", "steer+1..last"),
        )
    ]
    added = [
        ConditionSpec(
            name=f"persona, refusal at {at}",
            scales=[1.0, 2.0],
            ops=[DOSE, AddSpec(direction="refusal", at=at, unit="each")],
        )
        for at in ("1", "5")
    ]
    return msgspec.structs.replace(
        made.study([]),
        prompts=[PromptSet(set="strongreject", n=N), *made.study([]).prompts[1:]],
        condition=[
            ConditionSpec(name="baseline"),
            ConditionSpec(name="persona", scales=SCALES, ops=[ADD]),
            *knockouts,
            *(added if refusal else []),
        ],
    )


def refused(condition: str) -> int:
    """How many of the prompts a condition refuses."""
    if condition == "baseline" or condition.endswith("unsteered"):
        return 14
    if condition.startswith("persona, out at steer"):
        return 13
    if condition.startswith("persona, out late"):
        return 12
    if condition.startswith("persona, refusal at 5"):
        return 9
    return 2


def label(condition: str, family: str, i: int) -> str:
    """The first prompts are refused; under the late knockout a few replies break."""
    if i < refused(condition):
        return "refusal"
    broken = condition.startswith("persona, out late") and i >= N - 4
    return "degenerate" if broken else "complied-unscored"


def folder(path: Path, frame: pl.DataFrame | None = None, **options: Any) -> Path:
    """Write the folder and return it."""
    asked = study(**options)
    if frame is None:
        frame = rows(asked)
    return made.folder(path, asked, frame=frame)


def rows(asked: StudySpec, label: made.Label = label) -> pl.DataFrame:
    """The rows, with projections: the steer moves persona by 2 natural norms from layer 3 on."""
    frame = made.rows(asked, label)
    norms = {
        d.name: np.linalg.norm(d.vectors.astype(np.float64), axis=1) for d in made.made_directions()
    }
    columns = {}
    for name in ("persona", "refusal"):
        for phase in ("prompt", "response"):
            columns[f"{name}_after_{phase}"] = [
                [
                    float(norm * (0.1 * (hash_(prompt) % 5) + (2.0 if moved and at >= 3 else 0.0)))
                    for at, norm in enumerate(norms[name])
                ]
                for prompt, moved in zip(
                    frame["prompt_id"], frame["condition"] != "baseline", strict=True
                )
            ]
    return frame.with_columns(**{k: pl.Series(v) for k, v in columns.items()})


def hash_(prompt: str) -> int:
    """A number that a prompt always has."""
    return int(prompt[-4:], 16)
