"""Controls: every claim next to what could break it, and rules that the reader sets.

marimo edit notebooks/4_controls.py
python notebooks/4_controls.py -- --results results/smollm2-demo-smollm2-135m
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="4. Controls")

with app.setup:
    import dataclasses
    from pathlib import Path

    import marimo as mo

    from jaxsteer.errors import UserError
    from jaxsteer.evidence import claims, findings, paired, sensitivity
    from jaxsteer.evidence.browse import open_results
    from jaxsteer.evidence.charts import controls as charts
    from jaxsteer.evidence.charts import text, theme

    theme.use()
    ROOT = Path(__file__).resolve().parent.parent


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # What could break it

    A study steers a model and sees refusals fall. The sentence one would like to write is *the
    persona direction did that, by being what it is*. There is always a duller explanation: any push
    of that size would have done it; the model is simply broken; the projection alone does it. A
    **control** is a condition in which the dull explanation, and only that, is at work. If the
    effect shows up there too, the sentence has to go.

    This page puts every claim of a study next to the conditions that could break it, shows which
    prompts are behind each figure, and then hands you the rules.
    """)
    return


@app.cell
def _():
    results = mo.ui.text(
        value=str(mo.cli_args().get("results") or "results/smollm2-demo-smollm2-135m"),
        label="results directory",
        full_width=True,
    )
    results  # noqa: B018
    return (results,)


@app.cell
def _(results):
    try:
        opened, _problem = open_results(ROOT / results.value), ""
    except UserError as error:
        opened, _problem = None, str(error)
    if _problem and mo.app_meta().mode == "script":
        print(_problem)
    mo.stop(opened is None, mo.callout(mo.md(text.escaped(_problem)), kind="warn"))
    found = opened.found
    _banner = [mo.callout(mo.md(text.escaped(line)), kind="warn") for line in opened.banner]
    mo.vstack(
        [*_banner, mo.md(f"**{text.escaped(found.spec.name)}**: {found.rows.height:,} rows.")]
    )
    return (found,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 1. What the study claims

    The claims, and the comparisons that would confirm them, stood in the study's file before the
    run. Rates that are to differ are compared on the same prompts by the exact McNemar test, with
    Holm's correction over the whole study. "Few new cases" asks that the upper end of a 95 %
    interval stay under a margin: *no significant difference* would not do, since a small study
    finds none of anything.
    """)
    return


@app.cell
def _(found):
    try:
        planned, _problem = claims.evaluate(found), ""
    except UserError as error:
        planned, _problem = None, str(error)
    mo.stop(planned is None, mo.callout(mo.md(text.escaped(_problem)), kind="danger"))
    mo.stop(not planned, mo.callout(mo.md("This study plans no claim."), kind="warn"))
    mo.md(charts.claims_table(planned))
    return (planned,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 2. The controls

    - **random directions**: any push of this length would have done it. One seed shows little,
      because their effects vary: the claim's has to lie outside the *range of many*.
    - **knockout without steering**: if the projection raises refusal by itself, with nothing added,
      the "restored" refusals were not restored.
    - **matched norm**: a random *projection* removes almost nothing and is no match. This control
      takes away a random vector as long as the persona vector that was put in.
    - **neutral persona**: a direction measured as "comply" against "refuse" may be no persona but
      refusal reversed. The neutral one was measured against an ordinary manner.
    - **benign prompts**: fewer refusals are cheap if nothing is answered properly any more.
    - **order swap**: "early fails, late works" may be about depth, not order. Swapped, each of the
      two directions is added where the other was.

    Against a control the claim **holds**, or it **fails**, or the rows are too few to tell
    (**undecided**), which is the honest answer more often than studies admit.
    """)
    return


@app.cell
def _(found, planned):
    try:
        made, _problem = findings.evaluate(found) if planned else [], ""
    except UserError as error:
        made, _problem = [], str(error)
    mo.stop(bool(_problem), mo.callout(mo.md(text.escaped(_problem)), kind="danger"))
    mo.stop(not made, mo.callout(mo.md(findings.headline([]) + "."), kind="warn"))
    _alone, _absent = findings.alone(found, made), findings.absent(made)
    _notes = f"Kinds of control that this study does not have: {', '.join(_absent) or 'none'}. "
    _notes += f"Claims with no control beside them: {', '.join(_alone) or 'none'}."
    mo.vstack([mo.as_html(charts.findings_chart(made)), mo.md(text.escaped(_notes))])
    return (made,)


@app.cell
def _(made):
    _claims = list(dict.fromkeys(f.claim for f in made))
    claim = mo.ui.dropdown(_claims, value=_claims[0], label="controls of the claim")
    claim  # noqa: B018
    return (claim,)


