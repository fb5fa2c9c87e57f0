"""The terminal: model text with its control characters made visible, and progress.

Progress is a live bar on a terminal, and a line every ten seconds in a log.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

console = Console(stderr=True)


def plain(text: str) -> str:
    """Model text that cannot drive a terminal: control and format characters become visible."""
    return "".join(
        c if c == "\n" or unicodedata.category(c)[0] != "C" else f"\\x{ord(c):02x}" for c in text
    )


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
                self.title, total=self.total, completed=self.done, speed="(compiling)"
            )
        elif not self.quiet:
            print(
                f"{self.title}: {self.done}/{self.total} {self.unit}", file=sys.stderr, flush=True
            )
        return self

    def advance(self, count: int, tokens: int = 0) -> None:
        """Report `count` more finished items, and the tokens they generated."""
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
            print(
                f"{self.title}: {', '.join(part for part in parts if part)}",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.bar.stop()
