"""The pages in a browser on results on which a chart easily says something false."""

from __future__ import annotations

import pytest

from tests.evidence import hard_results
from tests.notebooks.browser import ROOT, opened, serve

# How the chart of outcomes begins.
OUTCOMES = {
    "everything refused": "Refusal is 100 % under each of",
    "all degenerate": "No refusal under",
    "one seed": "Refusal is highest under",
    "one condition": "Refusal is 63 % under baseline",
    "61 conditions": "Refusal is highest under",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("hard")
    return {name: hard_results.world(name, path / name).folder for name in OUTCOMES}


@pytest.mark.parametrize("notebook", ["3_layer_window", "4_controls", "5_receipt"])
def test_a_page_draws_hard_results_without_an_error(browser, folders, notebook):
    first, *others = folders.values()
    arguments = (ROOT / f"notebooks/{notebook}.py", "--results", str(first))
    with serve(*arguments) as url, opened(browser, url) as reader:
        for name, folder in folders.items():
            if folder in others:
                reader.results(folder)
            if notebook == "5_receipt":
                drawn = reader.chart(OUTCOMES[name]).texts
                assert sum(" of 40: " in text for text in drawn) > 60 or name != "61 conditions"
            page = reader.page.locator("body").inner_text()
            assert "made-model, float32" in page
            assert "nan" not in page.lower().split() and "1 seeds" not in page
        assert reader.errors == []
