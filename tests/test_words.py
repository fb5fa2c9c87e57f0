from __future__ import annotations

import sys
import unicodedata

import pytest
from rich.console import Console

from jaxsteer import words
from jaxsteer.words import Progress, p_equals, p_value, percent, points, span


@pytest.mark.parametrize(
    ("p", "shown"), [(None, "–"), (0.00001, "< 0.0001"), (0.0312, "0.031"), (1.0, "1")]
)
def test_p_values_are_short_and_never_zero(p, shown):
    assert p_value(p) == shown
    if p is not None:
        assert p_equals(p).startswith("p ") and p_equals(p).endswith(shown)


@pytest.mark.parametrize("share", [0.0001, 0.004, 0.9955, 0.99999])
def test_a_share_that_is_not_all_or_nothing_does_not_read_so(share):
    assert percent(share) not in ("0 %", "1 %", "99 %", "100 %")


def test_an_interval_names_its_unit_once():
    assert span(0.0004, 0.31) == "< 0.1 to 31 %"


def test_a_difference_that_rounds_to_nothing_has_no_minus_sign():
    assert points(-0.0001) == "+0"


HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]x[/red]\r\u202e<script>\u0085"


def test_control_and_direction_characters_become_visible():
    text = words.plain(HOSTILE + "\nnext")
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "\\x1b[2J" in text and text.endswith("\nnext")


AS_IT_IS = {
    "Persian": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "a family": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "a dark-skinned scientist": "\U0001f469\U0001f3fd\u200d\U0001f52c",
    "a rainbow flag": "\U0001f3f3\ufe0f\u200d\U0001f308",
    "Hindi": "\u0915\u094d\u200d\u0937",
    "code": "def f():\n\treturn 1\n",
}


@pytest.mark.parametrize("name", AS_IT_IS)
def test_harmless_text_is_shown_as_it_is(name):
    assert words.plain(AS_IT_IS[name]) == AS_IT_IS[name]
    assert words.plain("one\r\ntwo") == "one\ntwo"


def test_joiners_that_join_nothing_are_spelled_out():
    assert words.plain("a\u200db") == r"a\x200db"
    assert words.plain("\u0645\u200c\u200c\u200d") == "\u0645\u200c" + r"\x200c\x200d"


BEFORE = ["", "a", "\u0645", "\u0301", "\U0001f468"]


def check_shown(before, codes):
    """What is shown of each character after the same one."""
    for code in codes:
        shown = words.plain(before + chr(code)).removeprefix(before)
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Co", "Cn"):
            joins = code in (0x200C, 0x200D) and before not in ("", "a")
            assert shown == (chr(code) if joins or code in (9, 10) else f"\\x{code:02x}")
        else:
            assert shown == chr(code)


@pytest.mark.parametrize("before", BEFORE)
def test_of_a_character_what_is_shown_is_harmless_and_everything_harmless_is_shown(before):
    # The scripts of most languages and all general punctuation, and some of everything else.
    check_shown(before, [*range(0x3000), *range(0x3000, sys.maxunicode + 1, 97)])


@pytest.mark.slow
@pytest.mark.parametrize("before", BEFORE)
def test_that_holds_for_every_character(before):
    check_shown(before, range(sys.maxunicode + 1))


def test_a_log_has_a_line_at_the_start_and_one_at_the_end(capsys):
    with Progress("study", 6) as shown:
        shown.advance(2, tokens=40)
        shown.advance(4, tokens=60)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "study: 0/6 rows"
    assert last.startswith("study: 6/6 rows, ") and last.endswith("0 s left")
    assert "tokens/s" in last


def test_a_log_line_comes_every_ten_seconds_with_speed_and_time_left(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 11.0, 12.0, 40.0])
    monkeypatch.setattr(words.time, "monotonic", lambda: next(clock))
    with Progress("study", 80) as shown:
        for _ in range(4):
            shown.advance(10, tokens=110)
    lines = capsys.readouterr().err.splitlines()
    # At 11 s 20 rows are done: 220 tokens, and 60 rows are left.
    assert lines[1] == "study: 20/80 rows, 20 tokens/s, 33 s left"
    assert lines[2:] == ["study: 40/80 rows, 11 tokens/s, 40 s left"]


def test_rows_done_before_do_not_count_as_speed(capsys, monkeypatch):
    clock = iter([0.0, 20.0])
    monkeypatch.setattr(words.time, "monotonic", lambda: next(clock))
    with Progress("study", 100, done=90) as shown:
        shown.advance(5)
    # 5 fresh rows in 20 s, 5 to go.
    assert capsys.readouterr().err.splitlines() == [
        "study: 90/100 rows",
        "study: 95/100 rows, 20 s left",
    ]


def test_nothing_done_yet_has_no_time_left(capsys, monkeypatch):
    clock = iter([0.0, 20.0])
    monkeypatch.setattr(words.time, "monotonic", lambda: next(clock))
    with Progress("study", 3) as shown:
        shown.advance(0)
    assert capsys.readouterr().err.splitlines()[1:] == ["study: 0/3 rows"]


def test_a_terminal_has_a_bar_with_the_speed(monkeypatch):
    page = Console(force_terminal=True, width=100, record=True)
    monkeypatch.setattr(words, "console", page)
    monkeypatch.setattr(words.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("study", 4, unit="prompts") as shown:
        shown.advance(4, tokens=400)
    said = page.export_text()
    assert "4/4" in said and "prompts" in said and "tokens/s" in said


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_bar_ends_whatever_happens(error, monkeypatch):
    monkeypatch.setattr(words, "console", Console(force_terminal=True, width=100))
    monkeypatch.setattr(words.sys.stderr, "isatty", lambda: True, raising=False)
    shown = Progress("study", 4)
    try:
        with shown:
            if error:
                raise error
    except RuntimeError:
        pass
    assert not shown.bar.live.is_started
