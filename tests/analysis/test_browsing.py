from __future__ import annotations

from jaxsteer import data
from jaxsteer.analysis import browsing
from jaxsteer.errors import UserError
from tests.receipt import made

ROWS = made.rows(made.study())


def test_pages_hold_every_row_that_fits_once():
    seen = []
    first = browsing.page(ROWS, condition="persona", family="strongreject", size=7)
    for number in range(1, first.pages + 1):
        one = browsing.page(ROWS, condition="persona", family="strongreject", number=number, size=7)
        seen += one.rows["row_id"].to_list()
    assert len(seen) == len(set(seen)) == first.total == 40
    assert all(row.startswith("persona/") for row in seen)


def test_a_page_beyond_the_last_is_the_last_and_nothing_is_one_empty_page():
    beyond = browsing.page(ROWS, label="refusal", number=10**9)
    assert beyond.number == beyond.pages and beyond.rows.height > 0
    none = browsing.page(ROWS, condition="no such")
    assert (none.number, none.pages, none.total, none.rows.height) == (1, 1, 0, 0)


def test_harmful_families_are_veiled_and_ours_are_not():
    veiled = {name: browsing.may_harm(name) for name in ("strongreject", "harmbench", "unknown")}
    assert all(veiled.values())
    assert not browsing.may_harm("benign") and not browsing.may_harm("harmless")


def test_a_missing_data_set_is_said_and_the_others_are_there(monkeypatch):
    def missing(path: object = None) -> list[data.Prompt]:
        raise UserError("no such wheel")

    monkeypatch.setattr(data, "strongreject", missing)
    texts, problem = browsing.known_texts()
    assert "no such wheel" in problem
    assert texts[data.benign()[0].id] == data.benign()[0].text
