"""Progress of one piece of work, with the time left: a line that rewrites itself, or a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from orz_async.observe.words import duration

TERMINAL_S = 0.2
PLAIN_S = 10.0


class Progress:
    """Call it with what is being done and the fraction finished; it prints to stderr when enough time has passed."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._started = time.monotonic()
        self._next = 0.0
        self._width = 0

    def __call__(self, what: str, fraction: float) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        terminal = self._out.isatty()
        self._next = now + (TERMINAL_S if terminal else PLAIN_S)
        line = f"{what} ({fraction:.0%}{self._left(now - self._started, fraction)})"
        if terminal:
            print(f"\r{line:{self._width}}", end="", file=self._out, flush=True)
            self._width = len(line)
        else:
            print(line, file=self._out, flush=True)

    def _left(self, spent: float, fraction: float) -> str:
        return f", {duration(spent * (1 - fraction) / fraction)} left" if fraction > 0.02 else ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._width:
            print(file=self._out)
