"""What a run is asked and what it answers, and how prompts become arrays: padded or packed.

Sequence packing puts short prompts side by side in one packed sequence, an entry of a prefill
batch. Prompts of 11 to 87 tokens, each padded to its own width, would be one third padding; in
packed sequences of 96 tokens padding is less than a tenth. A token attends to its own prompt only
(`layers.causal`). How prompts are packed follows from all prompts of a run, never from which
of them are still to be run, so a resumed run packs them in the same way.

Prompts of 3 and 4 tokens in a packed sequence of 8:

    tokens        a  b  c  p  q  r  s  .
    segment_ids   1  1  1  2  2  2  2  0
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int

from jaxsteer.errors import UserError
from jaxsteer.model.decoder import Realised

# Padded lengths of prompts: 192, 256, 384, 512 and so on, up to a million.
BUCKETS = (32, 64, 96, 128, *(n << power for power in range(6, 19) for n in (3, 4)))
# Most prompts in a packed sequence: compiled programs measure the change in this many.
MAX_SEGMENTS = 8
# Most tokens of a packed sequence of several prompts: attention in wider ones costs more than the
# padding that they save.
WIDTH = 128
# Packed sequences of a batch on one device, which fewer keep as busy.
BATCH_ALONE = 8

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One row to run.

    Attributes:
      tokens: prompt ids.
      condition: index into the stacked interventions.
      row_id: stable 32-bit number of the row, folded into the sampling seed.
      shared: how many leading tokens are a prefix, run once for all requests of this condition that
        start with it: at most all but one; 0 runs the prompt whole.
      plain: this prefix is never steered, whatever the condition.
    """

    tokens: Sequence[int]
    condition: int = 0
    row_id: int = 0
    shared: int = 0
    plain: bool = False

    @property
    def prefix(self) -> tuple[int, ...]:
        """The leading tokens that are run once."""
        return tuple(self.tokens[: self.shared])

    @property
    def own(self) -> Sequence[int]:
        """The tokens after the prefix."""
        return self.tokens[self.shared :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """One row's result, on the host.

    Attributes:
      index: position of its request in the list given to `engine.run`.
      n_prompt: number of prompt tokens.
      tokens: generated ids, the ending token left out.
      text: the decoded reply.
      stopped: whether an end-of-sequence token ended it.
      prompt: realised change over the prompt per tap, leaves [layer, ...].
      response: the same over the generated tokens.
      logits: what each token, and the ending one, was chosen from; None unless asked for.
    """

    index: int
    n_prompt: int
    tokens: np.ndarray
    text: str
    stopped: bool
    prompt: dict[str, Realised]
    response: dict[str, Realised]
    logits: Float[np.ndarray, "chosen vocab"] | None = None


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by their key: 1 to 5 by whether they are even give {False: [1, 3, 5], True: [2, 4]}."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def parts(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Items in parts: [1, 2, 3] in parts of 2 is [1, 2] and [3]."""
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def fitted(batch: int, rows: int, multiple: int = 1) -> int:
    """Size of a batch for some rows: `batch`, or a half, a quarter... that still holds them all.

    An empty place costs as much as a full one; halves, so that few sizes are ever compiled. The
    number and every half are rounded up to the multiple.

    >>> fitted(64, 100), fitted(64, 32), fitted(64, 12), fitted(64, 12, multiple=32)
    (64, 32, 16, 32)
    >>> fitted(30, 100, multiple=4)
    32
    >>> fitted(10001, 6)
    10
    """
    batch = -(-batch // multiple) * multiple
    while (half := -(-batch // (2 * multiple)) * multiple) >= rows and half < batch:
        batch = half
    return batch


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, of each at most all but the last.

    [1, 2, 3, 4] and [1, 2, 5] share 2; [1, 2] and [1, 2] share none, since equal prompts are read
    once anyway.
    """
    distinct = set(map(tuple, prompts))
    if len(distinct) < 2:
        return 0
    # What the first and the last in order share, those between them share too.
    first, last = min(distinct), max(distinct)
    limit = min(map(len, distinct)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))


def shared_lengths(prompts: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> list[int]:
    """`shared_length` of each prompt's group: prompts of one system prompt, say."""
    members = grouped(range(len(prompts)), groups.__getitem__)
    lengths = {group: shared_length([prompts[i] for i in some]) for group, some in members.items()}
    return [lengths[group] for group in groups]


def bucket(length: int, limit: int) -> int:
    """The padded length of a prompt: the smallest bucket that holds it.

    A row's own length decides, never its neighbours', so padding is a property of the row.

    Raises:
      UserError: longer than `limit` tokens.
    """
    for size in BUCKETS:
        if length <= size and length <= limit:
            return size
    most = max(0, limit)
    # A limit is the model's context, less what the reply may take.
    mend = "shorten it" if most else "max_new_tokens leaves no room for the prompt; lower it"
    raise UserError(f"a prompt has {length} tokens and at most {most} fit; {mend}")


def together(most: int, length: int, usual: int) -> int:
    """How many sequences are run together: `most`, or fewer of more than the usual length.

    >>> together(8, 96, 128), together(8, 384, 128), together(8, 8192, 128)
    (8, 2, 1)
    """
    return min(most, max(1, most * usual // length))


def check_lengths(lengths: Iterable[int], limit: int) -> None:
    """Refuse what is too long before anything runs.

    Raises:
      UserError: as `bucket`.
    """
    for length in lengths:
        bucket(length, limit)


def left_pad(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-pad rows to `width`: int32 ids and the mask of real tokens, both [row, token].

    For width 4, [[7, 8], [5, 6, 9]] becomes
        ids  [[0, 0, 7, 8], [0, 5, 6, 9]]
        real [[F, F, T, T], [F, T, T, T]]
    The last column is every row's last prompt token. The filler id means nothing: only the mask
    says what is padding.
    """
    ids = np.zeros((len(rows), width), np.int32)
    real = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :] = row
            real[i, -len(row) :] = True
    return ids, real


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedPrompts:
    """Packed sequences, and where the prompt of each row is.

    Attributes:
      tokens: ids, by packed sequence.
      segment_ids: the prompt of each token, from 1; 0 is  By packed sequence.
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


def pack(requests: Sequence[Request], limit: int) -> PackedPrompts:
    """Pack the requests' own tokens, without their prefixes.

    Packed together are prompts that run under the same conditions and start with the same prefix.
    So a packed sequence has one prefix per condition, and no prompt is run where it was not asked
    for.

    Args:
      requests: all rows of a run.
      limit: most tokens of a prompt.

    Raises:
      UserError: a prompt that is too long.
    """
    asked: dict[tuple[int, ...], set[int]] = {}
    for request in requests:
        asked.setdefault(tuple(request.tokens), set()).add(request.condition)
    return pack_prompts(
        [request.own for request in requests],
        [(request.prefix, tuple(sorted(asked[tuple(request.tokens)]))) for request in requests],
        limit,
    )


def pack_prompts(
    prompts: Sequence[Sequence[int]], groups: Sequence[Hashable], limit: int
) -> PackedPrompts:
    """Pack prompts, the longest first, each into the first packed sequence with room for it.

    Rows with the same prompt and group share one place.

    Args:
      prompts: token ids, by row.
      groups: by row; only prompts of one group are packed together.
      limit: most tokens of a prompt.

    Returns:
      Packed sequences of at most `MAX_SEGMENTS` prompts. Their width is a bucket, at most `WIDTH`,
      in which whole batches have the fewest tokens; a longer prompt has a packed sequence of its
      own bucket.

    Raises:
      UserError: a prompt that is too long.
    """
    longest = max((bucket(len(prompt), limit) for prompt in prompts), default=0)
    rows = grouped(range(len(prompts)), lambda row: (groups[row], tuple(prompts[row])))
    widths = [w for w in BUCKETS if min(WIDTH, longest) <= w <= WIDTH]
    return min((_packed(len(prompts), rows, w, limit) for w in widths), key=_size)


def _size(packed: PackedPrompts) -> int:
    """Tokens of the packed sequences, in whole batches of each width."""
    total = 0
    for width, count in Counter(map(len, packed.tokens)).items():
        batch = fitted(BATCH_ALONE, count)
        total += width * batch * -(-count // batch)
    return total


def _packed(
    count: int,
    rows: Mapping[tuple[Hashable, tuple[int, ...]], Sequence[int]],
    least: int,
    limit: int,
) -> PackedPrompts:
    """`pack_prompts` into sequences of a least width; rows by group and prompt."""
    tokens, segment_ids = list[np.ndarray](), list[np.ndarray]()
    sequence, segment = [0] * count, [0] * count
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
            width = max(least, bucket(len(prompt), limit))
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
    tokens, real = left_pad([list(prompt) for prompt in index], width)
    return PackedPrompts(
        tokens=list(tokens),
        segment_ids=list(real.astype(np.int32)),
        sequence=sequence,
        segment=[1] * len(sequence),
    )
