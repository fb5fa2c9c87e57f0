"""Bytes that a compiled TPU program moves from and to HBM, read from its text.

The compiler's own count of bytes also has what moves inside the chip: it fetches weights and caches
into on-chip memory ahead of time, which the text writes as a memory space, S(1). Counted here are
the operands and results of each instruction that have no memory space. Of an operand that a fusion
slices, only the slices count; an asynchronous copy counts once.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
ARRAY = re.compile(rf"({'|'.join(BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
OPENS = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
LINE = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*)$")
# These move nothing: names for what is there, and the second halves of asynchronous copies.
FREE = {
    "after-all", "bitcast", "constant", "copy-done", "get-tuple-element", "iota", "parameter",
    "slice-done", "tuple", "while",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: `%name = shape operation(operands), attributes`."""

    name: str
    shape: str
    operation: str
    operands: Sequence[str]
    text: str

    def sizes(self, *, everywhere: bool = False) -> list[int]:
        """Bytes of the arrays of its result that are in HBM, or of all of them."""
        return [
            BYTES[kind] * _product(dimensions)
            for kind, dimensions, layout in ARRAY.findall(self.shape)
            if everywhere or "S(" not in layout
        ]


Program = dict[str, list[Instruction]]


def _product(dimensions: str) -> int:
    total = 1
    for size in filter(None, dimensions.split(",")):
        total *= int(size)
    return total


def parse(text: str) -> tuple[Program, str]:
    """The instructions of each computation, by its name, and the name of the entry."""
    program, entry, current = Program(), "", ""
    for line in text.splitlines():
        if opens := OPENS.match(line):
            current = opens[2]
            program[current] = []
            entry = current if opens[1] else entry
        elif current and (found := LINE.match(line)):
            program[current].append(_instruction(found[1], found[2]))
    return program, entry


def _instruction(name: str, text: str) -> Instruction:
    # The shape ends at the first space outside of brackets.
    depths = itertools.accumulate((letter in "({[") - (letter in ")}]") for letter in text)
    spaces = (i for i, depth in enumerate(depths) if text[i] == " " and depth == 0)
    end = next(spaces, len(text))
    shape, rest = text[:end], text[end + 1 :]
    operation, _, after = rest.partition("(")
    return Instruction(name, shape, operation, re.findall(r"%([\w.-]+)", after.split(")")[0]), rest)


def moved(program: Program, name: str) -> int:
    """Bytes from and to HBM of one computation, without those that it calls in a loop."""
    results: dict[str, Instruction] = {}
    total = 0
    for one in program[name]:
        results[one.name] = one
        if one.operation in ("slice-start", "copy-start"):
            total += min(one.sizes(everywhere=True)[:2])
        elif one.operation not in FREE:
            total += sum(one.sizes()) + sum(_read(program, one, results))
    return total


def _read(program: Program, one: Instruction, results: Mapping[str, Instruction]) -> Iterator[int]:
    called = re.search(r"calls=%?([\w.-]+)", one.text)
    sliced = _sliced(program[called[1]]) if called else {}
    for number, operand in enumerate(one.operands):
        sizes = results[operand].sizes() if operand in results else []
        # A tuple is read by the instructions that take its parts.
        if len(sizes) == 1:
            yield min(sizes[0], sliced.get(number, sizes[0]))


def _sliced(fusion: Sequence[Instruction]) -> dict[int, int]:
    """Bytes that a fusion reads of the operands which it only slices, by their number."""
    numbers = {
        one.name: int(one.text.partition("(")[2].partition(")")[0])
        for one in fusion
        if one.operation == "parameter"
    }
    read, whole = collections.Counter[int](), set[int]()
    for one in fusion:
        for place, operand in enumerate(one.operands):
            if operand not in numbers:
                continue
            if one.operation == "bitcast":
                numbers[one.name] = numbers[operand]
            elif one.operation in ("dynamic-slice", "slice") and place == 0:
                read[numbers[operand]] += sum(one.sizes(everywhere=True))
            else:
                whole.add(numbers[operand])
    return {number: size for number, size in read.items() if number not in whole}


def step_bytes(text: str, steps: int) -> float:
    """Bytes of one step of a program with one long loop, of which `steps` steps run in a call.

    What is outside of the loop is divided by their number.
    """
    program, entry = parse(text)
    body = max((name for name in program if name != entry), key=lambda name: len(program[name]))
    return moved(program, body) + moved(program, entry) / steps
