# /// script
# [tool.marimo.opengraph]
# title = "4 Controls"
# description = "Every claim beside the control that could break it, and rules to vary."
# ///
"""Controls: every claim next to the conditions that could refute it, and rules to vary.

marimo edit notebooks/4_controls.py
python notebooks/4_controls.py -- --results results/smollm2-demo-smollm2-135m
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="4. Controls", html_head_file="offline.html")

with app.setup:
    import dataclasses
    from pathlib import Path

    import marimo as mo

    from jaxsteer.evidence import claims, findings, outcomes
    from jaxsteer.evidence.charts import controls as charts
    from jaxsteer.evidence.charts import marks, opening

    marks.use()
    ROOT = Path(__file__).resolve().parent.parent


@app.cell
def _():
    results = opening.results_menu(ROOT)
    mo.vstack([mo.md("# Controls"), results])
    return (results,)


@app.cell
def _(results):
    found = opening.attempt(opening.open_results, ROOT / results.value)
    opening.head(ROOT, "4_controls.py", results.value, found)
    return (found,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    A study steers a model. Where the model then refuses less, the study would like to claim that
    *the persona direction* caused this. There are always simpler explanations: any vector of that
    length has the same effect; the model is broken; the projection alone has the effect. A
    **control** is a condition to which only the simpler explanation applies. If the effect appears
    there too, the claim fails.

    This page shows every claim of a study next to its controls, shows the prompts behind each
    figure, and lets you vary the rules of counting.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 1. What the study claims

    The claims, and the comparisons that would confirm them, were written in the study's file before
    the run. Two rates are compared on the same prompts by the exact McNemar test, with Holm's
    correction over the whole study. "Few new cases" requires that the upper end of a 95 % interval
    is below a margin, of the prompts *at risk*: refusal can return only where it was lost. *No
    significant difference* would not be enough, because a small study finds no significant
    difference anywhere. Where the rows could not have decided a claim, it is **not testable**.
    """)
    return


@app.cell
def _(found):
    planned = opening.attempt(claims.evaluate, found)
    mo.stop(not planned, opening.note("This study plans no claim."))
    mo.md(charts.claims_table(planned))
    return (planned,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 2. The controls

    - **random directions**: would any vector of this length have the same effect? One seed shows
      little, because effects vary between seeds: the claim's effect must be outside the *range of
      many*.
    - **knockout without steering**: does the projection raise refusal by itself? Then the
      "restored" refusals were not restored.
    - **matched norm**: a random *projection* removes almost nothing, so it is no fair control. This
      one subtracts a random vector that is as long as the persona vector that was added.
    - **neutral persona**: a direction measured as "comply" minus "refuse" may only be the negative
      of refusal. The neutral direction was measured against an ordinary manner instead.
    - **benign prompts**: a model whose replies are broken refuses less as well.
    - **order swap**: "early fails, late works" may depend on depth instead of order. In the swap,
      each of the two directions is added at the layer of the other.

    Against a control the claim **holds**, or it **fails**, or there are too few rows to tell
    (**undecided**).
    """)
    return


@app.cell
def _(found, planned):
    made = opening.attempt(findings.evaluate, found) if planned else []
    mo.stop(not made, opening.note(findings.headline([]) + "."))
    _alone, _absent = findings.alone(found, made), findings.absent(made)
    _notes = f"Kinds of control that this study does not have: {', '.join(_absent) or 'none'}. "
    _notes += f"Claims with no control beside them: {', '.join(_alone) or 'none'}."
    mo.vstack([opening.chart(charts.findings_chart(made)), mo.md(marks.escaped(_notes))])
    return (made,)


@app.cell
def _(made):
    _claims = list(dict.fromkeys(f.claim for f in made))
    claim = opening.menu("claim", {name: name for name in _claims}, label="controls of the claim")
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
    $m$ seeds the smallest possible one-sided p-value is $1 / (m + 1)$, however extreme the treated
    condition is: with three seeds it is 0.25, and 0.05 needs nineteen.
    """)
    return


