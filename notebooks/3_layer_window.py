# /// script
# [tool.marimo.opengraph]
# title = "3 Layer window"
# description = "Where in depth refusal comes back, and the prompts behind each cell."
# ///
"""The layer window: where in depth an intervention brings refusal back.

marimo edit notebooks/3_layer_window.py
python notebooks/3_layer_window.py -- --results results/layer-window
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="3. The layer window", html_head_file="offline.html")

with app.setup:
    from pathlib import Path

    import marimo as mo

    from jaxsteer.evidence import layer_windows
    from jaxsteer.evidence.charts import marks, opening
    from jaxsteer.evidence.charts import windows as charts

    marks.use()
    ROOT = Path(__file__).resolve().parent.parent
    MOST = 5  # conditions whose projections can be told apart in one chart

    def drawn(maps, which, missing):
        if maps.filter((maps["map"] == which) & (maps["column"] != layer_windows.NONE)).is_empty():
            return None, mo.md(f"{missing}: `jaxsteer sweep layer-window` does.")
        chart = charts.map_chart(maps, which)
        box = mo.ui.altair_chart(chart)
        return box, opening.chart(chart, box)


@app.cell
def _():
    results = opening.results_menu(ROOT)
    mo.vstack([mo.md("# The layer window"), results])
    return (results,)


@app.cell
def _(results):
    found = opening.attempt(opening.open_results, ROOT / results.value)
    opening.head(ROOT, "3_layer_window.py", results.value, found)
    return (found,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    A persona direction is added at one layer. Where the model then refuses less, two further
    interventions test *at which layers* this effect is decided.

    - **Knockout**: project the direction out again at a later layer. If refusal comes back, the
      effect still depended on the direction at that layer. If it does not, the later layers no
      longer need the direction.
    - **Adding refusal**: add the refusal direction at some layer, before or after the layer of the
      persona. If it restores refusal only after it, refusal is decided downstream of the persona.

    Each cell below is one condition, run on the same harmful prompts. Colour and number give the
    share refused, the small numbers its 95 % Wilson interval.
    """)
    return


@app.cell(hide_code=True)
def _(found):
    _tried = layer_windows.candidates(found)
    mo.stop(_tried.is_empty())
    mo.vstack(
        [
            mo.md(r"""
    ## How the window was chosen

    Not by looking at the maps below. On other prompts (HarmBench), the study tried each candidate
    with the persona and without it. It took the one that brings most refusals back, among those
    that do little *alone*: a projection that breaks the model, or that makes it refuse by itself,
    proves nothing.
    """),
            mo.md(marks.markdown_table(_tried.columns, _tried.rows())),
        ]
    )
    return


@app.cell
def _(found):
    _names = layer_windows.steered(found)
    mo.stop(
        not _names,
        opening.note(
            "This study has no condition that only adds a direction, so it has no maps: "
            "`jaxsteer sweep layer-window` runs a study that does."
        ),
    )
    _modes = {mode or "no mode": mode for mode in layer_windows.modes(found)}
    name = opening.menu("steered", {name: name for name in _names}, label="steered direction")
    mode = opening.menu("mode", _modes, label="persona mode")
    mo.hstack([name, mode] if len(_modes) > 1 else [name], justify="start", gap=2)
    return mode, name


@app.cell
def _(found, mode, name):
    maps = layer_windows.table(found, layer_windows.cells(found, name.value, mode.value))
    _places = maps.filter(maps["column"] != layer_windows.NONE)
    _few = _places.group_by("map", "strength").len()["len"].max() or 0
    mo.stop(
        not _places.height,
        opening.note(
            "No condition projects this direction out or adds refusal to it. "
            "`jaxsteer sweep layer-window` runs a study that does both."
        ),
    )
    opening.note(
        "This study has few layers and strengths, so its maps have few cells. "
        "`jaxsteer sweep layer-window` runs many more; then choose its results above.",
        kind="info",
    ) if _few < 6 else None
    return (maps,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Knockout

    Horizontal axis: the layers at which the direction is projected out, `not removed` first and
    whole windows last. Vertical axis: the strength at which it was added; row **0 is the knockout
    alone**, without steering.

    **Hatched cells are true by algebra.** The direction was added and projected out at the *same*
    layer, and
    $(I - uu^\top)(h + \alpha d) = (I - uu^\top)\, h$
    for any $\alpha$: that model was never steered. Such a cell equals the cell of row 0 in its
    column, so refusal that "comes back" there says nothing about depth. A knockout *before* the
    steered layer says nothing either: it cannot remove a vector that is added later.

    Compare every cell with *two* others: `not removed` in its own row (what did the knockout
    change?) and row 0 in its own column (does the knockout alone change or break the model?), which
    the second map subtracts. A **red corner** marks cells with many degenerate replies, which are
    not refusals either.

    **Drag over cells** to choose them; a click outside removes the choice.
    """)
    return


@app.cell
def _(maps):
    knockout, _shown = drawn(maps, "knockout", "This study runs no knockout")
    _shown  # noqa: B018
    return (knockout,)


@app.cell
def _(found, maps):
    _over = layer_windows.over_unsteered(found, maps)
    opening.chart(charts.difference_chart(_over)) if _over.height else None
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Adding refusal

    The persona is added at one strength in all cells, and the refusal direction at the layer of the
    column with the strength of the row. Read the strongest rows with care: a large added vector at
    any layer breaks replies, and a broken reply that begins with an apology counts as a refusal.
    Red corners mark such cells.
    """)
    return