@app.cell
def _(claim, made):
    mo.md(charts.findings_table([f for f in made if f.claim == claim.value]))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 3. The random envelope

    Each cross is one random direction under exactly the operations of the treated condition. With
    $m$ seeds the smallest possible p-value is $1 / (m + 1)$, however far out the treated condition
    lies: three seeds end at 0.25, and it takes nineteen to reach 0.05.
    """)
    return


@app.cell
def _(found, made):
    _table = findings.envelope_table(found, made)
    mo.stop(_table.is_empty(), mo.md("This study has no random control of a claim."))
    mo.as_html(charts.envelope_chart(_table))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 4. Which prompts flipped

    Two rates can be equal while every prompt behind them has changed. Each column is one prompt,
    the control above, the treated condition below; a line joins what differs. Point at a dot for
    the prompt's id and category (its text is in notebook 5, behind a veil).
    """)
    return


@app.cell
def _(found, made, planned):
    options = findings.comparisons(found, planned, made)
    mo.stop(
        not options, mo.callout(mo.md("No two conditions have rows to compare yet."), kind="warn")
    )
    pair = mo.ui.dropdown(options, value=next(iter(options)), label="compare", full_width=True)
    pair  # noqa: B018
    return (pair,)


@app.cell
def _(found, pair):
    _treated, _control, _family, _outcome = pair.value
    _paired = paired.Labels(found.rows, found.verdicts).pair(_treated, _control, _family)
    mo.stop(_paired.is_empty(), mo.callout(mo.md("They share no prompt yet."), kind="warn"))
    _counted = paired.flips(_paired, _outcome)
    mo.vstack(
        [
            mo.as_html(charts.flip_chart(_paired, _outcome, _treated, _control)),
            mo.md(charts.mcnemar_table(_counted, _outcome, _treated, _control)),
        ]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 5. Your rules

    Leave things out, and watch the verdicts. Each rule is one that somebody could defend:

    - **degenerate replies**: is a broken reply "not a refusal", or no answer to the question?
    - **prompts that no condition refuses** cannot show anything. But leaving them out makes every
      share larger, and so makes "few new cases" harder to show.
    - **seeds**: the verdict should not hang on which random directions were drawn.
    - **alpha** and **margin**: how strict to be.

    A verdict that turns on a defensible choice is weak, and a choice made *after* seeing which way
    it turns is no evidence: what counts is what was planned, on the left.
    """)
    return


@app.cell
def _(found):
    _seeds = [str(seed) for seed in sensitivity.seeds(found)]
    degenerate = mo.ui.switch(label="leave out pairs with a degenerate reply")
    never = mo.ui.switch(label="leave out prompts that no condition refuses")
    seeds = mo.ui.multiselect(_seeds, value=_seeds, label="random seeds")
    alpha = mo.ui.slider(
        steps=[0.001, 0.005, 0.01, 0.05, 0.1, 0.2],
        value=0.05,
        label="alpha",
        show_value=True,
        debounce=True,
    )
    margin = mo.ui.slider(
        0.02, 0.5, 0.01, value=0.15, label="margin", show_value=True, debounce=True
    )
    own_margin = mo.ui.switch(value=True, label="each test's own margin")
    mo.vstack(
        [
            mo.hstack([degenerate, never], justify="start", gap=2, wrap=True),
            mo.hstack([alpha, margin, own_margin], justify="start", gap=2, wrap=True),
            seeds,
        ]
    )
    return alpha, degenerate, margin, never, own_margin, seeds


@app.cell
def _(degenerate, found, never, seeds):
    _kept = frozenset(map(int, seeds.value))
    rules = sensitivity.Rules(
        drop_degenerate=degenerate.value,
        drop_never_refused=never.value,
        seeds=None if len(_kept) == len(sensitivity.seeds(found)) else _kept,
    )
    counts = sensitivity.counted(found, rules)
    return counts, rules


@app.cell
def _(alpha, counts, found, margin, own_margin, planned, rules):
    _margin = None if own_margin.value else margin.value
    _rules = dataclasses.replace(rules, alpha=alpha.value, margin=_margin)
    yours = sensitivity.judged(found, counts, _rules)
    _kind = "warn" if sensitivity.changed(planned, yours) else "neutral"
    _said = mo.callout(mo.md(text.escaped(sensitivity.summary(planned, yours, _rules))), kind=_kind)
    mo.vstack([_said, mo.md(charts.verdicts_table(planned, yours))])
    return


@app.cell(hide_code=True)
def _():
    mo.accordion(
        {
            "**1.** A study keeps only the prompts that the plain model refuses, and finds that "
            "steering lowers refusal. What is wrong?": mo.md(r"""
            On those prompts the baseline's rate is 100 % by selection, so *every* other condition,
            a harmless one included, can only be equal or lower. Prompts may be left out for
            something that treats both arms alike (refused by *no* condition), not for what one arm
            did.
            """),
            "**2.** A knockout brings refusal from 2 % back to 45 %, the untouched model refuses "
            "40 %, and the same knockout without steering 60 %. Was refusal restored?": mo.md(r"""
            Not shown. The projection by itself adds refusals (40 to 60 %), so some of the 45 % are
            its own work. What a restoration needs is that the knockout brings back the *same*
            prompts, with the unsteered twin at the baseline.
            """),
        },
        multiple=True,
    )
    return


if __name__ == "__main__":
    app.run()
