"""Virtual time: what happens next, in an order that depends on nothing but the calls made."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """A queue of calls by time; calls of the same time run in the order in which they were made.

    Many calls share a moment (thousands of generators that fetch the same weights), so the heap holds moments, not
    calls.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._stopped = False
        self._moments: list[float] = []
        """Heap of the keys of `_calls`."""
        self._calls: dict[float, list[tuple[Callable[..., None], tuple[Any, ...]]]] = {}

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        if time < self.now:
            time = self.now
        calls = self._calls.get(time)
        if calls is None:
            self._calls[time] = [(call, arguments)]
            heappush(self._moments, time)
        else:
            calls.append((call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + seconds, call, *arguments)

    def stop(self) -> None:
        """Let `run` return after the present call."""
        self._stopped = True

    def run(self, until: float) -> None:
        """Advance until `stop`, until that time, or until nothing is left to happen. Not to be resumed."""
        moments = self._moments
        while moments:
            if moments[0] > until:
                self.now = until
                return
            self.now = moments[0]
            # What is called may add to this very moment; the list grows under the loop, and that is wanted.
            for call, arguments in self._calls[self.now]:
                call(*arguments)
                if self._stopped:
                    return
            del self._calls[heappop(moments)]
