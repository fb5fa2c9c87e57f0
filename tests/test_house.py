"""The size and the shape of the package: budgets, the direction of imports, unused names."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import weigh

# Code lines. The aim is a core of 4,500, a package of 11,500 and 80 files, and what new features
# need. Lower these numbers with the code; raise one only in the commit that needs it, and give the
# reason here. Since the core was 4,690 (in core / in all):
#   366 / 366  families of models, in HF's form and as GGUF
#   395 / 465  files of chat models as they are: templates, ends, parts, adapters, chat-template
#   230 / 230  choosing policy, window and late refusal by rule; studies that would say nothing
#   150 / 320  what steering costs on benign prompts
#    65 /  90  rows that run in step in small programs: generate takes half the time
#    20 / 145  how well directions are known
#    10 / 110  what a study of its size could show; controls on a part of the prompts
#     0 / 170  what claims need before they say anything
#    20 / 140  stop signals, locks, and faults said in one line
#    13 / 108  limits of an answer, refusals by any verb, thinking that never ended
#    20 /  46  the table of windows, one-sided judges, a GGUF refused by its first bytes
#   252 / 432  prompt sets, policies, modes and traits of one's own; study new and study check
#     5 / 216  judges that run here, described in files
#   121 / 125  long prompts attended to in blocks, and the memory that a run takes
#     0 / 190  one header for every notebook, menus of results, addresses that can be sent
#     0 / 197  notebook 1: where directions come from, a map, random directions, exercises
#    53 / 150  titles that are true on any data, reliability measured by the sweep
#    20 /  20  rates of the selection that are not made again
#     7 /   7  a few rows with long prompts that decode apart
CORE = 6285
WHOLE = 14817
MODULE = 350
FILES = 80

# A module may import from its own group and from those above it.
GROUPS = (
    ("errors", "files", "stats", "words"),
    ("data",),
    ("model",),
    ("generation",),
    ("directions",),
    ("judges",),
    ("study",),
    ("evidence",),
    ("receipt",),
    ("api",),
    ("cli",),
)
RANK = {name: rank for rank, group in enumerate(GROUPS) for name in group}
# Decorators that register a function, so that no other code has to name it.
REGISTERS = ("command", "callback")


@pytest.fixture(scope="module")
def counted() -> dict[Path, int]:
    """Code lines of every module."""
    return weigh.modules()


def test_the_core_is_within_its_budget(counted):
    lines = weigh.core_lines(counted)
    assert lines <= CORE, weigh.table(counted)


def test_the_package_is_within_its_budget(counted):
    lines = sum(counted.values())
    assert lines <= WHOLE, weigh.table(counted)


def test_the_package_has_few_files(counted):
    files = len(counted)
    assert files <= FILES, weigh.table(counted)


def test_no_module_is_long(counted):
    assert {str(module): lines for module, lines in counted.items() if lines > MODULE} == {}


def _first_part(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def _imported(tree: ast.Module) -> Iterator[str]:
    """Folders and top-level modules of the package that a module imports, in functions too."""
    package = weigh.PACKAGE.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == package:
                yield parts[1] if len(parts) > 1 else "__init__"


def test_imports_point_from_a_folder_to_those_above_it(counted):
    upwards = []
    for module in counted:
        if module == Path("__init__.py"):
            continue
        tree = ast.parse((weigh.PACKAGE / module).read_text(encoding="utf-8"))
        # A name without a rank may neither import from the package nor be imported.
        rank = RANK.get(_first_part(module), -1)
        upwards += [
            f"{module} imports {name}"
            for name in _imported(tree)
            if RANK.get(name, len(GROUPS)) > rank
        ]
    assert not upwards, "\n".join(upwards)


def _defined(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines at its top level, registered commands excepted."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            calls = [d.func for d in node.decorator_list if isinstance(d, ast.Call)]
            if not any(isinstance(f, ast.Attribute) and f.attr in REGISTERS for f in calls):
                yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (leaf for target in targets for leaf in ast.walk(target)):
                # Not the `x` in `x.attribute = value`.
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    yield name.id


def test_every_name_is_used(counted):
    root = weigh.PACKAGE.parent
    words: Counter[str] = Counter()
    for folder in (weigh.PACKAGE, root / "tests", root / "notebooks"):
        for path in folder.rglob("*.py"):
            words.update(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    unused = [
        f"{module}: {name}"
        for module in counted
        for name in _defined(ast.parse((weigh.PACKAGE / module).read_text(encoding="utf-8")))
        if words[name] == 1 and not name.startswith("__")
    ]
    assert not unused, "\n".join(unused)