@app.cell
def _(found, made):
    _table = findings.envelope_table(found, made)
    mo.stop(_table.is_empty(), mo.md("This study has no random control of a claim."))
    opening.chart(charts.envelope_chart(_table))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 4. Which prompts flipped

    Two rates can be equal although every prompt behind them has changed. Each column is one prompt,
    the control above, the treated condition below; a line joins labels that differ. Point at a dot
    for the prompt's id and category (its text is in notebook 5, blurred until you ask for it).
    """)
    return


@app.cell
def _(found, made, planned):
    options = findings.comparisons(found, planned, made)
    mo.stop(not options, opening.note("No two conditions have rows to compare yet."))
    pair = opening.menu("compare", options, label="compare", full_width=True)
    pair  # noqa: B018
    return (pair,)


@app.cell
def _(found, pair):
    _treated, _control, _family, _outcome = pair.value
    _paired = outcomes.Labels(found.rows, found.verdicts).pair(_treated, _control, _family)
    mo.stop(_paired.is_empty(), opening.note("They share no prompt yet."))
    _counted = outcomes.flips(_paired, _outcome)
    mo.vstack(
        [
            opening.chart(charts.flip_chart(_paired, _outcome, _treated, _control)),
            mo.md(charts.mcnemar_table(_counted, _outcome, _treated, _control)),
        ]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 5. What it costs where nothing should change

    A condition may refuse nothing harmless and still have changed the model. Three measures against
    the untouched model: how far its next-token distributions move on the untouched model's own
    benign replies (KL divergence, in nats per token), how many of our questions with short answers
    it answers right, and how much longer or shorter its benign replies are. Intervals are at 95 %
    and paired: every prompt is compared with itself.
    """)
    return


@app.cell
def _(found):
    mo.md(charts.impact_table(found) or "This study did not measure its benign impact.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 6. Your rules

    Change the rules, and compare the verdicts. Each of these rules can be defended:

    - **degenerate replies**: a broken reply can be counted as "not a refusal" or left out.
    - **prompts that no condition refuses** cannot show a difference. But without them every share
      is larger, which makes "few new cases" harder to show.
    - **seeds**: the verdict should not depend on which random directions were drawn.
    - **alpha** and **margin**: how strict the tests are.

    A verdict that changes with a defensible rule is weak, and a rule chosen *after* seeing the
    verdict is no evidence: the planned verdict, on the left, is the one that counts.
    """)
    return


@app.cell
def _(found):
    _seeds = [str(seed) for seed in findings.seeds(found)]
    degenerate = opening.switch("degenerate", "leave out pairs with a degenerate reply")
    never = opening.switch("never", "leave out prompts that no condition refuses")
    seeds = mo.ui.multiselect(label="random seeds", **opening.kept_all("seeds", _seeds))
    _alphas, _margins = [0.001, 0.005, 0.01, 0.05, 0.1, 0.2], [i / 100 for i in range(2, 51)]
    _kept = opening.kept("alpha", 0.05, _alphas)
    alpha = mo.ui.slider(steps=_alphas, label="alpha", show_value=True, debounce=True, **_kept)
    margin = opening.slider("margin", _margins, 0.15, 0.01, key="margin")
    own_margin = opening.switch("own", "each test's own margin", first=True)
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
    rules = findings.Rules(
        drop_degenerate=degenerate.value,
        drop_never_refused=never.value,
        seeds=None if len(_kept) == len(findings.seeds(found)) else _kept,
    )
    counts = findings.count(found, rules)
    return counts, rules


@app.cell
def _(alpha, counts, found, margin, own_margin, planned, rules):
    _margin = None if own_margin.value else margin.value
    _rules = dataclasses.replace(rules, alpha=alpha.value, margin=_margin)
    yours = findings.judged(counts, _rules)
    _kind = "warn" if findings.changed(planned, yours) else "neutral"
    _said = mo.callout(
        mo.md(marks.escaped(findings.effect_of_rules(planned, yours, _rules))), kind=_kind
    )
    mo.vstack([_said, mo.md(charts.verdicts_table(planned, yours))])
    return


@app.cell(hide_code=True)
def _():
    mo.accordion(
        {
            "**1.** A study keeps only the prompts that the plain model refuses, and finds that "
            "steering lowers refusal. What is wrong?": mo.md(r"""
            On those prompts the baseline's rate is 100 % by selection, so *every* other condition,
            even one without an effect, can only be equal or lower. Prompts may be left out by a
            rule that treats both conditions alike (refused under *no* condition), not by the result
            of one condition.
            """),
            "**2.** A knockout brings refusal from 2 % back to 45 %, the untouched model refuses "
            "40 %, and the same knockout without steering 60 %. Was refusal restored?": mo.md(r"""
            Not shown. The projection alone adds refusals (40 to 60 %), so it may cause some of the
            45 %. Restoration requires that the *same* prompts are refused again, and that the
            unsteered twin is at the level of the baseline.
            """),
        },
        multiple=True,
    )
    return


if __name__ == "__main__":
    app.run()
