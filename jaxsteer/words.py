"""What a person reads: numbers as text, model text made harmless, and progress.

Each kind of number has one form and one rounding. The terminal, the reasons of claims, receipts,
charts and notebooks use these functions. A minus sign here is a true one (U+2212) and belongs to a
number; a hyphen within a name stays a hyphen.

Progress is a live bar on a terminal, and a line every ten seconds in a log.
"""

from __future__ import annotations

import decimal
import math
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from jaxsteer.errors import heed_stop

console = Console(stderr=True)


def rounded(value: float, digits: int) -> decimal.Decimal:
    """A number with so many decimals, halves away from zero, as browsers round.

    `round` and formats of Python round a half to the even neighbour instead, so that 25 of 40 would
    be 62 % in a table and 63 % in a chart.

    >>> [str(rounded(x, 0)) for x in (62.5, -62.5, 37.5)]
    ['63', '-63', '38']
    """
    step = decimal.Decimal(1).scaleb(-digits)
    return decimal.Decimal(float(value)).quantize(step, decimal.ROUND_HALF_UP)


def counted(n: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "seed"), counted(1200, "category")
    ('1 seed', '1,200 categories')
    """
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count(n)} {noun if n == 1 else several}"


def percent(share: float, digits: int = 0) -> str:
    """A share from 0 to 1 as a percentage.

    Near 0 and 1 it has one decimal, so that a rare outcome does not read as one that never occurs.

    >>> [percent(x) for x in (0, 0.0004, 0.003, 0.42, 25 / 40, 0.9996, 1)]
    ['0 %', '< 0.1 %', '0.3 %', '42 %', '63 %', '> 99.9 %', '100 %']
    """
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    near = 0 < share < 0.01 or 0.99 < share < 1
    decimals = max(digits, 1) if near else digits
    return f"{rounded(100 * share, decimals)} %"


def span(low: float, high: float) -> str:
    """An interval of shares.

    >>> span(0.263, 0.554)
    '26 to 55 %'
    """
    return f"{percent(low).removesuffix(' %')} to {percent(high)}"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign.

    >>> signed(-0.279, 3), signed(0.5)
    ('−0.279', '+0.50')
    """
    return f"{rounded(value, digits) + 0:+}".replace("-", "\u2212")


def points(difference: float, digits: int = 0) -> str:
    """A difference of shares in percentage points, without the unit.

    >>> points(-0.25), points(0.041), points(-0.001)
    ('−25', '+4', '+0')
    """
    return signed(100 * difference, digits)


def p_value(p: float | None) -> str:
    """A p-value for a table; `–` where there is none.

    >>> p_value(0.0312), p_value(0.125), p_value(2e-7), p_value(None)
    ('0.031', '0.13', '< 0.0001', '–')
    """
    if p is None:
        return "–"
    if p < 0.0001:
        return "< 0.0001"
    # Two digits of those that count.
    return f"{float(rounded(p, 1 - math.floor(math.log10(p)))):.2g}"


def p_equals(p: float) -> str:
    """A p-value within a sentence.

    >>> p_equals(0.0312), p_equals(2e-7)
    ('p = 0.031', 'p < 0.0001')
    """
    return f"p {'' if p < 0.0001 else '= '}{p_value(p)}"


def count(number: float) -> str:
    """A count; one of more than nine digits by its power of ten.

    >>> count(12870), count(5.8e75)
    ('12,870', 'about 10^75')
    """
    return f"{number:,.0f}" if number < 1e9 else f"about 10^{math.floor(math.log10(number))}"


def extent(counts: Iterable[int], noun: str = "") -> str:
    """The smallest and the largest of some counts, or the one that all are.

    >>> extent([24, 18, 20]), extent([1, 1], "seed"), extent([1, 3], "seed")
    ('18 to 24', '1 seed', '1 to 3 seeds')
    """
    known = sorted(counts)
    least = "" if known[0] == known[-1] else f"{count(known[0])} to "
    return least + (counted(known[-1], noun) if noun else count(known[-1]))


def layer_list(indices: Sequence[int]) -> str:
    """Layers in ascending order, runs of them as windows.

    >>> layer_list([19]), layer_list(range(18, 30)), layer_list([22, 24, 25])
    ('19', '18..29', '22, 24..25')
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def plain(text: str, spelled: str = "\\x{:02x}") -> str:
    """Model text that drives no terminal and hides nothing, and is otherwise as it is.

    Control, format, private and unassigned characters are spelled out: among them are colours,
    cursor moves, a return to the line's start, and marks that turn the direction of text. Shown as
    they are: line breaks, tabs, and a single joiner after a letter, mark or picture outside ASCII,
    where Persian, Indic scripts and emoji need it; elsewhere a joiner could only hide something.

    Args:
      text: hostile text.
      spelled: how a character is spelled, a format of its code point.

    >>> plain("a\\tb\\x1b[2J"), plain("\u0645\u06cc\u200c\u062e"), plain("a\u200db")
    ('a\\tb\\\\x1b[2J', '\u0645\u06cc\u200c\u062e', 'a\\\\x200db')
    """
    text = text.replace("\r\n", "\n")
    shown = []
    for before, c in zip("\n" + text, text, strict=False):
        visible = ord(before) > 127 and unicodedata.category(before)[0] in "LMS"
        joins = c in "\u200c\u200d" and visible
        harmless = c in "\n\t" or joins or unicodedata.category(c)[0] != "C"
        shown.append(c if harmless else spelled.format(ord(c)))
    return "".join(shown)


_said = [time.monotonic()]


def say(line: str) -> None:
    """Say a line on stderr, where progress goes."""
    print(line, file=sys.stderr, flush=True)


def still(line: str) -> None:
    """Say on stderr how far long work is, at most every ten seconds."""
    if time.monotonic() - _said[0] > 10:
        _said[0] = time.monotonic()
        say(line)


class Progress:
    """Counts rows of one phase: `with Progress("study", 100) as p: p.advance(4, tokens=160)`.

    `quiet` counts and says nothing, in a process whose rows another one reports.
    """

    def __init__(
        self, title: str, total: int, done: int = 0, unit: str = "rows", *, quiet: bool = False
    ):
        self.title, self.total, self.done, self.unit, self.quiet = title, total, done, unit, quiet
        self.fresh, self.tokens = 0, 0
        self.started = self.said = time.monotonic()
        self.live = sys.stderr.isatty() and not quiet
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit + " {task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> Progress:
        if self.live:
            self.bar.start()
            self.task = self.bar.add_task(
                self.title, total=self.total, completed=self.done, speed="(starting)"
            )
        elif not self.quiet:
            say(f"{self.title}: {self.done}/{self.total} {self.unit}")
        return self

    def advance(self, count: int, tokens: int = 0) -> None:
        """Report `count` more finished items, and the tokens they generated.

        Raises:
          Stopped: a stop signal was heard, so the items must be safe before this call.
        """
        self.done += count
        self.fresh += count
        self.tokens += tokens
        now = time.monotonic()
        elapsed = max(now - self.started, 1e-6)
        speed = f"{self.tokens / elapsed:.0f} tokens/s" if self.tokens else ""
        if self.live:
            self.bar.update(self.task, completed=self.done, speed=speed)
        elif not self.quiet and (now - self.said > 10 or self.done == self.total):
            self.said = now
            left = ""
            if self.fresh:
                left = f"{(self.total - self.done) * elapsed / self.fresh:.0f} s left"
            parts = [f"{self.done}/{self.total} {self.unit}", speed, left]
            say(f"{self.title}: {', '.join(part for part in parts if part)}")
        heed_stop()

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.bar.stop()
