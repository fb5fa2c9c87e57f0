"""A real browser on a served notebook, driven from Python. Every notebook's tests use this.

    with serve(NOTEBOOK, "--results", folder) as url, opened(browser, url) as reader:
        with reader.runs():                      # returns when the kernel has run and is idle
            reader.slide("strength", -4)         # or press keys, brush a chart...
        assert "−4" in reader.chart("next token").title
        reader.screenshot("1_light")
        assert reader.errors == []

Nothing here sleeps. The kernel says over its websocket which cells run (`cell-op`) and when a run
is complete (`completed-run`), and `Reader` listens to that. Errors are collected from three places:
the console, exceptions in the page, and cells that end in an error.

Chromium is Debian's. On a bare machine where we are root, `chromium_path` installs it through apt;
elsewhere it fails with one line that says what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, WebSocket

ROOT = Path(__file__).parent.parent.parent
SCREENSHOTS = ROOT / "results/screenshots"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
SECONDS = 1000.0  # Playwright counts milliseconds
PATIENCE = 240 * SECONDS  # a first run compiles the model's programs


class NoBrowser(Exception):
    """Chromium is missing and cannot be installed from here; the message says how to get it."""


def chromium_path() -> str:
    """Debian's Chromium, installed through apt when it is missing and we may.

    Raises:
      NoBrowser: neither.
    """
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found:
        return found
    how = "install it: apt-get update && apt-get install -y chromium"
    if not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get")):
        raise NoBrowser(f"the notebook tests need Chromium; {how} (as root), then run them again")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium")
    for command in (("apt-get", "update", "-qq"), install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            raise NoBrowser(f"{' '.join(command)} failed ({last}); {how}, then run the tests again")
    path = shutil.which("chromium")
    if not path:
        raise NoBrowser(f"apt-get installed no `chromium` command; {how}")
    return path


@contextlib.contextmanager
def serve(notebook: Path, *arguments: str, edit: bool = False) -> Iterator[str]:
    """Run `marimo run` (or `edit`) on a free port until the block ends; yields its address.

    Args:
      notebook: the file.
      arguments: the notebook's own, after `--`.
      edit: show the editor rather than the app.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    verb = "edit" if edit else "run"
    command = [sys.executable, "-m", "marimo", "--yes", verb, str(notebook)]
    command += ["--headless", "--no-token", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--", *arguments] if arguments else []
    log = SCREENSHOTS / f"{notebook.stem}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=30)


@dataclasses.dataclass(kw_only=True)
class Chart:
    """A Vega chart on the page, drawn as SVG.

    Attributes:
      svg: its drawing.
    """

    svg: Locator

    @property
    def texts(self) -> list[str]:
        """Every word drawn: titles, axes, labels, in drawing order."""
        return self.svg.locator("text").all_text_contents()

    @property
    def picture(self) -> str:
        """The drawing itself, to compare before and after."""
        return str(self.svg.evaluate("svg => svg.outerHTML"))

    def marks(self, kind: str) -> list[str]:
        """Shapes of one kind of mark (`symbol`, `rect`, `line`, `rule`) as drawn, with place."""
        script = "paths => paths.map(p => `${p.getAttribute('transform')} ${p.getAttribute('d')}`)"
        return list(self.svg.locator(f"g.mark-{kind} path").evaluate_all(script))

    def brush(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag over the plot from `start` to `end`, in shares of its width and height from the
        top left."""
        plot = self.svg.locator("g.root > g > path.background").first
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        assert box, "the chart is not on the page"
        mouse = self.svg.page.mouse
        points = [
            (box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)
        ]
        mouse.move(*points[0])
        mouse.down()
        mouse.move(*points[1], steps=8)
        mouse.up()


class Reader:
    """A page with a notebook, and what its kernel says.

    Attributes:
      page: Playwright's page.
      errors: from the console, the page and the cells, in order; a good test ends with none.
    """

    def __init__(self, page: Page):
        self.page = page
        self.errors: list[str] = []
        self._busy: set[str] = set()
        self._completed = 0
        self._socket: WebSocket | None = None
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(f"page: {error}"))
        page.on("websocket", self._listen)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"console: {message.text}")

    def _listen(self, socket: WebSocket) -> None:
        self._socket = socket
        self._busy.clear()
        socket.on("framereceived", self._hear)

    def _hear(self, payload: str | bytes) -> None:
        said = json.loads(payload)
        operation, data = said.get("op"), said.get("data") or {}
        if operation == "completed-run":
            self._completed += 1
        if operation == "cell-op":
            status = data.get("status")
            if status in ("queued", "running"):
                self._busy.add(data["cell_id"])
            elif status:
                self._busy.discard(data["cell_id"])
            output = data.get("output") or {}
            if output.get("mimetype") == "application/vnd.marimo+error":
                # A cell that `mo.stop` ended is not an error, nor are those that wait for it.
                for one in output.get("data") or []:
                    if one.get("type") not in ("ancestor-stopped", "ancestor-prevented"):
                        self.errors.append(f"cell: {one}")

    def open(self, url: str) -> None:
        """Load the notebook and wait for its first complete run."""
        for attempt in range(600):
            # The server is not up yet: the connection itself is refused, at once.
            with contextlib.suppress(Exception):
                self.page.goto(url, wait_until="commit")
                break
            self.page.wait_for_timeout(100 if attempt else 10)
        self.wait(until=1)

    def results(self, folder: object) -> None:
        """Open the same page on another results folder, as an address with that folder does."""
        here = urlsplit(self.page.url)
        asked = dict(parse_qsl(here.query)) | {"results": str(folder)}
        with self.loads():
            self.page.goto(here._replace(query=urlencode(asked)).geturl(), wait_until="commit")

    def wait(self, until: int) -> None:
        """Wait for so many completed runs in all, and for the kernel to be idle."""
        if self._socket is None:
            self.page.wait_for_event("websocket", timeout=PATIENCE)
        assert self._socket
        while self._completed < until or self._busy:
            self._socket.wait_for_event("framereceived", timeout=PATIENCE)

    @contextlib.contextmanager
    def runs(self) -> Iterator[None]:
        """What is done in the block makes the kernel run; leave when it has and is idle."""
        before = self._completed
        yield
        self.wait(until=before + 1)

    @contextlib.contextmanager
    def loads(self) -> Iterator[None]:
        """What is done in the block opens a page; leave when its own kernel has run and is idle."""
        before, self._socket = self._completed, None
        yield
        self.wait(until=before + 1)

    def slider(self, label: str) -> Locator:
        """The thumb of the marimo slider with this label; the first, where it is shown twice."""
        return self.page.get_by_role("slider", name=label, exact=True).first

    def slide(self, label: str, to: float) -> None:
        """Drag a slider's thumb to a value."""
        thumb = self.slider(label)
        thumb.scroll_into_view_if_needed()
        low, high = (float(thumb.get_attribute(f"aria-value{end}") or 0) for end in ("min", "max"))
        box = thumb.bounding_box()
        track = thumb.locator("xpath=ancestor::span[@data-orientation][last()]").bounding_box()
        assert box and track, f"no slider {label!r} on the page"
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(track["x"] + track["width"] * (to - low) / (high - low), y, steps=5)
        self.page.mouse.up()

    def chart(self, words: str) -> Chart:
        """The chart that has these words in its title, axes or labels."""
        drawn = self.page.locator(".vega-embed svg.marks").filter(has_text=words)
        drawn.first.wait_for(timeout=30 * SECONDS)
        return Chart(svg=drawn.first)

    def theme(self, scheme: str) -> None:
        """Switch the system's colour scheme, `light` or `dark`; marimo follows it."""
        self.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        self.page.wait_for_function(
            "dark => document.body.classList.contains('dark') === dark || "
            "document.documentElement.classList.contains('dark') === dark",
            arg=scheme == "dark",
        )

    def screenshot(self, name: str, of: Locator | None = None) -> Path:
        """Save a PNG of the whole notebook, or of one element, under results/screenshots."""
        path = SCREENSHOTS / f"{name}.png"
        if of:
            of.screenshot(path=path)
            return path
        # marimo scrolls an inner box: the window grows to it, so that nothing is cut off.
        height = self.page.evaluate(
            "() => Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight))"
        )
        before = self.page.viewport_size
        assert before
        self.page.set_viewport_size({"width": before["width"], "height": min(height, 16000)})
        self.page.screenshot(path=path)
        self.page.set_viewport_size(before)
        return path


@contextlib.contextmanager
def opened(browser: Browser, url: str, *, scheme: str = "light") -> Iterator[Reader]:
    """A fresh page on the notebook, after its first run."""
    context = browser.new_context(
        viewport={"width": 1200, "height": 900},
        color_scheme=scheme,  # type: ignore[arg-type]
        device_scale_factor=1,
    )
    try:
        reader = Reader(context.new_page())
        reader.open(url)
        yield reader
    finally:
        context.close()
