"""Where in depth an intervention brings refusal back: cells of (layer, strength), and their flips.

A study's conditions become cells of two maps. `knockout`: a direction is added at strength s and
projected out at some layers; s = 0 is the projection alone, its control. `refusal`: the direction
is added at full dose, and the refusal direction at some layer with strength s. The conditions that
cells are compared with, the steer alone and the untouched model, are in the column `none`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
from msgspec.structs import asdict

from jaxsteer import stats
from jaxsteer.directions import direction as directions
from jaxsteer.errors import UserError
from jaxsteer.evidence import controls
from jaxsteer.evidence.outcomes import Labels, flips
from jaxsteer.files import frame
from jaxsteer.study.conditions import unsteered_twin
from jaxsteer.study.results import Add, Condition, Project, Results
from jaxsteer.words import layer_list, p_value, percent, points

Map = Literal["knockout", "refusal"]
Phase = Literal["prompt", "response"]
NONE = "none"
REFUSAL = "refusal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A condition's place on a map.

    Attributes:
      map: which map.
      condition: its name.
      layers: where the direction is projected out (`knockout`) or refusal added (`refusal`); none
        for the steer alone and the baseline.
      strength: of the steer (`knockout`) or of the refusal direction (`refusal`), natural norms.
      control: the condition whose prompts it is paired with; "" for the baseline.
      twin: the same projection without steering; "" if there is none.
      cancels: whether the projection undoes the steer by algebra.
    """

    map: Map
    condition: str
    layers: tuple[int, ...] = ()
    strength: float = 0.0
    control: str = ""
    twin: str = ""
    cancels: bool = False

    @property
    def column(self) -> str:
        """The layers as text, or `none`."""
        return layer_list(self.layers) or NONE

    @property
    def order(self) -> int:
        """Sorts columns by depth, single layers before windows."""
        return self.layers[0] + 1000 * (len(self.layers) > 1) if self.layers else -1


def _everywhere(condition: Condition) -> bool:
    """Whether a condition removes a direction from every write of the model."""
    return any(isinstance(op, Project) and op.everywhere for op in condition.operations)


def modes(found: Results) -> list[str]:
    """The persona modes that were run, in order; [""] without any."""
    return list(dict.fromkeys(c.mode for c in found.run.conditions))


def steered(found: Results) -> list[str]:
    """Directions that are added alone, those that are also projected out again first."""
    alone: dict[str, None] = {}
    knocked_out: set[str] = set()
    for c in found.run.conditions:
        added = {op.direction for op in c.operations if isinstance(op, Add)}
        if len(c.operations) == 1 and c.seed is None:
            alone |= dict.fromkeys(added)
        if not _everywhere(c):
            out = {op.direction for op in c.operations if isinstance(op, Project)}
            knocked_out |= added & out
    return sorted(alone, key=lambda name: name not in knocked_out)


def cells(found: Results, name: str, mode: str = "") -> list[Cell]:
    """All conditions that have a place on the maps of one steered direction.

    Args:
      found: the results.
      name: the steered direction.
      mode: only this persona mode's conditions.
    """
    known = [
        c
        for c in found.run.conditions
        if c.mode == mode
        and not _everywhere(c)
        and all(op.direction in (name, REFUSAL) for op in c.operations)
    ]
    steers = {
        (op.layers, op.scale): c.name
        for c in known
        for op in _added(c, name)
        if len(c.operations) == 1
    }
    if not steers:
        return []
    # The layer that most conditions steer at; another one would be another map.
    at = Counter(op.layers for c in known for op in _added(c, name)).most_common(1)[0][0]
    alone = {scale: label for (layers, scale), label in steers.items() if layers == at}
    plain = controls.plain(found.run, mode)
    baseline = plain.name if plain else ""
    made = [Cell(map="knockout", condition=baseline)] if baseline else []
    made += [
        Cell(map="knockout", condition=label, strength=s, control=baseline)
        for s, label in alone.items()
    ]
    made += _knockouts(found, known, name, at, {0.0: baseline} | alone)
    made += [] if name == REFUSAL else _refusals(known, name, at, alone)
    # Repeats at the same place and strength, such as seeds, would cover each other.
    first: dict[tuple[str, str, float], Cell] = {}
    for cell in made:
        first.setdefault((cell.map, cell.column, cell.strength), cell)
    return list(first.values())


