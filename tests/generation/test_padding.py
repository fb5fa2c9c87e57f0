from __future__ import annotations

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.generation.requests import bucket, left_pad


@pytest.mark.parametrize(
    ("length", "width"), [(0, 32), (1, 32), (32, 32), (33, 64), (97, 128), (129, 192), (4097, 6144)]
)
def test_a_prompts_bucket_is_the_smallest_that_holds_it(length, width):
    assert bucket(length, 8192) == width


@pytest.mark.parametrize(("length", "limit"), [(101, 100), (8193, 8192), (1, 0)])
def test_a_prompt_beyond_the_limit_is_refused(length, limit):
    with pytest.raises(UserError, match=f"has {length} tokens and at most {limit} fit"):
        bucket(length, limit)


@pytest.mark.parametrize("limit", [0, -99488])
def test_a_reply_that_takes_the_whole_context_is_what_to_shorten(limit):
    with pytest.raises(UserError, match="at most 0 fit; max_new_tokens leaves no room"):
        bucket(6, limit)


def test_padding_goes_on_the_left_and_only_the_mask_tells_it_apart():
    ids, real = left_pad([[7, 8], [5, 6, 9], [], [0, 0, 0, 1]], 4)
    np.testing.assert_array_equal(ids, [[0, 0, 7, 8], [0, 5, 6, 9], [0, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(real.sum(1), [2, 3, 0, 4])
    assert real[:, -1].tolist() == [True, True, False, True] and ids.dtype == np.int32
