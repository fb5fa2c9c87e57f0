from __future__ import annotations

import pytest

from jaxsteer.errors import UserError
from jaxsteer.study.layer_expr import resolve_layers

L = 10
NAMED = {"steer": 5, "early": 2, "refusal": 4, "late_refusal": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", (7,)),
        ("steer", (5,)),
        ("steer+2", (7,)),
        ("steer+1..last", (6, 7, 8, 9)),
        ("2..4", (2, 3, 4)),
        ("2,4", (2, 4)),
        ("1,steer..last", (1, 5, 6, 7, 8, 9)),
    ],
)
def test_layer_expressions(text, expected):
    assert resolve_layers(text, NAMED, L, "test") == expected


@pytest.mark.parametrize("name", ["late2", "late-two", "late_2", "Late", "spät"])
@pytest.mark.parametrize(("offset", "expected"), [("", 6), ("+1", 7), ("-2..last", 4)])
def test_a_layer_may_have_any_name_that_a_study_may_give_it(name, offset, expected):
    assert resolve_layers(name + offset, {name: 6}, L, "test")[0] == expected


@pytest.mark.parametrize(
    "text",
    ["-1", "steer+9", "10", "nowhere", "steer*2", "", "4..2", "2,,3", "²", "9" * 5000, "last-²"],
)
def test_layers_that_do_not_exist_are_refused(text):
    with pytest.raises(UserError, match="test"):
        resolve_layers(text, NAMED, L, "test")


@pytest.mark.parametrize("text", ["2-4", "1,2-4"])
def test_a_window_written_with_a_hyphen_is_refused_with_the_right_spelling(text):
    with pytest.raises(UserError, match=r"write a window as 2\.\.4$"):
        resolve_layers(text, NAMED, L, "test")
