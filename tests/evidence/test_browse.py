from __future__ import annotations

from jaxsteer.data import prompts
from jaxsteer.errors import UserError
from jaxsteer.evidence import browse
from tests.receipt import made

ROWS = made.rows(made.study())


def test_pages_hold_every_row_that_fits_once():
    seen = []
    first = browse.page(ROWS, condition="persona", family="strongreject", size=7)
    for number in range(1, first.pages + 1):
        one = browse.page(ROWS, condition="persona", family="strongreject", number=number, size=7)
        seen += one.rows["row_id"].to_list()
    assert len(seen) == len(set(seen)) == first.total == 40
    assert all(row.startswith("persona/") for row in seen)


def test_a_page_beyond_the_last_is_the_last_and_nothing_is_one_empty_page():
    beyond = browse.page(ROWS, label="refusal", number=10**9)
    assert beyond.number == beyond.pages and beyond.rows.height > 0
    none = browse.page(ROWS, condition="no such")
    assert (none.number, none.pages, none.total, none.rows.height) == (1, 1, 0, 0)


def test_harmful_families_are_veiled_and_ours_are_not():
    veiled = {name: browse.may_harm(name) for name in ("strongreject", "harmbench", "unknown")}
    assert all(veiled.values())
    assert not browse.may_harm("benign") and not browse.may_harm("harmless")


def test_a_missing_data_set_is_said_and_the_others_are_there(monkeypatch):
    def missing(path: object = None) -> list[prompts.Prompt]:
        raise UserError("no such wheel")

    monkeypatch.setattr(prompts, "strongreject", missing)
    texts, problem = browse.known_texts()
    assert "no such wheel" in problem
    assert texts[prompts.benign()[0].id] == prompts.benign()[0].text
