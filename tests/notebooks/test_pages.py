"""What all notebooks have in common: the gallery, links, the address, and exported pages."""

from __future__ import annotations

import mimetypes
import subprocess
import sys
from pathlib import Path

import marimo
import numpy as np
import pytest

from jaxsteer.directions import direction
from jaxsteer.directions.direction import Direction
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests import tiny
from tests.evidence import windows_made
from tests.notebooks.browser import ROOT, Reader, opened, serve

KNOCKOUT = "layers the direction is projected out of"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return windows_made.folder(tmp_path_factory.mktemp("pages") / "made")


def marimos_own(route) -> None:
    """Answers for the network that serves marimo's scripts, with the files of this installation."""
    name = route.request.url.partition("/dist/")[2]
    path = Path(marimo.__file__).parent / "_static" / name
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    headers = {"access-control-allow-origin": "*", "content-type": kind}
    route.fulfill(body=path.read_bytes(), headers=headers)


def test_the_gallery_leads_to_a_notebook_and_its_links_and_address_keep_the_choice(browser, folder):
    with serve(ROOT / "notebooks", "--results", str(folder)) as url:
        with opened(browser, f"{url}/?file=2_geometry.py") as reader:
            next_one = reader.page.get_by_role("link", name="3 layer window")
            with reader.loads():
                next_one.click()
            assert "made-model, float32" in reader.page.inner_text("body")
            assert reader.chart(KNOCKOUT).texts
            with reader.runs():
                reader.page.get_by_label("projection on", exact=True).select_option("persona")
            assert "onto=persona" in reader.page.url
            address = reader.page.url
        with opened(browser, address) as again:
            assert again.page.get_by_label("projection on", exact=True).input_value() == "persona"
            assert again.errors == []
            again.page.goto(url)
            again.page.get_by_text("Where in depth refusal comes back").wait_for()


def exported(notebook: str, folder: Path, *arguments: str) -> Path:
    page = folder / f"{notebook}.html"
    command = [sys.executable, "-m", "marimo", "--yes", "export", "html", "--no-include-code"]
    command += [str(ROOT / f"notebooks/{notebook}.py"), "-o", str(page)]
    command += ["--", "--exported", "1", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    return page


def test_an_exported_page_says_what_is_inert_and_draws_its_charts(browser, folder, tmp_path):
    page = exported("3_layer_window", tmp_path, "--results", str(folder))
    with browser.new_context(offline=True) as alone:
        reader = Reader(alone.new_page())
        reader.page.goto(page.as_uri(), wait_until="load")
        reader.page.get_by_text("could not load marimo's scripts from cdn.jsdelivr.net").wait_for()
    with browser.new_context() as connected:
        reader = Reader(connected.new_page())
        reader.page.route("https://cdn.jsdelivr.net/**", marimos_own)
        reader.page.goto(page.as_uri())
        reader.page.get_by_text("do nothing here.").wait_for()
        assert reader.chart(KNOCKOUT).marks("symbol")
        link = reader.page.get_by_role("link", name="4 controls")
        assert link.get_attribute("href") == "4_controls.html"
        assert reader.page.locator("#offline").count() == 0


def test_what_an_exported_page_excepts_works_in_it(browser, tmp_path):
    hf = tiny.save(tiny.llama(), tmp_path / "hf")
    model = ChatModel.load(convert(hf, tmp_path / "tiny", "float32"))
    shape = (model.config.n_layers, model.config.d_model)
    persona = Direction(
        name="persona",
        vectors=np.ones(shape, np.float32),
        provenance={"weights_sha256": model.weights_sha256},
    )
    direction.save(tmp_path / "directions.safetensors", [persona])
    arguments = ("--model", str(tmp_path / "tiny"), "--results", str(tmp_path))
    page = exported("1_how_steering_works", tmp_path, *arguments)
    with browser.new_context() as connected:
        reader = Reader(connected.new_page())
        reader.page.route("https://cdn.jsdelivr.net/**", marimos_own)
        reader.page.goto(page.as_uri())
        reader.page.get_by_text("except the vectors of sections 1 to 5 and the menus").wait_for()
        plane = reader.page.locator(".plane").nth(1)
        before = plane.locator("output").get_attribute("data-result")
        plane.locator('[data-vector="h"]').focus()
        reader.page.keyboard.press("ArrowRight")
        assert plane.locator("output").get_attribute("data-result") != before
        chart = reader.chart("opens with a refusal:")
        drawn = chart.picture
        reader.page.locator(".vega-bindings select").nth(2).select_option(label="-8")
        assert chart.picture != drawn
