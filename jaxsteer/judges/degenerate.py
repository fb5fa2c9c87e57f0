"""Degenerate replies by rule: empty, looping, or made of non-words.

A heuristic for text that a broken model writes, not a judge of sense: a fluent, vague reply is not
degenerate.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter

JUDGE = "degenerate-1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """When a reply is degenerate.

    Attributes:
      min_words: shorter replies are not tested for repetition.
      loop: largest tolerated share of words inside repeated 4-grams.
      commonest: largest tolerated share of the commonest word.
      letters: smallest tolerated share of letters and digits among visible characters.
      long_words: largest tolerated share of words over 30 characters or with no vowel.
    """

    min_words: int = 12
    loop: float = 0.6
    commonest: float = 0.4
    letters: float = 0.5
    long_words: float = 0.4


def reasons(text: str, limits: Limits = Limits()) -> list[str]:
    """Why a reply is degenerate; empty when it is not."""
    visible = [c for c in text if not c.isspace()]
    if not any(c.isalnum() for c in visible):
        return ["no letters"]
    found = []
    words = text.lower().split()
    if "\ufffd" in text:
        found.append("undecodable bytes")
    if len(visible) >= 12 and sum(c.isalnum() for c in visible) / len(visible) < limits.letters:
        found.append("mostly symbols")
    # One space-free run of 40 characters of one or two kinds: "aaaaaaaa...", "hahahaha...".
    if any(len(word) >= 40 and len(set(word)) <= 3 for word in words):
        found.append("one character run")
    if len(words) >= limits.min_words:
        if looped_share(words) > limits.loop:
            found.append("loop")
        if Counter(words).most_common(1)[0][1] / len(words) > limits.commonest:
            found.append("one word")
        if sum(_odd(word) for word in words) / len(words) > limits.long_words:
            found.append("non-words")
    return found


def looped_share(words: list[str], n: int = 4) -> float:
    """Share of words covered by n-grams that occur before: 'a b c d a b c d' gives 0.5."""
    seen: set[tuple[str, ...]] = set()
    covered = [False] * len(words)
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered[i : i + n] = [True] * n
        seen.add(gram)
    return sum(covered) / max(len(words), 1)


def _odd(word: str) -> bool:
    latin = [c for c in word if c.isalpha() and "LATIN" in unicodedata.name(c, "")]
    if len(latin) < 4:
        return False
    plain = unicodedata.normalize("NFD", word)
    return len(word) > 30 or not any(c in "aeiouy" for c in plain)


def is_degenerate(text: str) -> bool:
    """Whether any reason holds."""
    return bool(reasons(text))
