# /// script
# [tool.marimo.opengraph]
# title = "2 Geometry"
# description = "Do persona and refusal point the same way? Cosines beside those of chance."
# ///
"""Geometry: cosines between persona, refusal and other directions, against chance.

marimo edit notebooks/2_geometry.py
python notebooks/2_geometry.py -- --results results/smollm2-demo-smollm2-135m
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="2. Geometry", html_head_file="offline.html")

with app.setup:
    from pathlib import Path

    import marimo as mo

    from jaxsteer.evidence import cosines
    from jaxsteer.evidence.charts import geometry as charts
    from jaxsteer.evidence.charts import marks, opening

    marks.use()
    ROOT = Path(__file__).resolve().parent.parent


@app.cell
def _():
    results = opening.results_menu(ROOT)
    mo.vstack([mo.md("# Geometry"), results])
    return (results,)


@app.cell
def _(results):
    _head = opening.head(ROOT, "2_geometry.py", results.value)
    found = opening.attempt(cosines.load, ROOT / results.value)
    mo.vstack([_head, *([opening.note(*found.notes)] if found.notes else [])])
    return (found,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    A direction is one vector per layer. Two directions $d$ and $e$ are compared by their
    **cosine**,

    $$\cos(d, e) = \frac{d \cdot e}{\lVert d \rVert \, \lVert e \rVert}$$

    which is $+1$ when they point the same way, $-1$ when they are opposed, and $0$ when moving
    along one does not change the projection on the other. If a persona direction were only the
    negative of the refusal direction, their cosine would be near $-1$, and "the persona switches
    refusal off" would say little more than "subtracting refusal removes refusal". The paper finds
    −0.180 and −0.279 in two large models: far from $-1$, hence two different directions.

    A small cosine proves nothing by itself. In many dimensions almost any two vectors are nearly
    perpendicular, and the states of a language model share much that has nothing to do with the
    prompt. So every number here is shown beside the values that **chance** gives.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## One pair over depth

    The chart shows three references.

    - **Grey band**: the *permutation null*. The labels of one direction's samples ("shows the
      trait" or "does not") are shuffled between whole instructions or prompts, the direction is
      computed again, and so is its cosine; 95 % of these cosines are in the band. What all samples
      share has the same effect on them. The shuffling is done for each direction of the pair, and
      the wider range is drawn.
    - **Mauve band**: the range over random directions. It is narrow, about $\pm 2/\sqrt{d}$ in a
      stream of $d$ numbers, because it assumes the same spread in all dimensions. The stream has
      not, and a cosine outside the mauve band alone is no finding.
    - **Diamonds**, for persona and refusal: what the paper reports for layer 20 of its two models,
      drawn at the same *share of depth*. (What it calls layer 20 may be our `resid_post.19`:
      its code numbers the embedding 0.)

    By chance alone, about one layer in twenty has a cosine outside the grey band.

    **Drag across the chart** to choose a window of layers for everything below; a click outside the
    window removes it.
    """)
    return


@app.cell
def _(found):
    table = cosines.pairs(found)
    _names = cosines.ranked(table, cosines.whole(found))
    mo.stop(not _names, opening.note("This folder has a single direction, and a cosine needs two."))
    pair = opening.menu("pair", {name: name for name in _names}, label="pair")
    pair  # noqa: B018
    return pair, table


@app.cell
def _(found):
    # The window outlives the chart that it was brushed on; it belongs to this folder.
    kept = {"window": cosines.named_window(str(mo.query_params().get("window")), found.n_layers)}
    return (kept,)


@app.cell
def _(found, kept, pair, table):
    _one = table.filter(table["pair"] == pair.value)
    _ends = {_one["first"][0], _one["second"][0]}
    _chart = charts.pair_chart(
        _one,
        cosines.random_cosines(found, _one["first"][0]),
        cosines.paper(found.n_layers) if _ends == {"persona", "refusal"} else None,
        kept["window"],
    )
    over_layers = mo.ui.altair_chart(_chart)
    mo.vstack([over_layers, mo.Html(marks.csv(_chart))])
    return (over_layers,)


@app.cell
def _(found, kept, over_layers, table):
    window = cosines.window_of(over_layers.selections, found.n_layers)
    # A new chart says nothing until the page has drawn it.
    if over_layers.selections:
        kept["window"] = window if window != cosines.whole(found) else None
        opening.write("window", "..".join(map(str, kept["window"] or ())))
    elif kept["window"]:
        window = kept["window"]
    averaged = cosines.means(table, window)
    _names = cosines.ranked(table, window)
    mo.stop(
        not averaged.height,
        mo.callout(mo.md("No pair has a cosine at these layers: choose others."), kind="warn"),
    )
    mo.md(f"**Window: {charts.span(window)}**, of {found.n_layers} layers.")
    return averaged, window


