from __future__ import annotations

import jax
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jaxsteer import topology
from jaxsteer.chips import GIB
from jaxsteer.cli.common import app
from jaxsteer.cli.scale import _table
from jaxsteer.errors import UserError
from jaxsteer.topology import Check


def check(**changes):
    values = {
        "model": "llama-3.1-8b",
        "topology": "v5e:2x4",
        "mesh": {"data": 2, "model": 4},
        "batch": 256,
        "weights": 4 * GIB,
        "cache": 2 * GIB,
        "other": GIB // 8,
        "temporaries": GIB // 2,
        "left": 9 * GIB,
        "step_seconds": 0.010,
        "exchange_seconds": 0.001,
        "chunk_seconds": 0.002,
        "bound_seconds": 0.007,
        "exchanges": (),
        "exchanged_bytes": 68_000_000,
        "lane": 128,
        "prefill_seconds": 0.0225,
        "together_seconds": 0.0035,
        "largest_batch": 1360,
        "table_rows": 3443,
        "table_seconds": 47.4,
        "compile_seconds": 100.0,
        "notes": (),
    }
    return Check(**(values | changes))


def lines(*checks):
    console = Console(width=110)
    with console.capture() as captured:
        console.print(_table(checks))
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in captured.get().splitlines()
        if line.startswith("│")
    ]
    return captured.get(), {name: values for name, *values in cells}


def test_the_table_has_a_column_per_model_and_slice():
    text, rows = lines(check(), check(topology="v6e:2x4", largest_batch=None, table_seconds=30))
    assert "compiled, not measured" in text and "v6e:2x4" in text
    assert rows["mesh"] == ["2 x 4", "2 x 4"]
    assert rows["weights"] == ["4.00", "4.00"]
    assert rows["bound / step"] == ["70%", "70%"]
    assert rows["exchanged a step, MB"] == ["68.0", "68.0"]
    assert rows["largest batch"] == ["1360", ""]
    assert rows["table, s (compiled estimate)"] == ["47", "30"]


def test_a_batch_that_the_table_bounds_and_not_the_memory_is_said():
    _, rows = lines(check(largest_batch=3440), check(largest_batch=3424))
    assert rows["largest batch"] == ["3440, all rows", "3424"]


def test_what_the_mesh_cannot_split_is_under_the_table():
    note = "4 key-value heads cannot be split in 8: k and v projections and the cache are whole"
    assert note in " ".join(lines(check(notes=(note,)))[0].split())


def test_more_than_there_is_does_not_fit():
    assert check().fits and not check(left=-1).fits


@pytest.mark.parametrize("command", [["--model", "llama-3.1-8b"], ["--json"]])
def test_what_does_not_fit_is_said_after_all_were_compiled_and_fails(monkeypatch, command):
    def checked(name, slice_, **options):
        if slice_ == "v4:2x2x1":
            raise topology.DoesNotFitError(f"{name} does not fit {slice_} on mesh: it took all")
        return check(model=name, topology=slice_, left=-GIB if slice_ == "v5e:2x4" else 0)

    monkeypatch.setattr(topology, "mesh_on", lambda *asked: None)
    monkeypatch.setattr(topology, "check", checked)
    done = CliRunner().invoke(app, ["tpu-check", *command], catch_exceptions=False)
    assert done.exit_code == 1
    assert "compiling llama-3.1-8b for v4:2x2x1" in done.stderr
    assert "llama-3.1-8b does not fit v5e:2x4 with 256 rows: 1.0 GiB too much" in done.stderr
    assert "llama-3.1-8b does not fit v4:2x2x1 on mesh: it took all" in done.stderr
    assert "fit v6e:2x4" not in done.stderr and "v6e:2x4" in done.stdout
    fits = CliRunner().invoke(app, ["tpu-check", "--topology", "v6e:2x4"], catch_exceptions=False)
    assert fits.exit_code == 0 and "does not fit" not in fits.stderr


def test_what_is_asked_for_last_is_looked_at_before_the_first_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(topology, "devices", lambda _: jax.devices()[:1])
    monkeypatch.setattr(topology, "check", lambda name, *_, **__: compiled.append(name))
    asked = ["--model", "llama-3.1-8b", "--model", "llama-3.1-9b", "--mesh", "model=1"]
    with pytest.raises(UserError, match=r"'llama-3\.1-9b' is not known here"):
        CliRunner().invoke(app, ["tpu-check", *asked], catch_exceptions=False)
    assert compiled == []
