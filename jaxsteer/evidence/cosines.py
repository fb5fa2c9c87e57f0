"""How directions lie to each other: the tables behind the geometry notebook.

Everything is a function of the directions of a results folder and, where it was measured, of its
geometry.json. A layer at which a direction is zero has no cosine and is left out of every mean; it
does not count as 0.
"""

from __future__ import annotations

import dataclasses
import itertools
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
      notes: what is missing or does not fit, and how to mend it, for a banner.
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
            f"{folder} holds no directions.safetensors: run `make demo`, or "
            "`jaxsteer sweep STUDY`, or name another results folder"
        )
    found = directions.load(path)
    meant = [k for k, d in found.items() if d.provenance.get("kind") != "random"]
    named = {k: found[k] for k in sorted(meant, key=lambda k: (k not in CORE, _rank(k)))}
    if not named:
        raise UserError(f"{path} holds random directions only: there is nothing to compare")
    shapes = {d.vectors.shape for d in found.values()}
    if len(shapes) > 1:
        raise UserError(f"{path} mixes directions of several shapes; extract them from one model")
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
        n_layers=next(iter(shapes))[0],
        notes=tuple(notes),
    )


def _rank(name: str) -> int:
    # The sort is stable, so names outside CORE keep the file's order.
    return CORE.index(name) if name in CORE else len(CORE)


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


def pairs(found: Geometry) -> pl.DataFrame:
    """Cosines of all pairs of named directions, a line per pair and layer.

    Columns: first, second, pair, layer, cosine (null where a vector is zero), and of the
    permutation null low, high, p and relabellings (null where it was not measured).
    """
    names = list(found.named)
    units = {k: _unit(d) for k, d in found.named.items()}
    nulls = {
        frozenset((pair.first, pair.second)): pair.null
        for pair in (found.measured.pairs if found.measured else [])
    }
    layers = np.arange(found.n_layers)
    frames: list[dict[str, Sequence[object]]] = []
    for one, other in itertools.combinations(names, 2):
        null = nulls.get(frozenset((one, other)))
        nothing = [None] * found.n_layers
        cosine = np.einsum("ld,ld->l", units[one], units[other])
        frames.append(
            {
                "first": [one] * found.n_layers,
                "second": [other] * found.n_layers,
                "pair": [f"{one} · {other}"] * found.n_layers,
                "layer": layers.tolist(),
                "cosine": [None if np.isnan(c) else float(c) for c in cosine],
                "low": null.low if null else nothing,
                "high": null.high if null else nothing,
                "p": null.p if null else nothing,
                "relabellings": [null.relabellings if null else None] * found.n_layers,
            }
        )
    columns = {k: [v for frame in frames for v in frame[k]] for k in _PAIRS}
    return pl.DataFrame(columns, schema=_PAIRS)


_PAIRS = {
    "first": pl.String, "second": pl.String, "pair": pl.String, "layer": pl.Int64,
    "cosine": pl.Float64, "low": pl.Float64, "high": pl.Float64, "p": pl.Float64,
    "relabellings": pl.Float64,
}  # fmt: skip


def _unit(direction: Direction) -> Float[np.ndarray, "layer d_model"]:
    wide = direction.vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, norms, out=np.full_like(wide, np.nan), where=norms > 0)


def ranked(table: pl.DataFrame, window: Window) -> list[str]:
    """Pairs, those within CORE first and then by size of their mean cosine over the window."""
    core = pl.col("first").is_in(CORE) & pl.col("second").is_in(CORE)
    shown = means(table, window).with_columns(core=core, size=pl.col("cosine").abs())
    return shown.sort("core", "size", descending=True, nulls_last=True)["pair"].to_list()


def random_cosines(found: Geometry, name: str) -> pl.DataFrame:
    """Smallest and largest cosine of a direction with the random controls, by layer.

    Columns: layer, low, high, n (number of random directions); no lines without any.
    """
    schema = {"layer": pl.Int64, "low": pl.Float64, "high": pl.Float64, "n": pl.Int64}
    if not found.random:
        return pl.DataFrame(schema=schema)
    unit = _unit(found.named[name])
    cosines = np.stack([np.einsum("ld,ld->l", unit, _unit(d)) for d in found.random.values()])
    kept = ~np.isnan(cosines).any(axis=0)
    return pl.DataFrame(
        {
            "layer": np.arange(found.n_layers)[kept],
            "low": cosines.min(axis=0)[kept],
            "high": cosines.max(axis=0)[kept],
            "n": np.full(int(kept.sum()), len(cosines)),
        },
        schema=schema,
    )


