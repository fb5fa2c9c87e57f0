"""Sequence packing: short prompts side by side in one packed sequence, an entry of a prefill batch.

Prompts of 11 to 87 tokens, each padded to its own width, would be one third padding; in packed
sequences of 96 tokens padding is less than a tenth. A token attends to its own prompt only
(`layers.causal_mask`). How prompts are packed follows from all prompts of a run, never from which
of them are still to be run, so a resumed run packs them in the same way.

Prompts of 3 and 4 tokens in a packed sequence of 8:

    tokens        a  b  c  p  q  r  s  .
    segment_ids   1  1  1  2  2  2  2  0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int

from jaxsteer.generation import padding

# Most prompts in a packed sequence: compiled programs measure the change in this many.
MAX_SEGMENTS = 8
# Tokens of a packed sequence, or fewer if the longest prompt is shorter: attention in wider ones
# costs more than the padding that they save.
WIDTH = 128


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedPrompts:
    """Packed sequences, and where the prompt of each row is.

    Attributes:
      tokens: ids, by packed sequence.
      segment_ids: the prompt of each token, from 1; 0 is padding. By packed sequence.
      sequence: index of the packed sequence, by row.
      segment: segment id of the prompt, by row.
    """

    tokens: list[Int[np.ndarray, " _token"]]
    segment_ids: list[Int[np.ndarray, " _token"]]
    sequence: list[int]
    segment: list[int]

    def width(self, row: int) -> int:
        """Tokens of a row's packed sequence."""
        return len(self.tokens[self.sequence[row]])

    def batch(
        self, rows: Sequence[int]
    ) -> tuple[Int[np.ndarray, "row token"], Int[np.ndarray, "row token"]]:
        """Tokens and segment ids of the packed sequences of some rows, all of one width."""
        listed = [self.sequence[row] for row in rows]
        tokens, segment_ids = self.tokens, self.segment_ids
        return np.stack([tokens[i] for i in listed]), np.stack([segment_ids[i] for i in listed])


def pack(prompts: Sequence[Sequence[int]], groups: Sequence[Hashable], limit: int) -> PackedPrompts:
    """Pack prompts, the longest first, each into the first packed sequence with room for it.

    Rows with the same prompt and group share one place.

    Args:
      prompts: token ids, by row.
      groups: by row; only prompts of one group are packed together.
      limit: most tokens of a prompt.

    Returns:
      Packed sequences of at most `MAX_SEGMENTS` prompts. Their width is the longest prompt's
      bucket, but at most `WIDTH`; a longer prompt has a packed sequence of its own bucket.

    Raises:
      UserError: a prompt that is too long.
    """
    longest = max((padding.bucket(len(prompt), limit) for prompt in prompts), default=0)
    least = min(WIDTH, longest)
    rows: dict[tuple[Hashable, tuple[int, ...]], list[int]] = {}
    for row, (group, prompt) in enumerate(zip(groups, prompts, strict=True)):
        rows.setdefault((group, tuple(prompt)), []).append(row)
    tokens, segment_ids = list[np.ndarray](), list[np.ndarray]()
    sequence, segment = [0] * len(prompts), [0] * len(prompts)
    # By group, the packed sequences that have room: index, tokens used, prompts held.
    opened: dict[Hashable, list[list[int]]] = {}
    # Prompts of equal length by their tokens, so that the order of the rows does not matter.
    for (group, prompt), its_rows in sorted(rows.items(), key=lambda x: (-len(x[0][1]), x[0][1])):
        some = opened.setdefault(group, [])
        found = next(
            (
                place
                for place in some
                if place[1] + len(prompt) <= len(tokens[place[0]]) and place[2] < MAX_SEGMENTS
            ),
            None,
        )
        if found is None:
            width = max(least, padding.bucket(len(prompt), limit))
            found = [len(tokens), 0, 0]
            some.append(found)
            tokens.append(np.zeros(width, np.int32))
            segment_ids.append(np.zeros(width, np.int32))
        index, start, held = found
        here = slice(start, start + len(prompt))
        tokens[index][here], segment_ids[index][here] = prompt, held + 1
        found[1:] = start + len(prompt), held + 1
        for row in its_rows:
            sequence[row], segment[row] = index, held + 1
    return PackedPrompts(tokens=tokens, segment_ids=segment_ids, sequence=sequence, segment=segment)


def one_each(prompts: Sequence[Sequence[int]], width: int) -> PackedPrompts:
    """Each prompt left-padded in a sequence of its own; equal prompts share one."""
    index: dict[tuple[int, ...], int] = {}
    sequence = [index.setdefault(tuple(prompt), len(index)) for prompt in prompts]
    tokens, real = padding.left_pad([list(prompt) for prompt in index], width)
    return PackedPrompts(
        tokens=list(tokens),
        segment_ids=list(real.astype(np.int32)),
        sequence=sequence,
        segment=[1] * len(sequence),
    )
