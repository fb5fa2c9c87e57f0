"""Where in depth an intervention brings refusal back: cells of (layer, strength), and their flips.

A study's conditions become cells of two maps. `knockout`: a direction is added at strength s and
projected out at some layers; s = 0 is the projection alone, its control. `refusal`: the direction
is added at full dose, and the refusal direction at some layer with strength s. What the cells are
compared with, the steer alone or nothing at all, stands in the column `none`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
from jaxtyping import Float

from jaxsteer import stats
from jaxsteer.directions import direction as directions
from jaxsteer.errors import UserError
from jaxsteer.evidence.paired import flips, pairs
from jaxsteer.study.record import Add, Condition, Project
from jaxsteer.study.results import Results
from jaxsteer.words import layer_list

Map = Literal["knockout", "refusal"]
Phase = Literal["prompt", "response"]
NONE = "none"
FAMILY = "strongreject"
REFUSAL = "refusal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A condition's place on a map.

    Attributes:
      map: which map.
      condition: its name.
      column: the layers in words, or `none`.
      order: sorts columns by depth.
      strength: of the steer (`knockout`) or of the refusal direction (`refusal`), natural norms.
      control: the condition whose prompts it is paired with; "" for the baseline.
      twin: the same projection without steering; "" if there is none.
      cancels: whether the projection undoes the steer by algebra.
    """

    map: Map
    condition: str
    column: str
    order: int
    strength: float
    control: str
    twin: str
    cancels: bool


def _everywhere(condition: Condition) -> bool:
    """Whether a condition removes a direction from every write of the model."""
    return any(isinstance(op, Project) and op.everywhere for op in condition.operations)


def modes(found: Results) -> list[str]:
    """The persona modes that were run, in order; [""] without any."""
    return list(dict.fromkeys(c.mode for c in found.run.conditions))


def steered(found: Results) -> list[str]:
    """Directions that are added alone, those that are also projected out again first."""
    added: dict[str, bool] = {}
    for condition in found.run.conditions:
        match condition.operations:
            case (Add(direction=name),) if condition.seed is None:
                added.setdefault(name, False)
    for condition in found.run.conditions:
        done = () if _everywhere(condition) else condition.operations
        for name in {op.direction for op in done if isinstance(op, Add)} & set(added):
            added[name] |= any(isinstance(op, Project) and op.direction == name for op in done)
    return sorted(added, key=lambda name: not added[name])


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
    baseline = next((c.name for c in known if not c.operations), "")
    if not steers:
        return []
    # The layer that most conditions steer at; another one would be another map.
    at = Counter(op.layers for c in known for op in _added(c, name)).most_common(1)[0][0]
    alone = {strength: label for (layers, strength), label in steers.items() if layers == at}
    made = [_cell("knockout", baseline, (), 0.0, "")] if baseline else []
    made += [_cell("knockout", label, (), s, baseline) for s, label in alone.items()]
    made += [cell for c in known if (cell := _knockout(c, name, at, alone, baseline))]
    made = _with_twins(made) + _refusals(known, name, at, alone)
    # Repeats that come to the same place and strength, such as seeds, would lie on each other.
    first: dict[tuple[str, str, float], Cell] = {}
    for cell in made:
        first.setdefault((cell.map, cell.column, cell.strength), cell)
    return list(first.values())


def _added(condition: Condition, name: str) -> list[Add]:
    return [op for op in condition.operations if isinstance(op, Add) and op.direction == name]


def _cell(
    which: Map,
    condition: str,
    layers: tuple[int, ...],
    strength: float,
    control: str,
    cancels: bool = False,
) -> Cell:
    # Windows stand behind single layers, both by depth.
    order = -1 if not layers else layers[0] + 1000 * (len(layers) > 1)
    column = layer_list(layers) if layers else NONE
    return Cell(
        map=which,
        condition=condition,
        column=column,
        order=order,
        strength=strength,
        control=control,
        twin="",
        cancels=cancels,
    )


def _knockout(
    condition: Condition,
    name: str,
    at: tuple[int, ...],
    alone: Mapping[float, str],
    baseline: str,
) -> Cell | None:
    out = [op for op in condition.operations if isinstance(op, Project)]
    added = [op for op in condition.operations if isinstance(op, Add)]
    if len(out) != 1 or out[0].direction != name or len(added) > 1:
        return None
    if added and (added[0].direction != name or added[0].layers != at):
        return None
    strength = added[0].scale if added else 0.0
    control = alone.get(strength, "") if added else baseline
    cancels = condition.cancels_steering
    return _cell("knockout", condition.name, out[0].layers, strength, control, cancels)


