"""Notebooks as single HTML files that open without a network: `make notebook-html`.

`marimo export html` runs a notebook and writes a page whose outputs are inside, but whose scripts,
styles and fonts load from a content delivery network. marimo ships the same files in its wheel, so
this module puts them into the page: styles and fonts as they are, scripts compressed. When the page
opens, each script becomes a blob, and an import map tells the browser where they are.

What a page without a kernel can do: planes are dragged, charts show their tooltips, exercises
unfold. Moving a marimo slider changes nothing; for that, open the notebook.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxsteer.errors import UserError
from jaxsteer.files import atomic_path

# Parts of marimo that none of our notebooks use, and that would double a page: Plotly and SQL.
LEFT_OUT = ("Plot-", "node-sql-parser-")

LOADER = """
<script>
(async () => {
  const packed = document.getElementById("jaxsteer-scripts").textContent;
  const bytes = Uint8Array.from(atob(packed), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const sources = JSON.parse(await new Response(stream).text());
  const imports = {};
  for (const [name, source] of Object.entries(sources)) {
    imports[name] = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  }
  const map = document.createElement("script");
  map.type = "importmap";
  map.textContent = JSON.stringify({ imports });
  document.head.append(map);
  await import("ENTRY");
})();
</script>
"""


def inline(page: str, static: Path) -> str:
    """A page of `marimo export html` with everything it loads put inside.

    Args:
      page: the exported HTML.
      static: marimo's `_static` folder, of the same version.

    Raises:
      UserError: the page does not look like that version's export.
    """
    entry = re.search(r'<script type="module"[^>]*src="[^"]*/assets/([^"/]+\.js)"', page)
    if not entry or not (static / "assets" / entry[1]).is_file():
        raise UserError(
            "cannot make the notebook's page self-contained: its scripts are not those of the "
            "installed marimo; install the tested version (constraints.txt) and export again"
        )
    # marimo's widgets copy into their shadow the styles that it marks, which this attribute does.
    styles = "".join(
        f'<style data-vite-dev-id="{path.name}">{_style(path, static)}</style>'
        for path in _style_sheets(static)
    )
    packed = base64.b64encode(gzip.compress(json.dumps(_scripts(static)).encode(), mtime=0))
    loader = LOADER.replace("ENTRY", f"marimo/{entry[1]}")
    scripts = f'<script id="jaxsteer-scripts" type="text/plain">{packed.decode()}</script>{loader}'
    # Every tag that loads from the network goes; what it loaded is in the page now.
    page = re.sub(r"<link\b[^>]*\bhref=[\"']https?://[^>]*>\s*", "", page)
    page = re.sub(r"<script type=\"module\"[^>]*src=[^>]*>\s*</script>\s*", "", page)
    page = page.replace("</head>", f'<link rel="icon" href="data:,">{styles}</head>', 1)
    return page.replace("</body>", scripts + "</body>", 1)


def _scripts(static: Path) -> dict[str, str]:
    """Every script by the name it is imported under, its own imports renamed to match."""
    paths = [p for p in sorted((static / "assets").glob("*.js")) if not p.name.startswith(LEFT_OUT)]
    names = {path.name for path in paths}

    def named(match: re.Match[str]) -> str:
        quote, name = match[1], match[2]
        return f"{quote}marimo/{name}{quote}" if name in names else match[0]

    made = {}
    for path in paths:
        text = re.sub(r"([\"'`])\./([\w.-]+\.js)\1", named, path.read_text(encoding="utf-8"))
        # What Vite would preload before an import is in the page already.
        text = re.sub(r"__vite__mapDeps\(\[[\d,]*\]\)", "[]", text)
        # A blob is no base for relative addresses; nothing is to be found under this one.
        text = text.replace("import.meta.url", json.dumps(f"https://offline.invalid/{path.name}"))
        made[f"marimo/{path.name}"] = text
    return made


def _style_sheets(static: Path) -> list[Path]:
    """All style sheets: marimo's own in its order, then those that a part would load later."""
    index = (static / "index.html").read_text(encoding="utf-8")
    first = re.findall(r"assets/([\w.-]+\.css)", index)
    found = {path.name: path for path in sorted((static / "assets").glob("*.css"))}
    return [found[name] for name in first] + [found[n] for n in found if n not in first]


def _style(path: Path, static: Path) -> str:
    """A style sheet with its web fonts and images inside."""

    def data(match: re.Match[str]) -> str:
        target = (path.parent / match[1].split("#")[0].split("?")[0]).resolve()
        kinds = {".woff2": "font/woff2", ".png": "image/png", ".svg": "image/svg+xml"}
        kind = kinds.get(target.suffix)
        # Other formats of a font are for browsers that cannot read woff2, and there is none left.
        if not kind or not target.is_file() or static.resolve() not in target.parents:
            return 'url("data:,")'
        return f'url("data:{kind};base64,{base64.b64encode(target.read_bytes()).decode()}")'

    text = path.read_text(encoding="utf-8")
    pattern = r"url\(\s*[\"']?(?!data:|#)([^)\"']+)[\"']?\s*\)"
    return re.sub(pattern, data, text).replace("</style", "<\\/style")


def export(notebook: Path, out: Path, arguments: Sequence[str] = ()) -> Path:
    """Run a notebook and write it as one HTML file that needs nothing else.

    Args:
      notebook: the marimo notebook.
      out: the folder to write into; the file is called like the notebook.
      arguments: the notebook's own command-line arguments.

    Raises:
      UserError: the notebook does not run, or marimo's version differs from the tested one.
    """
    import marimo

    target = out / f"{notebook.stem}.html"
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "page.html"
        command = [sys.executable, "-m", "marimo", "--yes", "export", "html", str(notebook)]
        command += [
            "--no-include-code",
            "-o",
            str(raw),
            "--force",
            *(["--", *arguments] if arguments else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not raw.is_file():
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise UserError(f"{notebook} does not run ({last}); run it as a script to see why")
        page = inline(raw.read_text(encoding="utf-8"), Path(marimo.__file__).parent / "_static")
    with atomic_path(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def main() -> None:
    """`python -m jaxsteer.charts.offline NOTEBOOK... --out DIR`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/html"))
    parser.add_argument("--results", help="results directory, given to every notebook")
    given = parser.parse_args()
    arguments = ["--results", given.results] if given.results else []
    try:
        for notebook in given.notebooks:
            print(export(notebook, given.out, arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
