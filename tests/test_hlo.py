from __future__ import annotations

from jaxsteer import hlo

# As the TPU compiler writes: a fusion inside a fusion counts where it is called; `%open` ends by
# its data, `%counted` after 3 turns.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: bf16[8,16]) -> bf16[8,16] {
  ROOT %reduce = bf16[8,16]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%counted.body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %work = f32[4]{0} fusion(%t), kind=kLoop, backend_config={"estimated_cycles":"10"}
  %gather = f32[4]{0} all-gather(%work), dimensions={0}
}

%counted.cond (t: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %turn = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%open.body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %matmul = bf16[8,16]{1,0} fusion(%t), kind=kOutput, calls=%inner, "estimated_cycles":"100"
  %more = (s32[], f32[4]) while(%t), condition=%counted.cond, body=%counted.body
  %start = (bf16[4,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%matmul), dimensions={0}
  %done = bf16[8,16]{1,0} all-gather-done(%start)
  %silly = f32[1]{0} fusion(%t), backend_config={"estimated_cycles":"9223372036854775807"}
}

%open.cond (t: (s32[], f32[4])) -> pred[] {
  %limit.1 = s32[] constant(9)
  %less.1 = pred[] compare(%turn, %limit.1), direction=LT
  ROOT %both = pred[] and(%less.1, %live)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %copy = f32[4]{0} copy(%p), backend_config={"estimated_cycles":"7"}
  %first = (s32[], f32[4]) while(%p), condition=%counted.cond, body=%counted.body
  %decode = (s32[], f32[4]) while(%copy), condition=%open.cond, body=%open.body
}
"""


def test_a_turn_of_the_open_loop_is_told_from_the_rest():
    once, turn = hlo.costs(PROGRAM)
    assert once.cycles == 7 + 3 * 10
    assert turn.cycles == 100 + 3 * 10


def test_exchanges_are_counted_with_their_bytes_where_they_happen():
    once, turn = hlo.costs(PROGRAM)
    assert {(e.kind, e.shape, e.nbytes, e.times) for e in once.exchanges} == {
        ("all-gather", "f32[4]", 16, 3)
    }
    assert {(e.kind, e.shape, e.nbytes, e.times) for e in turn.exchanges} == {
        ("all-reduce", "bf16[8,16]", 256, 1),
        ("all-gather", "f32[4]", 16, 3),
        ("all-gather", "bf16[8,16]", 256, 1),
    }


def test_a_program_without_a_loop_has_a_turn_of_no_cost():
    text = PROGRAM.replace("  %decode = (s32[], f32[4]) while", "  %decode = (s32[], f32[4]) call")
    once, turn = hlo.costs(text)
    assert (once.cycles, turn.cycles, turn.exchanges) == (37, 0, ())


def test_several_results_of_one_exchange_all_count():
    line = (
        "  %both = (f32[2,3]{1,0}, s32[5]{0}, pred[7]{0}) all-reduce(%a, %b, %c), to_apply=%add\n"
    )
    text = PROGRAM.replace("  %copy = ", line + "  %copy = ")
    found = {(e.shape, e.nbytes) for e in hlo.costs(text)[0].exchanges if e.kind == "all-reduce"}
    assert found == {("f32[2,3]", 24), ("s32[5]", 20), ("pred[7]", 7)}
