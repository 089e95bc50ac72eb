"""Virtual time: what happens next, in an order that depends on nothing but the calls made."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """A queue of calls by time; calls of the same time run in the order in which they were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        self._serial += 1
        heappush(self._calls, (time if time > self.now else self.now, self._serial, call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + seconds, call, *arguments)

    def run(self, until: float, finished: Callable[[], bool]) -> None:
        """Advance until `finished`, until that time, or until nothing is left to happen."""
        calls = self._calls
        while calls and not finished():
            if calls[0][0] > until:
                self.now = until
                return
            self.now, _, call, arguments = heappop(calls)
            call(*arguments)
