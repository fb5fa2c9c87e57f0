from __future__ import annotations

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import pytest

from jaxsteer import lowering, topology
from jaxsteer.chips import CHIPS, GIB, TOPOLOGIES, chip_of
from jaxsteer.errors import UserError
from jaxsteer.hlo import Cost, Exchange
from jaxsteer.lowering import Program
from jaxsteer.model import sharding
from jaxsteer.model.weights import param_shapes
from jaxsteer.published import MODELS
from jaxsteer.topology import Table
from tests.cli.command import jaxsteer
from tests.model.test_sharding import mesh_of


@pytest.mark.parametrize(
    # As the models' own cards count them.
    ("model", "parameters"),
    [("llama-3.1-8b", 8_030_261_248), ("qwen2.5-7b", 7_615_616_512)],
)
def test_the_shapes_are_those_of_the_published_models(model, parameters):
    shapes = param_shapes(MODELS[model]).values()
    assert sum(math.prod(shape) for shape in shapes) == parameters


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [4, 8])
def test_the_default_mesh_splits_everything(model, count):
    sizes = topology.default_mesh(MODELS[model], count)
    assert math.prod(sizes.values()) == count and sizes["model"] == 4
    assert sharding.notes(MODELS[model], mesh_of(**sizes)) == []


def test_the_largest_batch_is_on_the_line_through_two():
    # 10 bytes a row beside 360: 164 rows fit in 2000, and 160 is a multiple of 32.
    assert topology.largest((64, 128), (1000, 1640), 2000, 32, 10000) == 160
    assert topology.largest((64, 128), (1000, 1640), 2000, 1, 10000) == 164
    assert topology.largest((64, 128), (1000, 1640), 2000, 1, 100) == 100
    assert topology.largest((64, 128), (1000, 1640), 300, 1, 100) == 0


def test_a_table_is_turns_of_slots_and_batches_of_lanes_and_of_rows():
    # 313 prompts in 11 conditions are 3443 rows, 14 turns of 256 slots: 149 steps of
    # 10 ms, in 19 chunks of 8 at 2 ms each.
    decode, read = topology.table_seconds(Table(), 256, 0.010, 0.002, 0.1, 0.01)
    assert decode == pytest.approx(14 * (1.49 + 19 * 0.002))
    # Two prompts of 64 in a lane of 128: 108 batches of 16 lanes, and 216 batches of 16 rows.
    assert read == pytest.approx(10.8 + 2.16)


@pytest.mark.parametrize(
    ("prompt", "longest", "width", "in_one"),
    [(64, 256, 128, 2), (64, 100, 100, 1), (8, 256, 128, 8), (200, 256, 128, 1), (11, 87, 87, 7)],
)
def test_lanes_are_as_those_of_a_run(prompt, longest, width, in_one):
    table = Table(prompts=56, conditions=2, prompt=prompt, longest=longest)
    assert (table.width, table.lanes) == (width, 112 / in_one)


def test_links_pass_an_all_reduce_twice_around_and_both_ways():
    chip = CHIPS["v5e"]
    reduce = Exchange(kind="all-reduce", shape="bf16[100]", nbytes=10**6, times=3)
    # Twice 3/4 of a megabyte over two links of 50 GB/s, and twice two hops of a microsecond.
    seconds = topology.exchange_seconds((reduce,), 4, chip)
    assert seconds == pytest.approx(3 * (2 * 0.75e6 / 100e9 + 2 * 2e-6))
    gather = Exchange(kind="all-gather", shape="bf16[100]", nbytes=10**6, times=1)
    assert topology.exchange_seconds((gather,), 4, chip) == pytest.approx(0.75e6 / 100e9 + 2e-6)
    assert topology.exchange_seconds((reduce, gather), 1, chip) == 0


@pytest.mark.parametrize("text", ["", "v5e", "v5e:", "v9:2x2", "v5e:2by4", "2x4"])
def test_a_topology_that_is_not_known_shows_those_that_are(text):
    with pytest.raises(
        UserError, match=r"write a chip \(v4, v5e, v6e\) and a shape, such as v5e:2x4"
    ):
        chip_of(text)


def test_chips_are_as_their_data_sheets_say():
    sheets = {
        # GiB of HBM that a program may use, GB/s of it, GHz, GB/s of a link each way.
        "v4": (30.75, 1228, 1.05, 50),
        "v5e": (15.75, 819, 1.5, 50),
        "v6e": (31.24, 1640, 1.75, 112),
    }
    for name, (hbm, bandwidth, clock, link) in sheets.items():
        chip = CHIPS[name]
        assert (chip.hbm, chip.bandwidth) == (int(hbm * GIB), bandwidth * 1e9)
        assert (chip.clock, chip.link) == (clock * 1e9, link * 1e9)


MIB = 2**20


def nbytes(count):
    """An array of that many bytes on each device, and no values."""
    lies = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct((count,), jnp.int8, sharding=lies)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    cache: jax.ShapeDtypeStruct
    rest: jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Level:
    stream: jax.ShapeDtypeStruct


