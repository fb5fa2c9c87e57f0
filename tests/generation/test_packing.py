from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsteer.errors import UserError
from jaxsteer.generation.packing import MEMBERS, WIDTH, alone, pack

PROMPTS = st.lists(
    st.tuples(st.lists(st.integers(1, 99), min_size=1, max_size=200), st.sampled_from("ab")),
    max_size=40,
)


def held(lanes, row):
    """The tokens that a lane holds for a row, and where they are."""
    where = np.flatnonzero(lanes.owner[lanes.lane[row]] == lanes.member[row])
    return lanes.tokens[lanes.lane[row]][where].tolist(), where


@given(PROMPTS)
def test_every_prompt_is_whole_in_one_lane_of_its_group(rows):
    lanes = pack([prompt for prompt, _ in rows], [group for _, group in rows], 4096)
    groups: dict[int, str] = {}
    for row, (prompt, group) in enumerate(rows):
        tokens, where = held(lanes, row)
        assert tokens == prompt and (np.diff(where) == 1).all()
        assert groups.setdefault(lanes.lane[row], group) == group
        assert 1 <= lanes.member[row] <= MEMBERS
    # Nothing else is in them.
    assert sum(int((owner > 0).sum()) for owner in lanes.owner) == sum(
        len(prompt) for prompt, _ in {(tuple(p), g) for p, g in rows}
    )


@given(PROMPTS, st.randoms())
def test_the_order_of_the_rows_changes_no_lane(rows, random):
    other = list(rows)
    random.shuffle(other)
    first, second = (
        pack([p for p, _ in some], [g for _, g in some], 4096) for some in (rows, other)
    )
    for row, (prompt, group) in enumerate(rows):
        (_, here), (_, there) = held(first, row), held(second, other.index((prompt, group)))
        np.testing.assert_array_equal(here, there)


def test_short_prompts_share_a_lane_and_equal_ones_a_place():
    lanes = pack([[1, 2, 3], [7] * 30, [1, 2, 3], [4, 5]], "aaaa", 4096)
    assert [len(lane) for lane in lanes.tokens] == [32, 32]
    assert lanes.lane == [1, 0, 1, 0] and lanes.member == [1, 1, 1, 2]
    assert lanes.owner[1].tolist() == [1] * 3 + [0] * 29


def test_lanes_are_as_wide_as_the_longest_prompt_asks_but_long_ones_do_not_widen_all():
    assert {len(lane) for lane in pack([[1] * 3, [2] * 70], "ab", 4096).tokens} == {96}
    assert {len(lane) for lane in pack([[1] * 3, [2] * 500], "ab", 4096).tokens} == {WIDTH, 512}


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="at most 20 fit"):
        pack([[1] * 21], "a", 20)


def test_beginnings_have_a_lane_each_and_end_at_its_last_column():
    lanes = alone([[1, 2], [3], [1, 2], []], 4)
    assert [lane.tolist() for lane in lanes.tokens] == [[0, 0, 1, 2], [0, 0, 0, 3], [0] * 4]
    assert [owner.tolist() for owner in lanes.owner] == [[0, 0, 1, 1], [0, 0, 0, 1], [0] * 4]
    assert lanes.lane == [0, 1, 0, 2] and lanes.member == [1] * 4
    tokens, owner = lanes.filled([1], 4, 3)
    assert tokens.tolist() == [[0, 0, 0, 3], [0] * 4, [0] * 4] and owner.sum() == 1
