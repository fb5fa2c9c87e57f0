"""Degenerate replies by rule: empty text, loops, noise, or strings that are not words.

A heuristic for the text of a broken model, not a judge of sense: a fluent, vague reply is not
degenerate, and neither is one that the token limit cut. It finds loops and noise well, and mostly
misses nonsense made of real words (docs/judges.md has the figures). A coherence judge is better,
and decides instead if it has scored the reply.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from itertools import pairwise

from jaxsteer.judges import reasoning_blocks
from jaxsteer.judges.verdicts import Finding, JudgeRecord

# A word is a run of letters or of digits; in scripts without spaces, each character is a word.
_UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+|\d+")
# Lines drawn in tables and under headings.
_RULED = re.compile(r"^[\s|+=:*_#~-]+$", re.MULTILINE)
# In no English sentence does a word of the second set follow a word of the first.
_DANGLING = frozenset({"the", "a", "an"})
_NEVER_AFTER = frozenset(
    {"the", "a", "an", "of", "to", "is", "and", "with", "it", "at", "by", "or"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits beyond which a reply is degenerate, chosen on the `tune` part of our examples.

    Attributes:
      min_words: the words of shorter replies are tested for repetition only.
      loop: largest tolerated share of words inside runs that repeat with a fixed period.
      tail: fewest words in a loop at the end of the reply that make it degenerate by themselves.
      commonest: largest tolerated share of the commonest word.
      letters: smallest tolerated share of letters, digits and marks among visible characters.
      undecodable: largest tolerated share of replacement characters before the last character.
      non_words: largest tolerated share of Latin words over 30 letters or without a vowel.
      longest: letters of the longest word that is tolerated.
      switches: largest tolerated share of neighbouring words in different scripts, of 4 or more.
      dangling: largest tolerated share of word pairs such as "the of".
    """

    min_words: int = 12
    loop: float = 0.5
    tail: int = 12
    commonest: float = 0.4
    letters: float = 0.5
    undecodable: float = 0.02
    non_words: float = 0.4
    longest: int = 45
    switches: float = 0.6
    dangling: float = 0.08


LIMITS = Limits()
RECORD = JudgeRecord(
    name="degenerate",
    version="2",
    settings={"limits": dataclasses.asdict(LIMITS), "thinking": reasoning_blocks.VERSION},
)
JUDGE = RECORD.label


def reasons(text: str) -> list[str]:
    """Why a reply is degenerate, or an empty list. Finished thinking blocks are not read."""
    text = reasoning_blocks.visible(text)
    # A reply cut within a character of several bytes ends in a replacement character: no noise.
    text = text.rstrip().rstrip("\ufffd")
    visible = [c for c in _RULED.sub("", text).replace("|", " ") if not c.isspace()]
    if not any(c.isalnum() for c in visible):
        return ["no letters"]
    found = []
    # A mark belongs to its letter: half the characters of Thai and Hindi words are marks.
    spoken = sum(unicodedata.category(c)[0] in "LNM" for c in visible)
    if visible.count("\ufffd") > LIMITS.undecodable * len(visible):
        found.append("undecodable bytes")
    if len(visible) >= 12 and spoken / len(visible) < LIMITS.letters:
        found.append("mostly symbols")
    words = _WORD.findall(text.lower())
    if any(len(word) >= 40 and len(set(word)) <= 3 for word in words):
        found.append("one character run")
    elif 2 * sum(len(w) for w in words if len(w) > LIMITS.longest) > len("".join(words)):
        found.append("no spaces")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if loops(words) or (len(lines) >= 6 and len(set(lines[-5:])) == 1):
        found.append("loop")
    if len(words) >= LIMITS.min_words:
        if Counter(words).most_common(1)[0][1] / len(words) > LIMITS.commonest:
            found.append("one word")
        if sum(_odd(word) for word in words) / len(words) > LIMITS.non_words:
            found.append("non-words")
        scripts = [_script(word) for word in words]
        if len(set(scripts)) >= 4 and _changes(scripts) > LIMITS.switches:
            found.append("mixed scripts")
        pairs = list(pairwise(words))
        torn = sum(a in _DANGLING and b in _NEVER_AFTER for a, b in pairs)
        if torn >= 3 and torn / len(pairs) > LIMITS.dangling:
            found.append("torn sentences")
    return found


def loops(words: list[str]) -> bool:
    """Whether words repeat with a fixed period: most of the text, or a long run at its end.

    A refrain returns after other lines, so it has no fixed period. Numbered copies of one line are
    found by a second search without the numbers, if more than half of the words are left.
    """
    plain = [word for word in words if not word.isdigit()]
    for seen in (words, plain) if 2 * len(plain) > len(words) else (words,):
        runs = periodic_runs(seen)
        covered = sum(end - start for start, end in runs)
        if len(seen) >= LIMITS.min_words and covered > LIMITS.loop * len(seen):
            return True
        if runs and runs[-1][1] == len(seen):
            start, end = runs[-1]
            if end - start >= LIMITS.tail or (start == 0 and end >= 5):
                return True
    return False


def periodic_runs(words: list[str], longest: int = 16) -> list[tuple[int, int]]:
    """Disjoint [start, end) ranges in which one phrase follows itself again and again.

    A run has three repetitions, or four if the phrase has at most four words, because songs and
    speeches say a short phrase three times.

    >>> periodic_runs("so it is bad bad bad bad".split())
    [(3, 7)]
    >>> periodic_runs("a b a b a b a b a".split())
    [(0, 9)]
    """
    runs, start = [], 0
    while start < len(words):
        best = start
        for period in range(1, longest + 1):
            end = start + period
            while end < len(words) and words[end] == words[end - period]:
                end += 1
            if end - start >= (4 if period <= 4 else 3) * period:
                best = max(best, end)
        if best > start:
            runs.append((start, best))
        start = max(best, start + 1)
    return runs


def _odd(word: str) -> bool:
    if _script(word) != "LATIN" or len(word) < 4:
        return False
    plain = unicodedata.normalize("NFD", word)
    return len(word) > 30 or not any(c in "aeiouy" for c in plain)


def _script(word: str) -> str:
    name = unicodedata.name(word[0], "").split(" ")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "IDEOGRAPHIC") else name


def _changes(scripts: list[str]) -> float:
    return sum(a != b for a, b in pairwise(scripts)) / max(len(scripts) - 1, 1)


def is_degenerate(text: str) -> bool:
    """Whether any reason holds."""
    return bool(reasons(text))


def finding(text: str) -> Finding:
    """The verdict on a reply: `degenerate` with the reasons, or `fluent`."""
    found = reasons(text)
    verdict = "degenerate" if found else "fluent"
    return Finding(score=float(bool(found)), verdict=verdict, reason="; ".join(found))
