"""The TPU check without a TPU compiler: presets, bounds, and its programs on CPU devices."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from typing import Any

import pytest

from jaxsteer.model.weights import param_shapes
from tests.bench import hbm, tpu


@pytest.mark.parametrize(
    # As the models' own cards count them.
    ("model", "parameters"),
    [("llama-3.1-8b", 8_030_261_248), ("qwen2.5-7b", 7_615_616_512)],
)
def test_the_presets_have_their_published_numbers_of_parameters(model, parameters):
    shapes = param_shapes(tpu.config_of(model)).values()
    assert sum(math.prod(shape) for shape in shapes) == parameters


def test_seconds_are_between_everything_overlapped_and_nothing():
    chip = tpu.Chip(hbm=1, bandwidth=100, peak=1000)
    cost = tpu.Cost(memory=0, made=0, operations=2000, accessed=300)
    assert cost.seconds(chip, read=100) == (2, 2 + 3)
    assert cost.seconds(chip, read=250) == (2.5, 5)


# The layouts S(1) are in on-chip memory. HBM has 8 bytes of each prefetch, 16 + 16 of the entry's
# fusion, which reads two of four rows of its operand, and 8 that the step's fusion writes.
PROGRAM = """HloModule step

%sliced (p0: f32[4,2]) -> f32[2,2] {
  %p0 = f32[4,2]{1,0} parameter(0)
  ROOT %s = f32[2,2]{1,0} slice(%p0), slice={[0:2], [0:2]}
}

%body (w: f32[2,2]) -> f32[2] {
  %w = f32[2,2]{1,0} parameter(0)
  %start = ((f32[2,2]{1,0}), f32[2]{0:S(1)}, s32[]) slice-start(%w), slice={[0:1], [0:2]}
  %done = f32[2]{0:S(1)} slice-done(%start)
  %twice = f32[2]{0:S(1)} add(%done, %done)
  %more = f32[2]{0:S(1)} add(%twice, %done)
  ROOT %out = f32[2]{0} negate(%more)
}

ENTRY %main (a: f32[4,2]) -> f32[2,2] {
  %a = f32[4,2]{1,0} parameter(0)
  ROOT %f = f32[2,2]{1,0} fusion(%a), kind=kLoop, calls=%sliced
}
"""


def test_bytes_of_a_step_are_those_of_hbm_with_what_is_outside_of_the_loop_shared():
    assert hbm.step_bytes(PROGRAM, 4) == (8 + 8) + (16 + 16) / 4


def test_without_the_compiler_one_line_names_it(monkeypatch, capsys):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(sys, "argv", ["tpu", "--model", "llama-3.1-8b", "--topology", "v5e:2x4"])
    with pytest.raises(SystemExit) as ended:
        tpu.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and "no libtpu" in said


# In a process of its own: its eight devices are fixed when JAX starts, and shapes without values
# would not pass the type checks of the other tests.
TINY = """
import dataclasses, json
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jaxsteer.model import sharding
from tests import tiny
from tests.bench import hbm, tpu
tpu.LONGEST, tpu.NEW_TOKENS, tpu.ROWS = 32, 8, 64
config = tiny.config(vocab_size=64)
mesh = sharding.mesh("data=4,model=2")
found = tpu.check(config, mesh, tpu.Chip(1e9, 1e9, 1e9), 16)
sweep = tpu.Sweep(config, mesh)
programs = {"prefill": sweep.prefill(32), "decode": sweep.decode(sweep.state(16))}
print(json.dumps({
    "memory": found.memory,
    "left": found.left,
    "larger": tpu.larger(config, mesh, tpu.Chip(1e9, 1e9, 1e9), 16, found),
    "too large": tpu.check(config, mesh, tpu.Chip(1e3, 1e9, 1e9), 16).left,
    "text": {name: call[0].lower(*call[1:]).compile().as_text()
             for name, call in programs.items()},
}))
"""


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    """What the check says of a tiny model: rows in 4, heads, MLP and vocabulary in 2, bfloat16."""
    done = subprocess.run([sys.executable, "-c", TINY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_memory_is_that_of_one_devices_pieces(tiny):
    # Half of 2 x 64 x 32 of table and head, of 3 layers of 2 x 32 x 48 for q and o, 2 x 32 x 24 for
    # k and v, 3 x 32 x 48 for the MLP; all of 7 norms of 32; 2 bytes each.
    assert tiny["memory"]["weights"] == 2 * (2 * 64 * 32 // 2 + 3 * 9216 // 2 + 7 * 32)
    # 4 of 16 rows, 1 of 2 key-value heads of 12, keys and values of 3 layers in 48 slots, 2 bytes
    # each; and of each row, in 3 layers, an added and a removed vector of 32 in float32.
    least = 2 * (4 * 1 * 48 * 12) * 2 * 3 + 4 * 3 * 2 * 32 * 4
    assert least <= tiny["memory"]["decoding rows"] <= 1.2 * least
    assert tiny["left"] == 1e9 - sum(tiny["memory"].values())


@pytest.mark.slow
def test_all_rows_are_the_most_that_decode_together_and_too_many_do_not_fit(tiny):
    assert tiny["larger"] == 64 and tiny["too large"] < 0


def exchanged(text: str) -> list[list[int]]:
    """The shapes that a program's devices exchange, but for those of at most 128 numbers."""
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    results = re.findall(rf" = ([^=]*?) (?:{kinds})(?:-start)?\(", text)
    shapes = [re.findall(r"\[([\d,]+)\]", result) for result in results]
    found = [[int(size) for size in shape.split(",")] for some in shapes for shape in some]
    return [shape for shape in found if math.prod(shape) > 128]


@pytest.mark.slow
def test_devices_exchange_residual_streams_and_no_weights_or_caches(tiny):
    # A step's streams [4 rows, 1 token, 32] have 128 numbers; the smallest kernel's piece has 384.
    assert exchanged(tiny["text"]["decode"]) == []
    prefill = exchanged(tiny["text"]["prefill"])
    assert prefill and all(len(shape) == 3 and shape[1:] == [32, 32] for shape in prefill)