@app.cell
def _(table, window):
    # Nine panels are as many as one can read; the matrix below has all pairs.
    opening.chart(charts.pairs_chart(table, cosines.ranked(table, window)[:9], window))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## All pairs at once

    The mean cosine over the window. Names are ordered by **hierarchical clustering** (average
    linkage on $1 - \cos$): similar directions are neighbours, so groups of them show as blocks
    along the diagonal, and opposed groups as blocks of the other colour away from it. The order is
    computed for the window: with another window it may change.

    A direction that is zero at a layer has no cosine there: that layer is left out of the mean.
    Counting it as 0 would move every mean towards "unrelated".
    """)
    return


@app.cell
def _(averaged, found, window):
    _names = cosines.strongest(averaged, list(found.named))
    _ends = averaged["first"].is_in(_names) & averaged["second"].is_in(_names)
    _shown = averaged.filter(_ends)
    _order = cosines.hierarchical(cosines.gram(_shown, _names))
    _sorted = [_names[i] for i in _order]
    _cells, _total = cosines.matrix_table(_shown, _sorted), len(found.named)
    opening.chart(charts.matrix_chart(_cells, _sorted, window, total=_total))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Opposing pairs

    Do traits with opposite meanings have opposite directions? Often less than expected. "Evil" and
    "nurturing" prompts both ask for a *character*, and what all characters share makes their
    directions more similar. If a pair is opposed in meaning but not in direction, adding both
    directions does not cancel. Pairs whose trait files name each other as opposites have a
    triangle.
    """)
    return


@app.cell
def _(averaged, found, window):
    _outer = cosines.extremes(averaged, cosines.opposites(found))
    opening.chart(charts.extremes_chart(_outer, averaged.height, window))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Principal components

    Each direction is scaled to length 1 at every layer of the window, its layers are concatenated,
    the mean over directions is subtracted, and the axes of largest variance are computed. If many
    traits vary along one axis, they are mostly one trait. Subtracting the mean matters: without it
    the first component is the mean, and explains almost everything whenever all directions are
    similar. Be careful with few points: **three directions always lie in a plane**, and two
    components hold all of their variance.
    """)
    return


@app.cell
def _(averaged, found, window):
    _names = list(found.named)
    mo.stop(len(_names) < 3, mo.md("Principal components need at least three directions."))
    _found = cosines.components(cosines.gram(averaged, _names), _names)
    opening.chart(charts.components_chart(_found, window))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## How well is a direction known?

    Halve the instructions (or questions, or prompts) at random, compute the direction from each
    half, and take the cosine of the two: the **split-half reliability**. It limits every other
    cosine: if the halves of two directions agree only to 0.5, the two cannot be expected to have a
    cosine of 1 with each other, even when they are the same. Halving *questions* keeps all
    instructions on both sides and gives a higher value than halving *instructions*. The second
    estimates what a new wording of the trait would give, so it is the stricter measure.
    """)
    return


@app.cell
def _(found, window):
    _halved = cosines.reliability(found, window)
    _missing = [f"{name}: {why}" for name, why in cosines.unreliable(found).items()]
    mo.vstack(
        [
            opening.chart(charts.reliability_chart(_halved, window))
            if _halved.height
            else mo.callout(
                mo.md("Not measured. Run `jaxsteer geometry RESULTS --model DIR`."), kind="warn"
            ),
            mo.md(marks.escaped("Not halved: " + "; ".join(_missing))) if _missing else mo.md(""),
        ]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    More instructions make a direction better known. Below, each half has only so many of them;
    where a curve ends still rising, more instructions would help.
    """)
    return


@app.cell
def _(found, window):
    _grown = cosines.growth(found, window)
    _unit = "instruction" if "instruction" in _grown["unit"] else "prompt"
    mo.stop(
        _unit not in _grown["unit"],
        opening.note("Not measured: run `jaxsteer geometry RESULTS --model DIR` again."),
    )
    opening.chart(charts.growth_chart(_grown, _unit, window))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Lengths

    The norm of the stream grows with depth, and so do the directions, which are differences of its
    means. "Four natural norms" is therefore a different length at every layer. Compare a
    direction's line with the stream's: where the gap is wide, one natural norm is a small change,
    and where it is narrow, a large one. A fair comparison of layers uses equal *shares* of the
    stream's norm.
    """)
    return


@app.cell
def _(found, window):
    opening.chart(charts.norm_chart(cosines.norms(found, window), window))
    return


if __name__ == "__main__":
    app.run()
