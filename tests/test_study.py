from __future__ import annotations

import numpy as np
import pytest

from jaxsteer import study
from jaxsteer.directions import Direction
from jaxsteer.errors import UserError

L, D = 10, 8
NAMED = {"steer": 5, "early": 2, "refusal": 4, "late_refusal": 8}


def directions(seed=0):
    draw = np.random.default_rng(seed)
    names = ("persona", "refusal", "random-1", "random-2", "random-3")
    return {
        n: Direction(name=n, vectors=draw.standard_normal((L, D)).astype(np.float32), provenance={})
        for n in names
    }


def by_name(spec):
    return {c.name: c for c in study.conditions(spec, directions(), NAMED, 4.0)}


def test_the_demo_study_has_its_planned_conditions_and_every_knockout_its_twin():
    found = by_name(study.load("smollm2-demo"))
    for name in ("baseline", "persona", "random direction #1", "refusal out everywhere"):
        assert name in found
    knockouts = [c for c in found.values() if ", out" in c.name and not c.unsteered_twin_of]
    assert len(knockouts) == 4
    for knockout in knockouts:
        twin = found[f"{knockout.name}, unsteered"]
        assert twin.unsteered_twin_of == knockout.name
        assert twin.sites == knockout.sites[1:]


def test_only_the_knockout_at_the_steering_layer_cancels_steering():
    found = by_name(study.load("smollm2-demo"))
    assert [c.name for c in found.values() if c.cancels_steering] == [
        "persona, out at steering layer"
    ]


def test_dose_and_offsets_are_resolved_into_readable_sites():
    found = by_name(study.load("smollm2-demo"))
    assert found["persona"].sites == ("add persona at resid_post.5 x4",)
    assert "project persona at resid_post.6..9" in found["persona, out over late window"].sites


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", (7,)),
        ("steer", (5,)),
        ("steer+2", (7,)),
        ("steer+1..last", (6, 7, 8, 9)),
        ("2..4", (2, 3, 4)),
    ],
)
def test_layer_expressions(text, expected):
    assert study.resolve_layers(text, NAMED, L, "test") == expected


@pytest.mark.parametrize("text", ["-1", "steer+9", "10", "nowhere", "steer*2", "", "4..2"])
def test_layers_that_are_not_there_are_refused(text):
    with pytest.raises(UserError, match="test"):
        study.resolve_layers(text, NAMED, L, "test")


DEMO = (study.STUDIES / "smollm2-demo.toml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_new_tokens = 40", "max_new_token = 40", "max_new_token"),
        ("benign = 32", 'benign = "many"', "benign"),
        ('name = "smollm2-demo"', "name = [", "TOML"),
        ('name = "baseline"', 'name = "persona"', "twice"),
    ],
)
def test_a_malformed_study_names_the_key(tmp_path, old, new, message):
    path = tmp_path / "mine.toml"
    path.write_text(DEMO.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        study.load(path)


def test_an_unknown_direction_and_an_unknown_study_are_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(DEMO.replace('add = "persona"', 'add = "charm"'))
    with pytest.raises(UserError, match="charm"):
        by_name(study.load(path))
    with pytest.raises(UserError, match="smollm2-demo"):
        study.load("nosuch")
