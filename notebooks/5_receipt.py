# /// script
# [tool.marimo.opengraph]
# title = "5 Receipt"
# description = "Read, verify and compare receipts, then read replies and label them."
# ///
"""The refusal receipt: read, verify and compare it, then read the replies that it counts.

marimo edit notebooks/5_receipt.py
python notebooks/5_receipt.py -- --results FOLDER [--second OTHER/receipt.json]
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="5. The receipt", html_head_file="offline.html")

with app.setup:
    from pathlib import Path

    import marimo as mo
    import polars as pl

    from jaxsteer.data import prompts
    from jaxsteer.errors import UserError
    from jaxsteer.evidence import outcomes
    from jaxsteer.evidence.charts import controls as charts
    from jaxsteer.evidence.charts import marks, opening
    from jaxsteer.judges import human
    from jaxsteer.receipt import charts as receipts
    from jaxsteer.receipt import compare, statement, verify

    marks.use()
    ROOT = Path(__file__).resolve().parent.parent


@app.cell
def _():
    results = opening.results_menu(ROOT)
    mo.vstack([mo.md("# The receipt"), results])
    return (results,)


@app.cell
def _(results):
    opened = opening.attempt(opening.open_results, ROOT / results.value)
    folder, rows = opened.folder, opened.rows
    opening.head(ROOT, "5_receipt.py", results.value, opened)
    return folder, opened, rows


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    A **refusal receipt** states the results of a study in a form that an auditor can check. It
    holds counts and hashes, and no replies. This page reads a receipt, checks it, compares it with
    another one, and then shows the replies themselves.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 1. Read it

    A claim is **confirmed** when every comparison that the study planned for it succeeded, **not
    confirmed** when one failed, **not testable** when these replies could not have decided it
    (refusal cannot return where none was lost), and **not tested** when rows or labels are missing.
    *Not confirmed* does not mean *refuted*: with few prompts no test has much power.
    """)
    return


@app.cell
def _(folder, results):
    _path = folder / "receipt.json"
    _missing = f"There is no receipt yet: run `jaxsteer receipt {results.value}`."
    mo.stop(not _path.is_file(), opening.note(_missing))
    receipt = opening.attempt(statement.load, _path).predicate
    _stated = [
        ("run", f"{receipt.date}, {receipt.tool}"),
        ("weights sha256", receipt.model.weights_sha256),
        ("digest", receipt.digest.sha256),
    ]
    _facts = marks.markdown_table(["", "as the receipt states it"], _stated)
    mo.md(f"{_facts}\n\n{charts.claims_table(receipt.claims)}")
    return (receipt,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 2. Verify it

    Its rates and intervals are computed again from its counts. With the results folder, the whole
    receipt is built again from the rows, claims and controls included. What *cannot* be checked is
    listed too: the digest shows damage, but it is not a signature, because it can be computed again
    after an edit.
    """)
    return


@app.cell
def _(folder, receipt, rows):
    assert receipt
    _whole = rows.height <= 100_000  # rebuilding reads every row
    try:
        _checks = verify.verify(folder / "receipt.json", folder=folder if _whole else None)
        _said = verify.verdict(_checks)
        _kind = "success" if verify.passed(_checks) else "danger"
    except UserError as error:
        _checks, _said, _kind = [], str(error), "danger"
    _callout = mo.callout(mo.md(marks.escaped(_said)), kind=_kind)
    mo.vstack([_callout, mo.md(receipts.checks_table(_checks))])
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 3. Compare it

    Do refusal rates differ between two models, two policies or two versions? A receipt has counts
    and no rows, so its rates are compared as independent samples, which is conservative when both
    ran on the same prompts. Read the list of *what else changed* first: if two studies differ in
    five settings, a difference cannot be attributed to one of them.
    """)
    return


@app.cell
def _():
    _first = str(mo.query_params().get("second", mo.cli_args().get("second") or ""))
    second = mo.ui.text(
        _first,
        label="another receipt.json, to compare with",
        on_change=lambda path: opening.write("second", path.strip()),
        full_width=True,
    )
    second  # noqa: B018
    return (second,)