def paper(n_layers: int) -> pl.DataFrame:
    """Where the paper's two cosines would sit in a model of another depth: at the same share of it.

    Columns: model, cosine, layer (a fraction of a layer is possible), says.

    >>> paper(32)["layer"].to_list()[0]
    20.0
    """
    lines = [
        {
            "model": model,
            "cosine": value,
            "layer": PAPER_LAYER / (blocks - 1) * (n_layers - 1),
            "says": f"{model} at its layer {PAPER_LAYER}: {value:+.3f}".replace("-0", "−0"),
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
    found = inside.group_by("first", "second", "pair", maintain_order=True).agg(
        pl.col("cosine").mean(),
        least=pl.col("cosine").min(),
        most=pl.col("cosine").max(),
        low=pl.col("low").mean(),
        high=pl.col("high").mean(),
        layers=pl.len(),
    )
    return found


def gram(averaged: pl.DataFrame, names: Sequence[str]) -> Float[np.ndarray, "name name"]:
    """Mean cosines as a symmetric matrix; a pair without any has 0, so it pulls nowhere."""
    index = {name: i for i, name in enumerate(names)}
    matrix = np.eye(len(names))
    for one, other, cosine in averaged.select("first", "second", "cosine").iter_rows():
        matrix[index[one], index[other]] = matrix[index[other], index[one]] = cosine
    return matrix


def strongest(averaged: pl.DataFrame, names: Sequence[str], most: int = 60) -> list[str]:
    """The names that a readable square has room for: those with the largest cosine to any other."""
    ends = [averaged.select(pl.col(end).alias("name"), "cosine") for end in ("first", "second")]
    reach = pl.concat(ends).group_by("name").agg(pl.col("cosine").abs().max())
    first = set(reach.sort("cosine", "name", descending=[True, False]).head(most)["name"])
    return [name for name in names if name in first]


def hierarchical(matrix: Float[np.ndarray, "name name"]) -> list[int]:
    """An order in which similar directions are neighbours and opposite ones lie far apart.

    Average linkage on 1 - cosine, leaves ordered to make neighbours as alike as the tree allows
    (Bar-Joseph et al. 2001).
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
    flipped = averaged.rename({"first": "second", "second": "first"})
    both = pl.concat([averaged, flipped.select(averaged.columns)])
    inside = pl.col("cosine").is_between("low", "high")
    known = pl.when(pl.col("low").is_null()).then(pl.lit("null not measured"))
    chance = known.when(inside).then(pl.lit("within chance")).otherwise(pl.lit("beyond chance"))
    rank = {name: i for i, name in enumerate(order)}
    return (
        both.select(row="first", column="second", cosine="cosine", low="low", high="high")
        .with_columns(chance=chance)
        .sort(
            pl.col("row").replace_strict(rank, return_dtype=pl.Int64),
            pl.col("column").replace_strict(rank, return_dtype=pl.Int64),
        )
    )


def opposites(found: Geometry) -> set[frozenset[str]]:
    """Pairs of directions whose traits name each other as opposites."""
    shipped = prompts.traits()
    opposite = {name: prompts.trait(name).opposite for name in found.named if name in shipped}
    return {frozenset((a, b)) for a, b in opposite.items() if b in found.named}


def extremes(averaged: pl.DataFrame, named: set[frozenset[str]], most: int = 24) -> pl.DataFrame:
    """The pairs from most opposed to most aligned, with a mark on the traits' named opposites.

    Beyond `most`, named opposites stay and the middle goes.
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
    """PCA of the unit directions from their cosines alone, centred.

    The mean cosine over layers is the inner product of the unit vectors of all those layers laid
    end to end, so this is the PCA of those long vectors. Without centring the first component is
    mostly the mean.
    """
    n = len(names)
    centring = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(centring @ matrix @ centring)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    # A component has no sign of its own: the name that lies furthest out is put to the right.
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(n)])
    at = vectors * np.where(signs == 0, 1, signs) * np.sqrt(values)
    second = at[:, 1] if n > 1 else np.zeros(n)
    total = values.sum()
    return Components(
        table=pl.DataFrame({"name": list(names), "x": at[:, 0], "y": second}),
        shares=values / total if total > 0 else values,
    )


def reliability(found: Geometry, window: Window) -> pl.DataFrame:
    """Split-half reliabilities: direction, unit, units, layer, mean, low, high."""
    lines = [
        {
            "direction": name,
            "unit": unit,
            "units": halves.units,
            "layer": layer,
            "mean": halves.mean[layer],
            "low": halves.low[layer],
            "high": halves.high[layer],
        }
        for name, measured in _measured(found).items()
        for unit, halves in measured.reliability.items()
        for layer in range(window[0], window[1] + 1)
    ]
    schema = {"direction": pl.String, "unit": pl.String, "units": pl.Int64, "layer": pl.Int64}
    return pl.DataFrame(lines, schema={**schema, **dict.fromkeys(_ENDS, pl.Float64)})


_ENDS = ("mean", "low", "high")


def unreliable(found: Geometry) -> dict[str, str]:
    """Directions whose reliability was not measured, and why."""
    return {k: m.not_measured for k, m in _measured(found).items() if m.not_measured}


def _measured(found: Geometry) -> dict[str, Measured]:
    return found.measured.directions if found.measured else {}


def norms(found: Geometry, window: Window) -> pl.DataFrame:
    """Norms beside the stream's: direction, layer, norm, residual (null if unknown), share."""
    lines = []
    for name, direction in found.named.items():
        norm = np.linalg.norm(direction.vectors.astype(np.float64), axis=1)
        known = direction.provenance.get("residual_norm") or [None] * found.n_layers
        for layer in range(window[0], window[1] + 1):
            residual = known[layer]
            share = norm[layer] / residual if residual else None
            lines.append((name, layer, float(norm[layer]), residual, share))
    schema = {"direction": pl.String, "layer": pl.Int64}
    floats = dict.fromkeys(("norm", "residual", "share"), pl.Float64)
    return pl.DataFrame(lines, schema={**schema, **floats}, orient="row")