class Sweep(lowering.Sweep):
    """A sweep whose programs are names; see `programs`."""

    def __init__(self, config, mesh, new_tokens):
        self.mesh = mesh
        self.params = {"embed": nbytes(GIB), "layers": nbytes(7 * GIB)}

    def room(self, beginning, longest):
        return 464

    def prefix(self, width):
        return nbytes(256 * MIB)

    def levels(self, width, prefix):
        return [Level(nbytes(width * MIB // 2)), Level(nbytes(width * MIB // 2))]

    def state(self, batch, beginning, longest):
        return State(cache=nbytes(8 * batch * MIB), rest=nbytes(batch * MIB))

    def segment(self, stream, layers, width, prefix):
        return "segment", width

    def gather(self, level, layers, prefix, room):
        return "gather", 2 * level.stream.shape[0] // MIB

    def first_token(self, levels, width, prefix, room):
        return "choose", width

    def advance(self, state):
        return "advance", state.rest.shape[0] // MIB


REDUCE = Exchange(kind="all-reduce", shape="bf16[100]", nbytes=10**6, times=64)


def programs(a_row, too_many=10**6):
    """A compiler for `Sweep`: a decode step takes `a_row` MiB of temporaries for each row."""

    def program(cycles=0, turn=0, made=0, temporaries=0, exchanges=()):
        return Program(
            held=0,
            made=made * MIB,
            temporaries=temporaries * MIB,
            once=Cost(cycles=cycles, exchanges=()),
            turn=Cost(cycles=turn, exchanges=exchanges),
            seconds=1.0,
        )

    def compiled(kind, size):
        if kind == "advance" and size >= too_many:
            raise RuntimeError("RESOURCE_EXHAUSTED: it took all")
        return {
            "advance": program(3 * 10**6, 15 * 10**6, 0, size * a_row, (REDUCE,)),
            "segment": program(cycles=30_000 * size, temporaries=4 * size),
            "gather": program(cycles=150_000, made=size // 2),
            "choose": program(cycles=1_500_000, made=size // 4),
        }[kind]

    return compiled


@pytest.fixture
def check(monkeypatch):
    def checked(a_row=2, too_many=10**6, **options):
        monkeypatch.setattr(lowering, "Sweep", Sweep)
        monkeypatch.setattr(lowering, "compiled", programs(a_row, too_many))
        monkeypatch.setattr(topology, "mesh_on", lambda *asked: mesh_of(data=2, model=4))
        return topology.check("llama-3.1-8b", "v5e:2x4", **options)

    return checked


def test_what_is_left_is_what_the_slots_and_the_widest_lanes_leave(check):
    found = check(search=False)
    assert (found.weights, found.cache) == (8 * GIB, 2 * GIB)
    # 1 MiB a row; beginnings 256, lanes of 256 tokens 256, of 8 segments 128 each, and 64.
    assert found.other == (256 + 256 + 256 + 8 * 128 + 64) * MIB
    # A segment of lanes of 256 needs more than 256 rows that decode.
    assert found.temporaries == 1024 * MIB
    assert found.left == 15.75 * GIB - 10 * GIB - 1856 * MIB - 1024 * MIB
    assert found.fits and not check(a_row=20, search=False).fits
    assert found.largest_batch is None and found.compile_seconds == 7


def test_seconds_are_cycles_and_links_and_lanes_as_a_run_has_them(check):
    found = check(search=False)
    # Twice 3/4 of a megabyte over two links of 50 GB/s, and twice two hops of a microsecond.
    assert found.exchange_seconds == pytest.approx(64 * (2 * 0.75e6 / 100e9 + 2 * 2e-6))
    assert found.exchanged_bytes == 64 * 10**6
    assert found.step_seconds == pytest.approx(0.010 + found.exchange_seconds)
    assert found.chunk_seconds == pytest.approx(0.002)
    # The token table is not read, but for the rows it needs.
    assert found.bound_seconds == pytest.approx(9 * GIB / 819e9)
    # Eight segments of lanes of 128 tokens; eight gatherings, and the first tokens.
    assert found.lane == 128
    assert found.prefill_seconds == pytest.approx(8 * 128 * 30_000 / 1.5e9)
    assert found.together_seconds == pytest.approx(8 * 0.0001 + 0.001)
    decode = 14 * (149 * found.step_seconds + 19 * 0.002)
    read = 108 * found.prefill_seconds + 216 * found.together_seconds
    assert found.table_seconds == pytest.approx(decode + read)


@pytest.mark.parametrize(
    ("a_row", "too_many", "rows"),
    [
        # Of 16128 MiB 9792 stay and 1024 are for reading; 5312 hold 590 rows of 9, in sixteens 576.
        (2, 10**6, 576),
        # The compiler refuses these: a sixteenth less.
        (2, 576, 528),
        # Decoding 576 rows needs 2304 MiB where 256 needed no more than reading; so do 528.
        (4, 10**6, 480),
        # And so on, down to what is known to fit.
        (2, 257, 256),
    ],
)
def test_the_largest_batch_is_one_that_was_compiled_and_fits(check, a_row, too_many, rows):
    assert check(a_row, too_many).largest_batch == rows


def test_a_table_that_fits_at_once_is_the_largest_batch(check):
    found = check(table=Table(prompts=100, conditions=5))
    assert found.largest_batch == 496 and found.holds_table


def test_a_program_too_large_for_the_compiler_does_not_fit(check):
    with pytest.raises(topology.DoesNotFitError, match=r"mesh data=2,model=4: it took all; choose"):
        check(too_many=200)


def test_every_slice_that_is_checked_is_of_a_known_chip():
    assert [chip_of(name) for name in TOPOLOGIES] == [CHIPS["v5e"], CHIPS["v6e"], CHIPS["v4"]]


def test_without_the_compiler_the_command_says_how_to_get_it():
    assert "TPU_LIBRARY_PATH" not in os.environ
    done = jaxsteer("tpu-check", "--model", "llama-3.1-8b", "--topology", "v5e:2x4")
    assert done.returncode == 2
    assert "libtpu" in done.stderr and "make tpu-check" in done.stderr
    assert done.stderr.count("\n") == 1
