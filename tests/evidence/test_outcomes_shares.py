from __future__ import annotations

import polars as pl
import pytest

from jaxsteer.evidence import outcomes
from jaxsteer.stats import wilson
from tests.receipt import made


def rows(**labels: list[str]) -> pl.DataFrame:
    lines = [
        {"condition": name, "category": "any", "label": label}
        for name, given in labels.items()
        for label in given
    ]
    return pl.DataFrame(lines)


def test_segments_fill_each_bar_from_end_to_end():
    table = rows(a=["refusal", "bypass", "degenerate", "refusal"], b=["complied-unscored"])
    shares = outcomes.shares(table, "condition")
    for _, group in shares.group_by("group"):
        assert group["start"][0] == 0 and group["end"][-1] == pytest.approx(1)
        assert group["start"][1:].to_list() == group["end"][:-1].to_list()
    first = shares.row(0, named=True)
    assert (first["label"], first["k"], first["n"], first["share"]) == ("refusal", 2, 4, 0.5)
    assert (first["low"], first["high"]) == wilson(2, 4)


def test_intervals_lie_around_the_edge_that_their_share_sets():
    table = outcomes.shares(
        rows(a=["refusal"] * 4 + ["complied-unscored"] * 3 + ["bypass"] * 2 + ["degenerate"]),
        "condition",
    )
    found = {row["label"]: (row["from"], row["to"]) for row in table.to_dicts()}
    assert found["refusal"] == pytest.approx(wilson(4, 10))
    assert found["degenerate"] == pytest.approx(tuple(1 - x for x in reversed(wilson(1, 10))))
    # 90 % of the bar is left before the degenerate part begins.
    assert found["bypass"] == pytest.approx(tuple(0.9 - x for x in reversed(wilson(2, 10))))


def test_a_share_of_nothing_has_an_interval_too():
    table = outcomes.shares(rows(a=["refusal"], b=["degenerate"] * 9), "condition")
    none = table.filter((pl.col("group") == "b") & (pl.col("label") == "refusal"))
    assert none["from"][0] == 0 and none["to"][0] == pytest.approx(wilson(0, 9)[1])


def test_every_group_is_there_and_those_with_most_refusals_come_first():
    table = rows(few=["refusal", "bypass"], none=["bypass"] * 2, all=["refusal"] * 2)
    table = pl.concat([table, made.rows(made.study()).select(table.columns)])
    groups = outcomes.shares(table, "condition")["group"].unique(maintain_order=True).to_list()
    assert set(groups) == set(table["condition"]) and groups[0] == "all" and groups[-1] == "none"
