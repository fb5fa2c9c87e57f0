from __future__ import annotations

import pytest

from jaxsteer.errors import UserError
from jaxsteer.evidence.charts.offline import export, inline
from tests.notebooks.browser import ROOT

PROBE = ROOT / "tests/notebooks/probe.py"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return export(PROBE, tmp_path_factory.mktemp("html"))


def test_an_exported_page_draws_its_charts_without_a_network(browser, page):
    context = browser.new_context(offline=True)
    opened = context.new_page()
    asked, errors = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    opened.goto(page.as_uri())
    opened.locator(".vega-embed svg").filter(has_text="power 5").wait_for()
    opened.get_by_role("slider", name="power").wait_for()
    fonts = opened.evaluate("document.fonts.load('16px \"PT Sans\"').then(found => found.length)")
    context.close()
    assert fonts > 0 and errors == []
    assert [url for url in asked if not url.startswith(("blob:", "data:", "file:"))] == []
    assert [url for url in asked if url.startswith("file:")] == [page.as_uri()]


def test_an_exported_page_names_no_folder_of_this_machine(page):
    assert str(ROOT) not in page.read_text(encoding="utf-8")


def test_a_page_of_another_marimo_is_refused(tmp_path):
    with pytest.raises(UserError, match="tested version"):
        inline(
            '<script type="module" src="https://x.invalid/assets/index-OLD.js"></script>', tmp_path
        )


FAILING = """
import marimo
app = marimo.App()

@app.cell
def _():
    raise ValueError("no such thing")

"""


def test_a_notebook_with_a_failing_cell_is_not_exported(tmp_path):
    failing = tmp_path / "failing.py"
    failing.write_text(FAILING)
    with pytest.raises(UserError, match=r"failing\.py does not run"):
        export(failing, tmp_path / "html")
    assert not (tmp_path / "html").exists()
