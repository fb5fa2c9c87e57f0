"""TPU chips: what a data sheet says of them, and how to compile for a slice that is not there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from jaxsteer.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of TPU chip.

    Attributes:
      hbm: bytes a program may use: what the compiler names when it runs out.
      bandwidth: of HBM, bytes a second.
      clock: cycles a second.
      link: bytes a second over one link to a neighbour, each way.
      options: how to ask the compiler for it.
      source: where these numbers are from.
    """

    hbm: int
    bandwidth: float
    clock: float
    link: float
    options: Mapping[str, Any]
    source: str


# Clocks follow from the data sheets' peaks: 2 x cells of the matrix units x clock.
CHIPS = {
    "v4": Chip(
        hbm=int(30.75 * GIB),
        bandwidth=1228e9,
        clock=1.05e9,
        link=50e9,
        # Two cores that act as one device, as on a TPU VM.
        options={"chip_config_name": "megacore"},
        source="cloud.google.com/tpu/docs/v4: 275 TFLOP/s of 8 units of 128 x 128",
    ),
    "v5e": Chip(
        hbm=int(15.75 * GIB),
        bandwidth=819e9,
        clock=1.5e9,
        link=50e9,
        options={},
        source="cloud.google.com/tpu/docs/v5e: 197 TFLOP/s of 4 units of 128 x 128",
    ),
    "v6e": Chip(
        hbm=int(31.24 * GIB),
        bandwidth=1640e9,
        clock=1.75e9,
        link=112e9,
        options={},
        source="cloud.google.com/tpu/docs/v6e: 918 TFLOP/s of 4 units of 256 x 256",
    ),
}
TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "v4:2x2x1")
# Seconds until a byte is at a neighbour, whatever the size (jax-ml.github.io/scaling-book).
HOP = 1e-6


def chip_of(topology: str) -> Chip:
    """The chip of a slice such as `v5e:2x4`.

    Raises:
      UserError: a chip that is not known.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not all(size.isdecimal() for size in shape.split("x")):
        raise UserError(
            f"topology {topology!r} is not known; write a chip ({', '.join(CHIPS)}) and a shape, "
            f"such as {', '.join(TOPOLOGIES)}"
        )
    return CHIPS[kind]


def devices(topology: str) -> list[jax.Device]:
    """The devices of a slice that is not there, good for compiling only.

    Raises:
      UserError: a chip or shape that is not known, or no TPU compiler here.
    """
    chip = chip_of(topology)
    # The compiler asks a TPU VM's services who it is, and complains at length that they are not
    # there; these answers keep it quiet and change nothing in what it compiles.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_HOST_BOUNDS": "2,4,1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(topology, "tpu", **chip.options)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "not installed" in reason or "dlopen" in reason or "libtpu" in reason:
            raise UserError(
                "the TPU compiler (libtpu) is not installed; run `make tpu-check`, which installs "
                f"it beside the environment ({reason})"
            ) from None
        raise UserError(f"topology {topology!r} is refused: {reason}") from None
    return list(found.devices)
