from __future__ import annotations

import pytest

from tests.evidence import directions_made
from tests.notebooks import script
from tests.notebooks.browser import ROOT, Reader, opened, serve

NOTEBOOK = ROOT / "notebooks/2_geometry.py"
CHARTS = (
    "one cosine a layer;",
    "the strongest of",
    "Most opposed",
    "Two components hold",
    "a natural norm is at most",
)
# Charts of several panels have their findings in the page.
PANELS = ("cosines (", "Least reliable", "agrees with itself")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return directions_made.folder(tmp_path_factory.mktemp("geometry") / "made")


@pytest.fixture(scope="module")
def reader(browser, folder):
    with serve(NOTEBOOK, "--results", str(folder)) as url, opened(browser, url) as made:
        yield made


def test_it_opens_with_every_chart_drawn(reader: Reader):
    for words in CHARTS:
        assert reader.chart(words).texts
    for words in PANELS:
        assert reader.page.get_by_text(words).count() == 1
    assert reader.page.get_by_text("Window: layers 0..7").count() == 1
    assert reader.errors == []


def test_the_papers_cosines_stand_beside_persona_and_refusal(reader: Reader):
    words = " ".join(reader.chart(CHARTS[0]).texts)
    assert "Llama-3.1-8B at its layer 20: −0.180" in words
    assert "Qwen2.5-7B at its layer 20: −0.279" in words


def test_it_is_photographed_light_and_dark(reader: Reader):
    for scheme in ("light", "dark"):
        reader.theme(scheme)
        assert reader.screenshot(f"2_geometry_{scheme}").stat().st_size > 50_000
    reader.theme("light")


def test_a_brush_over_layers_filters_every_other_chart(reader: Reader):
    others = [reader.chart(words) for words in CHARTS[1:]]
    before = [chart.picture for chart in others]
    with reader.runs():
        reader.chart(CHARTS[0]).brush((0.3, 0.5), (0.7, 0.5))
    reader.page.get_by_text("Window: layers 2..5").wait_for()
    after = [reader.chart(words).picture for words in CHARTS[1:]]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert any("layers 2..5" in text.lower() for text in reader.chart(CHARTS[3]).texts)
    assert reader.page.get_by_text("Layers 2..5, all 6 pairs").count() == 1


def test_another_pair_redraws_the_first_chart_and_keeps_the_window(reader: Reader):
    with reader.runs():
        reader.page.get_by_label("pair", exact=True).select_option("evil · nurturing")
    words = " ".join(reader.chart(CHARTS[0]).texts)
    assert "evil · nurturing: cosine −" in words and "Llama" not in words
    assert reader.page.get_by_text("Window: layers 2..5").count() == 1


def test_its_address_opens_the_same_pair_and_window(browser, reader: Reader):
    with opened(browser, reader.page.url) as again:
        assert again.page.get_by_text("Window: layers 2..5").count() == 1
        assert "evil · nurturing: cosine −" in " ".join(again.chart(CHARTS[0]).texts)


@pytest.mark.parametrize("width", [360, 1600])
def test_charts_take_the_width_of_the_page(reader: Reader, width):
    reader.page.set_viewport_size({"width": width, "height": 900})
    reader.page.wait_for_function(
        "width => document.documentElement.scrollWidth <= width", arg=width
    )
    box = reader.chart(CHARTS[0]).svg.bounding_box()
    assert box and 0.6 * min(width, 1200) < box["width"] < width
    reader.page.set_viewport_size({"width": 1200, "height": 900})


def test_a_folder_without_results_is_answered_in_one_line(reader: Reader, tmp_path):
    reader.results(tmp_path)
    reader.page.get_by_text("make demo").first.wait_for()


def test_unmeasured_geometry_is_a_banner_and_the_rest_is_drawn(reader: Reader, tmp_path):
    bare = directions_made.folder(tmp_path / "bare", measured=False)
    reader.results(bare)
    reader.page.get_by_text("No geometry.json").wait_for()
    assert "chance not measured" in " ".join(reader.chart(CHARTS[0]).texts)


def test_nothing_went_wrong_in_the_console_or_a_cell(reader: Reader):
    assert reader.errors == []


def test_it_runs_as_a_script(folder):
    done = script.here(NOTEBOOK, "--results", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_results_it_says_what_to_run_and_ends_well(tmp_path):
    done = script.here(NOTEBOOK, "--results", tmp_path)
    assert done.returncode == 0
    assert "make demo" in done.stdout and "Traceback" not in done.stdout + done.stderr
