"""Photograph the notebooks as they run now: `make gallery`, or `python -m tests.notebooks.gallery`.

The pictures stand in the README and are marimo's own thumbnails in its gallery of notebooks, hence
their size and place. Each shows one chart of its notebook, found by the words that it draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from jaxsteer.evidence.charts.opening import DEFAULT
from tests.notebooks.browser import FLAGS, ROOT, chromium_path, opened, serve

# The window is wider than the picture, which leaves out marimo's own buttons at its edges.
WINDOW = {"width": 1360, "height": 660}
PICTURE = {"x": 80, "y": 0, "width": 1200, "height": 630}
LARGEST = 250_000  # bytes
# Words in the chart with which each picture begins.
SHOWN = {
    "1_how_steering_works": "click a cell to steer there",
    "2_geometry": "one cosine a layer",
    "3_layer_window": "layers the direction is projected out of",
    "4_controls": "difference of rates",
    "5_receipt": "share of strongreject prompts",
}


def thumbnail(notebook: str) -> Path:
    """Where marimo looks for a notebook's picture."""
    return ROOT / f"notebooks/__marimo__/assets/{notebook}/opengraph.png"


def main(results: str) -> None:
    """Make all pictures from the notebooks on a results folder, and one of its receipt."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS))
        made = []
        for notebook, words in SHOWN.items():
            path = thumbnail(notebook)
            path.parent.mkdir(parents=True, exist_ok=True)
            source = ROOT / f"notebooks/{notebook}.py"
            with serve(source, "--results", results) as url, opened(browser, url) as reader:
                reader.page.set_viewport_size(WINDOW)
                chart = reader.chart(words).svg
                # Charts above it may still grow to the new width.
                for _ in range(3):
                    chart.evaluate(
                        "svg => { svg.style.scrollMarginTop = '14px';"
                        " svg.scrollIntoView({block: 'start', behavior: 'instant'}) }"
                    )
                    reader.page.wait_for_timeout(400)
                reader.page.screenshot(path=path, clip=PICTURE)
                assert reader.errors == [], reader.errors
            made.append(path)
        page = browser.new_page(viewport={"width": 880, "height": 1222}, color_scheme="light")
        page.goto((ROOT / results / "receipt.html").resolve().as_uri())
        made.append(ROOT / "notebooks/img/receipt.png")
        page.screenshot(path=made[-1])
        browser.close()
    for path in made:
        size = path.stat().st_size
        print(f"{size / 1000:5.0f} kB  {path.relative_to(ROOT)}")
        if size > LARGEST:
            raise SystemExit(f"{path} is larger than {LARGEST / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:] or [DEFAULT])