def _with_twins(made: Sequence[Cell]) -> list[Cell]:
    twins: dict[str, str] = {}
    for cell in made:
        if not cell.strength:
            twins.setdefault(cell.column, cell.condition)
    return [
        dataclasses.replace(cell, twin=twins.get(cell.column, ""))
        if cell.strength and cell.column != NONE
        else cell
        for cell in made
    ]


def _refusals(
    known: Sequence[Condition],
    name: str,
    at: tuple[int, ...],
    alone: Mapping[float, str],
) -> list[Cell]:
    placed = []
    for c in known:
        first, second = _added(c, name), _added(c, REFUSAL)
        if len(c.operations) == 2 and len(first) == len(second) == 1 and first[0].layers == at:
            placed.append((c.name, first[0].scale, second[0]))
    if not placed:
        return []
    # One strength of the steer a map: the one that most conditions have.
    dose = Counter(strength for _, strength, _ in placed).most_common(1)[0][0]
    control = alone.get(dose, "")
    made = [_cell("refusal", control, (), 0.0, "")] if control else []
    return made + [
        _cell("refusal", label, added.layers, added.scale, control)
        for label, strength, added in placed
        if strength == dose
    ]


def table(found: Results, made: Sequence[Cell]) -> pl.DataFrame:
    """Refusal in every cell: the cell's fields, n, refused, rate, low, high, degenerate.

    Rates are over the harmful prompts that have a label, with Wilson 95 % intervals; a cell
    without any is left out.
    """
    wanted = [cell.condition for cell in made]
    asked = found.rows.lazy().filter(
        (pl.col("family") == FAMILY)
        & pl.col("condition").is_in(wanted)
        & pl.col("label").is_not_null()
    )
    counted = asked.group_by("condition").agg(
        n=pl.len(),
        refused=(pl.col("label") == "refusal").sum(),
        degenerate=(pl.col("label") == "degenerate").mean(),
    )
    placed = pl.DataFrame([dataclasses.asdict(cell) for cell in made], schema=_CELL)
    joined = placed.join(counted.collect(), on="condition", how="inner", maintain_order="left")
    ends = [stats.wilson(k, n) for k, n in joined.select("refused", "n").iter_rows()]
    return joined.with_columns(
        rate=pl.col("refused") / pl.col("n"),
        low=pl.Series([low for low, _ in ends], dtype=pl.Float64),
        high=pl.Series([high for _, high in ends], dtype=pl.Float64),
        norms=pl.col("strength").map_elements(lambda s: f"{s:g}", return_dtype=pl.String),
    ).sort("map", "order", "strength")


_CELL = {
    "map": pl.String, "condition": pl.String, "column": pl.String, "order": pl.Int64,
    "strength": pl.Float64, "control": pl.String, "twin": pl.String, "cancels": pl.Boolean,
}  # fmt: skip


def brushed(maps: pl.DataFrame, which: Map, selection: Mapping[str, Any]) -> pl.DataFrame:
    """The cells of a map that a brush covers; no lines without a brush.

    A brush has the columns and strengths it touches: {"cells": {"column": [...], "norms": [...]}}.
    """
    mine = maps.filter(pl.col("map") == which)
    for fields in selection.values():
        if isinstance(fields, Mapping) and fields.get("column") and fields.get("norms"):
            # Browsers may send numbers for texts that look like them.
            columns = [str(value) for value in fields["column"]]
            norms = [f"{float(value):g}" for value in fields["norms"]]
            return mine.filter(pl.col("column").is_in(columns) & pl.col("norms").is_in(norms))
    return mine.clear()


def strongest(maps: pl.DataFrame, which: Map) -> pl.DataFrame:
    """The row of a map with the largest strength: what is shown before anything is brushed."""
    mine = maps.filter((pl.col("map") == which) & (pl.col("column") != NONE))
    return mine.filter(pl.col("strength") == pl.col("strength").max())


