"""The thinking of a reasoning model, separated from its answer.

The rule, the same for every judge:
  1. If `<|channel|>final<|message|>` (gpt-oss) occurs, remove everything up to the last one.
  2. Remove each closed block `<think>...</think>` (also thinking, thought, reasoning; any case).
  3. A closing tag without an opening one ends a block that the chat template opened: remove
     everything up to the last such tag.
  4. An opening tag without a closing one was cut by the token limit. Remove the rest of a judge's
     reply, because it holds no answer; keep a reply that is judged, because it holds nothing else.
"""

from __future__ import annotations

import re

VERSION = "1"

_FINAL = "<|channel|>final<|message|>"
_TAG = r"(?:think|thinking|thought|reasoning)"
_BLOCK = re.compile(rf"<({_TAG})>.*?</\1>", re.DOTALL | re.IGNORECASE)
_CLOSE = re.compile(rf"</{_TAG}>", re.IGNORECASE)
_OPEN = re.compile(rf"<{_TAG}>", re.IGNORECASE)


def visible(text: str) -> str:
    """A reply to be judged, without its finished thinking.

    >>> visible("<think>He asks for tea.</think> Green or black?")
    'Green or black?'
    >>> visible("<think>He asks for")
    '<think>He asks for'
    """
    if "<" not in text:
        return text
    text = text.rpartition(_FINAL)[2]
    rest = _BLOCK.sub("", text)
    closed = list(_CLOSE.finditer(rest))
    rest = rest[closed[-1].end() :] if closed else rest
    return text if rest == text else rest.lstrip()


def answer(text: str) -> str:
    """A judge's reply without its thinking, finished or not.

    >>> answer("I weigh this.</think>coherence: 90")
    'coherence: 90'
    >>> answer("<think>I weigh this and")
    ''
    """
    rest = visible(text)
    opened = _OPEN.search(rest)
    return rest[: opened.start()] if opened else rest
