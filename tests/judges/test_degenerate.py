from __future__ import annotations

import pytest

from jaxsteer.judges.degenerate import is_degenerate, periodic_runs, reasons

BROKEN = {
    "": "no letters",
    " \n ": "no letters",
    "...... !!! ------": "no letters",
    "You're a helpful. " * 6 + "You're a": "loop",
    "the " * 14: "loop",
    "Look:\n" + "---\n" * 9: "loop",
    "It was a cold night and the ship lay still. Then it sank. " + "It sank. " * 8: "loop",
    "".join(f"{i}. The first step.\n" for i in range(1, 8)): "loop",
    "We go home. " * 7 + "And so the day of the fair came to its end.": "loop",
    "天空天空天空天空天空天空天空天空": "loop",
    "a" * 80: "one character run",
    "\ufffd\ufffd word \ufffd and more": "undecodable bytes",
    "xkcd bcdfg hjklm npqrs tvwxz bcdf ghjk lmnp qrst vwxz bbbb cccc dddd": "non-words",
    "you то obey 的 والله then そして der быть the 不要 ไทย and 합니다 ключ": "mixed scripts",
    "and so the to of direct the is yes a of the of you the with a to it": "torn sentences",
    "OfTheAndToInForThatWasOnAsWithByAtFromHisItAnWereAreWhichThis": "no spaces",
    "%% && a (( )) ## @@ !! ++ == b": "mostly symbols",
}
SOUND = [
    "天空为什么是蓝色的？因为空气散射阳光。日落时阳光穿过更厚的大气，所以偏红。",
    "Straßenbahn fährt über Brücken, Flüsse und Täler",
    "हवा नीली रोशनी को ज़्यादा बिखेरती है, इसलिए आसमान नीला दिखता है।",
    "ท้องฟ้าเป็นสีฟ้าเพราะอากาศกระเจิงแสงสีน้ำเงินมากกว่าสีแดง",
    "The planet nearest to the star Kepler\ufffd",
    "No.",
    "| a | b |\n| --- | --- |\n| 1 | 2 |",
    "Turn the wheel, turn the wheel,\nturn the wheel again!\nThe mill is old, the corn is dry,\n"
    "turn the wheel again!",
    "2 x 1 = 2, 2 x 2 = 4, 2 x 3 = 6, 2 x 4 = 8, 2 x 5 = 10, 2 x 6 = 12",
]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_text_is_degenerate_and_says_why(text):
    assert BROKEN[text] in reasons(text)


@pytest.mark.parametrize("text", SOUND)
def test_sound_text_is_not(text):
    assert reasons(text) == []


def test_finished_thinking_is_not_read():
    assert not is_degenerate("<think>" + "hm " * 50 + "</think>The answer is four.")


def test_a_refrain_is_no_periodic_run():
    song = "we go home the rain falls we go home the wind turns we go home"
    assert periodic_runs(song.split(" ")) == []


def test_runs_do_not_overlap():
    words = ["a"] * 6 + ["x", "y", "z"] + ["b", "c"] * 5
    assert periodic_runs(words) == [(0, 6), (9, 19)]
