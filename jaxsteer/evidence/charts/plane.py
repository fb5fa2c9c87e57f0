"""A plane with two vectors to drag: the state h, the direction d, and what steering makes of h.

The picture is drawn in the browser (plane.js), so it moves with the pointer and still works in an
exported page without a kernel. The tips come back to Python as traits; `evidence.lesson.steer_2d`
computes the same step with the library's own `interventions.apply`, and a browser test compares
the two. Tips move by mouse, by touch, and by the arrow keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import anywidget
import traitlets

from jaxsteer.evidence.charts.theme import PALETTE

Step = Literal["add", "project", "cap"]
HERE = Path(__file__).parent


class Plane(anywidget.AnyWidget):
    """Drag the tips of h and d; the steps are applied to h in the order given.

    Attributes:
      h: the state, [x, y] within -4 to 4.
      d: the direction, [x, y]; its length is its natural norm.
      strength: multiples of d that `add` adds.
      high: upper bound of the projection that `cap` keeps; the lower bound is -high.
      steps: which of add, project and cap are applied, in this order.
      colours: hex colours of d and of the result.
    """

    _esm = HERE / "plane.js"
    _css = HERE / "plane.css"
    h = traitlets.List(traitlets.Float()).tag(sync=True)
    d = traitlets.List(traitlets.Float()).tag(sync=True)
    strength = traitlets.Float(1.0).tag(sync=True)
    high = traitlets.Float(1.0).tag(sync=True)
    steps = traitlets.List(traitlets.Unicode()).tag(sync=True)
    colours = traitlets.Dict().tag(sync=True)


def plane(
    steps: Sequence[Step],
    *,
    h: tuple[float, float] = (1.0, 2.0),
    d: tuple[float, float] = (1.5, 0.5),
    strength: float = 1.0,
    high: float = 1.0,
) -> Plane:
    """A plane to show with `mo.ui.anywidget`; see `Plane` for the arguments."""
    return Plane(
        h=list(h),
        d=list(d),
        strength=strength,
        high=high,
        steps=list(steps),
        colours={"d": PALETTE["persona"], "result": PALETTE["axis"]},
    )
