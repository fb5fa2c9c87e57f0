"""Count the code lines of the package by folder: `python -m tests.weigh`, which `make lint` runs.

A code line is neither blank, nor a comment, nor part of a docstring. A statement that spans several
lines counts as that many.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "jaxsteer"
# The part of the package that a reader of the method has to read.
CORE = ("model", "generation", "directions", "study")
TOP_LEVEL = "(top level)"

_LAYOUT = (
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
)


def code_lines(source: str) -> int:
    """Number of code lines in the source text of a module.

    >>> code_lines('"Docstring."\\n\\n# Comment.\\nx = [\\n    1,\\n]\\n')
    3
    """
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - _docstring_lines(ast.parse(source)))


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def modules(package: Path = PACKAGE) -> dict[Path, int]:
    """Code lines of every module, by its path relative to the package."""
    return {
        path.relative_to(package): code_lines(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def folder(module: Path) -> str:
    """The first folder on a module's path, or `TOP_LEVEL`."""
    return module.parts[0] if len(module.parts) > 1 else TOP_LEVEL


def core_lines(counted: Mapping[Path, int]) -> int:
    """Code lines of the modules in the core's folders."""
    return sum(lines for module, lines in counted.items() if folder(module) in CORE)


def table(counted: Mapping[Path, int]) -> str:
    """Code lines, number of files and largest module of every folder, as text."""
    lines: Counter[str] = Counter()
    largest: dict[str, tuple[int, str]] = {}
    for module, count in counted.items():
        lines[folder(module)] += count
        largest[folder(module)] = max((count, str(module)), largest.get(folder(module), (0, "")))
    files = Counter(map(folder, counted))
    rows = [
        f"{lines[name]:6d} {files[name]:4d} files  {name:12s}  largest {largest[name][1]}, "
        f"{largest[name][0]}"
        for name in sorted(lines, key=lines.__getitem__, reverse=True)
    ]
    total = f"{sum(lines.values()):6d} {len(counted):4d} files  all; core {core_lines(counted)}"
    return "\n".join([f"code lines of {PACKAGE.name}", *rows, total])


if __name__ == "__main__":
    print(table(modules()))