def _added(condition: Condition, name: str) -> list[Add]:
    return [op for op in condition.operations if isinstance(op, Add) and op.direction == name]


def _knockouts(
    found: Results,
    known: Sequence[Condition],
    name: str,
    at: tuple[int, ...],
    controls: Mapping[float, str],
) -> Iterator[Cell]:
    for c in known:
        out = [op for op in c.operations if isinstance(op, Project)]
        added = [op for op in c.operations if isinstance(op, Add)]
        steers = [op for op in added if op.direction == name and op.layers == at]
        if len(out) != 1 or out[0].direction != name or len(added) > 1 or added != steers:
            continue
        strength = added[0].scale if added else 0.0
        twin = unsteered_twin(found.run.conditions, c)
        yield Cell(
            map="knockout",
            condition=c.name,
            layers=out[0].layers,
            strength=strength,
            control=controls.get(strength, ""),
            twin=twin.name if twin else "",
            cancels=c.cancels_steering,
        )


def _refusals(
    known: Sequence[Condition], name: str, at: tuple[int, ...], alone: Mapping[float, str]
) -> list[Cell]:
    placed = [
        (c.name, steer.scale, refusal)
        for c in known
        if len(c.operations) == 2
        for steer in _added(c, name)
        for refusal in _added(c, REFUSAL)
        if steer.layers == at
    ]
    if not placed:
        return []
    # One strength of the steer a map: the one that most conditions have.
    dose = Counter(strength for _, strength, _ in placed).most_common(1)[0][0]
    control = alone.get(dose, "")
    made = [Cell(map="refusal", condition=control)] if control else []
    return made + [
        Cell(
            map="refusal",
            condition=label,
            layers=refusal.layers,
            strength=refusal.scale,
            control=control,
        )
        for label, strength, refusal in placed
        if strength == dose
    ]


def table(found: Results, made: Sequence[Cell]) -> pl.DataFrame:
    """Refusal in every cell: its fields, n, refused, rate, low, high, degenerate, norms, chosen.

    Rates are over the harmful prompts, with Wilson 95 % intervals; `norms` is the strength as text,
    `chosen` whether the cell is at the layers that the study chose by rule or gave. A cell without
    rows is left out.
    """
    at = found.run.layers
    window = range(at.get("window", 0), at.get("window_last", at.get("window", -1)) + 1)
    taken = {"knockout": layer_list(window), "refusal": str(at.get("late_refusal", ""))}
    asked = pl.col("condition").is_in([c.condition for c in made])
    asked &= pl.col("family") == found.spec.main
    counted = found.rows.lazy().filter(asked).group_by("condition").agg(
        n=pl.len(),
        refused=(pl.col("label") == "refusal").sum(),
        degenerate=(pl.col("label") == "degenerate").mean(),
    )  # fmt: skip
    placed = frame(
        [{"column": c.column, "order": c.order, **dataclasses.asdict(c)} for c in made],
        "map:str condition:str column:str order:int strength control:str twin:str cancels:bool",
    )
    joined = placed.join(counted.collect(), on="condition", how="inner", maintain_order="left")
    ends = [stats.wilson(k, n) for k, n in joined.select("refused", "n").iter_rows()]
    return joined.with_columns(
        rate=pl.col("refused") / pl.col("n"),
        low=pl.Series([low for low, _ in ends], dtype=pl.Float64),
        high=pl.Series([high for _, high in ends], dtype=pl.Float64),
        norms=pl.col("strength").map_elements(lambda s: f"{s:g}", return_dtype=pl.String),
        chosen=pl.col("column") == pl.col("map").replace_strict(taken, return_dtype=pl.String),
    ).sort("map", "order", "strength")


