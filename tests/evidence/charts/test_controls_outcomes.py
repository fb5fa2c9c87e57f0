from __future__ import annotations

import polars as pl

from jaxsteer.evidence import outcomes
from jaxsteer.evidence.charts import controls as charts
from tests.receipt import made


def test_the_title_names_the_extremes():
    table = made.rows(made.study()).filter(pl.col("family") == "strongreject")
    drawn = charts.stacked_chart(outcomes.shares(table, "condition"), "condition", "prompts")
    words = drawn.to_dict()["description"]
    assert "highest under persona, out late, unsteered (48 %)" in words
    assert "lowest under persona and 1 more (3 %)" in words


def test_replies_are_escaped_and_veiled_where_they_may_harm():
    rows = pl.DataFrame(
        {
            "prompt_id": ["bn-1", "sr-1"],
            "family": ["benign", "strongreject"],
            "kind": ["benign", "harmful"],
            "condition": ["<b>baseline</b>"] * 2,
            "label": ["benign-answer", "refusal"],
            "judge": ["", "keyword-1"],
            "response": ["<script>x</script>", "\x1b[31m=cmd()"],
        }
    )
    html = charts.reply_cards(rows, {"bn-1": "<i>Hello</i>"}, reveal=False)
    assert not any(tag in html for tag in ("<script", "<b>", "<i>", "\x1b"))
    # Not blurred alone: what may harm is not in the page.
    assert html.count('class="js-veil"') == 2 and "cmd()" not in html
    shown = charts.reply_cards(rows, {}, reveal=True)
    assert 'class="js-veil"' not in shown and "\\x1b[31m=cmd()" in shown
