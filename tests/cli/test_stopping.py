"""What a command says and does when a signal stops it."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

import pytest

from jaxsteer.cli import __main__ as cli

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stop(monkeypatch, *arguments):
    """The exit code of `jaxsteer ARGUMENTS` when a Ctrl-C comes while it works."""
    monkeypatch.setattr(cli, "app", lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["jaxsteer", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize("command", ["sweep", "judge", "prepare"])
def test_a_command_that_goes_on_where_it_was_says_so(monkeypatch, capsys, command):
    assert stop(monkeypatch, command, "x") == 130
    said = "jaxsteer: stopped; what is finished is kept, run again to continue\n"
    assert capsys.readouterr().err == said


def test_a_command_that_would_throw_away_what_is_kept_says_how_not_to(monkeypatch, capsys):
    assert stop(monkeypatch, "sweep", "x", "--fresh") == 130
    again = "run again without --fresh to continue it"
    assert capsys.readouterr().err == f"jaxsteer: stopped; what is finished is kept, {again}\n"


@pytest.mark.parametrize("command", ["convert", "extract", "generate"])
def test_a_command_that_keeps_nothing_promises_nothing(monkeypatch, capsys, command):
    assert stop(monkeypatch, command, "x") == 130
    assert capsys.readouterr().err == "jaxsteer: stopped\n"


def test_a_stop_that_native_code_turned_into_an_error_is_a_stop(monkeypatch, capsys):
    def app():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        raise TypeError("not a data type")

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["jaxsteer", "sweep", "x"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("run again to continue\n")


def test_an_error_while_stopping_is_told_and_nothing_is_promised(monkeypatch, capsys):
    def app():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise OSError("disk full")

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["jaxsteer", "sweep", "x"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "OSError: disk full" in told and "kept" not in told


def test_an_error_of_our_own_still_shows_where_it_was(monkeypatch, capsys):
    def app():
        raise TypeError("a mistake")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "TypeError: a mistake" in capsys.readouterr().err


def test_a_second_ctrl_c_is_not_heard_once_the_first_has_ended_the_command(monkeypatch):
    stop(monkeypatch, "convert", "x")
    assert [signal.getsignal(number) for number in NUMBERS] == [signal.SIG_IGN] * 2
