from __future__ import annotations

import pytest

from jaxsteer.evidence.charts import windows as charts
from tests.evidence import windows_made
from tests.notebooks import script
from tests.notebooks.browser import ROOT, Reader, opened, serve
from tests.receipt import made

NOTEBOOK = ROOT / "notebooks/3_layer_window.py"
KNOCKOUT = "layers the direction is projected out of"
ADDED = "layer refusal is added at"
FLIPS = "diamond and line: net change"
DEPTH = "moved against the baseline"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return windows_made.folder(tmp_path_factory.mktemp("windows") / "made")


@pytest.fixture(scope="module")
def reader(browser, folder):
    with serve(NOTEBOOK, "--results", str(folder)) as url, opened(browser, url) as made:
        yield made


def test_it_opens_with_both_maps_flips_and_projections(reader: Reader):
    for words in (KNOCKOUT, ADDED, FLIPS, DEPTH):
        assert reader.chart(words).texts
    assert reader.page.get_by_text("Nothing is brushed").count() == 1
    assert reader.errors == []


def test_cells_that_cancel_are_hatched_in_ink(reader: Reader):
    drawn = reader.chart(KNOCKOUT)
    # Three strengths cancel, and the late window breaks replies at three and without steering.
    assert drawn.svg.locator("g.mark-rule line").count() == 3 * charts.STRIPS
    assert len(drawn.marks("symbol")) == 4
    assert "by algebra" in " ".join(reader.chart(FLIPS).texts)


def test_it_is_photographed_light_and_dark(reader: Reader):
    for scheme in ("light", "dark"):
        reader.theme(scheme)
        assert reader.screenshot(f"3_layer_window_{scheme}").stat().st_size > 50_000
    reader.theme("light")


def test_a_brush_over_cells_changes_the_flips_and_the_projections(reader: Reader):
    flips, depth = reader.chart(FLIPS).picture, reader.chart(DEPTH).picture
    with reader.runs():
        # The columns 4 and 5 of five, the rows of strength 4 and 2 of four.
        reader.chart(KNOCKOUT).brush((0.45, 0.1), (0.75, 0.4))
    reader.page.get_by_text("4 chosen cells", exact=True).wait_for()
    words = reader.chart(FLIPS).texts
    assert {"persona, out at 4 x2", "persona, out at 5 x4"} <= set(words)
    assert "persona, refusal at 5 x2" not in words
    assert reader.chart(FLIPS).picture != flips and reader.chart(DEPTH).picture != depth


def test_a_brush_in_the_other_map_adds_its_cells(reader: Reader):
    with reader.runs():
        reader.chart(ADDED).brush((0.7, 0.05), (0.95, 0.6))
    reader.page.get_by_text("6 chosen cells", exact=True).wait_for()
    assert "persona, refusal at 5 x2" in reader.chart(FLIPS).texts


def test_its_address_opens_the_same_cells(browser, reader: Reader):
    with opened(browser, reader.page.url) as again:
        again.page.get_by_text("6 chosen cells", exact=True).wait_for()
        assert again.chart(FLIPS).texts == reader.chart(FLIPS).texts
        assert again.page.url == reader.page.url


def test_the_prompts_own_tokens_can_be_shown(reader: Reader):
    with reader.runs():
        reader.page.get_by_text("prompt", exact=True).click()
    assert "mean over prompt tokens" in " ".join(reader.chart(DEPTH).texts)


def test_a_study_with_few_places_says_which_study_fills_the_map(reader: Reader, tmp_path):
    reader.results(made.folder(tmp_path / "few"))
    reader.page.get_by_text("its maps have few cells").wait_for()
    assert reader.chart(KNOCKOUT).texts
    reader.page.get_by_text("This study adds no refusal").wait_for()


def test_an_empty_folder_is_answered_in_one_line(reader: Reader, tmp_path):
    reader.results(tmp_path)
    reader.page.get_by_text("make demo").first.wait_for()


def test_an_incomplete_study_is_drawn_under_a_banner(reader: Reader, tmp_path):
    frame = windows_made.rows(windows_made.study())
    half = frame.head(frame.height // 2)
    reader.results(windows_made.folder(tmp_path / "half", frame=half))
    reader.page.get_by_text("Partial results").wait_for()
    assert reader.chart(KNOCKOUT).texts


def test_nothing_went_wrong_in_the_console_or_a_cell(reader: Reader):
    assert reader.errors == []


def test_it_runs_as_a_script(folder):
    done = script.here(NOTEBOOK, "--results", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_results_it_says_what_to_run_and_ends_well(tmp_path):
    done = script.here(NOTEBOOK, "--results", tmp_path)
    assert done.returncode == 0
    assert "make demo" in done.stdout and "Traceback" not in done.stdout + done.stderr
