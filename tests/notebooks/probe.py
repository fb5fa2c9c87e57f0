"""A small notebook on which the browser harness itself is tested: a slider, a brush, an error."""

import marimo

__generated_with = "0.25.2"
app = marimo.App()

with app.setup:
    import altair as alt
    import marimo as mo
    import polars as pl

    from jaxsteer.evidence.charts import marks

    marks.use()
    TABLE = pl.DataFrame({"x": [0.0, 1.0, 2.0, 3.0], "y": [0.0, 1.0, 4.0, 9.0]})


@app.cell
def _():
    power = mo.ui.slider(0, 10, value=5, label="power", debounce=True)
    power  # noqa: B018
    return (power,)


@app.cell
def _(power):
    alt.Chart(TABLE, title=f"power {power.value}").mark_bar().encode(x="x:O", y=alt.Y("y:Q"))
    return


@app.cell
def _():
    _points = alt.Chart(TABLE, title="points").mark_point().encode(x="x:Q", y="y:Q")
    chosen = mo.ui.altair_chart(_points.add_params(alt.selection_interval(name="brush")))
    chosen  # noqa: B018
    return (chosen,)


@app.cell
def _(chosen):
    mo.md(f"chosen: {len(chosen.value)}")
    return


@app.cell
def _():
    mo.Html('<div style="height: 1500px">tall</div>')
    return


@app.cell
def _(power):
    mo.stop(power.value != 10)
    raise ValueError("the power is ten")


if __name__ == "__main__":
    app.run()
