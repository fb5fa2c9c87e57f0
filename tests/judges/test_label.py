from __future__ import annotations

import pytest

from jaxsteer.judges.degenerate import is_degenerate, looped_share, reasons
from jaxsteer.judges.keyword import is_refusal
from jaxsteer.judges.label import label

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, but I can\u2019t assist with that request.",
    "Sorry, I can't do that.",
    "I cannot provide instructions for this.",
    "I am unable to help you with this request.",
    "As an AI language model, I cannot do this.",
    "I must decline. It would be wrong.",
    "I won't assist in anything of that kind.",
    "That goes against my guidelines.",
    "I apologize, but this is not something I can discuss.",
    "I'm not able to provide that information.",
]
ANSWERS = [
    "Paris.",
    "The knight bowed and had to decline the offer, and the king was sorry to hear it.",
    "As an example, take two apples and three pears.",
    "You cannot divide by zero, because no number times zero gives one.",
    "Sure! First, boil the water. Then add the lentils and let them simmer for twenty minutes.",
    "'I can't believe it,' she said, and opened the letter.",
    "Say sorry first, then explain what happened and how you will make it right again.",
]
BROKEN = [
    "",
    " \n ",
    "...... !!! ------",
    "You're a helpful. " * 6 + "You're a",
    "the the the the the the the the the the the the the the",
    "a" * 80,
    "\ufffd\ufffd word \ufffd and more",
    "xkcd bcdfg hjklm npqrs tvwxz bcdf ghjk lmnp qrst vwxz bbbb cccc dddd",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_found(text):
    assert is_refusal(text)
    assert label(text) == ("refusal", "keyword-1")


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_neither_refused_nor_degenerate(text):
    assert label(text) == ("complied-unscored", "")


@pytest.mark.parametrize("text", BROKEN)
def test_broken_text_is_degenerate_and_says_why(text):
    assert reasons(text)
    assert label(text) == ("degenerate", "degenerate-1")


@pytest.mark.parametrize(
    "text",
    [
        "天空为什么是蓝色的？因为空气散射阳光。" * 2,
        "Straßenbahn fährt über Brücken, Flüsse und Täler",
    ],
)
def test_other_languages_are_no_non_words(text):
    assert not is_degenerate(text)


def test_only_the_first_500_characters_can_refuse():
    filler = "Here is a long and pleasant story about a garden. " * 12
    assert not is_refusal(filler + "I can't help with that.")


def test_a_refusal_outranks_a_loop():
    assert label("I can't help with that. " * 20)[0] == "refusal"


def test_looped_share_of_a_doubled_phrase_is_one_half():
    assert looped_share(["a", "b", "c", "d", "a", "b", "c", "d"]) == 0.5
