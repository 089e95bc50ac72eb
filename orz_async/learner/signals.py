"""SIGINT and SIGTERM: the first lets the learner save and leave, the same one again ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from orz_async.errors import ExitCode, Interrupted


class Stop:
    """Whether a signal asked the learner to leave.

    Computation is never interrupted: `check` raises at the next step boundary. A wait is: inside `waiting` the signal
    raises at once, and what was waited for stays with the broker. Ctrl-C reaches a rank twice, as SIGINT from the
    terminal and as SIGTERM from torchrun; so a second signal is one of a kind that came before.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._interruptible = False
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return bool(self._seen)

    def check(self) -> None:
        if self._seen:
            names = " and ".join(signal.Signals(number).name for number in sorted(self._seen))
            raise Interrupted(f"{names}: the state is saved; start the same command again to go on")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        """Handle both signals inside the block. Main thread only."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            os._exit(ExitCode.INTERRUPTED)
        self._seen.add(number)
        if self._interruptible:
            self._interruptible = False  # once: a second kind of signal must not interrupt the saving
            self.check()
