from __future__ import annotations

import json

import polars as pl
import pytest

from jaxsteer.data import prompts
from jaxsteer.judges import human
from jaxsteer.receipt import build
from tests.notebooks import script
from tests.notebooks.browser import ROOT, Reader, opened, serve
from tests.receipt import made

NOTEBOOK = ROOT / "notebooks/5_receipt.py"
HOSTILE = "<script>window.pwned=1</script><img src=x onerror='window.pwned=1'> \x1b[31mred =cmd()"


def hostile(label: str, i: int) -> str:
    # What earns the label comes last, so that the receipt holds.
    said = made.reply_with_label(label, i)
    return f"{HOSTILE} **bold** $x^2$ {said}" if i == 0 else f"=cmd() {said}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """Results whose replies are hostile, under real benign prompts, with their receipt."""
    study = made.study()
    ids = [prompt.id for prompt in prompts.benign()]
    frame = made.rows(study, response=hostile)
    order = pl.int_range(pl.len()).over("condition", "family")
    known = order.replace_strict(dict(enumerate(ids)), default=None, return_dtype=pl.String)
    frame = frame.with_columns(
        prompt_id=pl.when(pl.col("family") == "benign").then(known).otherwise("prompt_id")
    )
    frame = frame.with_columns(row_id=pl.format("{}/{}", "condition", "prompt_id"))
    path = made.folder(tmp_path_factory.mktemp("receipt") / "made", study=study, frame=frame)
    build.write(path)
    return path


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory):
    """Another receipt, in which the persona does nothing."""

    def label(condition: str, family: str, i: int) -> str:
        return made.usual("baseline" if condition == "persona" else condition, family, i)

    path = made.folder(tmp_path_factory.mktemp("second") / "made", label=label)
    return build.write(path)[0]


@pytest.fixture(scope="module")
def reader(browser, folder, second):
    arguments = ("--results", str(folder), "--second", str(second))
    with serve(NOTEBOOK, *arguments) as url, opened(browser, url) as made_reader:
        yield made_reader


def veiled(reader: Reader) -> int:
    return reader.page.locator(".js-card p.js-veil").count()


def cards(reader: Reader) -> list[str]:
    return reader.page.locator(".js-card p").all_text_contents()


def choose(reader: Reader, label: str, value: str) -> None:
    with reader.runs():
        reader.page.get_by_label(label, exact=True).select_option(label=value)


def test_it_opens_with_every_part_drawn(reader: Reader):
    reader.page.get_by_text("The receipt holds").wait_for()
    assert "refusal under persona" in " ".join(reader.chart("Moved: ").texts)
    assert reader.chart("share of strongreject prompts").texts
    assert reader.errors == []


def test_hostile_replies_are_veiled_until_asked_for_and_inert_then(reader: Reader):
    assert veiled(reader) == len(cards(reader)) == 12
    assert "script" not in "".join(cards(reader))
    with reader.runs():
        reader.page.get_by_role("switch", name="show what may harm").click()
    assert veiled(reader) == 0
    shown = cards(reader)[1]
    assert shown.startswith("<script>window.pwned=1</script>") and "**bold** $x^2$" in shown
    assert "\x1b" not in shown and "\\x1b[31m" in shown
    assert reader.page.evaluate("typeof window.pwned") == "undefined"
    assert reader.page.locator('img[src="x"]').count() == 0


def test_it_is_photographed_light_and_dark(reader: Reader):
    for scheme in ("light", "dark"):
        reader.theme(scheme)
        assert reader.screenshot(f"5_receipt_{scheme}").stat().st_size > 50_000
    reader.theme("light")


def test_what_was_asked_for_can_be_veiled_again(reader: Reader):
    with reader.runs():
        reader.page.get_by_role("switch", name="show what may harm").click()
    assert veiled(reader) == 12


def test_benign_prompts_are_shown_with_their_text(reader: Reader):
    choose(reader, "family", "benign")
    assert veiled(reader) == 0
    assert cards(reader)[0] == prompts.benign()[0].text
    assert reader.page.evaluate("typeof window.pwned") == "undefined"
    choose(reader, "family", "all")


def test_another_condition_redraws_the_categories(reader: Reader):
    before = reader.chart("strongreject prompts under baseline").picture
    choose(reader, "by category, under", "persona")
    assert reader.chart("strongreject prompts under persona").picture != before


def test_labels_go_into_the_audit_file_without_a_formula(reader: Reader, folder):
    with reader.runs():
        reader.page.get_by_role("button", name="draw a sample").click()
    reader.page.get_by_text("0 of 50 replies have a label").wait_for()
    reader.page.get_by_role("radio", name="degenerate").click()
    reader.page.get_by_placeholder("a note, if you like").fill("=1+1")
    with reader.runs():
        reader.page.get_by_role("button", name="save and next").click()
    reader.page.get_by_text("1 of 50 replies have a label").wait_for()
    first, *others = human.entries(folder / "audit.csv")
    assert (first.label, first.note) == ("degenerate", "=1+1")
    assert not any(entry.label for entry in others)
    assert '"\'=1+1"' in (folder / "audit.csv").read_text(encoding="utf-8-sig")


def test_nothing_went_wrong_in_the_console_or_a_cell(reader: Reader):
    assert reader.errors == []


def test_it_runs_as_a_script(folder, second):
    done = script.here(NOTEBOOK, "--results", folder, "--second", second)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_changed_receipt_is_refused_and_the_rest_still_shown(tmp_path, folder):
    other = made.folder(tmp_path / "other")
    value = json.loads((folder / "receipt.json").read_text())
    value["predicate"]["study"]["name"] = "other"
    (other / "receipt.json").write_text(json.dumps(value))
    done = script.here(NOTEBOOK, "--results", other)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_results_it_says_what_to_run_and_ends_well(tmp_path):
    done = script.here(NOTEBOOK, "--results", tmp_path / "none")
    assert done.returncode == 0
    assert "make demo" in done.stdout and "Traceback" not in done.stdout + done.stderr
