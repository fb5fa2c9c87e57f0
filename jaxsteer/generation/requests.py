"""What a run is asked and what it answers: one row each."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

from jaxsteer.model.decoder import Realised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One row to run.

    Attributes:
      tokens: prompt ids.
      condition: index into the stacked interventions.
      row_id: stable 32-bit number of the row, folded into the sampling seed.
      shared: how many leading tokens are a prefix, run once for all requests of this condition that
        start with it: at most all but one; 0 runs the prompt whole.
    """

    tokens: Sequence[int]
    condition: int = 0
    row_id: int = 0
    shared: int = 0

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


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, of each at most all but the last.

    [1, 2, 3, 4] and [1, 2, 5] share 2; [1, 2] and [1, 2] share 1.
    """
    if not prompts:
        return 0
    first, limit = prompts[0], min(map(len, prompts)) - 1
    for i in range(limit):
        if any(prompt[i] != first[i] for prompt in prompts):
            return i
    return max(limit, 0)


def shared_lengths(prompts: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> list[int]:
    """`shared_length` of each prompt's group: prompts of one system prompt, say."""
    members: dict[Hashable, list[Sequence[int]]] = {}
    for prompt, group in zip(prompts, groups, strict=True):
        members.setdefault(group, []).append(prompt)
    lengths = {group: shared_length(some) for group, some in members.items()}
    return [lengths[group] for group in groups]
