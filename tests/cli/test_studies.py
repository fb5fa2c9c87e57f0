"""The tables that `jaxsteer sweep` prints."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from jaxsteer.cli import studies
from jaxsteer.model.convert import convert
from jaxsteer.receipt import build, page, statement
from jaxsteer.words import span
from tests import tiny
from tests.cli.command import here
from tests.receipt import made
from tests.test_words import HOSTILE


def printed(table, width=200):
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(table)
    return out.getvalue()


@pytest.fixture
def made_of(tmp_path):
    """The predicate of a receipt of made results, whose labels a test chooses."""

    def make(label=made.usual, **more):
        folder = made.folder(tmp_path / "made", label=label, **more)
        return statement.load(build.write(folder)[0]).predicate

    return make


def test_a_table_of_80_columns_has_a_line_a_condition_and_no_cut_word(made_of):
    p = made_of()
    text = printed(studies.outcomes_table(p, "strongreject"), 80)
    lines = [line.strip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80 and "…" not in text
    assert lines[0].startswith("made: harmful strongreject prompts; n: 40")
    for bar in page.bars(p.conditions, "strongreject"):
        (line,) = [line for line in lines if line.replace(" †", "").startswith(f"{bar.name}  ")]
        assert span(bar.low, bar.high) in line
    assert sum(line.startswith("random direction") for line in lines) == 1
    assert any("out at steer †" in line for line in lines) and "† cancels steering" in text


def test_a_hostile_condition_name_is_inert_in_the_table(made_of):
    p = made_of()
    hostile = msgspec.structs.replace(p.conditions[0], base=HOSTILE)
    text = printed(
        studies.outcomes_table(msgspec.structs.replace(p, conditions=[hostile]), "benign")
    )
    # The console itself writes no escapes here, so any would be the name's.
    assert "\x1b" not in text and "\x07" not in text and "[red]x[/red]" in text


def test_outcomes_have_a_column_where_there_are_some(made_of):
    assert "unfinished" not in printed(studies.outcomes_table(made_of(), "strongreject"))
    thinking = made_of(lambda condition, family, i: "unfinished" if i % 2 else "refusal")
    text = printed(studies.outcomes_table(thinking, "strongreject"), 80)
    assert "unfinished: 50 %" in " ".join(text.split()) and "broken" not in text


def test_modes_are_shown_against_the_policy_alone_with_intervals():
    shift = {"mode": "kind", "direction": "persona", "at": "resid_post.3", "n": 9}
    text = printed(studies.modes_table([shift | {"shift": 0.5, "low": 0.25, "high": 0.75}], "t"))
    assert "resid_post.3" in text and "+0.50 (+0.25 to +0.75)" in text


def test_a_mode_seen_on_one_prompt_has_no_interval_and_no_modes_make_no_table():
    line = {"mode": "kind", "direction": "persona", "at": "resid_post.3", "n": 1}
    line |= {"shift": 0.5, "low": None, "high": None}
    assert "+0.50 (one prompt)" in printed(studies.modes_table([line], "t"))
    assert printed(studies.modes_table([], "t")).startswith("t: no shift by mode")


def test_a_new_study_is_checked_by_its_command_with_exit_code_2_for_what_is_wrong(tmp_path):
    model = convert(tiny.save(tiny.llama(), tmp_path / "hf"), tmp_path / "model", "float32")
    wrote = here("study", "new", tmp_path / "mine")
    assert wrote.returncode == 0 and "jaxsteer study check" in wrote.stdout
    path = tmp_path / "mine/study.toml"
    fine = here("study", "check", path, "--model", model)
    assert (fine.returncode, fine.stderr) == (0, "") and "can run on model" in fine.stdout
    text = path.read_text().replace("n = 6", "n = 99").replace("late..last", f"la\\u001b{'x' * 9}")
    path.write_text(text)
    bad = here("study", "check", path, "--model", model)
    assert bad.returncode == 2 and "\x1b" not in bad.stderr
    counted, layer = bad.stderr.splitlines()
    assert "there are 8 different prompts; n asks for 99" in counted
    assert "'persona, out late': cannot read layer" in layer
