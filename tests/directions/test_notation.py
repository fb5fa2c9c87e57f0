from __future__ import annotations

import numpy as np
import pytest

from jaxsteer.directions import direction as directions
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.model.interventions import Add, Project


def direction(**provenance):
    return Direction(name="v", vectors=np.full((30, 4), 0.5, np.float32), provenance=provenance)


def test_strengths_and_windows_are_read():
    steer, share, negative, removed = directions.parse(
        ["v@21x4", "v@3..5x0.2r", "v@0x-1.5"], ["v@22..29"]
    )
    assert (steer.layers, steer.scale, steer.relative) == ((21,), 4.0, False)
    assert (share.layers, share.scale, share.relative) == ((3, 4, 5), 0.2, True)
    assert negative.scale == -1.5
    assert (removed.layers, removed.scale) == (tuple(range(22, 30)), None)


@pytest.mark.parametrize(
    "text",
    [
        "v",
        "v@21",
        "v@-1x4",
        "v@21x",
        "v@21x4q",
        "@21x4",
        "v@5..3x1",
        f"v@{'9' * 5000}x1",
        f"v@2x{'9' * 400}",
    ],
)
def test_other_steering_texts_are_refused_with_the_form(text):
    with pytest.raises(UserError, match=r"NAME@LAYERxSCALE|swap"):
        directions.parse([text], [])


@pytest.mark.parametrize("text", ["v", "v@", "v@2x4", "v@9..2", f"v@1..{'9' * 30}"])
def test_other_projection_texts_are_refused_with_the_form(text):
    with pytest.raises(UserError, match=r"NAME@LAYERS|swap"):
        directions.parse([], [text])


def test_a_share_is_turned_into_norms_by_the_recorded_residual_norm():
    # The vectors have norm 1, the residual stream 50 at layer 7: 0.2 of it are 10 norms.
    found = {"v": direction(residual_norm=[50.0] * 30)}
    (added,) = directions.operations(directions.parse(["v@7x0.2r"], []), found)
    assert isinstance(added, Add) and added.scale == pytest.approx(10.0)


def test_a_share_without_recorded_norms_and_an_unknown_direction_are_refused():
    with pytest.raises(UserError, match="natural norms"):
        directions.operations(directions.parse(["v@7x0.2r"], []), {"v": direction()})
    with pytest.raises(UserError, match="jaxsteer extract w"):
        directions.operations(directions.parse(["w@7x1"], []), {"v": direction()})


def test_a_projection_covers_its_window_in_one_operation():
    (removed,) = directions.operations(directions.parse([], ["v@22..24"]), {"v": direction()})
    assert isinstance(removed, Project) and removed.layers == (22, 23, 24)


@pytest.mark.parametrize("options", [(["v@22-29x1"], []), ([], ["v@22-29"])])
def test_a_window_with_a_hyphen_is_refused_with_its_spelling(options):
    with pytest.raises(UserError, match=r"22-29.*write a window as 22\.\.29"):
        directions.parse(*options)


def test_layers_are_read_from_a_number_or_a_window():
    assert directions.layers(20) == directions.layers("20") == (20,)
    assert directions.layers("21..23") == (21, 22, 23)
    assert directions.layers("24, 21..22") == (21, 22, 24)
    with pytest.raises(UserError, match=r"cannot read layers 'last'; write one layer as 21"):
        directions.layers("last")
