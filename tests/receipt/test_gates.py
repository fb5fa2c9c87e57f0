from __future__ import annotations

import pytest

from jaxsteer.errors import UserError
from jaxsteer.receipt import gates


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("refusal drop > 0.05", ("refusal", "drop", 0.05, "")),
        ("  benign-refusal   rise>0.1 ", ("benign-refusal", "rise", 0.1, "")),
        ("bypass rise > 5%", ("bypass", "rise", 0.05, "")),
        (
            "leakage rise > 0 in calm: persona, out late #2",
            ("leakage", "rise", 0.0, "calm: persona, out late #2"),
        ),
    ],
)
def test_gates_are_read(text, read):
    gate = gates.parse(text)
    assert (gate.metric, gate.way, gate.threshold, gate.condition) == read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot read"),
        ("refusal", "cannot read"),
        ("refusal drop 0.05", "cannot read"),
        ("refusal drop < 0.05", "cannot read"),
        ("refusal drop > 0.05 in", "cannot read"),
        ("refusal drop > -0.05", "cannot read"),
        ("refusal drop > 0.05; rm", "cannot read"),
        ("refusals drop > 0.05", "no metric 'refusals'"),
        ("refusal falls > 0.05", "neither drop nor rise"),
        ("refusal drop > 0.0.5", "is no number"),
        ("refusal drop > 5", "at most 1"),
        ("refusal drop > 150%", "at most 1"),
    ],
)
def test_malformed_gates_are_refused_saying_why(text, said):
    with pytest.raises(UserError, match=said):
        gates.parse(text)


def test_a_gate_fires_beyond_its_threshold_and_only_its_way():
    drop, rise = gates.parse("refusal drop > 0.05"), gates.parse("refusal rise > 0.05")
    assert drop.fires(-0.06)
    assert not drop.fires(0.06)
    assert rise.fires(0.06)
    # At the threshold is not beyond it, whatever floating point makes of 0.35 - 0.3.
    assert not rise.fires(0.35 - 0.3)
    assert not drop.fires(0.0)
