"""Sequence packing: short prompts side by side in a lane, one row of a prefill batch.

Prompts of 11 to 87 tokens, each padded to a width of its own, would be one third padding; in lanes
of 96 they are less than a tenth. A token sees its own prompt only (`masks.causal_mask`). What a
lane holds follows from all prompts of a run and never from which of them are still to do, so that a
run which is resumed goes on with the same lanes.

In a lane of 8, prompts of 3 and 4 tokens:

    tokens   a  b  c  p  q  r  s  .
    owner    1  1  1  2  2  2  2  0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int

from jaxsteer.generation import padding

# Most prompts in a lane: programs measure what is changed in as many, however many there are.
MEMBERS = 8
# Lanes are this wide, or as the longest prompt if that is shorter: attention in wider ones costs
# more than the padding that they save.
WIDTH = 128


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lanes:
    """Where the prompt of each row is.

    Attributes:
      tokens: ids, by lane.
      owner: which of the lane's prompts each token is of, from 1; 0 is padding. By lane.
      lane: by row.
      member: which of its lane's prompts a row's is, from 1.
    """

    tokens: list[Int[np.ndarray, " _token"]]
    owner: list[Int[np.ndarray, " _token"]]
    lane: list[int]
    member: list[int]

    def width(self, row: int) -> int:
        """Tokens of a row's lane."""
        return len(self.tokens[self.lane[row]])

    def filled(
        self, lanes: Sequence[int], width: int, batch: int
    ) -> tuple[Int[np.ndarray, "entry token"], Int[np.ndarray, "entry token"]]:
        """Tokens and owners of some lanes of that width, filled up to `batch` with padding."""
        empty = [np.zeros(width, np.int32)] * (batch - len(lanes))
        tokens = np.stack([self.tokens[n] for n in lanes] + empty)
        return tokens, np.stack([self.owner[n] for n in lanes] + empty)


def pack(prompts: Sequence[Sequence[int]], groups: Sequence[Hashable], limit: int) -> Lanes:
    """Put prompts into lanes: the longest first, each into the first lane with room for it.

    Rows with the same prompt and group are one prompt.

    Args:
      prompts: token ids, by row.
      groups: by row; only prompts of one group may be in one lane.
      limit: most tokens of a prompt.

    Returns:
      Lanes of at most `MEMBERS` prompts, as wide as the longest prompt's bucket but no wider than
      `WIDTH`, or as a longer prompt's own bucket.

    Raises:
      UserError: a prompt that is too long.
    """
    longest = max((padding.bucket(len(prompt), limit) for prompt in prompts), default=0)
    least = min(WIDTH, longest)
    rows: dict[tuple[Hashable, tuple[int, ...]], list[int]] = {}
    for row, (group, prompt) in enumerate(zip(groups, prompts, strict=True)):
        rows.setdefault((group, tuple(prompt)), []).append(row)
    tokens, owner = list[np.ndarray](), list[np.ndarray]()
    lane, member = [0] * len(prompts), [0] * len(prompts)
    # By group, the lanes that have room: number of the lane, tokens and prompts in it.
    opened: dict[Hashable, list[list[int]]] = {}
    # By tokens where lengths are equal, so that the order of the rows does not matter.
    for (group, prompt), its_rows in sorted(rows.items(), key=lambda x: (-len(x[0][1]), x[0][1])):
        some = opened.setdefault(group, [])
        found = next(
            (o for o in some if o[1] + len(prompt) <= len(tokens[o[0]]) and o[2] < MEMBERS), None
        )
        if found is None:
            width = max(least, padding.bucket(len(prompt), limit))
            found = [len(tokens), 0, 0]
            some.append(found)
            tokens.append(np.zeros(width, np.int32))
            owner.append(np.zeros(width, np.int32))
        number, start, before = found
        here = slice(start, start + len(prompt))
        tokens[number][here], owner[number][here] = prompt, before + 1
        found[1:] = start + len(prompt), before + 1
        for row in its_rows:
            lane[row], member[row] = number, before + 1
    return Lanes(tokens=tokens, owner=owner, lane=lane, member=member)


def alone(prompts: Sequence[Sequence[int]], width: int) -> Lanes:
    """Each prompt in a lane of that width of its own, left-padded; the same ones in the same."""
    numbers: dict[tuple[int, ...], int] = {}
    lane = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    tokens, real = padding.left_pad([list(prompt) for prompt in numbers], width)
    return Lanes(
        tokens=list(tokens), owner=list(real.astype(np.int32)), lane=lane, member=[1] * len(lane)
    )