def brushed(
    maps: pl.DataFrame, which: Map, selection: Mapping[str, Any], earlier: str = ""
) -> pl.DataFrame:
    """The cells of a map that a brush covers; no lines without a brush.

    A brush has the columns and strengths it touches: {"cells": {"column": [...], "norms": [...]}}.
    A map that was not drawn yet says nothing: then they are the conditions in `earlier`, such as
    `persona, out at 4 x2|persona, out at 5 x2`.
    """
    mine = maps.filter(pl.col("map") == which)
    for fields in selection.values():
        if isinstance(fields, Mapping) and fields.get("column") and fields.get("norms"):
            # Browsers may send numbers for texts that look like them.
            columns = [str(value) for value in fields["column"]]
            norms = [f"{float(value):g}" for value in fields["norms"]]
            return mine.filter(pl.col("column").is_in(columns) & pl.col("norms").is_in(norms))
    return mine.clear() if selection else mine.filter(pl.col("condition").is_in(earlier.split("|")))


def strongest(maps: pl.DataFrame, which: Map) -> pl.DataFrame:
    """The row of a map with the largest strength: what is shown before anything is brushed."""
    mine = maps.filter((pl.col("map") == which) & (pl.col("column") != NONE))
    return mine.filter(pl.col("strength") == pl.col("strength").max())


def flip_table(found: Results, chosen: pl.DataFrame) -> pl.DataFrame:
    """Paired flips of refusal, chosen cells against their controls.

    Columns: those that name and mark a cell, n, raised, lowered, difference, low, high (paired
    bootstrap), p (exact McNemar), p_holm (Holm over the lines), unlike (prompts whose label differs
    from the same projection without steering; null without that twin). Cells without a control, or
    without a prompt in common, are left out.
    """
    labels, lines = Labels(found.rows, found.verdicts), []
    for cell in chosen.filter(pl.col("control") != "").iter_rows(named=True):
        paired = labels.pair(cell["condition"], cell["control"], found.spec.main)
        if not paired.height:
            continue
        counted = asdict(flips(paired, "refusal"))
        unlike = None
        if cell["twin"]:
            twin = labels.pair(cell["condition"], cell["twin"], found.spec.main)
            unlike = int((twin["treated"] != twin["control"]).sum())
        lines.append(cell | counted | {"unlike": unlike})
    made = frame(
        lines,
        "map:str condition:str column:str order:int strength norms:str control:str cancels:bool "
        "degenerate chosen:bool n:int raised:int lowered:int difference low high p unlike:int",
    )
    return made.with_columns(p_holm=pl.Series(stats.holm(made["p"].to_list()), dtype=pl.Float64))


def over_unsteered(found: Results, maps: pl.DataFrame) -> pl.DataFrame:
    """Cells of the knockout map minus the same knockout without steering, as `flip_table`.

    Where nothing is removed, that is steering alone minus the untouched model. 0 means that the
    steering no longer changes the rate.
    """
    steered = maps.filter((pl.col("map") == "knockout") & (pl.col("strength") != 0))
    alone = pl.when(pl.col("column") == NONE).then("control").otherwise("twin")
    return flip_table(found, steered.with_columns(control=alone, twin=pl.lit("")))


def flips_to_read(table: pl.DataFrame) -> pl.DataFrame:
    """Flips with column names to read: counts, net change with its interval, p, the twin's check.

    `unlike twin` counts prompts whose label differs from the same knockout without steering; where
    the steer cancels by algebra it must be 0.
    """
    lines = [
        {
            "condition": row["condition"],
            "paired with": row["control"],
            "n": row["n"],
            "gained": row["raised"],
            "lost": row["lowered"],
            "net, points (95 %)": f"{points(row['difference'])} "
            f"({points(row['low'])} to {points(row['high'])})",
            "McNemar p": p_value(row["p"]),
            "p, Holm": p_value(row["p_holm"]),
            "unlike twin": "–" if row["unlike"] is None else str(row["unlike"]),
            "note": "true by algebra, no evidence" if row["cancels"] else "",
        }
        for row in table.iter_rows(named=True)
    ]
    return pl.DataFrame(lines)


