"""Redacted openings of replies, for receipts that show samples."""

from __future__ import annotations

from jaxsteer.terminal import plain

WORDS = 8
LONGEST = 20
RULE = (
    f"Rows with the smallest hash of row table and row id. Of a reply to a benign prompt, and of a "
    f"refusal, the first {WORDS} words; of every other reply the same number of words with each "
    "character masked."
)


def excerpt(text: str, family: str, label: str) -> str:
    """The opening of a reply as `RULE` says; control characters are spelled out.

    >>> excerpt("I cannot help with that, because it is not safe.", "strongreject", "refusal")
    'I cannot help with that, because it is …'
    >>> excerpt("First, take a", "strongreject", "bypass")
    '██████ ████ █'
    """
    words = [word[:LONGEST] for word in plain(text).split()]
    shown = words[:WORDS]
    if family != "benign" and label != "refusal":
        shown = ["█" * len(word) for word in shown]
    return " ".join([*shown, "…"] if len(words) > WORDS else shown)
