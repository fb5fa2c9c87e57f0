from __future__ import annotations

import json

import pytest

from jaxsteer.study import results
from tests.notebooks import script
from tests.notebooks.browser import ROOT, Reader, opened, serve
from tests.receipt import made

NOTEBOOK = ROOT / "notebooks/4_controls.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return made.folder(tmp_path_factory.mktemp("controls") / "made")


@pytest.fixture(scope="module")
def reader(browser, folder):
    with serve(NOTEBOOK, "--results", str(folder)) as url, opened(browser, url) as made_reader:
        yield made_reader


def verdicts(reader: Reader) -> str:
    return reader.page.locator("table").filter(has_text="by your rules").first.inner_text()


def test_it_opens_with_every_part_drawn(reader: Reader):
    for words in ("difference of rates", "random directions", "exact McNemar"):
        assert reader.chart(words).texts
    assert "as planned" in verdicts(reader)
    assert reader.page.get_by_text("No judge of harm has scored").count() == 1
    assert reader.errors == []


def test_every_value_has_its_interval(reader: Reader):
    controls = reader.chart("difference of rates")
    assert len(controls.svg.locator("g.mark-rule line").all()) > len(controls.marks("symbol")) > 3


def test_it_is_photographed_light_and_dark(reader: Reader):
    for scheme in ("light", "dark"):
        reader.theme(scheme)
        assert reader.screenshot(f"4_controls_{scheme}").stat().st_size > 50_000
    reader.theme("light")


def test_another_comparison_shows_other_flips(reader: Reader):
    chart = reader.chart("prompts, one column each")
    before = chart.picture
    with reader.runs():
        reader.page.get_by_label("compare", exact=True).select_option(
            label="persona, out late against persona (refusal, strongreject)"
        )
    reader.page.get_by_text("persona, out late: refusal").wait_for()
    assert reader.chart("prompts, one column each").picture != before


def test_a_margin_turns_a_verdict_and_the_study_keeps_its_own(reader: Reader):
    assert "←" not in verdicts(reader)
    with reader.runs():
        reader.page.get_by_role("switch", name="each test's own margin").click()
    with reader.runs():
        reader.slide("margin", -0.25)
    reader.page.get_by_text("Verdicts that your rules change: 2 of 7").wait_for()
    assert verdicts(reader).count("←") == 2


def test_leaving_out_degenerate_pairs_changes_what_is_counted(reader: Reader):
    before = verdicts(reader)
    with reader.runs():
        reader.page.get_by_role("switch", name="leave out pairs with a degenerate").click()
    assert verdicts(reader) != before and "of 38 prompts" in verdicts(reader)


def test_its_address_opens_the_same_rules(browser, reader: Reader):
    with reader.runs():
        reader.slide("alpha", 0)
    before = verdicts(reader)
    with opened(browser, reader.page.url) as again:
        assert verdicts(again) == before
        assert float(again.slider("margin").get_attribute("aria-valuenow")) == pytest.approx(
            float(reader.slider("margin").get_attribute("aria-valuenow"))
        )
        switch = again.page.get_by_role("switch", name="leave out pairs with a degenerate")
        assert switch.get_attribute("aria-checked") == "true"


def test_nothing_went_wrong_in_the_console_or_a_cell(reader: Reader):
    assert reader.errors == []


@pytest.mark.slow
def test_it_runs_as_a_script_in_a_process_of_its_own(folder):
    done = script.process(NOTEBOOK, "--results", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_results_it_says_what_to_run_and_ends_well(tmp_path):
    done = script.here(NOTEBOOK, "--results", tmp_path / "none")
    assert done.returncode == 0
    assert "make demo" in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_a_damaged_run_record_ends_it_well(tmp_path):
    damaged = made.folder(tmp_path / "damaged")
    run = json.loads((damaged / "run.json").read_text())
    for condition in run["conditions"]:
        del condition["benign"]
    (damaged / "run.json").write_text(json.dumps(run))
    done = script.here(NOTEBOOK, "--results", damaged)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run.json" in done.stdout and "`benign`" in done.stdout


def test_an_interrupted_run_is_shown_as_far_as_it_got(tmp_path, folder):
    run = made.run_record(made.study())
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text((folder / "run.json").read_text())
    results.write_shard(unfinished / "shards", run["key"], made.rows(made.study()).head(100))
    done = script.here(NOTEBOOK, "--results", unfinished)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
