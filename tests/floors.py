"""The versions that pyproject.toml allows, as they were when `make test-floor` last passed.

`python -m tests.floors` writes them to floors.txt; the target does so after its tests.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

RECORD = Path(__file__).with_suffix(".txt")


def allowed() -> str:
    """What pyproject.toml allows, one line each."""
    file = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = {f"python{project['requires-python']}", *project["dependencies"]}
    needed.update(*(extras[name] for name in ("dev", "judges", "notebooks")))
    return "".join(f"{line}\n" for line in sorted(needed) if not line.startswith("jaxsteer["))


if __name__ == "__main__":
    RECORD.write_text(allowed(), encoding="utf-8")
