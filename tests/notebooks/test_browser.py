from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.notebooks import browser as harness
from tests.notebooks.browser import Reader, opened, serve

PROBE = Path(__file__).parent / "probe.py"


@pytest.fixture(scope="module")
def url():
    with serve(PROBE) as address:
        yield address


@pytest.fixture
def reader(browser, url):
    with opened(browser, url) as made:
        yield made


def test_a_moved_slider_changes_the_chart(reader: Reader):
    before = reader.chart("power")
    assert "power 5" in before.texts
    with reader.runs():
        reader.slide("power", 8)
    assert "power 8" in reader.chart("power 8").texts
    assert reader.errors == []


def test_a_brush_reaches_the_kernel(reader: Reader):
    with reader.runs():
        reader.chart("points").brush((0.2, 0.05), (0.95, 0.95))
    reader.page.get_by_text("chosen: 2").wait_for()
    assert reader.errors == []


def test_a_failing_cell_and_a_console_error_are_seen(reader: Reader):
    with reader.runs():
        reader.slide("power", 10)
    # An app does not show readers what went wrong inside; its log does.
    assert [error[:5] for error in reader.errors] == ["cell:"]
    assert "the power is ten" in (harness.SCREENSHOTS / "probe.log").read_text()
    with reader.page.expect_console_message():
        reader.page.evaluate("console.error('from the page')")
    assert "console: from the page" in reader.errors


def test_charts_follow_the_theme_of_the_page(reader: Reader):
    title = reader.chart("power").svg.locator("g.role-title text").first
    colours = []
    for scheme in ("light", "dark"):
        reader.theme(scheme)
        colours.append(title.evaluate("text => getComputedStyle(text).fill"))
    # `rgb(15, 23, 42)` or `color(srgb 0.06 0.09 0.16)`, as the page's style sheet has it.
    light, dark = ([float(x) for x in re.findall(r"[\d.]+", colour)] for colour in colours)
    assert max(light) < 0.4 * max(dark)


def test_a_screenshot_shows_the_whole_notebook(reader: Reader):
    path = reader.screenshot("probe")
    width, height = (int.from_bytes(path.read_bytes()[i : i + 4], "big") for i in (16, 20))
    assert width == 1200 and height > 900


def test_without_chromium_and_root_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(harness.NoBrowser, match="apt-get install -y chromium") as error:
        harness.chromium_path()
    assert "\n" not in str(error.value)


def test_marimo_finds_nothing_wrong_with_the_notebooks():
    notebooks = sorted((harness.ROOT / "notebooks").glob("*.py"))
    assert notebooks
    command = [sys.executable, "-m", "marimo", "check", "--strict", *map(str, notebooks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
