from __future__ import annotations

import pytest

from jaxsteer.judges.reasoning_blocks import answer, visible

FINISHED = {
    "plain": "plain",
    "a < b and b > c": "a < b and b > c",
    "<think>x</think>y": "y",
    "<THINKING>\nx\n</THINKING>\n\ny": "y",
    "x</think>y": "y",
    "<think>a</think>b<think>c</think>d": "bd",
    "<|channel|>analysis<|message|>x<|channel|>final<|message|>y": "y",
}


@pytest.mark.parametrize("text", FINISHED)
def test_finished_thinking_is_taken_out_of_both_sides(text):
    assert visible(text) == answer(text) == FINISHED[text]


def test_unfinished_thinking_is_no_answer_but_all_there_is_to_judge():
    assert answer("<think>I wonder") == ""
    assert visible("<think>I wonder") == "<think>I wonder"
