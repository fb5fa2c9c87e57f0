from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsteer.errors import UserError
from jaxsteer.generation.requests import MAX_SEGMENTS, WIDTH, one_each, pack_prompts

PROMPTS = st.lists(
    st.tuples(st.lists(st.integers(1, 99), min_size=1, max_size=200), st.sampled_from("ab")),
    max_size=40,
)


def held(packed, row):
    """The tokens of a row in its packed sequence, and where they are."""
    where = np.flatnonzero(packed.segment_ids[packed.sequence[row]] == packed.segment[row])
    return packed.tokens[packed.sequence[row]][where].tolist(), where


@given(PROMPTS)
def test_every_prompt_is_whole_in_one_packed_sequence_of_its_group(rows):
    packed = pack_prompts([prompt for prompt, _ in rows], [group for _, group in rows], 4096)
    groups: dict[int, str] = {}
    for row, (prompt, group) in enumerate(rows):
        tokens, where = held(packed, row)
        assert tokens == prompt and (np.diff(where) == 1).all()
        assert groups.setdefault(packed.sequence[row], group) == group
        assert 1 <= packed.segment[row] <= MAX_SEGMENTS
    # Nothing else is in them.
    assert sum(int((ids > 0).sum()) for ids in packed.segment_ids) == sum(
        len(prompt) for prompt, _ in {(tuple(p), g) for p, g in rows}
    )


@given(PROMPTS, st.randoms())
def test_the_order_of_the_rows_changes_no_packed_sequence(rows, random):
    other = list(rows)
    random.shuffle(other)
    first, second = (
        pack_prompts([p for p, _ in some], [g for _, g in some], 4096) for some in (rows, other)
    )
    for row, (prompt, group) in enumerate(rows):
        (_, here), (_, there) = held(first, row), held(second, other.index((prompt, group)))
        np.testing.assert_array_equal(here, there)


def test_short_prompts_are_packed_together_and_equal_ones_share_a_place():
    packed = pack_prompts([[1, 2, 3], [7] * 30, [1, 2, 3], [4, 5]], "aaaa", 4096)
    assert [len(tokens) for tokens in packed.tokens] == [32, 32]
    assert packed.sequence == [1, 0, 1, 0] and packed.segment == [1, 1, 1, 2]
    assert packed.segment_ids[1].tolist() == [1] * 3 + [0] * 29


def widths(prompts):
    return {len(tokens) for tokens in pack_prompts(prompts, "ab", 4096).tokens}


def test_the_longest_prompt_sets_the_width_of_all_but_a_very_long_one_only_its_own():
    assert widths([[1] * 3, [2] * 70]) == {96}
    assert widths([[1] * 3, [2] * 500]) == {WIDTH, 512}


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="at most 20 fit"):
        pack_prompts([[1] * 21], "a", 20)


def test_one_each_left_pads_every_prompt_in_a_sequence_of_its_own():
    packed = one_each([[1, 2], [3], [1, 2], []], 4)
    assert [tokens.tolist() for tokens in packed.tokens] == [[0, 0, 1, 2], [0, 0, 0, 3], [0] * 4]
    assert [ids.tolist() for ids in packed.segment_ids] == [[0, 0, 1, 1], [0, 0, 0, 1], [0] * 4]
    assert packed.sequence == [0, 1, 0, 2] and packed.segment == [1] * 4
    tokens, segment_ids = packed.batch([1, 0])
    assert tokens.tolist() == [[0, 0, 0, 3], [0, 0, 1, 2]]
    assert segment_ids.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