def first_layer(found: Results, conditions: Sequence[str]) -> int:
    """The lowest layer at which any of the conditions does something; 0 when none does."""
    wanted = [c for c in found.run.conditions if c.name in conditions and not _everywhere(c)]
    layers = [layer for c in wanted for op in c.operations for layer in op.layers]
    return min(layers, default=0)


def along_depth(
    found: Results, conditions: Sequence[str], baseline: str, name: str, phase: Phase
) -> pl.DataFrame:
    """How far conditions move the projection on a direction, a line a condition and layer.

    Columns: condition, layer, mean, low, high, n, and after: the operations that have acted by that
    layer, in words.

    A prompt's projection after each layer, averaged over the tokens of the phase, minus the same
    prompt's under the baseline, in natural norms of that layer; the mean over harmful prompts and
    mean ± 1.96 standard errors. Without the subtraction the early layers, whose natural norms are
    small, would hide all others.

    Raises:
      UserError: the rows hold no such projections.
    """
    loaded = directions.load(found.folder / "directions.safetensors")
    column = f"{name}_after_{phase}"
    if column not in found.rows.columns or name not in loaded:
        raise UserError(
            f"{found.folder} recorded no projections on {name}; run its `jaxsteer sweep` again"
        )
    harmful = found.rows.filter(pl.col("family") == found.spec.main)
    norms = np.linalg.norm(loaded[name].vectors.astype(np.float64), axis=1)
    known = np.flatnonzero(norms)

    def projections(condition: str) -> dict[str, Sequence[float]]:
        rows = harmful.filter(condition=condition)
        return dict(rows.select("prompt_id", column).iter_rows())

    before, lines = projections(baseline), []
    for label in dict.fromkeys(conditions):
        after, run = projections(label), found.run.named(label)
        both = [prompt for prompt in after if prompt in before]
        if not both:
            continue
        change = np.array([after[p] for p in both]) - np.array([before[p] for p in both])
        n, moved = len(both), change[:, known] / norms[known]
        half = 1.96 * moved.std(axis=0, ddof=min(n - 1, 1)) / math.sqrt(n)
        for layer, mean, width in zip(known.tolist(), moved.mean(axis=0), half, strict=True):
            ends = (mean - width, mean + width)
            lines.append((label, layer, mean, *ends, n, _acted(run, layer)))
    return frame(lines, "condition:str layer:int mean low high n:int after:str")


def _acted(condition: Condition, layer: int) -> str:
    """The operations of a condition that act at a layer or before, in words."""
    verbs = {True: "adding", False: "removing"}
    parts = []
    for op in condition.operations:
        reached = [at for at in op.layers if at <= layer]
        if reached:
            where = "everywhere" if isinstance(op, Project) and op.everywhere else ""
            where = where or f"at {layer_list(reached)}"
            parts.append(f"{verbs[isinstance(op, Add)]} {op.direction} {where}")
    return " and ".join(parts)


def candidates(found: Results) -> pl.DataFrame:
    """What the study's window and late refusal were chosen from, on prompts not reported on.

    Returns:
      One line per candidate, the chosen one marked: what (`window` or `late refusal`), layers,
      strength (`–` where none applies), chosen, then rates: refused with the persona, refused alone
      and broken alone. `no operation` is the persona alone, and the untouched model.
    """
    tried, layers = found.run.candidates, found.run.layers
    late = layers.get("late_refusal")
    taken = {
        "window": (layers.get("window"), layers.get("window_last"), 0.0),
        "late refusal": (late, late, found.run.refusal_dose),
    }
    lines = [
        {
            "what": what,
            "layers": layer_list(range(c.layer, c.layer + c.width)) or "no operation",
            "strength": f"{c.scale:g}" if c.scale else "–",
            "chosen": "✓" if (c.layer, c.layer + c.width - 1, c.scale) == taken[what] else "",
            "refused with persona": percent(c.steered.refusal),
            "refused alone": percent(c.alone.refusal),
            "broken alone": percent(c.alone.degenerate),
        }
        for what, cells in (("window", tried.windows), ("late refusal", tried.late))
        for c in cells
    ]
    return pl.DataFrame(lines)
