from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def lowered():
    """What tests/lowered.py came to: rows in 4, heads, MLP and vocabulary in 2, bfloat16."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.lowered"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_step_adds_up_twice_a_layer_and_moves_no_weight_table_or_cache(lowered):
    exchanges = lowered["program"]["turn"]["exchanges"]
    # Everything else is about single tokens: the smallest kernel's piece has 768 bytes.
    large = [e for e in exchanges if e["nbytes"] > 128]
    # The streams of 4 rows, 32 wide: after attention and MLP of 3 layers, and where tokens are
    # looked up. (float32 on a CPU, which has no bfloat16 sums.)
    assert [(e["kind"], e["shape"], e["times"]) for e in large] == [
        ("all-reduce", "f32[4,1,32]", 2 * 3 + 1)
    ]


def test_memory_of_a_device_is_its_pieces(lowered):
    # Half of 2 x 64 x 32 of table and head, of 3 layers of 2 x 32 x 48 for q and o, 2 x 32 x 24 for
    # k and v, 3 x 32 x 48 for the MLP; all of 7 norms of 32; 2 bytes each.
    assert lowered["params"] == 2 * (2 * 64 * 32 // 2 + 3 * 9216 // 2 + 7 * 32)
    # 4 of 16 rows, 1 of 2 key-value heads of 12, keys and values of 3 layers; 16 + 32 + 8 slots
    # are 64 when they have to be a multiple of 16.
    assert lowered["cache"] == 2 * (4 * 1 * 64 * 12) * 2 * 3


def test_reading_prompts_hands_on_streams_keys_and_values_and_no_weight(lowered):
    def exchanged(name):
        found = lowered["reading"][name]["once"]["exchanges"]
        return [(e["kind"], e["shape"], e["times"]) for e in found if e["nbytes"] > 128]

    # Lanes of 32 tokens, 4 of a batch's 16 on each device. Each goes on from a stream that another
    # device may have, which half of the devices hand to the other; then two sums, as in a step.
    assert exchanged("segment") == [
        ("all-reduce", "f32[8,32,32]", 1),
        ("collective-permute", "f32[4,32,32]", 1),
        ("all-reduce", "f32[4,32,32]", 2),
    ]
    # A row's lane may be anywhere: all lanes' keys and values of the device's 1 of 2 heads of 12.
    assert exchanged("gather") == [("all-gather", "f32[16,1,32,12]", 2)]
    # Last tokens' streams.
    assert exchanged("choose") == [
        ("all-reduce", "f32[8,32]", 1),
        ("collective-permute", "f32[4,32]", 1),
    ]


def test_rows_are_put_together_in_pieces(lowered):
    # Keys and values of 4 rows, 64 slots of 1 of 2 heads of 12, 2 bytes each; and what was changed
    # in each row's layer, less than 100 bytes.
    cache = 2 * 4 * 1 * 64 * 12 * 2
    assert 0 <= lowered["reading"]["gather"]["made"] - cache <= 4 * 100


def test_the_compiler_counts_the_same_arguments(lowered):
    # And the probes of 3 layers, the sampling's three numbers.
    rest = 3 * 32 * 4 + 3 * 8
    assert 0 <= lowered["program"]["held"] - lowered["params"] - lowered["state"] <= rest
