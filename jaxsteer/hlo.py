"""What a compiled TPU program says about itself: cycles it expects, and what devices exchange.

Read from the text of the optimised program, in which every instruction that takes time carries the
compiler's estimate of its cycles. Exchanges carry none; their bytes are counted instead.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_WHILE = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_CALLS = re.compile(r"calls=%([\w.\-]+)")
_LIMIT = re.compile(r"^\s*%[\w.\-]+ = s32\[\]\S* constant\((\d+)\)")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+)\[([\d,]*)\]")
_EXCHANGE = re.compile(
    r" = (.+?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?\("
)
# An estimate that overflowed; the compiler writes the largest integer then.
_NONSENSE = 1 << 62


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """Results that devices exchange, of one kind and shape.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, collective-permute or all-to-all.
      shape: of the result on one device, as the program writes it, such as `bf16[32,4096]`.
      nbytes: its size on one device.
      times: how often.
    """

    kind: str
    shape: str
    nbytes: int
    times: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What running a piece of a program once costs on one device.

    Attributes:
      cycles: the compiler's estimates added up, exchanges not counted.
      exchanges: what devices exchange.
    """

    cycles: int
    exchanges: tuple[Exchange, ...]


def costs(text: str) -> tuple[Cost, Cost]:
    """The program without its open loop, and one turn of that loop.

    A loop with a known number of turns counts as that many. The open one, as a decode loop is,
    ends when its data say so; a program without one has a loop of no cost. The dearest counts.
    """
    parts, entry = _computations(text)
    found: list[str] = []
    once = _cost(parts, entry, found)
    turns = [_cost(parts, body, []) for body in found]
    none = Cost(cycles=0, exchanges=())
    return once, max(turns, key=lambda cost: cost.cycles, default=none)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    parts: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head[2]
            parts[current] = []
            entry = current if head[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current:
            parts[current].append(line)
    return parts, entry


def _cost(parts: Mapping[str, list[str]], name: str, loops: list[str]) -> Cost:
    """Of one computation; loops whose turns are not known are left out and put into `loops`."""
    cycles = 0
    exchanges: dict[tuple[str, str], Exchange] = {}

    def add(new: Exchange, times: int) -> None:
        key = (new.kind, new.shape)
        before = exchanges[key].times if key in exchanges else 0
        exchanges[key] = dataclasses.replace(new, times=before + new.times * times)

    for line in parts[name]:
        if (said := _CYCLES.search(line)) and int(said[1]) < _NONSENSE:
            cycles += int(said[1])
        for exchange in _exchanges(parts, line):
            add(exchange, 1)
        if loop := _WHILE.search(line):
            turns = _turns(parts[loop[1]])
            if turns is None:
                loops.append(loop[2])
                continue
            inner = _cost(parts, loop[2], [])
            cycles += inner.cycles * turns
            for exchange in inner.exchanges:
                add(exchange, turns)
    return Cost(cycles=cycles, exchanges=tuple(exchanges.values()))


def _turns(condition: list[str]) -> int | None:
    """Turns of a loop that counts from 0 to a constant, with nothing else to end it."""
    limits = [int(m[1]) for line in condition if (m := _LIMIT.match(line))]
    root = next((line for line in condition if "ROOT" in line), "")
    counts = " compare(" in root and "direction=LT" in root
    return limits[0] if counts and len(limits) == 1 else None


def _exchanges(parts: Mapping[str, list[str]], line: str) -> Iterator[Exchange]:
    """Those of one instruction, and of what it calls."""
    if called := _CALLS.search(line):
        for inner in parts.get(called[1], ()):
            yield from _exchanges(parts, inner)
    if not (found := _EXCHANGE.search(line)):
        return
    shapes = [(m[0], _nbytes(m[1], m[2])) for m in _SHAPE.finditer(found[1])]
    if found[3] and found[2] != "all-reduce":
        # An asynchronous start also names what it reads; the result is the larger, or as large.
        shapes = [max(shapes, key=lambda shape: shape[1])]
    for shape, nbytes in shapes:
        yield Exchange(kind=found[2], shape=shape, nbytes=nbytes, times=1)


def _nbytes(kind: str, sizes: str) -> int:
    count = 1
    for size in filter(None, sizes.split(",")):
        count *= int(size)
    bits = 8 if kind == "pred" or kind.startswith("f8") else int(re.sub(r"\D", "", kind))
    return count * max(bits // 8, 1)