def flip_table(found: Results, chosen: pl.DataFrame) -> pl.DataFrame:
    """Paired flips of refusal, chosen cells against their controls.

    Columns: those of `chosen` used as keys (map, condition, column, norms, control, cancels), n,
    raised, lowered, difference, low, high (paired bootstrap), p (exact McNemar), p_holm (Holm over
    the lines), unlike (prompts whose label differs from the same projection without steering; null
    without that twin). Cells without a control, or without a prompt in common, are left out.
    """
    lines = []
    for cell in chosen.filter(pl.col("control") != "").iter_rows(named=True):
        paired = pairs(found.rows, cell["condition"], cell["control"], FAMILY).drop_nulls()
        if not paired.height:
            continue
        counted = dataclasses.asdict(flips(paired, "refusal"))
        keys = ("map", "condition", "column", "norms", "control", "cancels")
        unlike = None
        if cell["twin"]:
            twin = pairs(found.rows, cell["condition"], cell["twin"], FAMILY)
            unlike = int((twin["treated"] != twin["control"]).sum())
        lines.append({**{k: cell[k] for k in keys}, **counted, "unlike": unlike})
    made = pl.DataFrame(lines, schema=_FLIPS)
    return made.with_columns(p_holm=pl.Series(stats.holm(made["p"].to_list()), dtype=pl.Float64))


_FLIPS = {
    "map": pl.String, "condition": pl.String, "column": pl.String, "norms": pl.String,
    "control": pl.String, "cancels": pl.Boolean, "n": pl.Int64, "raised": pl.Int64,
    "lowered": pl.Int64, "difference": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    "p": pl.Float64, "unlike": pl.Int64,
}  # fmt: skip


def first_layer(found: Results, conditions: Sequence[str]) -> int:
    """The lowest layer at which any of the conditions does something; 0 when none does."""
    wanted = [c for c in found.run.conditions if c.name in conditions and not _everywhere(c)]
    layers = [layer for c in wanted for op in c.operations for layer in op.layers]
    return min(layers, default=0)


def natural(found: Results, name: str) -> Float[np.ndarray, " layer"] | None:
    """The natural norms of a direction by layer, or None when the folder does not have it."""
    loaded = directions.load(found.folder / "directions.safetensors")
    if name not in loaded:
        return None
    return np.linalg.norm(loaded[name].vectors.astype(np.float64), axis=1)


def along_depth(
    found: Results, conditions: Sequence[str], baseline: str, name: str, phase: Phase
) -> pl.DataFrame:
    """How far conditions move the projection on a direction: condition, layer, mean, low, high, n.

    A prompt's projection after each layer, averaged over the tokens of the phase, minus the same
    prompt's under the baseline, in natural norms of that layer; the mean over harmful prompts and
    mean ± 1.96 standard errors. Without the subtraction the early layers, whose natural norms are
    small, would hide all others.

    Raises:
      UserError: the rows hold no such projections.
    """
    column, norms = f"{name}_after_{phase}", natural(found, name)
    if column not in found.rows.columns or norms is None:
        raise UserError(
            f"{found.folder} recorded no projections on {name}; run its `jaxsteer sweep` again"
        )
    order = list(dict.fromkeys(conditions))
    harmful = found.rows.lazy().filter(pl.col("family") == FAMILY)

    def long(which: Sequence[str], value: str) -> pl.LazyFrame:
        asked = harmful.filter(pl.col("condition").is_in(which))
        numbered = asked.select(
            "condition",
            "prompt_id",
            pl.col(column).alias(value),
            layer=pl.int_ranges(pl.col(column).list.len()),
        )
        return numbered.explode(value, "layer")

    scale = pl.LazyFrame({"layer": np.arange(len(norms)), "norm": norms})
    rank = {label: i for i, label in enumerate(order)}
    half = 1.96 * pl.col("sd").fill_null(0.0) / pl.col("n").sqrt()
    return (
        long(order, "value")
        .join(long([baseline], "before").drop("condition"), on=["prompt_id", "layer"])
        .join(scale.filter(pl.col("norm") > 0), on="layer")
        .with_columns(moved=(pl.col("value") - pl.col("before")) / pl.col("norm"))
        .group_by("condition", "layer")
        .agg(mean=pl.col("moved").mean(), sd=pl.col("moved").std(), n=pl.len())
        .with_columns(low=pl.col("mean") - half, high=pl.col("mean") + half)
        .drop("sd")
        .sort(pl.col("condition").replace_strict(rank, return_dtype=pl.Int64), "layer")
        .collect()
    )
