"""Cosines of a study's directions over depth, as the tables of the geometry notebook.

Everything is computed from the directions of a results folder and, where they were measured, from
its geometry.json. A layer at which a direction is zero has no cosine: it is left out of every mean
and does not count as 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from jaxsteer.data import prompts
from jaxsteer.directions import direction as directions
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.evidence import reliability as measuring
from jaxsteer.evidence.reliability import Measured, Measurements
from jaxsteer.files import frame
from jaxsteer.files import meant as near
from jaxsteer.words import signed

CORE = ("persona", "refusal", "axis")
# cos(persona, refusal) at "layer 20" in arXiv 2606.26161: model, number of blocks, value.
PAPER = (("Llama-3.1-8B", 32, -0.180), ("Qwen2.5-7B", 28, -0.279))
PAPER_LAYER = 20
Window = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """The directions of one results folder and what was measured of them.

    Attributes:
      named: directions that mean something, by name.
      random: random controls, by name.
      measured: geometry.json, or None.
      n_layers: number of blocks.
      notes: what is missing or does not fit, and how to correct it, for a banner.
    """

    named: Mapping[str, Direction]
    random: Mapping[str, Direction]
    measured: Measurements | None
    n_layers: int
    notes: tuple[str, ...]


def load(folder: Path) -> Geometry:
    """Read a folder's directions, and its geometry.json if there is one.

    Raises:
      UserError: no directions, or a file that cannot be read.
    """
    path = folder / "directions.safetensors"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no directions.safetensors{near(folder)}: run `make demo`, or "
            "`jaxsteer sweep STUDY`, or name another results folder"
        )
    found = directions.load(path)
    meant = [k for k, d in found.items() if d.provenance.get("kind") != "random"]
    # The sort is stable, so names outside CORE keep the file's order.
    named = {k: found[k] for k in sorted(meant, key=lambda k: CORE.index(k) if k in CORE else 9)}
    if not named:
        raise UserError(f"{path} holds random directions only: there is nothing to compare")
    measured = measuring.load(folder)
    again = f"run `jaxsteer geometry {folder} --model DIR`"
    notes = []
    if measured is None:
        notes.append(f"No geometry.json: the null bands and reliabilities are missing; {again}.")
    else:
        hashes = {k: entry.sha256 for k, entry in measured.directions.items()}
        stale = [k for k, d in named.items() if hashes.get(k, d.sha256) != d.sha256]
        absent = [k for k in named if k not in hashes]
        if stale:
            notes.append(f"geometry.json was measured on another {', '.join(stale)}; {again}.")
            measured = None
        elif absent:
            notes.append(f"geometry.json does not cover {', '.join(absent)}; {again}.")
    return Geometry(
        named=named,
        random={k: d for k, d in found.items() if k not in named},
        measured=measured,
        n_layers=len(next(iter(named.values())).vectors),
        notes=tuple(notes),
    )


def whole(found: Geometry) -> Window:
    """The window of all layers."""
    return 0, found.n_layers - 1


def window_of(selection: Mapping[str, Any], n_layers: int) -> Window:
    """A brushed range of the `layer` axis as whole layers, both ends included.

    No brush, or one between two layers, means all of them.

    >>> window_of({"layers": {"layer": [3.6, 9.2]}}, 30), window_of({}, 30)
    ((4, 9), (0, 29))
    """
    for fields in selection.values():
        ends = fields.get("layer") if isinstance(fields, Mapping) else None
        if ends:
            low, high = min(ends), max(ends)
            first, last = max(0, int(np.ceil(low))), min(n_layers - 1, int(np.floor(high)))
            if first <= last:
                return first, last
    return 0, n_layers - 1


def named_window(text: str, n_layers: int) -> Window | None:
    """The window that a text such as `4..9` names, or None."""
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    first, last = map(int, ends.groups()) if ends else (0, n_layers)
    return (first, last) if first <= last < n_layers else None


def pairs(found: Geometry) -> pl.DataFrame:
    """Cosines of all pairs of named directions, a line per pair and layer.

    Columns: first, second, pair, layer, cosine (null where a vector is zero), and of the
    permutation null low, high, p and relabellings (null where it was not measured).
    """
    nulls = {
        frozenset((pair.first, pair.second)): pair.null
        for pair in (found.measured.pairs if found.measured else [])
    }
    lines = []
    for one, other in itertools.combinations(found.named, 2):
        null = nulls.get(frozenset((one, other)))
        cosine = _cosines(found.named[one], found.named[other])
        for layer, value in enumerate(cosine.tolist()):
            at = (null.low[layer], null.high[layer], null.p[layer]) if null else (None,) * 3
            many = null.relabellings if null else None
            known = None if np.isnan(value) else value
            lines.append((one, other, f"{one} · {other}", layer, known, *at, many))
    columns = "first:str second:str pair:str layer:int cosine low high p relabellings"
    return frame(lines, columns)


def _cosines(one: Direction, other: Direction) -> Float[np.ndarray, " layer"]:
    """Cosine per layer, NaN where either vector is zero."""
    nonzero = one.vectors.any(axis=1) & other.vectors.any(axis=1)
    return np.where(nonzero, measuring.cosines(one.vectors, other.vectors), np.nan)


def ranked(table: pl.DataFrame, window: Window) -> list[str]:
    """Pairs, those within CORE first and then by size of their mean cosine over the window."""
    core = pl.col("first").is_in(CORE) & pl.col("second").is_in(CORE)
    shown = means(table, window).with_columns(core=core, size=pl.col("cosine").abs())
    return shown.sort("core", "size", descending=True, nulls_last=True)["pair"].to_list()


def random_cosines(found: Geometry, name: str) -> pl.DataFrame:
    """Smallest and largest cosine of a direction with the random controls, by layer.

    Columns: layer, low, high, n (number of random directions); no lines without any.
    """
    columns = "layer:int low high n:int"
    if not found.random:
        return frame([], columns)
    cosines = np.stack([_cosines(found.named[name], d) for d in found.random.values()])
    kept = ~np.isnan(cosines).any(axis=0)
    low, high = cosines.min(axis=0).tolist(), cosines.max(axis=0).tolist()
    n = len(cosines)
    return frame([(k, low[k], high[k], n) for k in np.flatnonzero(kept).tolist()], columns)


def paper(n_layers: int) -> pl.DataFrame:
    """The paper's two cosines, placed at the same share of depth in a model of another depth.

    Columns: model, cosine, layer (a fraction of a layer is possible), says.

    >>> paper(32)["layer"].to_list()[0]
    20.0
    """
    lines = [
        {
            "model": model,
            "cosine": value,
            "layer": PAPER_LAYER / (blocks - 1) * (n_layers - 1),
            "says": f"{model} at its layer {PAPER_LAYER}: {signed(value, 3)}",
        }
        for model, blocks, value in PAPER
    ]
    return pl.DataFrame(lines)


def means(table: pl.DataFrame, window: Window) -> pl.DataFrame:
    """Per pair, over the window: mean cosine, its smallest and largest, and the mean null range.

    Columns: first, second, pair, cosine, least, most, low, high, layers (how many had a cosine).
    The mean of a null's quantiles is about the quantile of a null in which all layers move
    together, so it is a cautious range for the mean.
    """
    inside = table.filter(pl.col("layer").is_between(*window) & pl.col("cosine").is_not_null())
    return inside.group_by("first", "second", "pair", maintain_order=True).agg(
        pl.col("cosine").mean(),
        least=pl.col("cosine").min(),
        most=pl.col("cosine").max(),
        low=pl.col("low").mean(),
        high=pl.col("high").mean(),
        layers=pl.len(),
    )


def gram(averaged: pl.DataFrame, names: Sequence[str]) -> Float[np.ndarray, "name name"]:
    """Mean cosines as a symmetric matrix; a pair without any has 0, so it pulls nowhere."""
    index = {name: i for i, name in enumerate(names)}
    matrix = np.eye(len(names))
    for one, other, cosine in averaged.select("first", "second", "cosine").iter_rows():
        matrix[index[one], index[other]] = matrix[index[other], index[one]] = cosine
    return matrix


def strongest(averaged: pl.DataFrame, names: Sequence[str], most: int = 60) -> list[str]:
    """The names with the largest cosine to any other, at most as many as a matrix can show."""
    ends = [averaged.select(pl.col(end).alias("name"), "cosine") for end in ("first", "second")]
    reach = pl.concat(ends).group_by("name").agg(pl.col("cosine").abs().max())
    first = set(reach.sort("cosine", "name", descending=[True, False]).head(most)["name"])
    return [name for name in names if name in first]


def hierarchical(matrix: Float[np.ndarray, "name name"]) -> list[int]:
    """An order in which similar directions are neighbours and opposite ones are far apart.

    Average linkage on 1 - cosine, with the leaves ordered to make neighbours as similar as the tree
    allows (Bar-Joseph et al. 2001).
    """
    if len(matrix) < 3:
        return list(range(len(matrix)))
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    distance = np.clip(1 - matrix, 0, 2)
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return [int(leaf) for leaf in hierarchy.leaves_list(tree)]


def matrix_table(averaged: pl.DataFrame, order: Sequence[str]) -> pl.DataFrame:
    """The mean cosines as cells of a square in the given order, both halves.

    Columns: row, column, cosine, low, high, chance (`within chance`, `beyond chance` or
    `null not measured`). The diagonal is left out: it is 1 by definition.
    """
    known = {}
    for one, other, *figures in averaged.select("first", "second", "cosine", "low", "high").rows():
        known[one, other] = known[other, one] = figures
    lines = []
    for row, column in itertools.permutations(order, 2):
        if (row, column) in known:
            cosine, low, high = known[row, column]
            chance = "null not measured"
            if low is not None:
                chance = f"{'within' if low <= cosine <= high else 'beyond'} chance"
            lines.append((row, column, cosine, low, high, chance))
    return frame(lines, "row:str column:str cosine low high chance:str")


def opposites(found: Geometry) -> set[frozenset[str]]:
    """Pairs of directions whose traits name each other as opposites."""
    shipped = prompts.traits()
    opposite = {name: prompts.trait(name).opposite for name in found.named if name in shipped}
    return {frozenset((a, b)) for a, b in opposite.items() if b in found.named}


def extremes(averaged: pl.DataFrame, named: set[frozenset[str]], most: int = 24) -> pl.DataFrame:
    """The pairs from most opposed to most aligned, with `opposite`: whether `named` has the pair.

    Of more than `most` pairs, the outermost and the named ones are kept.
    """
    marks = [frozenset(pair) in named for pair in averaged.select("first", "second").iter_rows()]
    table = averaged.with_columns(opposite=pl.Series(marks, dtype=pl.Boolean)).sort("cosine")
    if table.height <= most:
        return table
    position = pl.int_range(pl.len())
    outer = (position < most // 2) | (position >= pl.len() - most // 2)
    return table.filter(outer | pl.col("opposite"))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Components:
    """Principal components of unit directions.

    Attributes:
      table: name, x, y: coordinates on the first two, in cosine units.
      shares: share of the centred variance of every component, largest first.
    """

    table: pl.DataFrame
    shares: Float[np.ndarray, " component"]


def components(matrix: Float[np.ndarray, "name name"], names: Sequence[str]) -> Components:
    """PCA of at least two unit directions from their cosines alone, centred.

    The mean cosine over layers is, up to a factor, the inner product of the unit vectors of all
    layers concatenated, so this is the PCA of those long vectors. Without centring the first
    component is mostly the mean.
    """
    n = len(names)
    centring = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(centring @ matrix @ centring)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    # A component has no sign of its own: the name furthest from 0 is put on the positive side.
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(n)])
    at = vectors * signs * np.sqrt(values)
    return Components(
        table=pl.DataFrame({"name": list(names), "x": at[:, 0], "y": at[:, 1]}),
        shares=values / max(values.sum(), 1e-30),
    )


def reliability(found: Geometry, window: Window) -> pl.DataFrame:
    """Split-half reliabilities: direction, unit, units, layer, mean, low, high."""
    lines = [
        (name, unit, halves.units, layer, halves.mean[layer], halves.low[layer], halves.high[layer])
        for name, measured in _measured(found).items()
        for unit, halves in measured.reliability.items()
        for layer in range(window[0], window[1] + 1)
    ]
    return frame(lines, "direction:str unit:str units:int layer:int mean low high")


def growth(found: Geometry, window: Window) -> pl.DataFrame:
    """How halves agree by their size: direction, unit, units (in a half, a side), mean, low, high.

    The mean over the window's layers, and the smallest and largest of them.
    """
    lines = []
    for name, measured in _measured(found).items():
        for unit, halves in measured.reliability.items():
            for units, curve in sorted(halves.growth.items()):
                inside = curve[window[0] : window[1] + 1]
                lines.append((name, unit, units, float(np.mean(inside)), min(inside), max(inside)))
    return frame(lines, "direction:str unit:str units:int mean low high")


def unreliable(found: Geometry) -> dict[str, str]:
    """Directions whose reliability was not measured, and why."""
    return {k: m.not_measured for k, m in _measured(found).items() if m.not_measured}


def _measured(found: Geometry) -> dict[str, Measured]:
    return found.measured.directions if found.measured else {}


def norms(found: Geometry, window: Window) -> pl.DataFrame:
    """Norms of directions and of the stream.

    Columns: direction, layer, norm, residual (of the stream, null if unknown), share (norm over
    residual).
    """
    lines = []
    for name, direction in found.named.items():
        norm = np.linalg.norm(direction.vectors.astype(np.float64), axis=1)
        known = direction.provenance.get("residual_norm") or [None] * found.n_layers
        for layer in range(window[0], window[1] + 1):
            residual = known[layer]
            share = norm[layer] / residual if residual else None
            lines.append((name, layer, float(norm[layer]), residual, share))
    return frame(lines, "direction:str layer:int norm residual share")
