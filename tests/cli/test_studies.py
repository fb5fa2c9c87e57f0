"""The tables that `jaxsteer sweep` prints."""

from __future__ import annotations

import io

from rich.console import Console

from jaxsteer.cli import studies
from tests.test_words import HOSTILE


def printed(table):
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True, color_system=None).print(table)
    return out.getvalue()


def test_a_hostile_condition_name_is_inert_in_the_table():
    row = {
        "condition": HOSTILE,
        "family": "benign",
        "n": 4,
        "refusal": 0.25,
        "refusal_low": 0.05,
        "refusal_high": 0.7,
        "degenerate": 0.0,
        "unfinished": 0.0,
        "complied": 0.75,
        "cancels_steering": True,
    }
    text = printed(studies.summary_table([row], "t"))
    # The console itself writes no escapes here, so any would be the name's.
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]x[/red]" in text and "cancels steering" in text and "5 to 70 %" in text


def test_unfinished_thinking_has_a_column_when_there_is_some():
    row = {"condition": "c", "family": "benign", "n": 4, "refusal": 0.0, "refusal_low": 0.0}
    row |= {"refusal_high": 0.5, "degenerate": 0.0, "complied": 0.5, "cancels_steering": False}
    assert "unfinished" not in printed(studies.summary_table([row | {"unfinished": 0.0}], "t"))
    assert "50 %" in printed(studies.summary_table([row | {"unfinished": 0.5}], "t"))


def test_modes_are_shown_against_the_policy_alone_with_intervals():
    shift = {"mode": "kind", "direction": "persona", "at": "resid_post.3", "n": 9}
    text = printed(studies.modes_table([shift | {"shift": 0.5, "low": 0.25, "high": 0.75}], "t"))
    assert "resid_post.3" in text and "+0.50 (+0.25 to +0.75)" in text


def test_a_mode_seen_on_one_prompt_has_no_interval_and_no_modes_make_no_table():
    line = {"mode": "kind", "direction": "persona", "at": "resid_post.3", "n": 1}
    line |= {"shift": 0.5, "low": None, "high": None}
    assert "+0.50 (one prompt)" in printed(studies.modes_table([line], "t"))
    assert printed(studies.modes_table([], "t")).startswith("t: no shift by mode")
