from __future__ import annotations

import base64
import json
import re

import altair as alt
import polars as pl
import pytest

from jaxsteer.errors import UserError
from jaxsteer.evidence.charts import marks

TABLE = pl.DataFrame({"row": ["a", "b"], "rate": [0.1, 0.6], "low": [0.0, 0.4], "high": [0.3, 0.8]})


def dots(table=TABLE):
    return (
        alt.Chart(table)
        .mark_point()
        .encode(
            x=alt.X("rate:Q", title="refused, share of 40 prompts"),
            y="row:N",
            **marks.by_role("row", {"a": "persona", "b": "refusal"}),
        )
    )


def test_an_interval_spans_its_ends_under_the_values_own_axis_title():
    x = alt.X("rate:Q", title="refused, share of 40 prompts")
    roles = marks.by_role("row", {"a": "persona", "b": "refusal"})
    drawn = marks.dots(TABLE, x, alt.Y("row:N"), tooltip=marks.tooltip("row"), **roles)
    rule, point = drawn.to_dict()["layer"]
    assert rule["encoding"]["x"]["field"] == "low" and rule["encoding"]["x2"]["field"] == "high"
    assert rule["encoding"]["x"]["title"] == point["encoding"]["x"]["title"]
    assert rule["encoding"]["color"] == point["encoding"]["color"]
    assert "shape" not in rule["encoding"]


def test_a_value_without_interval_is_refused():
    with pytest.raises(UserError, match="no column high"):
        marks.dots(
            TABLE.drop("high"),
            alt.X("rate:Q"),
            alt.Y("row:N"),
            tooltip=marks.tooltip("row"),
            **marks.by_role("row", {"a": "persona", "b": "refusal"}),
        )


def test_a_title_states_the_finding_and_wraps():
    chart = marks.titled(dots(), "word " * 40, "n = 2", wrap=50)
    title = chart.to_dict()["title"]
    assert max(map(len, title["text"])) <= 50 and len(title["text"]) > 1
    assert title["subtitle"] == ["n = 2"]


def test_labels_are_text_of_the_same_marks():
    spec = marks.labelled(dots(), "row").to_dict()
    assert spec["mark"]["type"] == "text" and spec["encoding"]["text"]["field"] == "row"
    assert spec["encoding"]["x"]["field"] == "rate"


def test_control_characters_in_tokens_become_visible():
    assert marks.token_text("\x1b[31m a") == "\\x1b[31m␣a"
    assert marks.token_text("\u202eevil") == "\\x202eevil"


def test_the_data_of_a_chart_is_saved_as_text_that_no_spreadsheet_runs():
    table = TABLE.with_columns(row=pl.Series(["=cmd()", "b"]))
    chart = marks.wide([dots(table), marks.zero("x")], "finding", "detail", 100)
    encoded = re.search(r"base64,([^\"]+)", marks.csv(chart)).group(1)
    saved = base64.b64decode(encoded).decode().splitlines()
    assert saved[0] == "row,rate,low,high" and saved[1].startswith("'=cmd(),0.1,")
    panels = marks.Panels(finding="f", detail="d", charts=[chart, chart])
    assert base64.b64encode(("\n".join([*saved, *saved[1:], ""])).encode()).decode() in marks.csv(
        panels
    )


def test_titles_wrap_by_the_width_and_names_in_them_stay_text():
    hostile = "'] + alert(1) + ['" + " word" * 30
    spec = marks.wide([dots()], hostile, hostile, 100).to_dict()
    (patch,) = spec["usermeta"]["embedOptions"]["patch"]
    for expression, share in ((spec["title"]["text"]["expr"], 1), (patch["value"]["signal"], 1.2)):
        cases = re.findall(r'\? (\["(?:[^"]|\\")*"(?:, "(?:[^"]|\\")*")*\])', expression)
        assert len(cases) == len(marks.WRAPS)
        for lines, letters in zip(map(json.loads, cases), marks.WRAPS.values(), strict=True):
            assert " ".join(lines) == hostile and max(map(len, lines)) <= letters * share
