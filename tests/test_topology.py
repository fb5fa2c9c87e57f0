from __future__ import annotations

import math
import os

import pytest

from jaxsteer import parallel, topology
from jaxsteer.chips import CHIPS, TOPOLOGIES, chip_of
from jaxsteer.errors import UserError
from jaxsteer.hlo import Exchange
from jaxsteer.topology import MODELS, Table
from jaxsteer.weights import param_shapes
from tests.cli.command import jaxsteer
from tests.test_parallel import mesh_of


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
    assert parallel.notes(MODELS[model], mesh_of(**sizes)) == []


def test_the_largest_batch_is_on_the_line_through_two():
    # 10 bytes a row beside 360: 164 rows fit in 2000, and 160 is a multiple of 32.
    assert topology.largest((64, 128), (1000, 1640), 2000, 32, 10000) == 160
    assert topology.largest((64, 128), (1000, 1640), 2000, 1, 10000) == 164
    assert topology.largest((64, 128), (1000, 1640), 2000, 1, 100) == 100
    assert topology.largest((64, 128), (1000, 1640), 300, 1, 100) == 0


def test_a_table_is_turns_of_slots_and_batches_of_prompts():
    # 313 prompts in 11 conditions are 3443 rows, 14 turns of 256 slots: 149 steps of
    # 10 ms, in 19 chunks of 8 at 2 ms each.
    decode, read = topology.table_seconds(Table(), 256, 0.010, 0.002, 0.1)
    assert decode == pytest.approx(14 * (1.49 + 19 * 0.002))
    # And 216 batches of 16 prompts.
    assert read == pytest.approx(21.6)


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


def test_every_slice_that_is_checked_is_of_a_known_chip():
    assert [chip_of(name) for name in TOPOLOGIES] == [CHIPS["v5e"], CHIPS["v6e"], CHIPS["v4"]]


def test_without_the_compiler_the_command_says_how_to_get_it():
    assert "TPU_LIBRARY_PATH" not in os.environ
    done = jaxsteer("tpu-check", "--model", "llama-3.1-8b", "--topology", "v5e:2x4")
    assert done.returncode == 2
    assert "libtpu" in done.stderr and "make tpu-check" in done.stderr
    assert done.stderr.count("\n") == 1