@app.cell
def _(maps):
    added, _shown = drawn(maps, "refusal", "This study adds no refusal")
    _shown  # noqa: B018
    return (added,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The flips behind the chosen cells

    A rate does not show which prompts are behind it. All conditions ran on the same prompts, so
    each cell is *paired* with its control (steering alone at the same strength; for row 0 and
    `not removed`, the baseline), and only prompts whose label changes count. Under the null
    hypothesis a changed prompt goes either way with probability ½; the exact **McNemar** test
    computes how unlikely the observed split is, and Holm's correction accounts for testing several
    cells.

    No correction solves one problem: a window chosen *because* it looked good on this map is a
    hypothesis. Its p-value describes these prompts; a claim needs new ones.
    """)
    return


@app.cell
def _(added, found, knockout, maps):
    _boxes = {"knockout": knockout, "refusal": added}
    _picked = []
    for _which, _box in _boxes.items():
        _said, _asked = getattr(_box, "selections", {}), str(mo.query_params().get(_which))
        _picked.append(layer_windows.brushed(maps, _which, _said, _asked))
        opening.write(_which, "|".join(_picked[-1]["condition"]))
    chosen = _picked[0].vstack(_picked[1])
    _free = not chosen.height
    if _free:
        chosen = layer_windows.strongest(maps, "knockout").vstack(
            layer_windows.strongest(maps, "refusal")
        )
    flipped = layer_windows.flip_table(found, chosen)
    mo.md(
        "Nothing is brushed, so these are the rows of largest strength."
        if _free
        else f"**{chosen.height} chosen cells**, {flipped.height} with a control to pair with."
    )
    return chosen, flipped


@app.cell
def _(flipped):
    mo.stop(not flipped.height, opening.note("No chosen cell has a control on the same prompts."))
    _read = layer_windows.flips_to_read(flipped)
    mo.vstack(
        [
            opening.chart(charts.flips_chart(flipped)),
            mo.md(marks.markdown_table(_read.columns, _read.rows())),
        ]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Along depth

    How far the chosen conditions move the projection on a direction, layer by layer, against the
    same prompts under the baseline. An addition shows as a jump at its layer, a knockout as a drop.
    (The chart begins two layers before the first intervention: before it, only the tokens of the
    replies differ.)
    Two questions: does the jump *remain* in later layers, and does the **refusal** projection
    return after a knockout of the persona, as it should in a refusing reply?
    """)
    return


@app.cell
def _(found):
    _probed = [k for k in ("persona", "refusal") if f"{k}_after_response" in found.rows.columns]
    mo.stop(not _probed, opening.note("These rows recorded no projections."))
    onto = opening.menu(
        "onto", {name: name for name in _probed}, _probed[-1], label="projection on"
    )
    phase = mo.ui.radio(
        {"reply": "response", "prompt": "prompt"}, value="reply", label="tokens", inline=True
    )
    mo.hstack([onto, phase], justify="start", gap=2)
    return onto, phase


@app.cell
def _(chosen, found, maps, onto, phase):
    _none = (maps["column"] == layer_windows.NONE) & (maps["strength"] == 0)
    _baseline = maps.filter(_none & (maps["map"] == "knockout"))["condition"]
    mo.stop(not _baseline.len(), opening.note("This study has no baseline to compare with."))
    _order = [*chosen["control"].unique(maintain_order=True), *chosen["condition"]]
    _lines = [k for k in dict.fromkeys(_order) if k and k != _baseline[0]]
    _along = layer_windows.along_depth(found, _lines[:MOST], _baseline[0], onto.value, phase.value)
    # Below the first change only the replies' words differ.
    _along = _along.filter(_along["layer"] >= layer_windows.first_layer(found, _lines[:MOST]) - 2)
    mo.vstack(
        [
            opening.chart(charts.depth_chart(_along, onto.value, phase.value)),
            mo.md(f"{MOST} of {len(_lines)} conditions are drawn: choose fewer cells for others.")
            if len(_lines) > MOST
            else mo.md(""),
        ]
    ) if _along.height else opening.note("No projections on these prompts.")
    return


if __name__ == "__main__":
    app.run()
