from __future__ import annotations

from jaxsteer.receipt import build, charts, compare, statement
from tests.receipt import made


def test_moved_figures_stand_first_in_a_comparison(tmp_path):
    def label(condition: str, family: str, i: int) -> str:
        return made.usual("baseline" if condition == "persona" else condition, family, i)

    receipts = [
        statement.load(build.write(made.folder(tmp_path / name, **more))[0])
        for name, more in (("one", {}), ("two", {"label": label}))
    ]
    found = compare.compare(*receipts)
    first = charts.moved_first(found.lines)[0]
    assert (first.condition, first.metric, first.moved) == ("persona", "refusal", True)
    words = charts.diff_chart(found).to_dict()["description"]
    assert "most refusal under persona (+43 points)" in words
