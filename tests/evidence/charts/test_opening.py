from __future__ import annotations

import html
import json
import re

import marimo as mo
import pytest

from jaxsteer.evidence.charts import opening


class Address(dict[str, str]):
    """The part of marimo's query parameters that controls use."""

    def set(self, key: str, value: str) -> None:
        self[key] = value


@pytest.fixture
def address(monkeypatch):
    made = Address()
    monkeypatch.setattr(mo, "query_params", lambda: made)
    return made


def test_a_control_begins_with_the_value_of_the_address(address):
    address["strength"] = "-2.5"
    assert opening.kept("strength", 4.0, [-2.5, 4.0])["value"] == -2.5


@pytest.mark.parametrize("asked", ["7", "", "<script>", "nan", "None"])
def test_a_value_that_is_not_possible_is_the_first_one(address, asked):
    address["layer"] = asked
    assert opening.kept("layer", 3, range(6))["value"] == 3


def test_what_is_chosen_is_written_as_it_is_read_again(address):
    steps = [-0.5, 0.0, 4.0]
    opening.kept("strength", 0.0, steps)["on_change"](4)
    assert address == {"strength": "4"}
    assert opening.kept("strength", 0.0, steps)["value"] == 4.0


def test_a_menu_begins_with_the_choice_that_the_address_names(address):
    modes = {"no mode": "", "kind": "kind"}
    chosen = []
    for asked in ("kind", "no mode", "unknown"):
        address["mode"] = asked
        chosen.append(opening.menu("mode", modes, label="mode").value)
    assert chosen == ["kind", "", ""]


def test_a_sentence_with_markup_is_shown_as_text():
    (inside,) = re.findall("data-html='(.*?)'", opening.note("<b>bold</b>", "two").text)
    shown = json.loads(html.unescape(inside))
    assert "<b>" not in shown and "&lt;b&gt;bold" in shown and shown.count("<li>") == 2
