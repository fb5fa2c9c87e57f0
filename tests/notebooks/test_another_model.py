"""A tiny second model, really swept: the pages say its numbers, and none of the demo's model."""

from __future__ import annotations

import pytest

from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.receipt import build
from jaxsteer.study import run, spec
from tests import tiny
from tests.notebooks.browser import ROOT, opened, serve

LAYERS, WIDTH = 5, 40
NEUTRAL = """
neutral = { kind = "trait", trait = "compliant-neutral" }
[selection]
"""
# Of each notebook: words of the page, and a chart's with some that it must draw.
PAGES = {
    "2_geometry": ("Window: layers 0..4, of 5 layers.", "one cosine a layer;", {"4"}),
    "3_layer_window": ("its maps have few cells", "projected out of", {"not removed", "4"}),
    "4_controls": ("6 harmful strongreject, 3 benign", "prompts, one column each", {"baseline"}),
    "5_receipt": ("The receipt holds", "persona, out", {"share of strongreject prompts"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("another")
    hf = tiny.save(tiny.llama(num_hidden_layers=LAYERS, hidden_size=WIDTH), path / "hf")
    model = ChatModel.load(convert(hf, path / "five", "float32"))
    study = tiny.study_file(path, ("[selection]\n", NEUTRAL.lstrip()))
    run.run_study(spec.load(study), model, path / "results")
    build.write(path / "results")
    return path / "results"


@pytest.mark.parametrize("notebook", PAGES)
def test_a_page_says_the_numbers_of_the_model_that_was_run(browser, folder, notebook):
    said, chart, drawn = PAGES[notebook]
    arguments = (ROOT / f"notebooks/{notebook}.py", "--results", str(folder))
    with serve(*arguments) as url, opened(browser, url) as reader:
        reader.page.get_by_text(said).first.wait_for()
        page = reader.page.locator("body").inner_text()
        assert "five, float32" in page
        for other in ("576", "thirty", "30 layers", "smollm2-135m, float32", "safety-examples"):
            assert other not in page
        assert drawn <= set(reader.chart(chart).texts)
        layers = {int(text) for text in reader.chart(chart).texts if text.isdigit()}
        assert max(layers, default=0) < LAYERS or notebook == "4_controls"
        assert reader.errors == []
