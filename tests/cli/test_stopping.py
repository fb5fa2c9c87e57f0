"""What a command says and does when a signal stops it."""

from __future__ import annotations

import importlib.metadata
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from jaxsteer.cli import __main__ as cli
from jaxsteer.cli import common
from jaxsteer.errors import UserError, heed_stop

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(monkeypatch, app, *arguments):
    """The exit code of `jaxsteer ARGUMENTS` when its commands are `app`."""
    monkeypatch.setattr(type(common.app), "__call__", lambda self: app())
    monkeypatch.setattr(sys, "argv", ["jaxsteer", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def stop(monkeypatch, *arguments):
    """The exit code when a Ctrl-C comes while the command works."""

    def app():
        signal.raise_signal(signal.SIGINT)
        heed_stop()

    return ended(monkeypatch, app, *arguments)


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


def test_a_stop_interrupts_nothing_until_a_loop_looks(monkeypatch, capsys):
    done = []

    def app():
        signal.raise_signal(signal.SIGTERM)
        done.append("the rest of a file")
        heed_stop()
        done.append("another file")

    assert ended(monkeypatch, app, "extract", "x") == 143
    assert done == ["the rest of a file"]


def test_a_stop_after_the_last_loop_is_heard_too(monkeypatch, capsys):
    def app():
        signal.raise_signal(signal.SIGINT)
        raise SystemExit(0)

    assert ended(monkeypatch, app, "convert", "x") == 130


def test_a_stop_comes_before_an_error_that_has_nothing_to_do_with_it(monkeypatch, capsys):
    def app():
        signal.raise_signal(signal.SIGINT)
        raise UserError("another policy is needed")

    assert ended(monkeypatch, app, "convert", "x") == 130
    assert capsys.readouterr().err == "jaxsteer: stopped\n"


def test_no_reader_of_damaged_files_takes_a_stop_for_damage(monkeypatch, capsys):
    def app():
        signal.raise_signal(signal.SIGINT)
        try:
            heed_stop()
        except Exception as error:
            raise UserError("the file is damaged") from error

    assert ended(monkeypatch, app, "convert", "x") == 130
    assert "damaged" not in capsys.readouterr().err


def test_a_second_signal_ends_the_process_at_once():
    code = """
import signal, time
from jaxsteer.errors import listen
listen()
signal.raise_signal(signal.SIGTERM)
print("heard", flush=True)
signal.raise_signal(signal.SIGINT)
time.sleep(60)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (run.returncode, run.stdout) == (130, "heard\n")
    assert run.stderr == "jaxsteer: stopped at once\n"


def test_an_error_while_stopping_is_told_and_nothing_is_promised(monkeypatch, capsys):
    def app():
        try:
            signal.raise_signal(signal.SIGINT)
            heed_stop()
        finally:
            raise UserError("the disk is full")

    assert ended(monkeypatch, app, "sweep", "x") == 2
    told = capsys.readouterr().err
    assert "the disk is full" in told and "kept" not in told


def test_an_error_of_our_own_is_one_line_that_names_its_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path))

    def app():
        raise TypeError("a mistake\x1b[2J\nin two lines")

    assert ended(monkeypatch, app, "sweep", "x") == 1
    (said,) = capsys.readouterr().err.splitlines()
    version = importlib.metadata.version("jaxsteer")
    assert f"a fault of jaxsteer {version} (TypeError: a mistake" in said and "\x1b" not in said
    (written,) = tmp_path.glob("faults/*.txt")
    assert said.endswith(f"its traceback is in {written}")
    assert "in app" in written.read_text() and "TypeError: a mistake" in written.read_text()


def test_a_fault_whose_traceback_cannot_be_written_shows_it(monkeypatch, capsys, tmp_path):
    (tmp_path / "faults").write_text("a file where the folder belongs")
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path))

    def app():
        raise TypeError("a mistake")

    assert ended(monkeypatch, app, "sweep", "x") == 1
    assert "cannot be written" in capsys.readouterr().err