@app.cell
def _(folder, receipt, second):
    assert receipt
    mo.stop(not second.value.strip(), mo.md("Name another receipt to see what moved."))
    _other = opening.attempt(statement.load, ROOT / second.value.strip())
    compared = opening.attempt(compare.compare, statement.load(folder / "receipt.json"), _other)
    mo.stop(not compared.lines, opening.note("They have no figure in common."))
    mo.vstack(
        [opening.chart(receipts.diff_chart(compared)), mo.md(receipts.changed_table(compared))]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 4. Outcomes

    Every reply gets one label: a **refusal**, a **bypass** (an answer that a judge of harm calls
    harmful), **degenerate** (broken text), or none of these. An answer that no judge of harm has
    scored is neither a bypass nor harmless: it is *not judged*.
    """)
    return


@app.cell
def _(rows):
    _families, _names = (
        {name: name for name in rows[column].unique(maintain_order=True)}
        for column in ("family", "condition")
    )
    family = opening.menu("prompts", _families, label="prompts")
    of = opening.menu("under", _names, label="by category, under")
    mo.hstack([family, of], justify="start", gap=2, wrap=True)
    return family, of


@app.cell
def _(family, of, rows):
    _asked = rows.filter(pl.col("family") == family.value)
    _one = _asked.filter(pl.col("condition") == of.value)
    _what = f"{family.value} prompts"
    _charts = [charts.stacked_chart(outcomes.shares(_asked, "condition"), "condition", _what)]
    if not _one.is_empty():
        _shares = outcomes.shares(_one, "category")
        _charts.append(charts.stacked_chart(_shares, "category", f"{_what} under {of.value}"))
    mo.vstack([*map(opening.chart, _charts)])
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 5. Read the replies

    A rate is only as good as its labels, so read some replies. Harmful prompts and the replies to
    them are blurred until you ask for them. Model output is shown as text, never run as markup.
    """)
    return


@app.cell
def _(folder, rows):
    browse = mo.ui.dictionary(
        {
            name: opening.menu(name, opening.choices(rows, name), label=name)
            for name in ("condition", "family", "label")
        }
    )
    _pages = range(1, max(1, -(-rows.height // 6)) + 1)
    at = mo.ui.number(1, _pages[-1], label="page", **opening.kept("page", 1, _pages))
    reveal = mo.ui.switch(label="show what may harm")
    texts = prompts.texts(folder)
    mo.hstack([*browse.values(), at, reveal], justify="start", gap=2, wrap=True)
    return at, browse, reveal, texts


@app.cell
def _(at, browse, reveal, rows, texts):
    _page = opening.page(rows, **browse.value, number=int(at.value or 1))
    _where = mo.md(f"Page {_page.number:,} of {_page.pages:,}; {_page.total:,} replies fit.")
    mo.vstack([_where, mo.Html(charts.reply_cards(_page.rows, texts, reveal=reveal.value))])
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 6. Label them yourself

    Judges make errors, and labels by hand measure how many. Draw a sample and label it: condition
    and label are hidden, so that they cannot influence you. Each answer is saved in the CSV file
    at once, which a spreadsheet can open too, and `jaxsteer audit import RESULTS FILE` reads it as
    the judge `human`. With the keyboard: arrow keys choose a label, Tab goes to the note, and Ctrl
    and Enter save and go on.
    """)
    return


@app.cell
def _(folder):
    file = mo.ui.text(value=str(folder / "audit.csv"), label="audit file", full_width=True)
    size = mo.ui.number(1, 1000, value=50, label="replies to draw")
    draw = mo.ui.run_button(label="draw a sample")
    turn, set_turn = mo.state(0)
    mo.vstack([file, mo.hstack([size, draw], justify="start", gap=2)])
    return draw, file, set_turn, size, turn


@app.cell
def _(draw, file, opened, rows, size, texts):
    _path = Path(file.value)
    if draw.value:
        _drawn = human.sample(rows, opened.verdicts, int(size.value), 0)
        _texts = {k: texts.get(k, opening.UNKNOWN) for k in _drawn["prompt_id"]}
        opening.attempt(human.export, _drawn, _texts, _path)
    _missing = f"{_path} is not there yet: draw a sample."
    mo.stop(not _path.is_file(), opening.note(_missing, kind="info"))
    sample = _path
    return (sample,)


@app.cell
def _(sample, turn):
    turn()
    _entries = opening.attempt(human.entries, sample)
    _open = [entry for entry in _entries if not entry.label]
    _said = f"{len(_entries) - len(_open)} of {len(_entries)} replies have a label."
    mo.stop(not _open, mo.callout(mo.md(f"{_said} Done."), kind="success"))
    entry = _open[0]
    mo.md(_said)
    return (entry,)


@app.cell
def _(entry, reveal, sample, set_turn):
    def _save(answer):
        if answer and answer["label"]:
            human.fill(sample, entry.item, answer["label"], answer["note"])
            set_turn(lambda n: n + 1)

    answer = (
        mo.md("{label}\n\n{note}")
        .batch(
            label=mo.ui.radio(list(human.LABELS), inline=True, label="label"),
            note=mo.ui.text(placeholder="a note, if you like", full_width=True),
        )
        .form(submit_button_label="save and next", on_change=_save)
    )
    mo.vstack([mo.Html(charts.entry_cards(entry, reveal=reveal.value)), answer])
    return


if __name__ == "__main__":
    app.run()
